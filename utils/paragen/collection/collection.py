"""What a finished run folder is: its files, its manifest, how it is made whole and how it is checked.

Imported by train.py, verify.py, index.py and the cleaners. A folder with a manifest.json is complete, one without is
not. A manifest carries the hash of its own content, so that an edited one is known.
"""

import json
import os
import platform
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import evaluation, run_identity
from paragen.common import devices, files, paths
from paragen.common.cli import UserError, say

FORMAT = 2
MANIFEST = paths.MANIFEST
KEYS = {
    "phase", "dataset", "run", "rank", "recipe", "data", "base_model", "tokenizer", "pretrain", "adapter_config_sha256",
    "checkpoints", "sha256",
}  # fmt: skip
CHECKPOINT_FILE = re.compile(r"checkpoint-\d+\.safetensors")
LOG, PICTURE = "trainer_log.jsonl", "training_loss.png"
OPTIONAL = (LOG, PICTURE, evaluation.FILE)
BESIDE = (paths.ADAPTER_CONFIG, *OPTIONAL)  # the files of a collection beside its manifest and checkpoints
PACKAGES = ("llamafactory", "transformers", "peft", "accelerate", "datasets", "torch", "safetensors")


def checkpoint_name(step: int) -> str:
    """The file name of a collection's checkpoint."""
    return f"checkpoint-{step}.safetensors"


def read_manifest(folder: Path) -> dict | None:
    """A run folder's manifest, or None where there is none. Raises UserError when it cannot be read."""
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{paths.relative(folder / MANIFEST)}: cannot be read: {error.strerror}") from None
    return parse_manifest(data, paths.relative(folder / MANIFEST), "train again with FORCE=1")


def parse_manifest(data: bytes, name: str, way_out: str) -> dict:
    """The manifest in the bytes of a manifest.json; raises UserError with `name` and `way_out` when it is not sound."""
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise UserError(f"{name}: broken ({error}); {way_out}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not manifest.keys() >= KEYS:
        raise UserError(f"{name}: not a manifest of format {FORMAT}; {way_out}")
    if sealed(manifest)["sha256"] != manifest["sha256"]:
        raise UserError(f"{name}: was edited after it was written; put it back, or {way_out}")
    return manifest


def sealed(manifest: dict) -> dict:
    """`manifest` with the hash of its other content as its last key, `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**content, "sha256": files.sha256_of_value(content)}


def run_folders(tops: list[Path]) -> list[Path]:
    """All folders below `tops` (or they themselves) that are collections, or by name or content should be, sorted.

    Nothing inside a collection or a stock checkpoint folder is looked at, nor what is made from collections (exports).
    """
    found, linked = set(), set()
    for top in tops:
        for name, subfolders, names in os.walk(top.absolute(), followlinks=True):
            folder, enter = Path(name), []
            if paths.EXPORT_RECORD in names:
                subfolders[:] = []
                continue
            if folder.name.endswith("_finetune") or (
                not folder.name.endswith("_pretrain") and is_collection(folder, names)
            ):
                found.add(folder)
            skipped = paths.DERIVED if folder == top.absolute() or folder == paths.SAVES else ()
            for sub in sorted(subfolders):
                if sub.startswith(".") and sub.endswith("_finetune.old"):
                    found.add(folder / sub[1 : -len(".old")])  # a crash between two renames; the next training mends it
                elif sub.endswith("_finetune") and (folder / sub / MANIFEST).is_file():
                    found.add(folder / sub)
                elif not (sub.startswith(".") or sub in skipped or paths.CHECKPOINT.fullmatch(sub)):
                    enter.append(sub)
            links = {sub: os.path.realpath(folder / sub) for sub in enter if (folder / sub).is_symlink()}
            subfolders[:] = [sub for sub in enter if sub not in links or links[sub] not in linked]
            linked.update(links.values())  # each is entered once, so that a link upwards ends
    return sorted(found)


def is_collection(folder: Path, names: list[str]) -> bool:
    """Whether a folder, whatever its name, is a collection going by its manifest or by the files (`names`) in it."""
    has_checkpoints = any(CHECKPOINT_FILE.fullmatch(name) for name in names)
    if MANIFEST not in names:
        return has_checkpoints
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (ValueError, OSError):
        return has_checkpoints
    return isinstance(manifest, dict) and (manifest.get("phase") == "finetune" or has_checkpoints)


class State(NamedTuple):
    """How a run folder stands to what is requested."""

    name: str  # missing, complete, stale, or unknown: a folder without a manifest
    changed: list[str]  # what makes it stale, a phrase each
    manifest: dict[str, Any] | None


def state_of(folder: Path, identity: dict) -> State:
    """How a run folder stands to the identity of the run that is requested."""
    if not folder.exists():
        return State("missing", [], None)
    manifest = read_manifest(folder)
    if manifest is None:
        return State("unknown", [], None)
    changed = run_identity.changes(manifest, identity)
    return State("stale" if changed else "complete", changed, manifest)


def manifest_of(
    folder: Path, phase: str, rank: int, identity: dict[str, Any], checkpoints: list[dict], facts: dict[str, Any]
) -> dict:
    """The manifest of a run.

    Args:
        folder: the run folder by its final name.
        identity: as `run_identity.identity_of` gives it; a section that is not known is null.
        checkpoints: step, loss, learning_rate, bytes and sha256 of each, in the order of steps.
        facts: seed, device, precision, trained_rows, attempt and package versions, each null where not known, and, of a
            collection, adapter_config_sha256.
    """
    category = folder.parent.parent.name
    recipe = identity["recipe"]
    return sealed({
        "format": FORMAT,
        "phase": phase,
        "category": category if category in paths.CATEGORIES else None,
        "dataset": recipe["dataset"] if recipe else folder.parent.name,
        "run": folder.name,
        "rank": rank,
        "recipe_sha256": files.sha256_of_value(recipe) if recipe else None,
        **identity,
        "adapter_config_sha256": None,
        **facts,
        "checkpoints": checkpoints,
    })  # fmt: skip


def attempt_facts(attempt: str, started: str, finished: str) -> dict[str, Any]:
    """The facts of a run made by this process: versions and attempt."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "attempt": {"id": attempt, "started": started, "finished": finished},
    }


def read_back(folder: Path, checkpoints: list[dict]) -> None:
    """Raise unless each checkpoint file of a collection is on disk with the bytes that were recorded."""

    def check(entry: dict) -> None:
        path = folder / checkpoint_name(entry["step"])
        if not path.is_file() or path.stat().st_size != entry["bytes"] or files.sha256_of(path) != entry["sha256"]:
            raise UserError(f"{path}: does not hold what was written (a failing disk?); run it again")

    with ThreadPoolExecutor(min(8, devices.cpu_cores())) as threads:
        list(threads.map(check, checkpoints))


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same keys, dtypes, shapes and bits."""
    import torch
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype
        and torch.equal(first[key].view(-1).view(torch.uint8), second[key].view(-1).view(torch.uint8))
        for key in first
    )


def check_finite(path: Path) -> None:
    """Raise UserError when a safetensors file holds values that are not finite: the training diverged."""
    import torch
    from safetensors.torch import load_file

    if not all(torch.isfinite(tensor).all() for tensor in load_file(path).values()):
        raise UserError("the training diverged: the adapter holds values that are not finite; lower learning_rate")


def tidy(folder: Path, keep: set[str]) -> None:
    """Remove every entry of a staging folder whose name is not in `keep`."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir():
            files.remove_folder(path)
        else:
            path.unlink()


def draw_loss(folder: Path, title: str, kept_from: int | None = None) -> None:
    """training_loss.png from trainer_log.jsonl: this phase's loss per step, the kept window shaded."""
    import matplotlib.pyplot as plt
    from llamafactory.extras.ploting import gen_loss_plot

    with open(folder / LOG, encoding="utf-8") as file:
        log = [json.loads(line) for line in file]
    figure = gen_loss_plot(log)
    axes = figure.axes[0]
    axes.set_title(title, fontsize=9)
    if kept_from is not None:
        axes.axvspan(kept_from - 0.5, log[-1]["current_steps"] + 0.5, alpha=0.12, color="tab:green", label="kept")
        axes.legend()
    figure.savefig(folder / PICTURE, dpi=100)
    plt.close(figure)


def set_base_name(adapter_config: Path, base: dict) -> None:
    """Name the base model in adapter_config.json by hub id and revision, or by its folder's name: no local path.

    PEFT keeps target_modules as a set; they are sorted so that equal runs have equal files.
    """
    config = json.loads(adapter_config.read_bytes())
    config["base_model_name_or_path"] = base["hub_id"] or base["name"]
    config["revision"] = base["revision"]
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    files.write_json(adapter_config, config)


def faults_of(folder: Path, manifest: dict) -> list[str]:
    """What is wrong with a collection, a phrase each: files, hashes, steps, keys, shapes, values, evaluation.json."""
    entries = manifest["checkpoints"]
    faults = [] if entries else ["the manifest lists no checkpoint"]
    expected = {checkpoint_name(entry["step"]) for entry in entries}
    expected |= {MANIFEST, *BESIDE}
    half_written = files.unfinished(folder / evaluation.FILE)  # what a killed evaluation leaves is no fault
    there = {path.name for path in folder.iterdir() if path not in half_written}
    faults += [f"{name} is missing" for name in sorted(expected - there - {*OPTIONAL})]
    faults += [f"{name} does not belong here" for name in sorted(there - expected)]
    steps = [entry["step"] for entry in entries]
    if steps and manifest["recipe"] is not None and steps != list(range(steps[0], steps[0] + len(steps))):
        faults.append(f"the steps are not consecutive: {steps}")
    kept = manifest["recipe"] and manifest["recipe"].get("save_total_limit")
    if kept and len(steps) != kept:
        faults.append(f"{len(steps)} checkpoints, but the recipe keeps {kept}")
    config = folder / paths.ADAPTER_CONFIG
    if config.name in there and files.sha256_of(config) != manifest["adapter_config_sha256"]:
        faults.append(f"{config.name} does not have its recorded sha256")
    try:
        if (labels := evaluation.bytes_in(folder)) is not None:
            evaluation.parse(labels, manifest, evaluation.FILE)
    except UserError as error:
        faults.append(str(error))
    present = [entry for entry in entries if checkpoint_name(entry["step"]) in there]
    faults += _checkpoint_faults(folder, present, manifest["rank"])
    return faults


def bring_labels(folder: Path, manifest: dict, coming: bytes | None) -> None:
    """Give a whole collection the evaluation.json that comes with the same one. Call it with the folder's lock held.

    Raises UserError where that would lose scores that were measured here and FORCE=1 was not said.
    """
    path, here = folder / evaluation.FILE, evaluation.bytes_in(folder)
    if evaluation.is_newer(coming, here, manifest, paths.relative(path), run_identity.force_asked()):
        files.write_atomically(path, coming)
        say(f"scores brought: {paths.relative(path)}")


def _checkpoint_faults(folder: Path, entries: list[dict], rank: int) -> list[str]:
    """Faults in the checkpoint files themselves, which are read several at a time."""
    with ThreadPoolExecutor(min(8, devices.cpu_cores())) as threads:
        read = list(
            threads.map(lambda entry: _read_checkpoint(folder / checkpoint_name(entry["step"]), entry), entries)
        )
    faults, layout = [], None
    for entry, (of_file, found) in zip(entries, read, strict=True):
        name = checkpoint_name(entry["step"])
        if found is None:
            faults += of_file
            continue
        layout = layout or found
        if found != layout:
            faults.append(f"{name} has other keys, shapes or types than the first checkpoint")
        ranks = {shape[0] for key, (shape, _) in found.items() if key.endswith("lora_A.weight")}
        if ranks != {rank}:
            faults.append(f"{name} holds rank {sorted(ranks)}, not {rank}")
        faults += of_file
    return faults


def _read_checkpoint(path: Path, entry: dict) -> tuple[list[str], dict[str, tuple] | None]:
    """What is wrong with a checkpoint file by itself, and shape and dtype by key; only a file whose hash is right is
    opened as tensors (None otherwise)."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.stat().st_size != entry["bytes"]:
        return [f"{path.name} has {path.stat().st_size} bytes, not {entry['bytes']}"], None
    if files.sha256_of(path) != entry["sha256"]:
        return [f"{path.name} does not have its recorded sha256"], None
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        return [f"{path.name} is not a safetensors file: {error}"], None
    is_finite = all(torch.isfinite(tensor).all() for tensor in tensors.values())
    faults = [] if is_finite else [f"{path.name} holds values that are not finite"]
    return faults, {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def peft_faults(folder: Path, step: int, base: Path) -> list[str]:
    """Load one checkpoint through PEFT onto the base model's bare structure (no weights are read)."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    reads_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # LLaMA-Factory chooses its class so
    with torch.device("meta"):
        model = (AutoModelForImageTextToText if reads_pictures else AutoModelForCausalLM).from_config(config)
    with tempfile.TemporaryDirectory() as adapter:
        for name, source in (
            (paths.ADAPTER, folder / checkpoint_name(step)),
            (paths.ADAPTER_CONFIG, folder / paths.ADAPTER_CONFIG),
        ):
            os.symlink(source.absolute(), Path(adapter, name))
        try:
            loaded = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            return [f"PEFT does not load checkpoint {step}: {' '.join(str(error).split())[:300]}"]
        with safe_open(Path(adapter, paths.ADAPTER), "pt") as file:
            stored = set(file.keys())
    differing = stored ^ set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    if differing:
        return [f"PEFT does not take checkpoint {step}: {len(differing)} keys differ, such as {min(differing)}"]
    return []
