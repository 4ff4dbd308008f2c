"""An attempt at a run: whether it is needed, its lock, its staging folder, and whether it may be published."""

import contextlib
import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paragen.collection import discovery, manifest_recipe, replacing, run_identity
from paragen.collection.run_identity import Snapshot
from paragen.common import cli, files, locks, paths
from paragen.common.cli import UserError, say
from paragen.recipes import render
from paragen.recipes.run import Run
from paragen.training import data_notes, interrupted, left_overs, overrides, status
from paragen.training.outcome import AlreadyRunning

FULL_DISK_BYTES = 2**20  # a disk with fewer free bytes counts as full


@dataclass(frozen=True)
class Attempt:
    """An attempt at a run. Its staging folder becomes the run folder."""

    run: Run
    snapshot: Snapshot
    staging: Path
    id: str
    started: str

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is trained from (see run_identity.py)."""
        return self.snapshot.identity


@contextlib.contextmanager
def begin(run: Run, snapshot: Snapshot) -> Iterator[Attempt | None]:
    """Begin an attempt at a run, which the body trains; yields None where the run is complete.

    While the body runs, the run is locked and the rendered recipe lies beside the recipe. The staging folder is empty,
    or as an interrupted attempt left it (see interrupted.py). Afterwards it is removed where it was not published and
    holds no whole checkpoint to go on from.

    Raises AlreadyRunning when another process trains the run, UserError when its run folder is stale, holds something
    else or cannot be replaced (see replacing.py), when its pretrain is missing, when an override has no effect, or when
    a manifest could not record its recipe.
    """
    overrides.check(run)
    manifest_recipe.check_trainable(snapshot.identity["recipe"], str(run.recipe))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.lock(files.beside(run.folder, "lock")))
            stack.enter_context(rendered(run))
        except locks.Busy as busy:
            raise AlreadyRunning(f"{run} is running already (it holds {busy})") from None
        left = interrupted.staging_of(run.folder)
        files.recover_folder(run.folder, spare=left)
        if is_complete(run, snapshot.identity):
            left_overs.drop_old_claim(run)
            yield None
            if left is not None:
                files.remove_folder(left)
        else:
            check_pretrain(run)
            replacing.check(run.folder)
            yield stack.enter_context(staged(run, snapshot, left))
        drop_claim(run.folder)


@contextlib.contextmanager
def rendered(run: Run) -> Iterator[Path]:
    """Write the rendered recipe beside the recipe until the body ends. The file is also a lock: raises locks.Busy."""
    path = render.temporary_path(run.recipe, run.config)
    with locks.lock(path) as handle:
        os.ftruncate(handle, 0)
        os.pwrite(handle, render.dump(run.config).encode(), 0)
        yield path


def is_complete(run: Run, identity: dict[str, Any]) -> bool:
    """Whether a run is complete as requested; if so, prints that.

    Raises UserError where the run folder is stale or holds something else. FORCE=1 replaces runs of this phase only.
    """
    folder, name = run.folder, paths.relative(run.folder)
    forced = run_identity.force_requested()
    if forced and (folder / paths.MANIFEST).is_file() and folder.name.endswith(f"_{run.phase}"):
        return False
    state = discovery.state_of(folder, identity)
    if state.manifest is not None and state.manifest.phase != run.phase:
        raise UserError(
            f"{name} holds a {state.manifest.phase} run, but this recipe makes a {run.phase} one; change output_dir"
        )
    if state.manifest is not None and forced:
        return False
    if state.manifest is not None and run_identity.resumed_changes(state.manifest.identity, identity):
        check_pretrain(run)
    if state.name == "stale":
        raise UserError(
            f"{name} is stale, changed since: {state.reason}; FORCE=1 redoes it, keeping the old one until then"
        )
    if state.name == "unknown":
        raise UserError(
            f"{name} has no manifest.json: a stock run (utils/checkpoint_cleaner.py makes a finetune one a collection) "
            "or something else; change output_dir or move it away"
        )
    if state.name == "broken":
        say(f"broken: {name}: {state.reason}; it is made again, and what is left of it stays until then")
    if state.name == "complete":
        status.say_complete(run)
    return state.name == "complete"


def check_pretrain(run: Run) -> None:
    """Raise UserError, with the command that makes it, where the checkpoint that a run resumes from is missing."""
    if run.resumed is None:
        return
    pretrain = run.recipe.with_name(run.recipe.name.replace("_finetune", "_pretrain"))
    script = shlex.quote(paths.relative(paths.UTILS / "train_with_rank.sh"))
    named = (
        shlex.quote(paths.relative(pretrain))
        if pretrain.is_file() and pretrain != run.recipe
        else "<the pretrain recipe>"
    )
    ranked = paths.rank_in(run.config["resume_from_checkpoint"])
    seed = f" seed={ranked[1]}" if ranked and ranked[1] is not None else ""
    run_identity.check_resumable(run.resumed, run.rank, f"bash {script} {named} {run.rank}{seed}")


@contextlib.contextmanager
def staged(run: Run, snapshot: Snapshot, left: Path | None) -> Iterator[Attempt]:
    """A new attempt at a run. Its staging folder is removed afterwards, unless it was published or can be resumed.

    Args:
        run: the run.
        snapshot: what it is trained from.
        left: the staging folder of an interrupted attempt, which becomes that of this one; None for an empty one.
    """
    attempt, started = secrets.token_hex(4), now()
    staging = files.beside(run.folder, f"staging-{attempt}")
    if not run.collects and run.resumed is not None:
        save_steps = run.config.get("save_steps")
        say(f"save_steps is {save_steps}, not 1: this run resumes its checkpoint, but collects nothing")
    if run.resumed is None:  # else its pretrain printed them
        data_notes.announce(data_notes.warnings_of(run, snapshot.identity["data"]))
    if left is None:
        staging.mkdir(parents=True)
    else:
        left.rename(staging)
    try:
        with cli.writing_to(run.folder):
            yield Attempt(run, snapshot, staging, attempt, started)
    except RuntimeError as error:
        if full := full_disk(run.folder):
            raise full from error
        raise
    finally:
        with cli.unstoppable():
            if not interrupted.recorded(staging):
                files.remove_folder(staging)


def full_disk(folder: Path) -> UserError | None:
    """The error for a full disk below a run folder, or None: torch.save raises "unexpected pos" without the cause."""
    if shutil.disk_usage(folder.parent).free >= FULL_DISK_BYTES:
        return None
    return UserError(f"{paths.relative(folder.parent)}: the disk is full; free some space and run it again")


def check_claim(folder: Path, attempt: str | None = None) -> None:
    """Raise UserError when a sweep gave this run to another attempt, because it took this one for dead.

    Args:
        folder: the run folder.
        attempt: the id of this attempt; default: PARAGEN_ATTEMPT, which a sweep sets (for a pack, an id per cell).
    """
    mine, latest = attempt or os.environ.get("PARAGEN_ATTEMPT"), files.beside(folder, "attempt")
    if mine and (not latest.is_file() or latest.read_text() not in mine.split(",")):
        raise UserError(f"{paths.relative(folder)}: another attempt took this run over; nothing of this one is kept")


def drop_claim(folder: Path) -> None:
    """Remove the claim of this attempt on a complete run, so that a sweep that is killed later leaves none."""
    mine, claim = os.environ.get("PARAGEN_ATTEMPT"), files.beside(folder, "attempt")
    if mine and claim.is_file() and claim.read_text() in mine.split(","):
        claim.unlink()


def now() -> str:
    """The time in the manifest's form: ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
