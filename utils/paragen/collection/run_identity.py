"""The identity of a run: what it is trained from, so that a later run of the same name can be compared with it.

An identity is a JSON object with the sections recipe, data, base_model, tokenizer and pretrain. They hold contents and
hashes, no paths of this machine.
"""

import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import adapter_config, presence, row_hashes, run_files
from paragen.collection.manifest import read_manifest
from paragen.collection.row_hashes import RowHashes
from paragen.common import files, paths, settings
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, pictures
from paragen.model import base_models, model_files
from paragen.recipes import keys, templates
from paragen.recipes.run import Run

NO_MODEL = {"base_model": None, "tokenizer": None}


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
    folder = run.data_dir
    entries = [dataset_info.data_file(name, folder) for name in run.datasets]
    found = [*entries, folder / "dataset_info.json"]
    for parent in (run.base, run.resumed):
        found += sorted(parent.iterdir()) if parent is not None and parent.is_dir() else []
    return {str(path): files.stamp_of(path.stat()) for path in found if path.is_file()}


def identity_of(run: Run) -> dict[str, Any]:
    """What a run is trained from, as a JSON value (see the head of this file). Reads all of it.

    Raises UserError when the model, the data or the pretrain checkpoint is missing, with the command that makes it.
    """
    base = base_models.local_folder(run.base)
    return {
        "recipe": _recipe_of(run),
        "data": [_data_of(name, run) for name in run.datasets],
        **model_identity_of(base),
        "pretrain": pretrain_of(run.resumed) or _named_pretrain(run.resumed),
    }


def quick_identity_of(run: Run) -> dict[str, Any]:
    """The same to compare a finished run with, without reading what did not change since it was read last.

    A pretrain checkpoint is taken for what its manifest records where the names and lengths of its files agree. The
    section of a model or a dataset that is not there is None: `changes` does not compare it.
    """
    has_model = (run.base / "config.json").is_file()
    data = [_known_data_of(name, run) for name in run.datasets]
    return {
        "recipe": _recipe_of(run),
        "data": None if None in data else data,
        **(_known_model_of(run.base, _stamps_in(run.base)) if has_model else NO_MODEL),
        "pretrain": _recorded_pretrain_of(run.resumed) or _named_pretrain(run.resumed),
    }


def _recipe_of(run: Run) -> dict[str, Any]:
    trained = {key: value for key, value in run.config.items() if key not in keys.NOT_TRAINED}
    recipe_keys = {"seed": keys.OMITTED_SEED, **trained}
    if template_hash := templates.hash_of(run.config.get("template")):
        recipe_keys["template_sha256"] = template_hash
    return dict(sorted(recipe_keys.items()))


def model_identity_of(base: Path) -> dict[str, Any]:
    """The sections `base_model` and `tokenizer` of a manifest for a base model's folder."""
    tokenizer = {"sha256": model_files.hash_of(base, model_files.tokenizer_files(base))}
    return {"base_model": base_models.identity_of(base), "tokenizer": tokenizer}


@cache
def _known_model_of(base: Path, stamps: tuple) -> dict[str, Any]:
    """`model_identity_of` a folder whose files have these stamps. Raises UserError where it holds no whole model."""
    return model_identity_of(base_models.local_folder(base))


def _stamps_in(folder: Path) -> tuple:
    """The stamps of the files in a folder, by name."""
    return tuple((path.name, files.stamp_of(path.stat())) for path in sorted(folder.iterdir()) if path.is_file())


def tokens_key(identity: dict) -> str | None:
    """A key for the tokenised rows of a run: equal for all runs that tokenise the same rows in the same way.

    None where they depend on more: on pictures, on rows outside the identity (of an eval_dataset), or on tokens that
    the recipe stores itself (tokenized_path).
    """
    if any(data["pictures"] for data in identity["data"]) or keys.UNSHARED_TOKENS & identity["recipe"].keys():
        return None
    recipe = {key: value for key, value in identity["recipe"].items() if key not in keys.NOT_TOKENISED}
    return files.sha256_of_value([recipe, data_trained_on(identity), identity["tokenizer"], _tokenising_versions()])


@cache
def _tokenising_versions() -> dict[str, str]:
    """The versions of the packages that make tokens, read once: looking them up takes milliseconds."""
    return {name: version(name) for name in ("llamafactory", "transformers", "tokenizers", "datasets")}


def data_trained_on(identity: dict) -> list[dict]:
    """The data of an identity without what decides no training, such as descriptions and licences."""
    return [{**one, "entry": dataset_info.without_marks(one["entry"])} for one in identity["data"]]


def pretrain_of(checkpoint: Path | None) -> dict | None:
    """Run, step and hash of the checkpoint that is resumed; None where none is, or where it is gone."""
    if checkpoint is None or not (checkpoint / run_files.STATE).is_file():
        return None
    sha256 = resumed_sha256(checkpoint)
    _check_against_manifest(checkpoint, sha256)
    return {"run": checkpoint.parent.name, "step": step_of(checkpoint), "sha256": sha256}


def resumed_sha256(checkpoint: Path) -> str:
    """The hash over the hashes of the files in a checkpoint folder that a resumed run reads."""
    resumed = sorted(path for path in checkpoint.iterdir() if run_files.is_resumed(path.name))
    return files.sha256_of_value({path.name: files.sha256_of(path) for path in resumed})


def _named_pretrain(checkpoint: Path | None) -> dict | None:
    """Run and step of a checkpoint that is gone, from its path."""
    if checkpoint is None:
        return None
    named = paths.CHECKPOINT.fullmatch(checkpoint.name)
    return {"run": checkpoint.parent.name, "step": int(named[1]) if named else None, "sha256": None}


def _recorded_pretrain_of(checkpoint: Path | None) -> dict | None:
    """`pretrain_of`, as the run's manifest recorded it; None also where files are missing or have other lengths."""
    named = paths.CHECKPOINT.fullmatch(checkpoint.name) if checkpoint is not None else None
    manifest = read_manifest(checkpoint.parent) if checkpoint is not None and named is not None else None
    if checkpoint is None or named is None or manifest is None:
        return pretrain_of(checkpoint)
    entry = next((entry for entry in manifest.checkpoints if entry.step == int(named[1])), None)
    if entry is None or presence.checkpoint_faults(checkpoint.parent, entry):
        return None
    return {"run": checkpoint.parent.name, "step": entry.step, "sha256": entry.sha256}


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a stock checkpoint folder was saved."""
    path = checkpoint / run_files.STATE
    try:
        return int(json.loads(path.read_bytes())["global_step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths.relative(path)}: broken ({error!r}); train that recipe again with FORCE=1") from None


def changes(old: dict, new: dict) -> list[str]:
    """The differences between two identities, a phrase each; a section that is None in one of them is skipped."""
    found = []
    for key in sorted({*(old["recipe"] or {}), *new["recipe"]}) if old["recipe"] is not None else []:
        before, after = old["recipe"].get(key), new["recipe"].get(key)
        if before != after:
            found.append(f"{key} ({before} -> {after})")
    if old["data"] is not None and new["data"] is not None and old["data"] != new["data"]:
        found += _data_changes(old["data"], new["data"])
    for section, what in (("base_model", "the base model"), ("tokenizer", "the tokenizer")):
        before, after = ((identity[section] or {}).get("sha256") for identity in (old, new))
        if None not in (before, after) and before != after:
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
    """The section of one dataset. Raises UserError where it is missing, cannot be trained on, or some of its rows are
    held out and the recipe would train on them."""
    entry = dataset_info.entry_of(name, run.data_dir)
    section = _section_of(name, entry, dataset_info.data_file(name, run.data_dir), run, row_hashes.read)
    free = section["rows_in_file"] - (entry.get(dataset_info.HELD_OUT) or 0)
    if section["rows"] > free:
        raise UserError(
            f"{name}: the last {entry[dataset_info.HELD_OUT]} rows are held out for scoring, and "
            f"{paths.relative(run.recipe)} would train on some of them: set max_samples to {free} in it (make recipe "
            "does so), or register the file with HELD_OUT=0"
        )
    return section


def _known_data_of(name: str, run: Run) -> dict[str, Any] | None:
    """`_data_of` without reading what did not change; None where the dataset is not there."""
    info = run.data_dir / "dataset_info.json"
    entry = _known_entry(name, run.data_dir, files.stamp_of(info.stat())) if info.is_file() else None
    path = run.data_dir / entry["file_name"] if entry else None
    return _section_of(name, entry, path, run, row_hashes.known) if entry and path and path.is_file() else None


@cache
def _known_entry(name: str, data_dir: Path, _stamp: tuple[int, ...]) -> dict[str, Any] | None:
    """A dataset's entry in a dataset_info.json with this stamp; None where there is none."""
    return dataset_info.entry_of(name, data_dir) if name in dataset_info.read_info(data_dir) else None


def _section_of(
    name: str, entry: dict[str, Any], path: Path, run: Run, hashes_of: Callable[[Path, int | None], RowHashes]
) -> dict[str, Any]:
    """A dataset's entry, its file, and the first `max_samples` rows with their pictures."""
    dataset_info.require_trainable(name, entry)
    if entry.get("num_samples") is not None:
        raise UserError(f"{name}: num_samples in dataset_info.json draws rows at random; use max_samples in the recipe")
    hashes, shown = hashes_of(path, run.config.get("max_samples")), None
    if "images" in dataset_info.columns_of(entry):
        media = run.resolve(run.config["media_dir"]) if run.config.get("media_dir") else run.data_dir
        shown = pictures.identity_of(dataset_info.load_rows(path)[: hashes.rows], entry, path, media)
    return {
        "name": name,
        "file": entry["file_name"],
        "entry": {key: value for key, value in entry.items() if key != "file_name"},
        **hashes._asdict(),
        "pictures": shown,
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
    entry = next((entry for entry in manifest.checkpoints if entry.step == step_of(checkpoint)), None)
    if entry is None or entry.sha256 != sha256:
        faults = presence.checkpoint_faults(checkpoint.parent, entry) if entry else []
        what = "; ".join(faults) or "differs from what its run's manifest.json recorded"
        way_out = "train the pretrain recipe again" if faults else "train the pretrain recipe again with FORCE=1"
        raise UserError(f"{paths.relative(checkpoint)}: {what}; {way_out}")
    if faults := presence.content_faults(checkpoint.parent, manifest, checkpoint.name):
        raise UserError(
            f"{paths.relative(checkpoint.parent)}: {faults[0]}; train the pretrain recipe again with FORCE=1"
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
    missing = [name for name in run_files.RESUMED if not (checkpoint / name).is_file() and name != "rng_state.pth"]
    if missing:
        raise UserError(
            f"{paths.relative(checkpoint)}: cannot be resumed, {missing[0]} is missing; "
            "a pretrain recipe keeps it with save_only_model: false"
        )
    there = adapter_config.read(checkpoint / paths.ADAPTER_CONFIG)["r"]
    if there != rank:
        raise UserError(
            f"{paths.relative(checkpoint)}: has rank {there}, not {rank}; name the rank in resume_from_checkpoint"
        )


def force_requested() -> bool:
    """Whether the user set FORCE=1: make again what is complete or stale."""
    return settings.switch("FORCE")
