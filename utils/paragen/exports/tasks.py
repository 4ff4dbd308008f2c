"""Formats with one adapter a task: which checkpoint stands for a dataset, its descriptions, what is held out."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import checkpoints, derived, task_descriptions
from paragen.collection.index import Chosen
from paragen.collection.manifest import CheckpointEntry
from paragen.common import files, paths, settings
from paragen.common.cli import UserError
from paragen.exports import best_step, one_of_each

# The keys of an adapter_config.json that PEFT 0.15 stops at, with the values at which leaving them out changes nothing.
LATER_KEYS: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,), "arrow_config": (None,), "ensure_weight_tying": (None, False),
    "qalora_group_size": (None, 16), "target_parameters": (None, []), "use_qalora": (None, False),
}  # fmt: skip
# What PEFT multiplies the factors by, and what they are factors of: adapters that differ here are of different kinds.
KIND = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "bias")
LIKE = "kind_sha256"  # in a part's source: the hash of all that adapters of one export share
KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")


class Task(NamedTuple):
    """A dataset with the adapter that stands for it."""

    name: str  # the dataset's
    chosen: Chosen
    entry: CheckpointEntry
    config: dict[str, Any]  # adapter_config.json, without what PEFT 0.15 does not know
    shapes: dict[str, tuple[int, ...]]  # by PEFT's key
    descriptions: list[str]
    held_out: bool  # named by VAL


def planned(chosen: list[Chosen], format_name: str) -> list[Task]:
    """The tasks of an export, in the order of their names.

    Raises UserError for what a format with one adapter a task cannot hold, or reads silently in a wrong way: several
    models, ranks or seeds, two collections of a dataset, adapters of different kinds, other layers than those of a
    Llama-like model, and a dataset without descriptions.
    """
    one_of_each.check(chosen, format_name)
    held_out = held_out_names([one.manifest.dataset for one in chosen])
    steps = settings.text("STEPS") or "last"
    found = [task_of(one, steps, one.manifest.dataset in held_out) for one in chosen]
    for task in found[1:]:
        check_alike(task, found[0])
    if all(task.held_out for task in found):
        raise UserError(f"VAL={' '.join(held_out)}: leaves no dataset to train on; name fewer")
    return sorted(found, key=lambda task: task.name)


def held_out_names(names: Sequence[str]) -> list[str]:
    """The datasets that VAL names. Raises UserError for one that is not among `names`, those to export."""
    return [paths.choose(value, names, "exported dataset") for value in settings.values("VAL")]


def task_of(one: Chosen, steps: str, held_out: bool) -> Task:
    """A collection as a task; `steps` as STEPS has it: `last` or `best`."""
    if {"/", "\\"} & set(one.manifest.dataset) or one.manifest.dataset.startswith("."):
        raise UserError(f"{one.name}: {one.manifest.dataset!r} cannot name a task's folder; rename the dataset")
    entry = entry_of(one, steps)
    shapes = checkpoints.layout_of(next(checkpoints.open_all(one.folder, [entry])))
    checkpoints.layers_of(shapes)
    if strange := sorted(key for key in shapes if not KEY.fullmatch(key)):
        raise UserError(
            f"{one.name}: {strange[0]}: the format has the layers model.layers.<n> of Llama-like models alone; "
            "FORMAT=peft and canonical take any layer"
        )
    config = for_peft_0_15(checkpoints.adapter_config(one.folder, one.manifest), one.name)
    return Task(one.manifest.dataset, one, entry, config, shapes, task_descriptions.required(one.manifest), held_out)


def entry_of(one: Chosen, steps: str) -> CheckpointEntry:
    """The checkpoint that stands for a collection.

    Args:
        one: the collection.
        steps: `last`, or `best`, see `best_step.best_entry`.

    Raises UserError for another value, and for `best` of a collection without scores to choose by.
    """
    if steps not in ("last", "best"):
        raise UserError(f"STEPS={steps}: is not known for a format with one adapter a dataset; known: last, best")
    return one.manifest.checkpoints[-1] if steps == "last" else best_step.best_entry(one)


def for_peft_0_15(config: dict[str, Any], name: str) -> dict[str, Any]:
    """An adapter_config.json without the keys that PEFT 0.15 does not know. Raises UserError where one says something.

    `name` is the collection's.
    """
    for key, silent in LATER_KEYS.items():
        if config.get(key) not in silent:
            raise UserError(f"{name}: adapter_config.json has {key}={config[key]!r}, which PEFT 0.15 does not know")
    return {key: value for key, value in config.items() if key not in (*LATER_KEYS, "peft_version")}


def check_alike(task: Task, first: Task) -> None:
    """Raise UserError where two adapters differ in scaling, target layers or shapes, which no reader compares."""
    for key in KIND:
        if (task.config.get(key) or None) != (first.config.get(key) or None):
            one, other = f"{key} {task.config.get(key)}", f"{first.chosen.name} has {first.config.get(key)}"
            raise UserError(
                f"{task.chosen.name}: has {one}, {other}; the first adapter's would count for all: choose with "
                "DATASET=.. those with the same recipe"
            )
    for key in task.shapes.keys() | first.shapes.keys():
        if task.shapes.get(key) != first.shapes.get(key):
            raise UserError(
                f"{task.chosen.name}: has other target layers or shapes than {first.chosen.name} ({key}); choose with "
                "DATASET=.. those with the same recipe"
            )


def modules_of(task: Task) -> list[str]:
    """The last names of a task's adapted layers: `q_proj`."""
    return sorted({found[2] for key in task.shapes if (found := KEY.fullmatch(key))})


def source_of(task: Task, format_name: str, dtype: str) -> dict[str, Any]:
    """What decides the content of a task's adapter, and what has to be the same for all adapters in an export."""
    base = task.chosen.manifest.base_model
    kind = [base and base.sha256, task.shapes, [task.config.get(key) or None for key in KIND]]
    return {
        "format": format_name, "sha256": task.chosen.manifest.sha256, "step": task.entry.step, "dtype": dtype,
        LIKE: files.sha256_of_value(kind),
    }  # fmt: skip


def check_out(out: Path, sources: dict[str, dict[str, Any]]) -> None:
    """Raise UserError where OUT has the adapter of another dataset from an earlier export that is of another kind.

    `sources` are those of the adapters to export, by their paths in OUT.
    """
    kind = next(iter(sources.values()))[LIKE]
    for name, entry in derived.read_record(out).items():
        if name not in sources and entry["source"].get(LIKE, kind) != kind and (out / name).exists():
            raise UserError(
                f"{paths.relative(out / name)}: is of another model, rank or recipe; take another OUT for this one"
            )


def as_yaml(value: Any) -> str:
    """A value as YAML, in the order of its keys."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
