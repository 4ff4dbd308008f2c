"""manifest.json of a run folder: what was trained, from what, and which checkpoints it made.

It is written last: a run folder without one is unfinished. `presence.py` compares it with the files that are there. It
carries the SHA-256 of its own content, so that an edited one is recognised. `parse_manifest` checks every value once;
code that has a `Manifest` relies on it.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from paragen.collection import manifest_kinds as kinds
from paragen.collection.manifest_kinds import Section, Unfit
from paragen.collection.manifest_recipe import check_recipe
from paragen.collection.manifest_records import (
    IDENTITY,
    Attempt,
    BaseModel,
    CheckpointEntry,
    Conversion,
    Manifest,
    ResumedPretrain,
    Tokenizer,
    TrainedData,
)
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, descriptions

__all__ = [
    "IDENTITY", "Attempt", "BaseModel", "CheckpointEntry", "Conversion", "Manifest", "ResumedPretrain", "Tokenizer",
    "TrainedData", "attempt_facts", "check_manifest", "new_manifest", "parse_manifest", "phase_named_in",
    "read_manifest", "require_manifest", "sealed", "write_manifest",
]  # fmt: skip
FORMAT = 2
LARGEST_FILE = 2**24  # bytes; one of 100 checkpoints has 20,000
DEEPEST = 16  # levels of lists and objects
PACKAGES = ("llamafactory", "transformers", "peft", "accelerate", "datasets", "torch", "safetensors")
COUNTS = ("processes", "threads", "rows_at_a_time", "accumulated", "packed_with")
# Keys that every manifest has; all others came later and may be missing.
KEYS = (
    "phase", "dataset", "run", "rank", *IDENTITY, "adapter_config_sha256", "checkpoints", "sha256",
)  # fmt: skip


def read_manifest(folder: Path) -> Manifest | None:
    """A run folder's manifest, or None where there is none. Raises UserError when it cannot be read or is not sound."""
    path = folder / paths.MANIFEST
    try:
        data = files.read_up_to(path, LARGEST_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{paths.relative(path)}: cannot be read: {error.strerror}") from None
    return parse_manifest(data, paths.relative(path), "train again with FORCE=1")


def require_manifest(folder: Path) -> Manifest:
    """A run folder's manifest. Raises UserError where there is none, too."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{paths.relative(folder)}: has no {paths.MANIFEST}, so it is no finished collection")
    return manifest


def phase_named_in(folder: Path) -> str | None:
    """The phase that a folder's manifest.json names, whether or not that is sound; None where it names none.

    Finds collections that `read_manifest` then refuses with a message, and passes over other programs' files.
    """
    try:
        content = json.loads(files.read_up_to(folder / paths.MANIFEST, LARGEST_FILE))
    except (ValueError, RecursionError, OSError):
        return None
    phase = content.get("phase") if isinstance(content, dict) else None
    return phase if phase in paths.PHASES else None


def parse_manifest(data: bytes, name: str, way_out: str) -> Manifest:
    """The manifest in the bytes of a manifest.json, which may come from a stranger.

    Args:
        data: the file's bytes.
        name: what messages call the file.
        way_out: how messages end: what the user can do.

    Raises UserError naming the file, the key and the value when anything is not as `Manifest` describes it.
    """
    if len(data) > LARGEST_FILE:
        raise UserError(f"{name}: has {len(data)} bytes, more than any manifest; {way_out}")
    try:
        content = json.loads(data)
        if not kinds.is_flat(content, DEEPEST):
            raise UserError(
                f"{name}: not a manifest of format {FORMAT}: nested more than {DEEPEST} levels deep; {way_out}"
            )
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{name}: not a manifest of format {FORMAT}; {way_out}")
        if missing := [key for key in KEYS if key not in content]:
            raise UserError(f"{name}: not a manifest of format {FORMAT}: it has no {missing[0]!r}; {way_out}")
        if sealed(content)["sha256"] != content["sha256"]:
            raise UserError(f"{name}: was edited after it was written; put it back, or {way_out}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: broken ({error}); {way_out}") from None
    return check_manifest(content, name, way_out)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of a manifest with the hash of its other content as its last key, `sha256`."""
    unsealed = {key: value for key, value in content.items() if key != "sha256"}
    return {**unsealed, "sha256": files.sha256_of_value(unsealed)}


def new_manifest(
    folder: Path,
    phase: str,
    rank: int,
    identity: dict[str, Any],
    checkpoints: Sequence[CheckpointEntry],
    facts: dict[str, Any],
) -> Manifest:
    """The manifest of a run that was just made.

    Args:
        folder: the run folder by its final name.
        phase: `pretrain` or `finetune`.
        rank: the LoRA rank.
        identity: as `run_identity.identity_of` gives it; a section that is not known is None.
        checkpoints: in ascending order of their steps.
        facts: further keys of a manifest; one that is not known is None.

    Raises UserError for a value that no manifest may have, such as a loss that is not finite.
    """
    category = folder.parent.parent.name
    recipe = identity["recipe"]
    content = sealed({
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
        "checkpoints": [asdict(entry) for entry in checkpoints],
    })  # fmt: skip
    return check_manifest(content, f"{paths.relative(folder)}: its manifest", "it is not kept")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json into a folder, atomically."""
    files.write_json(folder / paths.MANIFEST, manifest.content)


def attempt_facts(attempt: str, started: str, finished: str) -> dict[str, Any]:
    """The keys `versions` and `attempt` of a run made by this process; times in ISO 8601."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "attempt": {"id": attempt, "started": started, "finished": finished},
    }


def check_manifest(content: dict[str, Any], name: str, way_out: str) -> Manifest:
    """The record of a manifest's JSON object; arguments and errors as for `parse_manifest`. Its seal is not checked."""
    try:
        top = Section(content)
        return Manifest(
            phase=top.get("phase", kinds.PHASE),
            category=top.get_optional("category", kinds.CATEGORY),
            dataset=top.get("dataset", kinds.DATASETS),
            run=top.get("run", kinds.NAME),
            rank=top.get("rank", kinds.RANK),
            recipe=top.section("recipe", check_recipe),
            data=top.sections("data", _data_of),
            base_model=top.section("base_model", _base_model_of),
            tokenizer=top.section("tokenizer", _tokenizer_of),
            pretrain=top.section("pretrain", _pretrain_of),
            adapter_config_sha256=top.get_optional("adapter_config_sha256", kinds.SHA256),
            checkpoints=_checkpoints_of(top),
            sha256=top.get("sha256", kinds.SHA256),
            seed=top.get_optional("seed", kinds.SEED),
            **{key: top.get_optional(key, kinds.TEXT) for key in ("device", "precision", "engine", "dropout_stream")},
            **{key: top.get_optional(key, kinds.COUNT) for key in COUNTS},
            deterministic=top.get_optional("deterministic", kinds.YES_OR_NO),
            **{key: top.get_optional(key, kinds.WHOLE) for key in ("trained_rows", "total_steps")},
            files_sha256=top.get_optional("files_sha256", kinds.HASHES),
            data_warnings=top.get_optional("data_warnings", kinds.LINES),
            versions=top.get_optional("versions", kinds.TEXTS),
            attempt=top.section("attempt", _attempt_of),
            converted=top.section("converted", _conversion_of),
            content=content,
        )
    except Unfit as error:
        raise UserError(f"{name}: not a manifest of format {FORMAT}: {error}; {way_out}") from None


def _checkpoints_of(top: Section) -> tuple[CheckpointEntry, ...]:
    top.get("checkpoints", kinds.LIST)
    entries = top.sections("checkpoints", _checkpoint_of)
    if not entries:
        raise Unfit("checkpoints lists no checkpoint")
    for before, entry in zip(entries, entries[1:], strict=False):
        if entry.step <= before.step:
            raise Unfit(f"checkpoints has step {entry.step} after step {before.step}, not in ascending order")
    return entries


def _checkpoint_of(section: Section) -> CheckpointEntry:
    return CheckpointEntry(
        step=section.get("step", kinds.COUNT),
        loss=section.get("loss", kinds.NUMBER, nullable=True),
        learning_rate=section.get("learning_rate", kinds.NUMBER, nullable=True),
        bytes=section.get("bytes", kinds.WHOLE),
        sha256=section.get("sha256", kinds.SHA256),
    )


def _data_of(section: Section) -> TrainedData:
    entry = Section(section.get("entry", kinds.OBJECT), f"{section.place}entry.")
    checked = {
        "columns": kinds.NAMES,
        "tags": kinds.TAGS,
        "formatting": kinds.FORMATTING,
        dataset_info.HELD_OUT: kinds.WHOLE,
        descriptions.KEY: kinds.DESCRIPTIONS,
    }
    for key in checked.keys() & entry.value.keys():
        entry.get(key, checked[key])
    return TrainedData(
        name=section.get("name", kinds.NAME),
        file=section.get("file", kinds.PATH),
        entry=entry.value,
        rows=section.get("rows", kinds.WHOLE),
        rows_sha256=section.get("rows_sha256", kinds.SHA256),
        sha256=section.get_optional("sha256", kinds.SHA256),
        pictures=section.get_optional("pictures", kinds.OBJECT),
    )


def _base_model_of(section: Section) -> BaseModel:
    of_keys = {"name": kinds.NAME, "hub_id": kinds.HUB_ID, "revision": kinds.TEXT, "sha256": kinds.SHA256}
    return BaseModel(**{key: section.get_optional(key, kind) for key, kind in of_keys.items()})


def _tokenizer_of(section: Section) -> Tokenizer:
    return Tokenizer(section.get_optional("sha256", kinds.SHA256))


def _pretrain_of(section: Section) -> ResumedPretrain:
    return ResumedPretrain(
        section.get("run", kinds.NAME), section.get("step", kinds.WHOLE), section.get_optional("sha256", kinds.SHA256)
    )


def _attempt_of(section: Section) -> Attempt:
    started, finished = (datetime.fromisoformat(section.get(key, kinds.TIME)) for key in ("started", "finished"))
    return Attempt(section.get("id", kinds.TEXT), started, finished)


def _conversion_of(section: Section) -> Conversion:
    section.get_optional("before", kinds.OBJECT)
    return Conversion(
        section.get("from", kinds.TEXT), section.get("to", kinds.DTYPE), section.get("sha256", kinds.SHA256)
    )
