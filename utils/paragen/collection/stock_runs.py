"""Makes a collection of a finished stock LLaMA-Factory finetune run: the adapters of its saved steps, or of the newest,
and a manifest.

The collection is built and read back beside the run folder before it replaces it, so that a crash loses nothing. Only
files that stock runs write are removed (see stock_files.py); all others stay where they are. Facts that a stock run
does not record are null in the manifest.
"""

import argparse
import json
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import (
    adapter_config,
    finishing,
    manifest_kinds,
    replacing,
    run_files,
    stock_files,
    verification,
)
from paragen.collection.manifest import CheckpointEntry, new_manifest, read_manifest, write_manifest
from paragen.common import files, locks, paths, settings
from paragen.common.cli import UserError
from paragen.model import base_models


class Outcome(NamedTuple):
    """How cleaning a run folder ended.

    Attributes:
        state: `clean` (was one already), `cleaned`, or `would clean` in a dry run.
        checkpoints: how many it has, or would have.
        freed: bytes.
        removed: the files that are removed, as paths below the folder.
        kept: those that become files of the collection.
        others: those that no stock run writes: they stay where they are.
    """

    state: str
    checkpoints: int
    freed: int = 0
    removed: Sequence[str] = ()
    kept: Sequence[str] = ()
    others: Sequence[str] = ()

    @property
    def lines(self) -> list[str]:
        """A line per file below the headings `removed` and `kept`, for a dry run."""
        return [
            "removed:", *(f"  {name}" for name in self.removed),
            "kept:", *(f"  {name}" for name in (*self.kept, *self.others)),
        ]  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that cleaning one folder and cleaning many share."""
    parser.add_argument(
        "--keep", type=int, default=settings.number("KEEP"), help="keep the newest N steps (default: all)"
    )
    dry = settings.switch("DRY_RUN")
    parser.add_argument("--dry-run", action="store_true", default=dry, help="only list what would be removed and kept")


def clean(folder: Path, keep: int | None = None, dry_run: bool = False) -> Outcome:
    """Turn a stock finetune run folder into a collection.

    Args:
        folder: the run folder.
        keep: how many checkpoints to keep, the newest by step number; None: all.
        dry_run: change nothing.

    Raises UserError, with nothing changed, for a folder that is no finished finetune run or holds a broken checkpoint.
    """
    if keep is not None and keep < 1:
        raise UserError(f"--keep {keep}: keep at least one checkpoint")
    folder = Path(os.path.normpath(folder.absolute()))
    folder = folder.resolve() if folder.is_symlink() else folder
    if not folder.parent.is_dir():
        raise UserError(f"{folder}: no such folder")
    try:
        with locks.lock(files.beside(folder, "lock")):
            if not dry_run:
                files.recover_folder(folder)
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder")
            manifest = read_manifest(folder)
            if manifest is not None:
                if manifest.phase != "finetune":
                    raise UserError(f"{folder}: is a pretrain run; only a finetune run becomes a collection")
                return Outcome("clean", len(manifest.checkpoints))
            kept = finished_checkpoints(folder)[-(keep or 0) :]
            planned = plan(folder, kept)
            if not dry_run:
                rebuild(folder, kept, planned.others)
            return planned._replace(state="would clean" if dry_run else "cleaned")
    except locks.Busy:
        raise UserError(f"{folder}: is being trained or cleaned right now") from None


def finished_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a finished stock finetune run, in ascending order of their steps.

    Raises UserError naming what is missing or broken.
    """
    found = {int(path.name.split("-")[1]): path for path in folder.iterdir() if is_checkpoint(path)}
    if not found:
        raise UserError(f"{folder}: holds no checkpoint-<step> folder, so it is no run folder")
    checkpoints = [found[step] for step in sorted(found)]
    state = read_state(folder)
    if state is None or state["global_step"] < state["max_steps"]:
        state_file = run_files.STATE
        raise UserError(
            f"{folder}: the run did not finish ({state_file} of its end is missing); train it to the end first"
        )
    if folder.name.endswith("_pretrain") or not (folder.name.endswith("_finetune") or saved_every_step(state, found)):
        raise UserError(f"{folder}: is no finetune run (its name does not say so and it did not save every step)")
    if max(found) != state["global_step"]:
        raise UserError(f"{folder}: the checkpoint of its last step, {state['global_step']}, is missing")
    for path in checkpoints:
        check_adapter(path)
    return checkpoints


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint folder by its name."""
    return path.is_dir() and paths.CHECKPOINT.fullmatch(path.name) is not None


def saved_every_step(state: dict, found: dict[int, Path]) -> bool:
    """Whether a run of any name saved a checkpoint after each of several steps."""
    return len(found) > 1 and max(found) - min(found) == len(found) - 1 or state.get("save_steps") == 1


def read_state(folder: Path) -> dict | None:
    """The trainer state in a folder, or None."""
    try:
        state = json.loads((folder / run_files.STATE).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{folder / run_files.STATE}: broken: {error}") from None
    return state if isinstance(state, dict) and {"global_step", "max_steps", "log_history"} <= state.keys() else None


def check_adapter(checkpoint: Path) -> None:
    """Raise UserError unless a checkpoint folder holds a LoRA adapter that can be read to its last byte.

    Nothing more is verified: a stock run records no hashes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        adapter = adapter_config.read(checkpoint / paths.ADAPTER_CONFIG)
        load_file(checkpoint / paths.ADAPTER)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or checkpoint / paths.ADAPTER}: is missing; nothing was changed") from None
    except (ValueError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint}: its adapter is broken ({error}); remove that folder to clean the run without it"
        ) from None
    if "peft_type" not in adapter:
        raise UserError(f"{checkpoint}: holds no LoRA adapter")


def plan(folder: Path, kept: list[Path]) -> Outcome:
    """What becomes of each file of a run folder whose checkpoint folders `kept` become a collection."""
    found = stock_files.files_in(folder)
    taken = {run_files.LOG, run_files.PICTURE, f"{kept[-1].name}/{paths.ADAPTER_CONFIG}"}
    taken |= {f"{checkpoint.name}/{paths.ADAPTER}" for checkpoint in kept}
    removed = [name for name in found.stock if name not in taken]
    freed = files.size_of(folder / name for name in removed)
    return Outcome("", len(kept), freed, removed, [name for name in found.stock if name in taken], found.others)


def rebuild(folder: Path, kept: list[Path], others: Sequence[str]) -> None:
    """Build a collection from the checkpoint folders `kept` (ascending by step) beside `folder`, and replace that.

    The files `others` (see stock_files.py) are taken along. Raises UserError, with nothing changed, where one of them
    has the name of a file of the collection.
    """
    staging = files.beside(folder, f"staging-{secrets.token_hex(4)}")
    staging.mkdir()
    try:
        losses = {
            entry["step"]: entry
            for entry in (read_state(folder) or {"log_history": []})["log_history"]
            if "loss" in entry
        }
        entries = []
        for checkpoint in kept:
            step = int(checkpoint.name.rpartition("-")[2])
            target = staging / run_files.checkpoint_name(step)
            replacing.link_or_copy(checkpoint / paths.ADAPTER, target)
            log = losses.get(step, {})
            loss, learning_rate = (finite_or_none(log.get(key)) for key in ("loss", "learning_rate"))
            entries.append(CheckpointEntry(step, loss, learning_rate, target.stat().st_size, files.sha256_of(target)))
        for name in (run_files.LOG, run_files.PICTURE):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, staging / name)
        adapter = adapter_config.read(kept[-1] / paths.ADAPTER_CONFIG)
        base = base_of(adapter)
        shutil.copyfile(kept[-1] / paths.ADAPTER_CONFIG, staging / paths.ADAPTER_CONFIG)
        finishing.set_base_name(staging / paths.ADAPTER_CONFIG, base)
        identity = {"recipe": None, "data": None, "base_model": base, "tokenizer": None, "pretrain": None}
        unknown = ("seed", "device", "processes", "threads", "precision", "deterministic", "rows_at_a_time",
                   "accumulated", "trained_rows", "total_steps", "versions", "attempt")  # fmt: skip
        facts = {**dict.fromkeys(unknown), "adapter_config_sha256": files.sha256_of(staging / paths.ADAPTER_CONFIG)}
        facts["files_sha256"] = finishing.hashes_beside(staging)
        manifest = new_manifest(folder, "finetune", adapter["r"], identity, entries, facts)
        write_manifest(staging, manifest)
        for name in others:
            replacing.take_along(folder, staging, name)
        faults = verification.faults_of(staging, manifest)
        if faults:
            raise UserError(f"{folder}: {faults[0]}; nothing was changed")
        files.publish_folder(staging, folder)
    finally:
        files.remove_folder(staging)


def finite_or_none(value: Any) -> float | None:
    """A logged figure, None where it is not a finite number."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def base_of(adapter: dict) -> dict:
    """The section `base_model` of a manifest from adapter_config.json, which does not record the hash."""
    named = str(adapter.get("base_model_name_or_path") or "")
    is_hub_id = "/" in named and manifest_kinds.HUB_ID.fits(named) and not Path(named).exists()
    folder = paths.MODELS / Path(named).name
    hub_id = named if is_hub_id else base_models.hub_origin(folder)[0]
    return {"name": Path(named).name or None, "hub_id": hub_id, "revision": adapter.get("revision"), "sha256": None}
