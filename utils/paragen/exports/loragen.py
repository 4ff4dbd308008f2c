"""Collections as LoRAGen's first stage reads them: one adapter a dataset, its q and v projections in float32.

    FORMAT=loragen MODEL=.. RANK=8 [VAL="BoolQ"] [STEPS=best] [SLICE=1] OUT=~/loragen-data python utils/export.py

Writes
    loras/<dataset>/adapter_model.safetensors    a PEFT adapter, with four stacked tensors more (below); its data_dir
    loras/<dataset>/adapter_config.json
    descriptions/<dataset>/metadata.yaml         the yaml_root of its emb_generate.py
    split.json                                   which datasets are in `train` and, named by VAL, in `val`
    config.yaml                                  the paths and sizes, to be merged into one of its configs:
        python stage1/main_stage1.py -b stage1/configs/lora_config_bench_tasks.yaml OUT/config.yaml ...
Its training step looks in the adapter's file for `decoder_only.lora_{qa,qb,va,vb}`, the factors A and B of the query
and value projections of all layers: layers x rank x inputs, and layers x outputs x rank. PEFT passes over them.
"""

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from paragen.collection import checkpoints, derived
from paragen.collection.index import Chosen
from paragen.common import paths, settings
from paragen.common.cli import UserError, say
from paragen.exports import checkpoint_copies, parts, tasks
from paragen.exports.tasks import Task

FORMAT = "loragen"
READ = ("q_proj", "v_proj")
DESCRIPTIONS = 20  # that its emb_generate.py reads of a task
BLOCKS = 288  # the rows of its decoder's module embedding where the config sets no max_blocks; four a layer are used


class Sizes(NamedTuple):
    """What its config has to say of the adapters."""

    layers: int
    rank: int
    inputs: int
    query: int  # outputs of the query projection
    value: int  # outputs of the value projection


def export(chosen: list[Chosen], out: Path, dtype: str | None) -> None:
    """Export one adapter of each dataset.

    Args:
        chosen: the collections, one a dataset, of one model and rank.
        out: the folder to write below.
        dtype: None or float32, the only one that its training takes.

    Raises UserError, before anything is written, for collections that LoRAGen refuses or reads in a wrong way.
    """
    if dtype not in (None, "float32"):
        raise UserError(f"DTYPE={dtype}: LoRAGen trains on float32 alone; omit it")
    plan = tasks.planned(chosen, FORMAT)
    cut = settings.switch("SLICE")
    check_layers(plan[0], cut)
    sizes = sizes_of(plan[0])
    sources = {f"loras/{task.name}": tasks.source_of(task, FORMAT, "float32") for task in plan}
    tasks.check_out(out, sources)
    made: list[tuple[str, dict[str, Any], Callable[[Path], None]]] = [
        (name, source, partial(write_adapter, task)) for (name, source), task in zip(sources.items(), plan, strict=True)
    ]
    for task in plan:
        texts = {"descriptions": task.descriptions}
        made.append((f"descriptions/{task.name}", {"format": FORMAT, **texts}, partial(write_descriptions, texts)))
    for name, value in (("split.json", split_of(plan)), ("config.yaml", config_of(sizes, out))):
        made.append((name, {"format": FORMAT, "content": value}, partial(write_file, name, value)))
    missing = [(name, source) for name, source, _ in made if not derived.is_there(out, name, source)]
    for name, source in missing:
        derived.check_replaceable(out, name, source)
    values = 2 * sizes.layers * sizes.rank * (2 * sizes.inputs + sizes.query + sizes.value)
    derived.check_room(out, 4 * values * sum(name.startswith("loras/") for name, _ in missing))
    for name, source, write in made:
        parts.make(out, name, source, write)
    print_notes(plan, out, cut)


def check_layers(task: Task, cut: bool) -> None:
    """Raise UserError unless q and v were trained, alone or with SLICE=1 beside others, in every layer and alike."""
    trained = tasks.modules_of(task)
    found = f"{task.chosen.name}: was trained on {', '.join(trained)}; LoRAGen reads q_proj and v_proj"
    again = "collect it again with `lora_target: q_proj,v_proj` in both recipes"
    if not set(READ) <= set(trained):
        raise UserError(f"{found}: {again}")
    if len(trained) > len(READ) and not cut:
        raise UserError(
            f"{found} alone: {again}, or cut them out with SLICE=1 (its scores are then not those of what is exported)"
        )
    sizes_of(task)


def sizes_of(task: Task) -> Sizes:
    """The sizes that all layers share. Raises UserError where they differ or where its reader takes A for B."""
    shapes = layer_shapes(task)
    if list(shapes) != list(range(len(shapes))) or any(shape != shapes[0] for shape in shapes.values()):
        raise UserError(
            f"{task.chosen.name}: q_proj and v_proj are not alike in every layer from the first on, as LoRAGen expects"
        )
    query_a, query_b, value_a, value_b = shapes[0]
    if query_a is None or query_b is None or value_a is None or value_b is None or query_a != value_a:
        raise UserError(f"{task.chosen.name}: q_proj and v_proj differ in inputs or rank, which LoRAGen refuses")
    sizes = Sizes(len(shapes), query_a[0], query_a[1], query_b[0], value_b[0])
    if sizes.rank >= min(sizes[2:]):
        raise UserError(
            f"{task.chosen.name}: rank {sizes.rank} is not below the layers' widths {', '.join(map(str, sizes[2:]))}, "
            "by which LoRAGen tells ranks from widths; choose a lower RANK=.."
        )
    return sizes


def layer_shapes(task: Task) -> dict[int, tuple[tuple[int, ...] | None, ...]]:
    """By layer, the shapes of q_proj's A and B and of v_proj's A and B."""
    numbers = sorted({int(found[1]) for key in task.shapes if (found := tasks.KEY.fullmatch(key)) and found[2] in READ})
    return {number: tuple(task.shapes.get(key_of(number, *part)) for part in PARTS.values()) for number in numbers}


PARTS = {"qa": ("q_proj", "A"), "qb": ("q_proj", "B"), "va": ("v_proj", "A"), "vb": ("v_proj", "B")}


def key_of(layer: int, module: str, half: str) -> str:
    """PEFT's key of a factor."""
    return f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{half}.weight"


def write_adapter(task: Task, folder: Path) -> None:
    """Write a task's adapter to the new folder `folder`."""
    import torch
    from safetensors.torch import save_file

    path = task.chosen.folder / task.entry.file_name
    found = checkpoints.load(path, task.entry.bytes, task.entry.sha256)
    tensors: dict[str, torch.Tensor] = {}
    for name, part in PARTS.items():
        keys = [key_of(layer, *part) for layer in layer_shapes(task)]
        tensors |= {key: checkpoints.cast(found[key], torch.float32, key, path).contiguous() for key in keys}
        tensors[f"decoder_only.lora_{name}"] = torch.stack([tensors[key] for key in keys])
    folder.mkdir()
    save_file(tensors, folder / paths.ADAPTER, metadata={"format": "pt"})
    checkpoint_copies.write_config(folder, {**task.config, "target_modules": list(READ)})


def write_descriptions(texts: dict[str, Any], folder: Path) -> None:
    """Write a task's metadata.yaml to the new folder `folder`."""
    folder.mkdir()
    (folder / "metadata.yaml").write_text(tasks.as_yaml(texts), encoding="utf-8")


def write_file(name: str, value: Any, path: Path) -> None:
    """Write split.json or config.yaml, by `name`, at `path`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n" if name.endswith(".json") else tasks.as_yaml(value)
    path.write_text(text, encoding="utf-8")


def split_of(plan: list[Task]) -> dict[str, list[str]]:
    """The content of split.json."""
    return {
        "train": [task.name for task in plan if not task.held_out],
        "val": [task.name for task in plan if task.held_out],
    }


def config_of(sizes: Sizes, out: Path) -> dict[str, Any]:
    """The content of config.yaml: what differs from its own configs."""
    outputs = {"d_out_q": sizes.query, "d_out_v": sizes.value}
    encoder = {"d_model": sizes.inputs, "rank": sizes.rank, "dec_only": True, "d_in": sizes.inputs, **outputs}
    decoder = {
        "lora_rank": sizes.rank, "plm_hidden_size": sizes.inputs, "num_layers": sizes.layers, "dec_only": True,
        "dec_d_in": sizes.inputs, "dec_dq_out": sizes.query, "dec_dv_out": sizes.value,
        **({"max_blocks": 4 * sizes.layers} if 4 * sizes.layers > BLOCKS else {}),
    }  # fmt: skip
    ddconfig = {"encoder": {"params": encoder}, "decoder": {"params": decoder}}
    loss = {"params": {"num_layers": sizes.layers}}
    data = {"data_dir": str(out / "loras"), "split_file": str(out / "split.json")}
    return {"model": {"params": {"lossconfig": loss, "ddconfig": ddconfig}}, "data": {"params": data}}


def print_notes(plan: list[Task], out: Path, cut: bool) -> None:
    """Print what LoRAGen does not say."""
    if cut and len(tasks.modules_of(plan[0])) > len(READ):
        say(
            "note: SLICE=1 cuts q_proj and v_proj out of adapters that were trained with other layers, too: the scores "
            "of the collections are not those of the exported adapters"
        )
    if few := [task.name for task in plan if len(task.descriptions) < DESCRIPTIONS]:
        say(f"note: fewer than the {DESCRIPTIONS} descriptions that LoRAGen reads of a task: {', '.join(few)}")
    base, ours = "stage1/configs/lora_config_bench_tasks.yaml", shlex.quote(str(out / "config.yaml"))
    say(
        f"note: in LoRAGen: python stage1/main_stage1.py -b {base} {ours} -n paragen --train true; its "
        f"emb_generate.py takes {out / 'descriptions'} as the root of its YAML files"
    )
