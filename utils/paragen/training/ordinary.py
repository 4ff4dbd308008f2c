"""The ordinary path: trains one run with LLaMA-Factory's own trainer, on one device or several."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from paragen.collection import run_identity
from paragen.common import cli, devices, files, paths
from paragen.common.cli import say
from paragen.model import base_models
from paragen.recipes import batches
from paragen.recipes.run import Run
from paragen.training import attempts, completion, interrupted, outcome, status, token_cache
from paragen.training.attempts import Attempt


def train(run: Run, halved: bool = False) -> None:
    """Train a run, unless it is complete. The files go into a staging folder, which becomes the run folder at the end.

    Args:
        run: the run.
        halved: train with half the rows at a time and accumulate twice as often, where that is the same objective.

    Raises AlreadyRunning, OutOfMemory, DistributedFailure (see outcome.py), or UserError for anything else that the
    user can correct.
    """
    if status.is_run_complete(run):
        return
    snapshot = run_identity.snapshot_of(run)
    with attempts.begin(run, snapshot) as attempt:
        if attempt is None:
            return
        wanted = devices.choose()
        devices.pin(wanted)
        job = job_of(attempt, wanted)
        say(f"{run.phase} {run.recipe.name} at rank {run.rank} -> {paths.relative(run.folder)}")
        job["config"] |= batches.share_batch(run.config, len(wanted), halved, base_models.has_processor(run.base))
        job |= continuation(attempt, job["config"], wanted)
        if len(wanted) > 1:
            train_distributed(job, len(wanted))
        else:
            from paragen.training import process  # imports LLaMA-Factory: after the devices are pinned

            process.train(job)
        if run.collects:
            completion.check_last(attempt.staging)
        completion.complete(attempt, json.loads((attempt.staging / "facts.json").read_bytes()))


def job_of(attempt: Attempt, wanted: list[str], loads_rows: bool = True) -> dict[str, Any]:
    """The argument of `process.train` for an attempt on the devices `wanted`.

    Tokenised rows in the cache are checked here, once, so that the processes of several devices agree about whether the
    cache is used; without `loads_rows` they are neither checked nor used.
    """
    key = run_identity.tokens_key(attempt.identity) if os.environ.get("PARAGEN_TOKENS") else None
    tokens = Path(os.environ["PARAGEN_TOKENS"], key) if key else None
    return {
        "recipe": str(attempt.run.recipe),
        "config": dict(attempt.run.config),
        "phase": attempt.run.phase,
        "staging": str(attempt.staging),
        "devices": wanted,
        "pictures": any(data["pictures"] for data in attempt.identity["data"]),
        "tokens": str(tokens) if tokens else None,
        "tokens_ready": loads_rows and tokens is not None and token_cache.is_whole(tokens),
        "continued": None,
        "record": None,
    }


def continuation(attempt: Attempt, config: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    """What lets an interrupted attempt be resumed, as keys of a job.

    `continued` is the checkpoint folder from which this attempt goes on, or None. `record` is what its own checkpoints
    are recorded with; None where they cannot be resumed: a finetune starts from its pretrain, and whether pictures
    changed is known only after reading them.

    Args:
        attempt: the attempt, with its staging folder as `attempts.begin` yields it.
        config: the rendered recipe with the batch as the devices share it.
        wanted: the devices.
    """
    record = record_of(attempt, config, wanted)
    if record is None:
        return {}
    checkpoint = interrupted.go_on(attempt.staging, record["circumstances"])
    return {"continued": str(checkpoint) if checkpoint else None, "record": record}


def record_of(
    attempt: Attempt, config: dict[str, Any], wanted: list[str], engine: str = "stock"
) -> dict[str, Any] | None:
    """What an attempt's checkpoints are recorded with, as `continuation` has it; None where they cannot be resumed.

    The staging folder is emptied where nothing in it can be used, whatever the checkpoints are.

    Args:
        attempt, config, wanted: as for `continuation`.
        engine: which one trains, `stock` or `packed`.
    """
    if attempt.run.collects or attempt.snapshot.stamps is None or config.get("save_only_model"):
        interrupted.start_over(attempt.staging, "it is a finetune, or its recipe or data cannot be resumed")
        return None
    if run_identity.force_requested():
        interrupted.start_over(attempt.staging, "FORCE=1")
    present = interrupted.circumstances(attempt.identity, config, wanted, engine)
    return {"circumstances": present, "stamps": attempt.snapshot.stamps}


def train_distributed(job: dict[str, Any], count: int) -> None:
    """Train a job in one process per device (see launch.py); they end with this process.

    Raises DistributedFailure, with the cause, when one of them fails.
    """
    staging = Path(job["staging"])
    files.write_json(staging / "job.json", job)
    command = [sys.executable, "-m", "paragen.training.launch", str(staging / "job.json"), str(count)]
    child = subprocess.Popen(command, env=cli.environment_for_modules(), preexec_fn=cli.end_with_parent)
    try:
        status = child.wait()
    finally:
        child.terminate()
        child.wait()
    if status:
        ended = [found for path in staging.glob("outcome-*.json") if (found := outcome.read(path))]
        known = [found for found in ended if found.kind not in ("done", "stopped")]
        raise outcome.DistributedFailure(known[0] if known else outcome_of_status(status, count))


def outcome_of_status(status: int, count: int) -> outcome.Outcome:
    """The outcome of a training on several devices, of whose processes none recorded a cause."""
    if status < 0 or status > 128:
        ended = cli.killed_text(status if status < 0 else 128 - status)
        return outcome.Outcome("killed", f"a process of the {count} {ended}")
    return outcome.Outcome("failed", f"training on {count} devices failed with status {status}; see the cause above")
