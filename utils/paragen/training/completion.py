"""Turns a trained staging folder into a run folder: checks it, removes extra files, and writes the manifest last."""

import json
from pathlib import Path
from typing import Any

from paragen.collection import finishing, replacing, run_files, run_identity
from paragen.collection.manifest import CheckpointEntry, attempt_facts, new_manifest, write_manifest
from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.training import attempts, data_notes
from paragen.training.attempts import Attempt


def complete(attempt: Attempt, facts: dict[str, Any]) -> None:
    """Complete a trained staging folder and publish it as the run folder; arguments and errors as for both."""
    publish(attempt, finish(attempt, facts))


def finish(attempt: Attempt, facts: dict[str, Any]) -> int:
    """Complete a trained staging folder, manifest included; returns the number of its checkpoints.

    Args:
        attempt: the attempt whose training ended.
        facts: what the manifest records of the training: device, precision, rows, steps (see collector.facts_of), and
            as `data_warnings` what was noticed about the tokenised rows.

    Raises UserError when checkpoints are missing or not finite, or when the data changed during the training. Several
    threads may do this for an attempt each.
    """
    staging, run = attempt.staging, attempt.run
    facts = facts | attempt_facts(attempt.id, attempt.started, attempts.now())
    facts = {"seed": run.seed, **facts}
    checkpoints = finish_finetune(attempt) if run.collects else finish_pretrain(attempt)
    if run.collects:
        facts["adapter_config_sha256"] = files.sha256_of(staging / paths.ADAPTER_CONFIG)
    facts["files_sha256"] = finishing.hashes_beside(staging)
    if changed := run_identity.changed_since(run, attempt.snapshot):
        raise UserError(f"{'; '.join(changed)}: changed while it was trained on; run it again")
    facts["data_warnings"] = data_notes.warnings_of(run, attempt.identity["data"]) + facts.get("data_warnings", [])
    manifest = new_manifest(run.folder, run.phase, run.rank, attempt.identity, checkpoints, facts)
    files.sync_tree(staging)  # most files are not synced when they are written
    write_manifest(staging, manifest)
    return len(checkpoints)


def publish(attempt: Attempt, count: int) -> None:
    """Publish a complete staging folder, with so many checkpoints, as the run folder.

    Raises UserError when a sweep gave the run to another attempt.
    """
    folder = attempt.run.folder
    attempts.check_claim(folder)
    replacing.publish(attempt.staging, folder)
    say(f"done: {paths.relative(folder)}, {count} checkpoints")


def check_last(staging: Path) -> None:
    """Raise RuntimeError unless the last checkpoint equals the adapter that LLaMA-Factory saved at the end."""
    entries = json.loads((staging / "collected.json").read_bytes())
    last = staging / run_files.checkpoint_name(entries[-1]["step"]) if entries else None
    if last and not finishing.same_tensors(last, staging / paths.ADAPTER):
        raise RuntimeError("the last collected checkpoint is not the adapter that LLaMA-Factory saved at its end")


def finish_finetune(attempt: Attempt) -> list[CheckpointEntry]:
    """Make a staging folder a collection that lacks only its manifest; returns the entries of its checkpoints."""
    staging, folder = attempt.staging, attempt.run.folder
    entries = [CheckpointEntry(**entry) for entry in json.loads((staging / "collected.json").read_bytes())]
    kept = attempt.identity["recipe"].get("save_total_limit")
    if not entries or (kept and len(entries) != kept):
        raise UserError(
            f"{paths.relative(folder)}: training stopped early, {len(entries)} of {kept} checkpoints were collected"
        )
    finishing.read_back(staging, entries)
    finishing.check_finite(staging / entries[-1].file_name)
    finishing.set_base_name(staging / paths.ADAPTER_CONFIG, attempt.identity["base_model"])
    finishing.draw_loss(staging, folder.name, kept_from=entries[0].step)
    names = {entry.file_name for entry in entries}
    finishing.tidy(staging, {*names, *run_files.BESIDE})
    return entries


def finish_pretrain(attempt: Attempt) -> list[CheckpointEntry]:
    """Reduce a staging folder to resumable checkpoints, log and loss picture; returns the checkpoints' entries."""
    staging, folder = attempt.staging, attempt.run.folder
    saved = sorted((p for p in staging.iterdir() if paths.CHECKPOINT.fullmatch(p.name)), key=run_identity.step_of)
    if not saved:
        raise UserError(f"{paths.relative(folder)}: training ended without a checkpoint; set save_steps in the recipe")
    finishing.check_finite(saved[-1] / paths.ADAPTER)
    with open(staging / run_files.LOG, encoding="utf-8") as file:
        logged = {line["current_steps"]: line for line in map(json.loads, file) if "loss" in line}
    entries = []
    for checkpoint in saved:
        finishing.tidy(checkpoint, {path.name for path in checkpoint.iterdir() if run_files.is_kept(path.name)})
        finishing.set_base_name(checkpoint / paths.ADAPTER_CONFIG, attempt.identity["base_model"])
        step = run_identity.step_of(checkpoint)
        log = logged.get(step, {})
        size, identity = files.size_of(checkpoint.iterdir()), run_identity.pretrain_of(checkpoint)
        assert identity is not None  # `step_of` has read its trainer_state.json
        entries.append(CheckpointEntry(step, log.get("loss"), log.get("lr"), size, identity["sha256"]))
    finishing.draw_loss(staging, folder.name)
    finishing.tidy(staging, {*(p.name for p in saved), run_files.LOG, run_files.PICTURE})
    return entries
