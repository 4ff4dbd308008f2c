"""Each layer's update B·A in its one canonical form, as a PEFT adapter with the same product.

    FORMAT=canonical [DATASET=..] [MODEL=..] [RANK=..] [OUT=..] [DTYPE=..] python utils/export.py       (make export)

Reads collections, writes OUT/<category>/<dataset>/<run folder>/ with checkpoint-<step>.safetensors (PEFT's keys),
adapter_config.json (unchanged, since the scaling stays) and canonical.json: what it was made from, and how.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paragen.analysis import canonical
from paragen.collection import checkpoints, derived, index
from paragen.collection.manifest import CheckpointEntry
from paragen.common import files, parallel, paths
from paragen.common.cli import UserError

BUDGET = 1 << 30  # bytes that one batch of steps may take
ABOUT = "canonical.json"


def export(chosen: list[index.Chosen], out: Path, dtype: str | None) -> None:
    """Write the canonical form of some collections below `out`.

    Args:
        chosen: the collections.
        out: the export's folder.
        dtype: what the factors are rounded to; None is float32, also for adapters trained in bfloat16, since factors
            rounded to bfloat16 would have another product (by up to 0.4 %).
    """
    for one in chosen:
        source = source_of(one, dtype or "float32")
        derived.make_part(out, one.name, source, partial(write, one, source))


def source_of(one: index.Chosen, dtype: str) -> dict[str, Any]:
    """What decides the content of a collection's canonical form."""
    return {
        "format": "canonical",
        "method": canonical.METHOD,
        "manifest": one.manifest.sha256,
        "dtype": dtype,
    }


def write(one: index.Chosen, source: dict[str, Any], folder: Path, budget: int = BUDGET) -> None:
    """Write the canonical form of a collection to the new folder `folder`.

    A layer's steps are computed in batched calls, as many at a time as `budget` bytes hold; their number changes no bit
    of the result.
    """
    import torch
    from safetensors.torch import save

    config = checkpoints.adapter_config(one.folder, one.manifest)
    entries = one.manifest.checkpoints
    dtype = getattr(torch, source["dtype"])
    folder.mkdir()
    for part, handles in checkpoints.in_chunks(one.folder, entries, steps_within(budget, one, entries)):
        layers = checkpoints.layers_of(handles[0].keys())
        factors = partial(canonical_factors, one.folder, entries[part], handles, dtype)
        steps: list[dict[str, torch.Tensor]] = [{} for _ in handles]
        for layer, both in zip(layers, parallel.each(factors, layers), strict=True):
            for end, values in zip(("lora_A", "lora_B"), both, strict=True):
                for step, value in zip(steps, values, strict=True):
                    step[f"{layer}.{end}.weight"] = value
        for entry, tensors in zip(entries[part], steps, strict=True):
            path = folder / entry.file_name
            files.write_atomically(path, save(tensors, metadata={"format": "pt"}))
    files.write_json(folder / paths.ADAPTER_CONFIG, config)
    files.write_json(folder / ABOUT, about(one, source))


def canonical_factors(folder: Path, entries: Sequence[CheckpointEntry], handles: list, dtype: Any, layer: str) -> list:
    """[A', B'] of one layer in some open checkpoints, rounded to `dtype`. Raises UserError where that overflows."""
    both = []
    for values in canonical.canonical(*checkpoints.factors_of(folder, entries, handles, layer)):
        both.append(values.to(dtype).contiguous())
        if not both[-1].isfinite().all():
            raise UserError(f"{layer}: does not fit into {str(dtype).removeprefix('torch.')}; omit DTYPE")
    return both


def steps_within(budget: int, one: index.Chosen, entries: Sequence[CheckpointEntry]) -> int:
    """How many steps fit into `budget` bytes: their results, and about eight float64 copies of a layer per thread."""
    layout = checkpoints.layout_of(next(checkpoints.open_all(one.folder, entries[:1])))
    sizes = [rows * columns for rows, columns in layout.values()]
    return max(1, budget // (8 * sum(sizes) + parallel.WORKERS * 8 * 8 * 2 * max(sizes)))


def about(one: index.Chosen, source: dict[str, Any]) -> dict[str, Any]:
    """The content of canonical.json."""
    return {
        **source,
        "collection": one.name,
        "form": "B' = U sqrt(S), A' = sqrt(S) V^T with B A = U S V^T; S descending; in each column of U the first "
        "entry within 0.1 % of the largest magnitude is positive; computed in float64",
        "zero_below": f"rank * {canonical.NOISE} * the layer's largest singular value",
    }
