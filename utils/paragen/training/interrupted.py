"""What an interrupted pretrain left in its staging folder, and whether the next attempt at it goes on from there.

transformers writes a checkpoint's files in place, so a folder under its final name may be half-written. After each save
the engine records the hashes of the files in RECORD, and what the run is trained from; only a checkpoint whose files
have these hashes is whole. The ordinary engine goes on from the last one (checkpoint_record.py), the packed one from
the last that all runs of a pack have (packed/continuation.py), with the bits of an undisturbed run on the CPU. Its end
has them only where everything that decides them is as it was: see `circumstances`.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paragen.collection import run_files, run_identity
from paragen.collection.manifest import PACKAGES
from paragen.common import devices, files, paths, settings
from paragen.common.cli import say
from paragen.recipes import keys

RECORD = "whole_checkpoints.json"  # in a staging folder
UNLOGGED = "unlogged_loss_{}.json"  # in a checkpoint folder, per process: the loss since the last line of the log
PACKED_DROPOUT = 2  # which random numbers the packed engine's dropout has (see packed/dropout.py)
KEPT = (RECORD, run_files.LOG)  # beside the checkpoints
NEEDED = {paths.ADAPTER, "optimizer.pt", run_files.STATE}  # of a checkpoint, to go on from it


def circumstances(
    identity: dict[str, Any], config: dict[str, Any], wanted: list[str], engine: str = "stock"
) -> dict[str, Any]:
    """What an interrupted run and its continuation must have in common, as a JSON object.

    Args:
        identity: what the run is trained from (see run_identity.py).
        config: the rendered recipe with the batch as the devices share it.
        wanted: the devices, as devices.choose gives them.
        engine: which one trains, `stock` or `packed`.
    """
    present = {
        "engine": engine,
        "dropout_stream": PACKED_DROPOUT if engine == "packed" and config.get("lora_dropout") else None,
        "identity": {**identity, "data": run_identity.data_trained_on(identity)},
        "config": {key: value for key, value in config.items() if key not in keys.PATHS},
        "devices": [devices.kind_of(device) for device in wanted],
        "threads": devices.threads(len(wanted) or 1) if wanted[:1] in ([], ["cpu"]) else None,
        "DETERMINISTIC": settings.switch("DETERMINISTIC"),
        "versions": {name: version(name) for name in PACKAGES},
    }
    return json.loads(json.dumps(present))


def staging_of(folder: Path) -> Path | None:
    """The staging folder that an interrupted attempt at a run folder left, the one with the latest whole checkpoint.

    None where no attempt recorded a checkpoint. The files are not read yet: see `go_on`.
    """
    found = {max(recorded(left)): left for left in files.companions(folder, "staging-") if recorded(left)}
    return found[max(found)] if found else None


def go_on(staging: Path, present: dict[str, Any]) -> Path | None:
    """Prepare a staging folder for an attempt; returns the checkpoint folder to go on from, None to start at step 0.

    Verifies the hashes of all files of the checkpoints that stay. What an interrupted attempt left besides them is
    removed; its log stays up to the checkpoint. Prints from where the run goes on, or why it starts over.

    Args:
        staging: the attempt's staging folder, empty or as an interrupted attempt left it.
        present: the `circumstances` of this attempt.
    """
    whole = [step for step in whole_steps(staging, present) if not is_last(staging, step)]
    return keep_until(staging, present, whole)


def whole_steps(staging: Path, present: dict[str, Any]) -> list[int]:
    """The steps of an interrupted attempt's whole checkpoints, ascending. Verifies the hashes of all of their files.

    Where what decides the training has changed, the staging folder is emptied, and a line says so.
    """
    known = recorded(staging)
    changed = _changes(files.read_cache(staging / RECORD).get("circumstances"), present) if known else []
    if changed:
        start_over(staging, "; ".join(changed))
        return []
    return _whole_steps(staging, known)


def is_last(staging: Path, step: int) -> bool:
    """Whether nothing is left to train after a checkpoint: transformers would train one step more."""
    state = staging / run_files.checkpoint_folder(step) / run_files.STATE
    return step >= json.loads(state.read_bytes())["max_steps"]


def keep_until(
    staging: Path,
    present: dict[str, Any],
    steps: list[int],
    reason: str = "no checkpoint before the last step is as it was recorded",
) -> Path | None:
    """Prepare a staging folder for an attempt that goes on from the last of some whole checkpoints; returns its folder.

    Args:
        staging: the attempt's staging folder.
        present: the `circumstances` of this attempt.
        steps: those of the checkpoints that stay, the first ones, ascending; none: it starts over.
        reason: why it starts over.
    """
    if not steps:
        start_over(staging, reason)
        return None
    known = recorded(staging)
    record(staging, present, {step: known[step] for step in steps})
    _cut_log(staging / run_files.LOG, steps[-1])
    _keep(staging, {*map(run_files.checkpoint_folder, steps), *KEPT})
    say(f"resuming {run_files.checkpoint_folder(steps[-1])} of an interrupted attempt")
    return staging / run_files.checkpoint_folder(steps[-1])


def start_over(staging: Path, reason: str) -> None:
    """Empty a staging folder; where an interrupted attempt left checkpoints in it, print why they are not used."""
    if known := recorded(staging):
        say(f"an interrupted attempt left {run_files.checkpoint_folder(max(known))}, but it starts over: {reason}")
    _keep(staging, set())


def record(staging: Path, present: dict[str, Any], checkpoints: dict[int, dict[str, str]]) -> None:
    """Record the whole checkpoints of a staging folder: the hashes of their files, by step and name."""
    content = {"circumstances": present, "checkpoints": {str(step): hashes for step, hashes in checkpoints.items()}}
    files.write_json(staging / RECORD, content)


def add(staging: Path, present: dict[str, Any], step: int) -> None:
    """Add a checkpoint to the record of a staging folder, and drop those from it that save_total_limit has deleted."""
    known = {one: hashes for one, hashes in recorded(staging).items() if one != step}
    there = {one: hashes for one, hashes in known.items() if (staging / run_files.checkpoint_folder(one)).is_dir()}
    record(staging, present, {**there, step: hashes_of(staging / run_files.checkpoint_folder(step))})


def are_untouched(stamps: dict[str, Any]) -> bool:
    """Whether files are as they were before a run read them.

    Args:
        stamps: files.stamp_of each, by path (see `Snapshot`).
    """
    stamped = ((Path(path), tuple(stamp)) for path, stamp in stamps.items())
    return all(path.is_file() and files.stamp_of(path.stat()) == stamp for path, stamp in stamped)


def hashes_of(checkpoint: Path) -> dict[str, str]:
    """The hash of each file in a checkpoint folder, by name; empty where there is no such folder."""
    return {path.name: files.sha256_of(path) for path in sorted(checkpoint.glob("*")) if path.is_file()}


def recorded(staging: Path) -> dict[int, dict[str, str]]:
    """The recorded hashes of a staging folder's checkpoints, by step and name; empty where there is no sound record.

    The files themselves are not read.
    """
    found = files.read_cache(staging / RECORD).get("checkpoints")
    found = found if isinstance(found, dict) else {}
    return {int(step): hashes for step, hashes in sorted(found.items()) if step.isdecimal() and hashes}


def _whole_steps(staging: Path, known: dict[int, dict[str, str]]) -> list[int]:
    """The steps of the first checkpoints, as far as all of them are as they were recorded."""
    whole: list[int] = []
    for step in sorted(known):
        checkpoint = staging / run_files.checkpoint_folder(step)
        if not checkpoint.exists():  # save_total_limit deletes the oldest before the next one is recorded
            continue
        if hashes_of(checkpoint) != known[step] or not known[step].keys() >= NEEDED:
            break  # files may be missing that a process was removing when the rest was recorded
        whole.append(step)
    return whole


def _changes(before: Any, present: dict[str, Any]) -> list[str]:
    """The differences between two `circumstances`, a phrase each."""
    if isinstance(before, dict):
        before = {"engine": "stock", "dropout_stream": None, **before}  # older records lack these
    if before == present:
        return []
    if not isinstance(before, dict) or before.keys() != present.keys():
        return [f"{RECORD} is broken"]
    changed = run_identity.changes(before["identity"], present["identity"])
    if changed:
        return changed
    for section in ("config", "versions"):
        for key in sorted(before[section].keys() | present[section].keys()):
            old, new = before[section].get(key), present[section].get(key)
            changed += [f"{key} ({old} -> {new})"] if old != new else []
    for key in ("engine", "dropout_stream", "devices", "threads", "DETERMINISTIC"):
        changed += [f"{key} ({before[key]} -> {present[key]})"] if before[key] != present[key] else []
    return changed or ["what it is trained from"]


def _cut_log(log: Path, step: int) -> None:
    """Drop the lines of LLaMA-Factory's log after a step, the one without a loss that ends a log, and a broken one."""
    kept = []
    for line in log.read_bytes().splitlines(keepends=True) if log.is_file() else []:
        try:
            read = json.loads(line)
            if read["current_steps"] > step or "loss" not in read or not line.endswith(b"\n"):
                break
        except (ValueError, KeyError):
            break
        kept.append(line)
    files.write_atomically(log, *kept)


def _keep(staging: Path, names: set[str]) -> None:
    """Remove all of a staging folder but the named files and folders."""
    for path in staging.iterdir():
        if path.name not in names:
            files.remove_folder(path)
