"""Collections as ordinary PEFT adapter folders, one per step.

    FORMAT=peft [STEPS=all|last|every:10] DATASET=ARC-c OUT=~/adapters python utils/export.py

Writes OUT/<category>/<dataset>/<run folder>/checkpoint-<step>/ with
    adapter_model.safetensors    the collected bytes (DTYPE=.. casts them)
    adapter_config.json          the collection's
    README.md                    a model card: what it is and how to load it
PeftModel.from_pretrained loads each of them, and engines that serve LoRA folders (vLLM, SGLang) do, too; a note names
the reason where an engine will refuse one. STEPS=every:10 takes every tenth checkpoint, counted back from the last.
"""

import json
import re
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from paragen.collection import checkpoints, derived, evaluation
from paragen.collection.index import Chosen
from paragen.collection.manifest import BaseModel, CheckpointEntry
from paragen.common import paths, settings
from paragen.common.cli import UserError, say
from paragen.exports import checkpoint_copies, parts

FORMAT = "peft"
# The values that vLLM takes for --max-lora-rank (vllm/config/lora.py); it refuses an adapter of a larger rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Layers of Llama-like models for which vLLM and SGLang have LoRA; they have none for those of GPT-2 and BERT.
SERVED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class Planned(NamedTuple):
    """A collection and what its export needs."""

    chosen: Chosen
    entries: Sequence[CheckpointEntry]  # the selected checkpoints
    config: dict[str, Any]  # adapter_config.json
    keys: list[str]
    stored: str  # the dtype
    scores: dict[int, str]  # a text for the model card by step, of the evaluated checkpoints


def export(chosen: list[Chosen], out: Path, dtype: str | None) -> None:
    """Export the steps that STEPS selects of each collection.

    Args:
        chosen: the collections.
        out: the folder to write below.
        dtype: what the checkpoints are cast to; None keeps theirs.

    Raises UserError, before anything is written, for a value of STEPS that is not known and for too little disk.
    """
    steps = settings.text("STEPS") or "all"
    plan = [planned(one, steps) for one in chosen]
    missing = [one for one in plan if not derived.is_there(out, one.chosen.name, source_of(one, dtype))]
    for one in missing:
        derived.check_replaceable(out, one.chosen.name, source_of(one, dtype))
    sizes = [checkpoint_copies.bytes_of(entry, one.stored, dtype) for one in missing for entry in one.entries]
    derived.check_room(out, sum(sizes))
    for one in plan:
        parts.make(out, one.chosen.name, source_of(one, dtype), partial(write_adapters, one, dtype))
    for one in plan:
        for line in [*refusals_of(one.config, one.keys), *rank_notes(one.config["r"])]:
            say(f"note: {one.chosen.name}: {line}")


def planned(chosen: Chosen, steps: str) -> Planned:
    """What the export of a collection needs; `steps` as STEPS selects them."""
    entries = selected(chosen.manifest.checkpoints, steps)
    config = checkpoints.adapter_config(chosen.folder, chosen.manifest)
    first = next(checkpoints.open_all(chosen.folder, entries))
    keys = sorted(first.keys())
    return Planned(chosen, entries, config, keys, checkpoints.dtype_of(first), scores_of(chosen))


def scores_of(chosen: Chosen) -> dict[int, str]:
    """A text for the model card of each evaluated step: score, metric, rows, and the base model's score."""
    shown = evaluation.shown(evaluation.read(chosen.folder, chosen.manifest))
    if shown is None:
        return {}
    base = evaluation.text_of(shown, shown["base"])
    about = f"{evaluation.METRICS[shown['metric']]}, {evaluation.rows_text(shown)}"
    about += f"; its base model {base}" if base else ""
    texts = {score["step"]: evaluation.text_of(shown, score) for score in shown["checkpoints"]}
    return {step: f"{text}: {about}" for step, text in texts.items() if text}


def selected(entries: Sequence[CheckpointEntry], steps: str) -> Sequence[CheckpointEntry]:
    """The checkpoints that STEPS selects: `all`, `last`, or `every:<n>`, counted back from the last."""
    every = re.fullmatch(r"every:0*([1-9][0-9]{0,8})", steps)
    if steps not in ("all", "last") and not every:
        raise UserError(f"STEPS={steps}: is not known; known: all, last, every:<n>, such as every:10")
    stride = 1 if steps == "all" else int(every[1]) if every else len(entries)
    return entries[::-1][:: max(stride, 1)][::-1]


def source_of(one: Planned, dtype: str | None) -> dict[str, Any]:
    """What decides the content of a collection's folder."""
    return {
        "format": FORMAT,
        "collection": one.chosen.name,
        "sha256": one.chosen.manifest.sha256,
        "steps": [entry.step for entry in one.entries],
        "dtype": dtype or one.stored,
        **evaluation.scores_mark(one.chosen.folder),
    }


def modules_of(keys: list[str]) -> list[str]:
    """The adapted modules, as the base model names them."""
    return sorted({re.sub(r"\.lora_.*", "", key).removeprefix(checkpoints.PEFT_PREFIX) for key in keys})


def refusals_of(config: dict[str, Any], keys: list[str]) -> list[str]:
    """The reasons why vLLM or SGLang refuse an adapter (vllm/lora/peft_helper.py, sglang's lora_config.py)."""
    lines = []
    unusual = {
        "bias": config.get("bias", "none") != "none",
        "modules_to_save": bool(config.get("modules_to_save")),
        "use_dora": bool(config.get("use_dora")),
        "rank_pattern": bool(config.get("rank_pattern")),
        "alpha_pattern": bool(config.get("alpha_pattern")),
    }
    if found := [key for key, there in unusual.items() if there]:
        lines.append(f"vLLM and SGLang do not serve adapters with {', '.join(found)}")
    if unknown := sorted({module.rpartition(".")[2] for module in modules_of(keys)} - SERVED):
        lines.append(f"vLLM and SGLang have no LoRA for these layers: {', '.join(unknown)}; PEFT loads them")
    if isinstance(config["target_modules"], str):
        lines.append("SGLang takes target_modules as a list of names, not as a pattern")
    return lines


def rank_notes(rank: int) -> list[str]:
    """The option that vLLM needs for a rank above its default of 16: a list of one line, or an empty one."""
    if rank <= 16:
        return []
    fitting = vllm_rank(rank)
    if fitting is None:
        return [f"vLLM serves ranks up to {VLLM_RANKS[-1]}, not {rank}"]
    return [f"vLLM serves rank {rank} when started with --max-lora-rank {fitting}"]


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM that allows a rank; None for one that is too large."""
    return next((value for value in VLLM_RANKS if value >= rank), None)


def write_adapters(one: Planned, dtype: str | None, staging: Path) -> None:
    """Write the adapter folders of a collection's selected steps into the new folder `staging`."""
    for entry in one.entries:
        write_adapter(one, entry, staging / f"checkpoint-{entry.step}", dtype)


def write_adapter(one: Planned, entry: CheckpointEntry, folder: Path, dtype: str | None) -> None:
    """Write the adapter folder of one step."""
    folder.mkdir(parents=True)
    checkpoint_copies.write_checkpoint(one.chosen.folder, entry, folder / paths.ADAPTER, dtype)
    config = json.loads(checkpoints.adapter_config_bytes(one.chosen.folder, one.chosen.manifest))
    checkpoint_copies.write_config(folder, config)
    (folder / "README.md").write_text(card_of(one, entry, dtype), encoding="utf-8")


def in_markdown(text: str) -> str:
    """A text from a manifest as Markdown shows it literally: on one line, without links, code or HTML."""
    return re.sub(r"([\\`<>\[\]])", r"\\\1", " ".join(text.split()))


def card_of(one: Planned, entry: CheckpointEntry, dtype: str | None) -> str:
    """The model card of one step. Its key `base_model` needs a hub id, so a base without one is not named there."""
    manifest = one.chosen.manifest
    base = manifest.base_model or BaseModel()
    named = base.hub_id or (f"models/{base.name}" if base.name else "its base model")
    kind = "ImageTextToText" if any(".language_model." in key for key in one.keys) else "CausalLM"
    rank = vllm_rank(one.config["r"])
    facts = {
        "collection": one.chosen.name,
        "step": entry.step,
        "loss": entry.loss,
        "score of the collected checkpoint": one.scores.get(entry.step),
        "rank": manifest.rank,
        "seed": manifest.seed,
        "sha256 of the collected checkpoint": entry.sha256,
        "cast to": None if dtype == one.stored else dtype,
    }
    lines = [
        "---",
        *(yaml.safe_dump({"base_model": base.hub_id}, width=1000).splitlines() if base.hub_id else []),
        "library_name: peft",
        "tags: [lora, paragen]",
        "---",
        "",
        f"# {in_markdown(manifest.dataset)}, step {entry.step}: LoRA for {in_markdown(base.name or named)}",
        "",
        *(f"- {what}: {in_markdown(str(value))}" for what, value in facts.items() if value is not None),
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import AutoModelFor{kind}",
        "",
        f"base = AutoModelFor{kind}.from_pretrained({json.dumps(named, ensure_ascii=False)})",
        'model = PeftModel.from_pretrained(base, "this folder")',
        "```",
    ]
    if rank and not refusals_of(one.config, one.keys):
        command = (
            f"vllm serve {shlex.quote(named)} --enable-lora --max-lora-rank {rank} --lora-modules name=this-folder"
        )
        lines += ["", f"`` {command} ``" if "`" in command else f"`{command}`"]
    return "\n".join(lines) + "\n"
