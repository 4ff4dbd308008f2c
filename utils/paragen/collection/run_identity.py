"""The identity of a run: what it is trained from, so that a later run of the same name can be compared with it.

An identity is a JSON object with the sections recipe, data, base_model, tokenizer and pretrain. They hold contents and
hashes, no paths of this machine.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection.manifest import read_manifest
from paragen.common import files, paths, settings
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, pictures
from paragen.model import base_models, model_files
from paragen.recipes import keys, templates
from paragen.recipes.run import Run

# The files that a checkpoint folder needs to be resumed; each of them changes the training that follows.
RESUMED = (paths.ADAPTER, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


class Snapshot(NamedTuple):
    """A run's identity, and the files that it was taken from as they were before."""

    identity: dict[str, Any]
    stamps: dict[str, tuple[int, ...]] | None  # by path; None where stamps alone cannot show a change


def snapshot_of(run: Run) -> Snapshot:
    """A run's identity, in a form that shows cheaply whether it is still true. Raises as `identity_of`."""
    stamps = _stamps_of(run)
    identity = identity_of(run)
    return Snapshot(identity, None if any(data["pictures"] for data in identity["data"]) else stamps)


def changed_since(run: Run, snapshot: Snapshot) -> list[str]:
    """What of a run's identity changed since a snapshot, a phrase each. Reads the files only where one was touched."""
    if snapshot.stamps is not None and snapshot.stamps == _stamps_of(run):
        return []
    return changes(snapshot.identity, identity_of(run))


def _stamps_of(run: Run) -> dict[str, tuple[int, ...]]:
    """The stamps of the files that an identity is taken from, but for pictures."""
    folder = run.resolve(run.config.get("dataset_dir", "data"))
    entries = [dataset_info.data_file(name.strip(), folder) for name in run.config["dataset"].split(",")]
    found = [*entries, folder / "dataset_info.json"]
    for parent in (run.base, run.resumed):
        found += sorted(parent.iterdir()) if parent is not None and parent.is_dir() else []
    return {str(path): files.stamp_of(path.stat()) for path in found if path.is_file()}


def identity_of(run: Run) -> dict[str, Any]:
    """What a run is trained from, as a JSON value (see the head of this file).

    Raises UserError when the model, the data or the pretrain checkpoint is missing, with the command that makes it.
    """
    base, config = base_models.local_folder(run.base), run.config
    trained = {key: value for key, value in config.items() if key not in keys.NOT_TRAINED}
    recipe_keys = {"seed": keys.OMITTED_SEED, **trained}
    if template_hash := templates.hash_of(config.get("template")):
        recipe_keys["template_sha256"] = template_hash
    return {
        "recipe": dict(sorted(recipe_keys.items())),
        "data": [_data_of(name.strip(), run) for name in config["dataset"].split(",")],
        "base_model": base_models.identity_of(base),
        "tokenizer": {"sha256": model_files.hash_of(base, model_files.tokenizer_files(base))},
        "pretrain": pretrain_of(run.resumed) or _named_pretrain(run.resumed),
    }


def tokens_key(identity: dict) -> str | None:
    """A key for the tokenised rows of a run: equal for all runs that tokenise the same rows in the same way.

    None where they depend on more: on pictures, on rows outside the identity (of an eval_dataset), or on tokens that
    the recipe stores itself (tokenized_path).
    """
    if any(data["pictures"] for data in identity["data"]) or keys.UNSHARED_TOKENS & identity["recipe"].keys():
        return None
    recipe = {key: value for key, value in identity["recipe"].items() if key not in keys.NOT_TOKENISED}
    versions = {name: version(name) for name in ("llamafactory", "transformers", "tokenizers", "datasets")}
    return files.sha256_of_value([recipe, identity["data"], identity["tokenizer"], versions])


def pretrain_of(checkpoint: Path | None) -> dict | None:
    """Run, step and hash of the checkpoint that is resumed; None where none is, or where it is gone."""
    if checkpoint is None or not (checkpoint / "trainer_state.json").is_file():
        return None
    resumed = sorted(path for path in checkpoint.iterdir() if is_resumed(path.name))
    sha256 = files.sha256_of_value({path.name: files.sha256_of(path) for path in resumed})
    _check_against_manifest(checkpoint, sha256)
    return {"run": checkpoint.parent.name, "step": step_of(checkpoint), "sha256": sha256}


def _named_pretrain(checkpoint: Path | None) -> dict | None:
    """Run and step of a checkpoint that is gone, from its path."""
    if checkpoint is None:
        return None
    named = paths.CHECKPOINT.fullmatch(checkpoint.name)
    return {"run": checkpoint.parent.name, "step": int(named[1]) if named else None, "sha256": None}


def is_resumed(name: str) -> bool:
    """Whether a resumed training reads this file of a checkpoint folder (several processes have an rng_state each)."""
    return name in RESUMED or re.fullmatch(r"rng_state_\d+\.pth", name) is not None


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a stock checkpoint folder was saved."""
    path = checkpoint / "trainer_state.json"
    try:
        return int(json.loads(path.read_bytes())["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths.relative(path)}: broken ({error!r}); train that recipe again with FORCE=1") from None


def changes(old: dict, new: dict) -> list[str]:
    """The differences between two identities, a phrase each; a section that is None in the old one is skipped."""
    found = []
    for key in sorted({*(old["recipe"] or {}), *new["recipe"]}) if old["recipe"] is not None else []:
        before, after = old["recipe"].get(key), new["recipe"].get(key)
        if before != after:
            found.append(f"{key} ({before} -> {after})")
    if old["data"] is not None and old["data"] != new["data"]:
        found += _data_changes(old["data"], new["data"])
    for section, what in (("base_model", "the base model"), ("tokenizer", "the tokenizer")):
        if old[section] is not None and old[section].get("sha256") not in (None, new[section]["sha256"]):
            found.append(f"{what}'s files")
    return found + resumed_changes(old, new)


def resumed_changes(old: dict, new: dict) -> list[str]:
    """The differences between the checkpoints that two runs resume from, as `changes` has them.

    A checkpoint that is gone, as after PRUNE_PRETRAIN=1, is compared by its run and step.
    """
    before, after = old["pretrain"], new["pretrain"]
    if before is None or after is None or before.get("sha256") is None:
        return []
    if after["sha256"] is None and before["run"] != after["run"]:
        return [f"the resumed run ({before['run']} -> {after['run']}, which does not exist)"]
    if before["step"] != after["step"]:
        return [f"the resumed step ({before['step']} -> {after['step']})"]
    if after["sha256"] not in (None, before["sha256"]):
        return [f"the pretrain checkpoint {after['run']}/checkpoint-{after['step']}"]
    return []


def _data_of(name: str, run: Run) -> dict[str, Any]:
    """The section of one dataset: its entry, its file, and the first `max_samples` rows with their pictures."""
    config, folder = run.config, run.resolve(run.config.get("dataset_dir", "data"))
    entry = dataset_info.entry_of(name, folder)
    dataset_info.require_trainable(name, entry)
    if entry.get("num_samples") is not None:
        raise UserError(f"{name}: num_samples in dataset_info.json draws rows at random; use max_samples in the recipe")
    path = dataset_info.data_file(name, folder)
    rows = dataset_info.load_rows(path)
    used = rows[: config.get("max_samples") or len(rows)]
    media = run.resolve(config["media_dir"]) if config.get("media_dir") else folder
    return {
        "name": name,
        "file": entry["file_name"],
        "entry": {key: value for key, value in entry.items() if key != "file_name"},
        "sha256": files.sha256_of(path),
        "rows_in_file": len(rows),
        "rows": len(used),
        "rows_sha256": files.sha256_of_value(used),
        "pictures": pictures.identity_of(used, entry, path, media),
    }


def _data_changes(old: list[dict], new: list[dict]) -> list[str]:
    if [data["name"] for data in old] != [data["name"] for data in new]:
        return []  # the recipe's `dataset` key differs too, and is named
    found = []
    for before, after in zip(old, new, strict=True):
        if before.get("rows_sha256") != after["rows_sha256"]:
            found.append(f"the rows of {after['file']} ({before.get('rows')} -> {after['rows']} rows)")
        if before.get("pictures") != after.get("pictures"):
            found.append(f"the pictures of {after['file']}")
        if dataset_info.without_marks(before.get("entry") or {}) != dataset_info.without_marks(after["entry"]):
            found.append(f"the entry of {after['name']} in dataset_info.json")
    return found


def _check_against_manifest(checkpoint: Path, sha256: str) -> None:
    manifest = read_manifest(checkpoint.parent)
    if manifest is None:
        return
    recorded = {entry.step: entry.sha256 for entry in manifest.checkpoints}
    if recorded.get(step_of(checkpoint)) != sha256:
        raise UserError(
            f"{paths.relative(checkpoint)}: differs from what its run's manifest.json recorded; "
            "train the pretrain recipe again with FORCE=1"
        )


def check_resumable(checkpoint: Path, rank: int, how_to_make: str) -> None:
    """Raise UserError for a checkpoint that does not exist (listing those that do) or has another rank.

    Args:
        checkpoint: the folder a recipe resumes from.
        rank: the rank to train.
        how_to_make: the command that makes the missing checkpoint.
    """
    if not (checkpoint / paths.ADAPTER).is_file():
        run = checkpoint.parent
        steps = sorted(
            int(match[1])
            for path in (run.iterdir() if run.is_dir() else ())
            if (match := paths.CHECKPOINT.fullmatch(path.name))
        )
        there = f"steps there: {', '.join(map(str, steps))}" if steps else f"{paths.relative(run)} has no checkpoints"
        raise UserError(
            f"resume_from_checkpoint {paths.relative(checkpoint)} does not exist ({there}); make it with: {how_to_make}"
        )
    missing = [name for name in RESUMED if not (checkpoint / name).is_file() and name != "rng_state.pth"]
    if missing:
        raise UserError(
            f"{paths.relative(checkpoint)}: cannot be resumed, {missing[0]} is missing; "
            "a pretrain recipe keeps it with save_only_model: false"
        )
    with open(checkpoint / paths.ADAPTER_CONFIG, encoding="utf-8") as file:
        there = json.load(file).get("r")
    if there != rank:
        raise UserError(
            f"{paths.relative(checkpoint)}: has rank {there}, not {rank}; name the rank in resume_from_checkpoint"
        )


def force_requested() -> bool:
    """Whether the user set FORCE=1: make again what is complete or stale."""
    return settings.switch("FORCE")
