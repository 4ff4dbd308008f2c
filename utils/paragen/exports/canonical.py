"""Each layer's update B·A in its one canonical form, as a PEFT adapter with the same product.

    FORMAT=canonical [PARTS="usv delta stats"] [DATASET=..] [MODEL=..] [RANK=..] [OUT=..] python utils/export.py

Reads collections, writes OUT/<category>/<dataset>/<run folder>/ with checkpoint-<step>.safetensors (PEFT's keys),
adapter_config.json (unchanged, since the scaling stays) and canonical.json: what it was made from, and how. PARTS adds
    usv      OUT/usv/<category>/...     <layer>.U (outputs x r), .S (r, descending), .Vt (r x inputs): B·A = U S V^T
    delta    OUT/delta/<category>/...   <layer>.delta: the product B·A itself, outputs x inputs
    stats    OUT/stats/                 mean.safetensors, std.safetensors: of each entry of the canonical factors over
                                        all checkpoints of the chosen collections; stats.json: the same of each key
None of them is multiplied by the scaling, which the canonical.json of usv and delta names.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paragen.analysis import canonical
from paragen.collection import checkpoints, derived, index, lora_config
from paragen.collection.manifest import CheckpointEntry
from paragen.common import files, parallel, paths, settings
from paragen.common.cli import UserError, say
from paragen.exports import canonical_stats, parts

if TYPE_CHECKING:
    import torch

BUDGET = 1 << 30  # bytes that one batch of steps may take
ABOUT = "canonical.json"
Tensors = dict[str, "torch.Tensor"]
FORMS = {
    "factors": "B' = U sqrt(S), A' = sqrt(S) V^T with B A = U S V^T; S descending; in each column of U the first "
    "entry within 0.1 % of the largest magnitude is positive; computed in float64",
    "usv": "U, S and Vt with B A = U S V^T; S descending; in each column of U the first entry within 0.1 % of the "
    "largest magnitude is positive, columns beyond the update's rank are zero; computed in float64",
    "delta": "the product B A of the factors as trained; computed in float64",
}


def export(chosen: list[index.Chosen], out: Path, dtype: str | None) -> None:
    """Write the canonical form of some collections below `out`, and what PARTS names.

    Args:
        chosen: the collections.
        out: the export's folder.
        dtype: what the values are rounded to; None is float32, also for adapters trained in bfloat16, since factors
            rounded to bfloat16 would have another product (by up to 0.4 %).

    Raises UserError, before anything is written, for PARTS=stats of collections with other keys or shapes than the
    first, and where there is too little disk.
    """
    dtype, wanted = dtype or "float32", settings.values("PARTS")
    forms = ["factors", *(form for form in ("usv", "delta") if form in wanted)]
    plan = [(name_of(one, form), one, source_of(one, dtype, form)) for form in forms for one in chosen]
    made: list[tuple[str, dict[str, Any], int, Callable[[Path], None]]] = [
        (name, source, bytes_of(one, source), partial(write, one, source)) for name, one, source in plan
    ]
    if "stats" in wanted:
        canonical_stats.check_alike(chosen)
        write_stats = partial(canonical_stats.write, partial(canonical_steps, chosen, dtype))
        source = canonical_stats.source_of(chosen, dtype)
        made.append((canonical_stats.NAME, source, canonical_stats.bytes_of(chosen[0]), write_stats))
    missing = [(name, source, size) for name, source, size, _ in made if not derived.is_there(out, name, source)]
    for name, source, _ in missing:
        derived.check_replaceable(out, name, source)
    check_room(out, [(source.get("part"), size) for _, source, size in missing])
    for name, source, _, write_part in made:
        parts.make(out, name, source, write_part)


def name_of(one: index.Chosen, form: str) -> str:
    """The path of a part in the export."""
    return one.name if form == "factors" else f"{form}/{one.name}"


def source_of(one: index.Chosen, dtype: str, form: str = "factors") -> dict[str, Any]:
    """What decides the content of a collection's part."""
    return {
        "format": "canonical",
        "method": canonical.METHOD,
        "manifest": one.manifest.sha256,
        "dtype": dtype,
        **({} if form == "factors" else {"part": form}),
    }


def check_room(out: Path, sizes: list[tuple[str | None, int]]) -> None:
    """Print how large the products are; raise UserError where the disk is too small for what is to be written.

    `sizes` are the kind and the bytes of each part to write.
    """
    if products := [size for part, size in sizes if part == "delta"]:
        say(
            f"note: PARTS=delta writes the products themselves, {sum(products) / 1e9:.1f} GB for {len(products)} "
            "collections; their factors hold the same in a fraction of that"
        )
    derived.check_room(out, sum(size for _, size in sizes))


def bytes_of(one: index.Chosen, source: dict[str, Any]) -> int:
    """About how many bytes a part takes on the disk."""
    layout = checkpoints.layout_of(next(checkpoints.open_all(one.folder, one.manifest.checkpoints[:1])))
    if source.get("part") == "delta":
        values = sum(outputs * inputs for outputs, inputs in product_shapes(layout))
    else:
        values = sum(rows * columns for rows, columns in layout.values())
    return values * (4 if source["dtype"] == "float32" else 2) * len(one.manifest.checkpoints)


def product_shapes(layout: dict[str, tuple[int, ...]]) -> list[tuple[int, int]]:
    """(outputs, inputs) of each adapted layer, from the shapes of a checkpoint's tensors."""
    layers = checkpoints.layers_of(layout)
    return [(layout[f"{layer}.lora_B.weight"][0], layout[f"{layer}.lora_A.weight"][1]) for layer in layers]


def write(one: index.Chosen, source: dict[str, Any], folder: Path, budget: int = BUDGET) -> None:
    """Write one part of a collection, as `source` describes it, to the new folder `folder`.

    A layer's steps are computed in batched calls, as many at a time as `budget` bytes hold; their number changes no bit
    of the result.
    """
    from safetensors.torch import save_file

    config = checkpoints.adapter_config(one.folder, one.manifest)
    folder.mkdir()
    form = {"usv": usv_of, "delta": delta_of}.get(source.get("part", ""), factors_of)
    for entry, tensors in steps_of(one, source["dtype"], form, budget):
        save_file(tensors, folder / entry.file_name, metadata={"format": "pt"})
    if form is factors_of:
        stored = json.loads(checkpoints.adapter_config_bytes(one.folder, one.manifest))
        files.write_json(folder / paths.ADAPTER_CONFIG, stored)
    files.write_json(folder / ABOUT, about(one, source, config))


def steps_of(
    one: index.Chosen, dtype: str, form: Callable[..., Tensors], budget: int = BUDGET
) -> Iterator[tuple[CheckpointEntry, Tensors]]:
    """Each step of a collection in a form, rounded to `dtype`: `factors_of`, `usv_of` or `delta_of`."""
    import torch

    entries = one.manifest.checkpoints
    size = steps_within(budget, one, entries, products=form is delta_of)
    for part, handles in checkpoints.in_chunks(one.folder, entries, size):
        layers = checkpoints.layers_of(handles[0].keys())
        of_layer = partial(rounded, one.folder, entries[part], handles, getattr(torch, dtype), form)
        steps: list[Tensors] = [{} for _ in handles]
        for found in parallel.each(of_layer, layers):
            for key, values in found.items():
                for step, value in zip(steps, values, strict=True):
                    step[key] = value.contiguous()
        yield from zip(entries[part], steps, strict=True)


def canonical_steps(chosen: list[index.Chosen], dtype: str) -> Iterator[Tensors]:
    """The canonical factors of every checkpoint of some collections, one after the other."""
    for one in chosen:
        for _, tensors in steps_of(one, dtype, factors_of):
            yield tensors


def rounded(
    folder: Path,
    entries: Sequence[CheckpointEntry],
    handles: list,
    dtype: "torch.dtype",
    form: Callable[..., Tensors],
    layer: str,
) -> Tensors:
    """One layer of some open checkpoints in a form, rounded to `dtype`. Raises UserError where that overflows."""
    a, b = checkpoints.factors_of(folder, entries, handles, layer)
    found = {key: values.to(dtype) for key, values in form(layer, a, b).items()}
    if not all(values.isfinite().all() for values in found.values()):
        raise UserError(f"{layer}: does not fit into {str(dtype).removeprefix('torch.')}; omit DTYPE")
    return found


def factors_of(layer: str, a: "torch.Tensor", b: "torch.Tensor") -> Tensors:
    """The canonical factors of a layer by PEFT's keys, from its factors in n steps: n x r x inputs, n x outputs x r."""
    new_a, new_b = canonical.canonical(a, b)
    return {f"{layer}.lora_A.weight": new_a, f"{layer}.lora_B.weight": new_b}


def usv_of(layer: str, a: "torch.Tensor", b: "torch.Tensor") -> Tensors:
    """U, S and V^T of a layer, from its factors in some steps."""
    left, values, right = canonical.usv(a, b)
    return {f"{layer}.U": left, f"{layer}.S": values, f"{layer}.Vt": right}


def delta_of(layer: str, a: "torch.Tensor", b: "torch.Tensor") -> Tensors:
    """The product B·A of a layer, from its factors in some steps."""
    return {f"{layer}.delta": b @ a}


def steps_within(budget: int, one: index.Chosen, entries: Sequence[CheckpointEntry], products: bool = False) -> int:
    """How many steps fit into `budget` bytes: their results, and about eight float64 copies of a layer per thread."""
    layout = checkpoints.layout_of(next(checkpoints.open_all(one.folder, entries[:1])))
    sizes = [rows * columns for rows, columns in layout.values()]
    if products:
        sizes += [outputs * inputs for outputs, inputs in product_shapes(layout)]
    return max(1, budget // (8 * sum(sizes) + parallel.WORKERS * 8 * 8 * 2 * max(sizes)))


def about(one: index.Chosen, source: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The content of canonical.json."""
    content = {
        **source,
        "collection": one.name,
        "form": FORMS[source.get("part", "factors")],
        "zero_below": f"rank * {canonical.NOISE} * the layer's largest singular value",
    }
    if "part" not in source:  # the factors lie beside adapter_config.json
        return content
    layers = checkpoints.layers_of(next(checkpoints.open_all(one.folder, one.manifest.checkpoints[:1])).keys())
    scalings = {layer: lora_config.scaling_of(config, layer) for layer in layers}
    return {**content, "scaling": scalings if len(set(scalings.values())) > 1 else next(iter(scalings.values()))}
