"""A trained staging folder becomes a run folder: checked, tidied, its manifest written last."""

import json
from pathlib import Path
from typing import Any

from paragen.collection import collection, run_identity
from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.training import attempts
from paragen.training.attempts import Attempt


def complete(attempt: Attempt, facts: dict[str, Any]) -> None:
    """Make a trained staging folder whole and give it the run folder's name.

    Args:
        facts: what the training is known by: device, precision, rows, steps (see collector.facts_of).

    Raises UserError when checkpoints are missing or not finite, when the data changed meanwhile, or when a sweep gave
    the run to another attempt.
    """
    staging, run = attempt.staging, attempt.run
    facts = facts | collection.attempt_facts(attempt.id, attempt.started, attempts.now())
    facts = {"seed": run.seed, **facts}
    checkpoints = finish_finetune(attempt) if run.collects else finish_pretrain(attempt)
    if run.collects:
        facts["adapter_config_sha256"] = files.sha256_of(staging / paths.ADAPTER_CONFIG)
    if changed := run_identity.changed_since(run, attempt.snapshot):
        raise UserError(f"{'; '.join(changed)}: changed while it was trained on; run it again")
    manifest = collection.manifest_of(run.folder, run.phase, run.rank, attempt.identity, checkpoints, facts)
    if run.collects:
        files.sync_tree(staging)  # a collection's files are not synced one by one while it trains
    files.write_json(staging / collection.MANIFEST, manifest)
    attempts.check_claim(run.folder)
    files.publish_folder(staging, run.folder)
    say(f"done: {paths.relative(run.folder)}, {len(checkpoints)} checkpoints")


def check_last(staging: Path) -> None:
    """Raise unless the last collected checkpoint is the adapter that LLaMA-Factory itself saved at its end."""
    entries = json.loads((staging / "collected.json").read_bytes())
    last = staging / collection.checkpoint_name(entries[-1]["step"]) if entries else None
    if last and not collection.same_tensors(last, staging / paths.ADAPTER):
        raise RuntimeError("the last collected checkpoint is not the adapter that LLaMA-Factory saved at its end")


def finish_finetune(attempt: Attempt) -> list[dict[str, Any]]:
    """Make a staging folder a collection, all but its manifest; the entries of its checkpoints."""
    staging, folder = attempt.staging, attempt.run.folder
    entries = json.loads((staging / "collected.json").read_bytes())
    kept = attempt.identity["recipe"].get("save_total_limit")
    if not entries or (kept and len(entries) != kept):
        raise UserError(
            f"{paths.relative(folder)}: training stopped early, {len(entries)} of {kept} checkpoints were collected"
        )
    collection.read_back(staging, entries)
    collection.check_finite(staging / collection.checkpoint_name(entries[-1]["step"]))
    collection.set_base_name(staging / paths.ADAPTER_CONFIG, attempt.identity["base_model"])
    collection.draw_loss(staging, folder.name, kept_from=entries[0]["step"])
    names = {collection.checkpoint_name(entry["step"]) for entry in entries}
    collection.tidy(staging, {*names, *collection.BESIDE})
    return entries


def finish_pretrain(attempt: Attempt) -> list[dict[str, Any]]:
    """Tidy a staging folder down to resumable checkpoints, log and picture; the entries of its checkpoints."""
    staging, folder = attempt.staging, attempt.run.folder
    saved = sorted((p for p in staging.iterdir() if paths.CHECKPOINT.fullmatch(p.name)), key=run_identity.step_of)
    if not saved:
        raise UserError(f"{paths.relative(folder)}: training ended without a checkpoint; set save_steps in the recipe")
    collection.check_finite(saved[-1] / paths.ADAPTER)
    with open(staging / collection.LOG, encoding="utf-8") as file:
        logged = {line["current_steps"]: line for line in map(json.loads, file) if "loss" in line}
    entries = []
    for checkpoint in saved:
        resumed = {path.name for path in checkpoint.iterdir() if run_identity.is_resumed(path.name)}
        collection.tidy(checkpoint, {paths.ADAPTER_CONFIG, "scaler.pt", *resumed})
        collection.set_base_name(checkpoint / paths.ADAPTER_CONFIG, attempt.identity["base_model"])
        step = run_identity.step_of(checkpoint)
        log = logged.get(step, {})
        entries.append({
            "step": step,
            "loss": log.get("loss"),
            "learning_rate": log.get("lr"),
            "bytes": files.size_of(checkpoint.iterdir()),
            "sha256": run_identity.pretrain_of(checkpoint)["sha256"],
        })  # fmt: skip
    collection.draw_loss(staging, folder.name)
    collection.tidy(staging, {*(p.name for p in saved), collection.LOG, collection.PICTURE})
    return entries
