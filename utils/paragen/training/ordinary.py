"""Train one recipe at one rank with LLaMA-Factory; a finetune recipe ends as a collection.

    bash utils/train_with_rank.sh RECIPE.yaml RANK [key=value ...]     is the way to call it

Reads the recipe, its data and its base model; fills saves/.../<run folder>. FORCE=1 redoes a complete or stale run,
DEVICES chooses devices (see devices.py). HF_HUB_OFFLINE is set: everything a run needs is on disk before it starts.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from paragen.collection import discovery, finishing, run_files, run_identity
from paragen.collection.manifest import CheckpointEntry, attempt_facts, new_manifest, read_manifest, write_manifest
from paragen.common import cli, devices, files, paths
from paragen.common.cli import UserError, say
from paragen.model import base_models
from paragen.recipes import render

FULL = 2**20  # bytes free on a disk that counts as full


@contextlib.contextmanager
def rendered(recipe: Path, config: dict) -> Iterator[Path]:
    """The rendered recipe beside the recipe while the body runs. It is its own lock; raises files.Busy."""
    path = render.temporary_path(recipe, config)
    with files.lock(path) as handle:
        os.ftruncate(handle, 0)
        os.write(handle, render.dump(config).encode())
        yield path


def already_there(folder: Path, identity: dict, phase: str) -> bool:
    """Whether the run is complete as asked for.

    Raises UserError where a stale run or something else stands at its place. FORCE=1 replaces runs of this phase alone.
    """
    name = paths.relative(folder)
    if run_identity.force_asked() and (folder / paths.MANIFEST).is_file() and folder.name.endswith(f"_{phase}"):
        return False
    manifest = read_manifest(folder)
    if manifest is not None and manifest.phase != phase:
        raise UserError(f"{name} holds a {manifest.phase} run, but this recipe makes a {phase} one; change output_dir")
    if manifest is not None and run_identity.force_asked():
        return False
    state, changed = discovery.state_of(folder, identity)
    if state == "stale":
        raise UserError(
            f"{name} is stale, changed since: {'; '.join(changed)}; FORCE=1 redoes it, keeping the old one until then"
        )
    if state == "unknown":
        raise UserError(
            f"{name} has no manifest.json: a stock run (utils/checkpoint_cleaner.py makes a finetune one a collection) "
            "or something else; change output_dir or move it away"
        )
    if state == "complete":
        say(f"complete: {name}")
    return state == "complete"


def check_pretrain(recipe: Path, config: dict) -> None:
    """Refuse a recipe whose pretrain checkpoint is not there, naming the command that makes it."""
    checkpoint = run_identity.resume_folder(recipe, config)
    if checkpoint is None:
        return
    pretrain = recipe.with_name(recipe.name.replace("_finetune", "_pretrain"))
    script = paths.relative(paths.ROOT / "utils" / "train_with_rank.sh")
    named = pretrain if pretrain.is_file() and pretrain != recipe else "<the pretrain recipe>"
    seed = paths.rank_in(config["resume_from_checkpoint"])
    seed = f" seed={seed[1]}" if seed and seed[1] is not None else ""
    run_identity.check_resumable(checkpoint, config["lora_rank"], f"bash {script} {named} {config['lora_rank']}{seed}")


def run(recipe: Path, config: dict, folder: Path, identity: dict) -> None:
    """Train into a staging folder beside the run folder, make it whole, give it its name."""
    with staged(recipe, config, folder, identity) as attempt:
        wanted = devices.choose()
        devices.pin(wanted)
        job = job_of(attempt, wanted)
        say(f"{attempt.phase} {recipe.name} at rank {config['lora_rank']} -> {paths.relative(folder)}")
        halved = bool(os.environ.get("PARAGEN_HALVE_BATCH"))
        job["config"] |= devices.share_batch(
            config, len(wanted), halved, base_models.has_processor(base_of(recipe, config))
        )
        if len(wanted) > 1:
            spread(job, len(wanted))
        else:
            from paragen.training import process  # imports LLaMA-Factory: after the devices are pinned

            process.train(job)
        if attempt.phase == "finetune":
            check_last(attempt.staging)
        complete(attempt, json.loads((attempt.staging / "facts.json").read_bytes()))


class Attempt(NamedTuple):
    """One try at a run: what is trained, and the staging folder that becomes its run folder."""

    recipe: Path  # absolute: the training changes the current folder
    config: dict
    folder: Path
    identity: dict
    staging: Path
    id: str
    started: str

    @property
    def phase(self) -> str:
        return render.phase_of(self.config)


@contextlib.contextmanager
def staged(recipe: Path, config: dict, folder: Path, identity: dict) -> Iterator[Attempt]:
    """A new attempt at a run while the body trains and completes it; what is left of its staging folder is removed."""
    attempt, started = secrets.token_hex(4), now()
    staging = files.beside(folder, f"staging-{attempt}")
    if render.phase_of(config) == "pretrain" and config.get("resume_from_checkpoint"):
        say(f"save_steps is {config.get('save_steps')}, not 1: this run resumes and trains on, but collects nothing")
    staging.mkdir(parents=True)
    try:
        yield Attempt(recipe.absolute(), config, folder, identity, staging, attempt, started)
    except RuntimeError as error:
        if shutil.disk_usage(folder.parent).free < FULL:  # torch.save says "unexpected pos" and hides the cause
            raise UserError(
                f"{paths.relative(folder.parent)}: the disk is full; free some space and run it again"
            ) from error
        raise
    finally:
        files.remove_folder(staging)


def job_of(attempt: Attempt, wanted: list[str]) -> dict:
    """What train_worker.py is told: see `train` there. `wanted` are the devices."""
    key = run_identity.tokens_key(attempt.identity) if os.environ.get("PARAGEN_TOKENS") else None
    return {
        "recipe": str(attempt.recipe),
        "config": dict(attempt.config),
        "staging": str(attempt.staging),
        "devices": wanted,
        "pictures": any(data["pictures"] for data in attempt.identity["data"]),
        "tokens": str(Path(os.environ["PARAGEN_TOKENS"], key)) if key else None,
    }


def complete(attempt: Attempt, facts: dict) -> None:
    """Make a trained staging folder whole and give it the run folder's name; `facts` are the training's."""
    staging, folder, identity, config = attempt.staging, attempt.folder, attempt.identity, attempt.config
    facts = facts | attempt_facts(attempt.id, attempt.started, now())
    facts = {"seed": config.get("seed", render.DEFAULT_SEED), **facts}
    finish = finish_finetune if attempt.phase == "finetune" else finish_pretrain
    checkpoints = finish(staging, folder, identity)
    if attempt.phase == "finetune":
        facts["adapter_config_sha256"] = files.sha256_of(staging / paths.ADAPTER_CONFIG)
    if changed := run_identity.changes(identity, run_identity.identity_of(attempt.recipe, config)):
        raise UserError(f"{'; '.join(changed)}: changed while it was trained on; run it again")
    manifest = new_manifest(folder, attempt.phase, config["lora_rank"], identity, checkpoints, facts)
    write_manifest(staging, manifest)
    check_attempt(folder)
    files.publish_folder(staging, folder)
    say(f"done: {paths.relative(folder)}, {len(checkpoints)} checkpoints")


def check_last(staging: Path) -> None:
    """Raise unless the last collected checkpoint is the adapter that LLaMA-Factory itself saved at its end."""
    entries = json.loads((staging / "collected.json").read_bytes())
    last = staging / run_files.checkpoint_name(entries[-1]["step"]) if entries else None
    if last and not finishing.same_tensors(last, staging / paths.ADAPTER):
        raise RuntimeError("the last collected checkpoint is not the adapter that LLaMA-Factory saved at its end")


def finish_finetune(staging: Path, folder: Path, identity: dict) -> list[CheckpointEntry]:
    """Make a staging folder a collection, all but its manifest; the entries of its checkpoints."""
    entries = [CheckpointEntry(**entry) for entry in json.loads((staging / "collected.json").read_bytes())]
    kept = identity["recipe"].get("save_total_limit")
    if not entries or (kept and len(entries) != kept):
        raise UserError(
            f"{paths.relative(folder)}: training stopped early, {len(entries)} of {kept} checkpoints were collected"
        )
    finishing.read_back(staging, entries)
    finishing.check_finite(staging / entries[-1].file_name)
    finishing.set_base_name(staging / paths.ADAPTER_CONFIG, identity["base_model"])
    finishing.draw_loss(staging, folder.name, kept_from=entries[0].step)
    names = {entry.file_name for entry in entries}
    finishing.tidy(staging, {*names, *run_files.BESIDE})
    return entries


def finish_pretrain(staging: Path, folder: Path, identity: dict) -> list[CheckpointEntry]:
    """Tidy a staging folder down to resumable checkpoints, log and picture; the entries of its checkpoints."""
    saved = sorted((p for p in staging.iterdir() if paths.CHECKPOINT.fullmatch(p.name)), key=run_identity.step_of)
    if not saved:
        raise UserError(f"{paths.relative(folder)}: training ended without a checkpoint; set save_steps in the recipe")
    finishing.check_finite(saved[-1] / paths.ADAPTER)
    with open(staging / run_files.LOG, encoding="utf-8") as file:
        logged = {line["current_steps"]: line for line in map(json.loads, file) if "loss" in line}
    entries = []
    for checkpoint in saved:
        resumed = {path.name for path in checkpoint.iterdir() if run_identity.is_resumed(path.name)}
        finishing.tidy(checkpoint, {paths.ADAPTER_CONFIG, "scaler.pt", *resumed})
        finishing.set_base_name(checkpoint / paths.ADAPTER_CONFIG, identity["base_model"])
        step = run_identity.step_of(checkpoint)
        log = logged.get(step, {})
        size, sha256 = files.size_of(checkpoint.iterdir()), run_identity.pretrain_of(checkpoint)["sha256"]
        entries.append(CheckpointEntry(step, log.get("loss"), log.get("lr"), size, sha256))
    finishing.draw_loss(staging, folder.name)
    finishing.tidy(staging, {*(p.name for p in saved), run_files.LOG, run_files.PICTURE})
    return entries


def base_of(recipe: Path, config: dict) -> Path:
    """The base model's folder of a rendered recipe."""
    return render.resolve(recipe, config["model_name_or_path"])


def check_attempt(folder: Path, attempt: str | None = None) -> None:
    """Raise UserError when a sweep gave this run to another attempt because this one was thought dead.

    `attempt` is the id of this one (default: as the sweep told this process; a pack has an id per cell).
    """
    mine, latest = attempt or os.environ.get("PARAGEN_ATTEMPT"), files.beside(folder, "attempt")
    if mine and (not latest.is_file() or latest.read_text() not in mine.split(",")):
        raise UserError(f"{paths.relative(folder)}: another attempt took this run over; nothing of this one is kept")


def drop_claim(folder: Path) -> None:
    """Forget that a sweep gave this run to this attempt: it is whole. A sweep that is killed now leaves no claim."""
    mine, claim = os.environ.get("PARAGEN_ATTEMPT"), files.beside(folder, "attempt")
    if mine and claim.is_file() and claim.read_text() in mine.split(","):
        claim.unlink()


def spread(job: dict, count: int) -> None:
    """Run the job in one process per device, through torchrun on our own script; they die with this process."""
    path = Path(job["staging"], "job.json")
    files.write_json(path, job)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *launcher, "--module", "paragen.training.process", path]
    child = subprocess.Popen(command, env=cli.environment_for_modules(), preexec_fn=cli.end_with_parent)
    try:
        status = child.wait()
    finally:
        child.terminate()
        child.wait()
    if status:
        raise UserError(f"training on {count} devices failed with status {status}; the cause stands above")


def now() -> str:
    """The time as the manifest writes it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
