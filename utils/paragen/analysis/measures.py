"""Statistics of collections: how far the adapters of the steps are apart, where, and in how many directions.

The files of a collection's statistics (utils/stats.py lists them) are made once, and again when the collection or
METHOD changed. An update is B·A times PEFT's scaling.

Importance of a layer (or of one factor) = m / M, with m the mean over its entries of the standard deviation across the
steps, and M that mean over the entries of all layers. The deviation is the population's, of factors that were first
standardised within each step (mean 0, standard deviation 1 over the factor; a constant factor is 0). So the mean of
the importances over all entries is 1; without any variation every importance is 1. Drag-and-Drop LLMs computes the
same per token, which is a block of columns of a factor; here it is per factor and per layer.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from paragen.analysis import layer_stats as ls
from paragen.analysis import step_reader
from paragen.analysis.stats_files import METHOD
from paragen.collection import checkpoints, index
from paragen.collection.manifest import CheckpointEntry
from paragen.common import files, parallel, paths
from paragen.common.cli import UserError

CPU = torch.device("cpu")
BUDGET = 2 << 30  # bytes of running sums: layers that do not fit are taken in a further pass over the files
CHUNK = 1 << 30  # bytes of the steps that are read at once
COLUMNS = {
    "layer": "the layer's name in PEFT's keys",
    "tensor": "lora_A, lora_B, or update: scaling * B A",
    "rows": "of the matrix", "columns": "of the matrix",
    "mean": "over all entries and steps (factors only)",
    "std": "population standard deviation across steps of an entry, mean over the entries (factors only)",
    "norm_first": "Frobenius norm at the first step", "norm_mean": "mean over steps", "norm_last": "at the last step",
    "change_mean": "Frobenius norm of the difference to the step before, mean over all steps but the first",
    "change_max": "its largest",
    "effective_rank_first": "exp of the entropy of the normalised singular values, at the first step (updates only)",
    "effective_rank_mean": "mean over steps", "effective_rank_last": "at the last step",
    "importance": "see importance.safetensors; an update's is its layer's",
}  # fmt: skip
ARRAYS = {
    "steps": "int64, N: the optimizer steps",
    "sketch": "float32, N x 1024: random projection of a step's updates, the same for all collections of base_model",
    "norm": "float32, L x N: Frobenius norm of each layer's update",
    "change": "float32, L x N: Frobenius norm of the update's difference to the kept step before; first column 0",
    "effective_rank": "float32, L x N: effective rank of each layer's update",
}  # fmt: skip


PER_LAYER, PER_FACTOR = ("norm", "change", "effective_rank"), ("factor_norm", "factor_change")
TOTALS = ("mean", "std", "standardised_std")


class Measured(NamedTuple):
    """The statistics of a collection: L layers, N steps; float64."""

    layers: list[str]
    shapes: list[tuple[int, int, int]]  # outputs, inputs, r
    sketch: torch.Tensor  # N x 1024
    norm: torch.Tensor  # L x N
    change: torch.Tensor  # L x N
    effective_rank: torch.Tensor  # L x N
    factor_norm: torch.Tensor  # L x 2 (A, B) x N
    factor_change: torch.Tensor  # L x 2 x N
    mean: torch.Tensor  # L x 2
    std: torch.Tensor  # L x 2
    standardised_std: torch.Tensor  # L x 2


def write(one: index.Chosen, measured: Measured, folder: Path) -> None:
    """Write the four files of a collection's statistics to the new `folder`."""
    from safetensors.torch import save

    config = checkpoints.adapter_config(one.folder, one.manifest)
    by_factor, by_layer = importance_of(measured)
    keys = [f"{layer}.{end}.weight" for layer in measured.layers for end in ("lora_A", "lora_B")]
    weights = dict(zip(measured.layers, by_layer, strict=True)) | dict(zip(keys, by_factor.flatten(), strict=True))
    arrays = {name: getattr(measured, name).float() for name in ARRAYS if name != "steps"}
    folder.mkdir()
    files.write_atomically(
        folder / "importance.safetensors", save({key: value.float().clone() for key, value in weights.items()})
    )
    files.write_atomically(folder / "steps.safetensors", save({"steps": torch.tensor(one.manifest.steps), **arrays}))
    write_table(folder / "stats.parquet", measured, by_factor, by_layer)
    files.write_json(folder / "stats.json", about(one, config, base_model_of(one, config), measured))


def of_collection(
    one: index.Chosen, device: torch.device, check: Callable[[], None], advance: Callable[[int], None]
) -> Measured:
    """The statistics of a collection; arguments as for `measure`."""
    config = checkpoints.adapter_config(one.folder, one.manifest)
    base = base_model_of(one, config)
    return measure(one.folder, one.manifest.checkpoints, config, base, device, check=check, advance=advance)


def base_model_of(one: index.Chosen, config: dict[str, Any]) -> str:
    """The name of the base model's folder, which seeds the sketch; adapter_config.json's if the manifest has none."""
    return one.manifest.base_name or str(config.get("base_model_name_or_path")).rstrip("/").rsplit("/", 1)[-1]


def measure(
    folder: Path,
    entries: Sequence[CheckpointEntry],
    config: dict[str, Any],
    base: str,
    device: torch.device = CPU,
    budget: int = BUDGET,
    chunk: int = CHUNK,
    check: Callable[[], None] = lambda: None,
    advance: Callable[[int], None] = lambda size: None,
) -> Measured:
    """One streaming pass over the checkpoints of a collection; its layers are shared out to the cores.

    Takes `budget` bytes for the running sums of a group of layers, `chunk` bytes for the steps that are read at once
    (of the host's memory and the device's), and, for the results, 8 bytes per step and layer and 8192 per step; nothing
    else grows with the number of steps. A GPU gives what the CPU gives, to the rounding of float32.

    Args:
        folder: the collection.
        entries: the checkpoints in its manifest.
        config: the content of its adapter_config.json.
        base: the base model's name.
        device: the CPU, or a GPU.
        budget, chunk: bytes.
        check: called before each file and each layer; what it raises ends the measuring.
        advance: called after each chunk, with the number of bytes that were measured.

    Raises UserError naming a checkpoint that is damaged, UnsupportedAdapter for an adapter that has no such statistics.
    """
    layout = step_reader.first_layout(folder, entries)
    layers = layers_of(folder, layout)
    keys = [(f"{layer}.lora_A.weight", f"{layer}.lora_B.weight") for layer in layers]
    shapes = [(layout[b].shape[0], layout[a].shape[1], layout[a].shape[0]) for a, b in keys]
    kept = {name: torch.zeros(len(layers), len(entries), dtype=torch.float64) for name in PER_LAYER}
    kept |= {name: torch.zeros(len(layers), 2, len(entries), dtype=torch.float64) for name in PER_FACTOR}
    totals = {name: torch.zeros(len(layers), 2, dtype=torch.float64) for name in TOTALS}
    sketch = torch.zeros(len(entries), ls.SKETCH_SIDE**2, dtype=torch.float64)
    for group in groups_of(shapes, budget):

        def begin(number: int) -> ls.Running:
            return ls.start_layer(config, base, layers[number], *shapes[number][:2], device)

        running = dict(zip(group, parallel.each(begin, group), strict=True))
        for steps in step_reader.read(folder, entries, steps_within(chunk, entries), device, check):

            def add(number: int, running=running, steps=steps) -> tuple:
                check()
                return ls.add_steps(running[number], *(steps.values(key) for key in keys[number]))

            for number, (after, figures) in zip(group, parallel.each(add, group), strict=True):
                check_finite(folder, entries[steps.part], keys[number], figures["factor_norm"])
                running[number] = after
                sketch[steps.part] += figures.pop("sketch")
                for name, values in figures.items():
                    kept[name][number, ..., steps.part] = values
            advance(sum(entry.bytes for entry in entries[steps.part]) * len(group) // len(layers))
        in_order = [running[number] for number in group]
        for number, found in zip(group, parallel.each(ls.totals, in_order), strict=True):
            for name, values in found.items():
                totals[name][number] = values
    return Measured(layers, shapes, sketch, **kept, **totals)


def layers_of(folder: Path, layout: Mapping[str, step_reader.Stored]) -> list[str]:
    """The adapted layers; raises UnsupportedAdapter naming the collection where they are not linear."""
    try:
        layers = checkpoints.layers_of(layout)
        if not layers:
            raise checkpoints.UnsupportedAdapter("has no LoRA factors")
        for layer in layers:
            check_shapes({key: layout[key].shape for key in (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")})
    except checkpoints.UnsupportedAdapter as error:
        raise checkpoints.UnsupportedAdapter(f"{paths.relative(folder)}: {error}") from None
    return layers


def check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UnsupportedAdapter unless the factors A and B of a layer, in this order, can be multiplied."""
    for key, shape in shapes.items():
        if len(shape) != 2:
            raise checkpoints.UnsupportedAdapter(f"{key} is no matrix; statistics are of linear layers alone")
        if min(shape) < 1:
            raise checkpoints.UnsupportedAdapter(f"{key} has no values: its shape is {shape[0]} x {shape[1]}")
    (a, (rank, _)), (b, (_, columns)) = shapes.items()
    if rank != columns:
        raise checkpoints.UnsupportedAdapter(f"{b} has {columns} columns, and {a} has {rank} rows")


def check_finite(
    folder: Path, entries: Sequence[CheckpointEntry], keys: tuple[str, str], factor_norm: torch.Tensor
) -> None:
    """Raise UserError naming the checkpoint whose factor has a value that is not finite (factor_norm: 2 x steps)."""
    for key, norms in zip(keys, factor_norm.isfinite(), strict=True):
        if not norms.all():
            path = folder / entries[norms.tolist().index(False)].file_name
            raise UserError(f"{paths.relative(path)}: {key} holds values that are not finite; collect it again")


def groups_of(shapes: list[tuple[int, int, int]], budget: int) -> list[list[int]]:
    """The layers' numbers in groups whose running sums take at most `budget` bytes; a group has at least one layer."""
    groups: list[list[int]] = [[]]
    used = 0
    for number, (outputs, inputs, rank) in enumerate(shapes):
        size = (outputs + inputs) * (ls.STATE_BYTES * rank + 4 * ls.SKETCH_SIDE)
        if groups[-1] and used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(number)
        used += size
    return groups


def steps_within(chunk: int, entries: Sequence[CheckpointEntry]) -> int:
    """How many steps fit into `chunk` bytes, at least one; the same on every machine, as the last bits depend on it."""
    return max(1, chunk // max(entry.bytes for entry in entries))


def importance_of(measured: Measured) -> tuple[torch.Tensor, torch.Tensor]:
    """The importance of each factor (L x 2) and of each layer (L), as the head of this file defines it."""
    sizes = torch.tensor([(rank * inputs, outputs * rank) for outputs, inputs, rank in measured.shapes])
    sums = measured.standardised_std * sizes
    overall = sums.sum() / sizes.sum()
    if overall == 0:
        return torch.ones(sizes.shape), torch.ones(len(sizes))
    return measured.standardised_std / overall, sums.sum(1) / sizes.sum(1) / overall


def write_table(path: Path, measured: Measured, by_factor: torch.Tensor, by_layer: torch.Tensor) -> None:
    """Write stats.parquet: for each layer lora_A, lora_B and update."""
    import pyarrow as pa
    import pyarrow.parquet

    rows = []
    for number, layer in enumerate(measured.layers):
        outputs, inputs, rank = measured.shapes[number]
        for side, (name, shape) in enumerate((("lora_A", (rank, inputs)), ("lora_B", (outputs, rank)))):
            norm, change = measured.factor_norm[number, side], measured.factor_change[number, side]
            rows.append({"layer": layer, "tensor": name, "rows": shape[0], "columns": shape[1]})
            rows[-1] |= {"mean": float(measured.mean[number, side]), "std": float(measured.std[number, side])}
            rows[-1] |= over_steps(norm, change) | {"importance": float(by_factor[number, side])}
        rows.append({"layer": layer, "tensor": "update", "rows": outputs, "columns": inputs})
        rows[-1] |= over_steps(measured.norm[number], measured.change[number])
        ranks = measured.effective_rank[number]
        figures = {"first": ranks[0], "mean": ranks.mean(), "last": ranks[-1]}
        rows[-1] |= {f"effective_rank_{name}": float(value) for name, value in figures.items()}
        rows[-1] |= {"importance": float(by_layer[number])}
    kinds = {"layer": pa.string(), "tensor": pa.string(), "rows": pa.int64(), "columns": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in COLUMNS])
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    files.write_atomically(path, sink.getvalue().to_pybytes())


def over_steps(norm: torch.Tensor, change: torch.Tensor) -> dict[str, float]:
    """The columns of stats.parquet for the norm and the change of one tensor, each given per step."""
    moved = change[1:] if len(change) > 1 else change
    figures = {
        "norm_first": norm[0],
        "norm_mean": norm.mean(),
        "norm_last": norm[-1],
        "change_mean": moved.mean(),
        "change_max": moved.max(),
    }
    return {name: float(value) for name, value in figures.items()}


def about(one: index.Chosen, config: dict[str, Any], base: str, measured: Measured) -> dict[str, Any]:
    """The content of stats.json."""
    return {
        "method": METHOD,
        "manifest": one.manifest.sha256,
        "collection": one.name,
        "base_model": base,
        "rank": one.manifest.rank,
        "lora_alpha": config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "parameters": sum((outputs + inputs) * rank for outputs, inputs, rank in measured.shapes),
        "files": {
            "stats.parquet": COLUMNS,
            "importance.safetensors": "float32 scalar by layer and by factor tensor: the mean over its entries of the "
            "standard deviation across steps of the factors standardised within each step, divided by that mean over "
            "all layers; averages to 1 over all entries",
            "steps.safetensors": ARRAYS,
        },
        "layers": measured.layers,
    }
