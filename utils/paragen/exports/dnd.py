"""Collections as Drag-and-Drop LLMs reads them: OUT is the root of its checkout, or an empty folder to copy into one.

    FORMAT=dnd DATASET="ARC-c BoolQ" MODEL=qwen2.5-0.5b RANK=8 OUT=~/Drag-and-Drop-LLMs python utils/export.py

Writes
    data/<task>/<dataset>/<step>.safetensors     alone in their folder, since every file there is read as a checkpoint
    prepare/data/<dataset>_train.json            the rows that were trained on; common sense scripts read this name,
    prepare/data/<dataset>.json                  the scripts of all other tasks this one
    workspace/datasets/<task>/<dataset>/criterion_weight.pt      the weights of its loss, where it has a tokenizer
Tasks are named as its scripts name them: common_sense_reasoning, and coding, math and vllm with the size of a Qwen2.5
(coding7B, vllm3B). For a model without a task there, the task has the model's name: coding_gpt2. These paths name no
model, rank or seed, so an export holds one of each. Drag-and-Drop's scripts cast to bfloat16 themselves.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import checkpoints, derived
from paragen.collection.index import Chosen
from paragen.collection.manifest import CheckpointEntry
from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.exports import checkpoint_copies, dnd_prompts, dnd_weights, one_of_each, parts
from paragen.exports.one_of_each import listed, name_of

FORMAT = "dnd"
# What its training scripts set: real_length (checkpoints read of each dataset), num_texts (prompts drawn for a pair).
TASKS = {
    "common_sense_reasoning": (50, 128),
    "coding1.5B": (80, 16),
    "coding7B": (100, 16),
    "math1.5B": (80, 32),
    "math7B": (80, 16),
    "vllm3B": (100, 16),
}
PREFIXES = {
    "common-sense-reasoning": "common_sense_reasoning",
    "coding": "coding",
    "math": "math",
    "multimodal": "vllm",
}
# The models and ranks that it has a tokenizer for, by hidden size, width of the MLP and number of layers.
TOKENIZERS: dict[tuple[int | None, ...], int] = {
    (896, 4864, 24): 8,
    (1536, 8960, 28): 16,
    (3584, 18944, 28): 16,
    (2048, 11008, 36): 16,
}
# A text layer below a vision-language model is named `model.language_model.layers` by transformers 5,
# `language_model.model.layers` by some older ones; Drag-and-Drop reads the number where a text model has it.
KEY = re.compile(
    r"base_model\.model\.(?:model\.language_model|language_model\.model|model)\.layers\."
    r"(\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:up|gate|down)_proj)\.lora_[AB]\.weight)"
)


class Planned(NamedTuple):
    """A collection and what its export needs."""

    chosen: Chosen
    task: str
    dataset: str
    keys: dict[str, str]  # Drag-and-Drop's key by the collection's
    shapes: dict[str, list[int]]  # by Drag-and-Drop's keys
    stored: str  # the dtype

    @property
    def folder(self) -> str:
        return f"data/{self.task}/{self.dataset}"

    @property
    def prompt_files(self) -> list[str]:
        ends = ["_train.json"] if self.task == PREFIXES["common-sense-reasoning"] else ["_train.json", ".json"]
        return [f"prepare/data/{self.dataset}{end}" for end in ends]

    @property
    def weights_file(self) -> str:
        return dnd_weights.name_of(self.task, self.dataset)

    @property
    def has_tokenizer(self) -> bool:
        """Whether Drag-and-Drop has a tokenizer for the rank and the sizes of these layers."""
        widths = {key.split(".")[-3]: shape[1] for key, shape in self.shapes.items() if key.endswith("lora_A.weight")}
        layers = {key.split(".")[4] for key in self.shapes}
        known = TOKENIZERS.get((widths.get("q_proj"), widths.get("down_proj"), len(layers)))
        return known == self.chosen.manifest.rank and len(widths) == 7


def export(chosen: list[Chosen], out: Path, dtype: str | None) -> None:
    """Export collections of one model, rank and seed.

    Args:
        chosen: the collections.
        out: the root of a Drag-and-Drop checkout or an empty folder.
        dtype: what the checkpoints are cast to; None keeps theirs.

    Raises UserError, before anything is written, when an export cannot hold them all or one has unsupported layers.
    """
    one_of_each.check(chosen, FORMAT)
    plan = [planned(one) for one in chosen]
    sources = {one.folder: source_of(one, dtype) for one in plan}
    check_alike(sources, out)
    kept = [dnd_prompts.kept(one.chosen, one.prompt_files, out) for one in plan]
    for one in plan:
        if one.has_tokenizer:
            dnd_weights.check(one.chosen, out, one.weights_file)
    missing = [one for one in plan if not derived.is_there(out, one.folder, sources[one.folder])]
    for one in missing:
        derived.check_replaceable(out, one.folder, sources[one.folder])
    sizes = [checkpoint_copies.bytes_of(entry, one.stored, dtype) for one in missing for entry in steps_of(one)]
    derived.check_room(out / "data", sum(sizes))  # which may be a link to a larger disk
    for one, stays in zip(plan, kept, strict=True):
        parts.make(out, one.folder, sources[one.folder], functools.partial(write_steps, one, dtype=dtype))
        for name in one.prompt_files:
            if name not in stays:
                dnd_prompts.write(one.chosen, out, name)
        if one.has_tokenizer:
            width = dnd_weights.token_width(list(one.shapes.items()))
            dnd_weights.write(one.chosen, out, one.weights_file, one.keys, width, dtype or one.stored)
    print_notes(plan, out)


def task_of(category: str, model: str) -> str:
    """The task folder of a category (as in our paths) and a base model's folder name."""
    prefix = PREFIXES[category]
    if category == "common-sense-reasoning":
        return prefix
    size = re.fullmatch(r"Qwen2\.5-(?:VL-)?(\d+(?:\.\d+)?B)(?:-Instruct)?", model, re.IGNORECASE)
    return prefix + size[1].upper() if size else f"{prefix}_{model}"


def planned(chosen: Chosen) -> Planned:
    """What the export of a collection needs. Raises UserError for layers or names that Drag-and-Drop does not read."""
    manifest = chosen.manifest
    if manifest.category not in PREFIXES:
        raise UserError(f"{chosen.name}: lies in no category that has a task there; those are {', '.join(PREFIXES)}")
    first = next(checkpoints.open_all(chosen.folder, manifest.checkpoints))
    names = sorted(first.keys())
    checkpoints.layers_of(names)
    keys = {name: dnd_key(name, chosen.name) for name in names}
    slices = {name: first.get_slice(name) for name in names}
    return Planned(
        chosen,
        task_of(manifest.category, name_of(chosen)),
        manifest.dataset,
        keys,
        {keys[name]: piece.get_shape() for name, piece in slices.items()},
        checkpoints.dtype_of(first),
    )


def dnd_key(key: str, name: str) -> str:
    """PEFT's key as Drag-and-Drop parses it. Raises UserError for one that it does not."""
    found = KEY.fullmatch(key)
    if not found:
        raise UserError(
            f"{name}: {key}: Drag-and-Drop reads model.layers.<n> with q/k/v/o_proj and up/gate/down_proj only; "
            "FORMAT=peft and canonical take any layer"
        )
    return f"{checkpoints.PEFT_PREFIX}model.layers.{found[1]}"


def source_of(one: Planned, dtype: str | None) -> dict[str, Any]:
    """What decides the content of a collection's folder, and what has to be the same for all in an export."""
    manifest = one.chosen.manifest
    return {
        "format": FORMAT,
        "collection": one.chosen.name,
        "sha256": manifest.sha256,
        "model": name_of(one.chosen),
        "rank": manifest.rank,
        "seed": manifest.seed,
        "layers_sha256": files.sha256_of_value(one.shapes),
        "dtype": dtype or one.stored,
    }


def check_alike(sources: dict[str, dict], out: Path) -> None:
    """Raise UserError unless all parts, including those in OUT, have one model, rank, seed and set of layers."""
    there = {
        f"{paths.relative(out)}/{name}": entry["source"]
        for name, entry in derived.read_record(out).items()
        if "layers_sha256" in entry["source"] and (out / name).exists()
    }
    everyone = there | sources
    for key, what in (("model", "model"), ("rank", "rank"), ("seed", "seed"), ("layers_sha256", "set of layers")):
        known = {name: source[key] for name, source in everyone.items() if source[key] is not None}
        first = next(iter(known), None)
        for name, value in known.items():
            if value != known[first]:
                values = "" if key == "layers_sha256" else f" ({value}, not {known[first]})"
                raise UserError(f"{name}: has another {what}{values} than {first}; take another OUT for it")


def steps_of(one: Planned) -> Sequence[CheckpointEntry]:
    """The manifest's entries of a collection's checkpoints."""
    return one.chosen.manifest.checkpoints


def write_steps(one: Planned, staging: Path, dtype: str | None) -> None:
    """Write all checkpoints of a collection into a new folder, and nothing else."""
    staging.mkdir()
    for entry in steps_of(one):
        target = staging / f"{entry.step}.safetensors"
        checkpoint_copies.write_checkpoint(one.chosen.folder, entry, target, dtype, one.keys)


def print_notes(plan: list[Planned], out: Path) -> None:
    """Print a note for each figure of Drag-and-Drop's training scripts that the export does not meet."""
    record = derived.read_record(out)
    for task in dict.fromkeys(one.task for one in plan):
        real, texts = figures_of(task)
        counts = {
            Path(name).name: len(entry["files"] or {})
            for name, entry in record.items()
            if name.startswith(f"data/{task}/") and (out / name).exists()
        }
        counts |= {one.dataset: len(steps_of(one)) for one in plan if one.task == task}
        least = min(counts.values())
        for one in plan:
            if one.task == task:
                print_count_notes(one, counts[one.dataset], least, real)
            rows = dnd_prompts.count(one.chosen, out / one.prompt_files[-1])
            if one.task == task and rows < texts:
                say(
                    f"note: {one.dataset}: {rows} prompts, fewer than the num_texts of {texts} in its {task} scripts, "
                    f"which fail then; set num_texts to {rows} at most"
                )
        if least < real and len(set(counts.values())) > 1:
            numbers = listed(f"{dataset} {count}" for dataset, count in sorted(counts.items()))
            say(f"note: {task}: its datasets have different numbers of checkpoints ({numbers}); use {least} of each")
    print_tokenizer_note(plan[0])


def print_count_notes(one: Planned, count: int, least: int, real: int) -> None:
    """Print a note where a dataset has fewer or more checkpoints than Drag-and-Drop's scripts read of it.

    Args:
        one: the collection.
        count: its checkpoints.
        least: the fewest of any dataset in the export.
        real: the scripts' real_length.
    """
    scripts = f"the real_length of {real} in Drag-and-Drop's {one.task} scripts"
    if count < real:
        say(
            f"note: {one.dataset}: {count} checkpoints, fewer than {scripts}, which would pair those after it with the "
            f"prompts of other datasets; set real_length to {least} in the script that trains and, if you run it, in "
            "workspace/datasets/criterion_weight_for_*.py"
        )
    elif count > real:
        say(
            f"note: {one.dataset}: {count} checkpoints, more than {scripts}, which take {real} of them in the "
            f"arbitrary order of os.listdir; collect with KEEP={real}, or set real_length to {least} there"
        )


def figures_of(task: str) -> tuple[int, int]:
    """real_length and num_texts in the scripts of a task, or else of the first task of its kind."""
    if task in TASKS:
        return TASKS[task]
    kind = re.match("coding|math|vllm", task)
    assert kind is not None  # `task_of` makes no other names
    return next(figures for name, figures in TASKS.items() if name.startswith(kind[0]))


def print_tokenizer_note(one: Planned) -> None:
    """Print a note where Drag-and-Drop has no tokenizer for a rank and the sizes of these layers."""
    if not one.has_tokenizer:
        say(
            f"note: Drag-and-Drop has no tokenizer for {name_of(one.chosen)} at rank {one.chosen.manifest.rank} with "
            "these layers (it has Qwen2.5 0.5B at rank 8, and 1.5B, 7B and VL-3B at rank 16, all linear layers): write "
            f"one there, and {dnd_weights.FILE}, which has a number per token of it"
        )
