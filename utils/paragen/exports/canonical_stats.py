"""Mean and standard deviation of canonical factors over collections, for models that normalise weights across tasks."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paragen.analysis import canonical
from paragen.collection import checkpoints, index
from paragen.common.cli import UserError

if TYPE_CHECKING:
    import torch

NAME = "stats"  # the part's folder in the export


def check_alike(chosen: list[index.Chosen]) -> None:
    """Raise UserError unless the first checkpoints of all collections have the same keys and shapes."""
    layouts = {one.name: layout_of(one) for one in chosen}
    first = next(iter(layouts))
    for name, layout in layouts.items():
        if layout != layouts[first]:
            key = min(
                key for key in layout.keys() | layouts[first].keys() if layout.get(key) != layouts[first].get(key)
            )
            raise UserError(
                f"{name}: {key} is {text_of(layout.get(key))}, in {first} it is {text_of(layouts[first].get(key))}; "
                "PARTS=stats takes collections of one model, rank and set of layers: choose with MODEL=.. RANK=.."
            )


def layout_of(one: index.Chosen) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a collection's first checkpoint, by PEFT's key."""
    return checkpoints.layout_of(next(checkpoints.open_all(one.folder, one.manifest.checkpoints[:1])))


def text_of(shape: tuple[int, ...] | None) -> str:
    """A shape for a message."""
    return "missing" if shape is None else " x ".join(map(str, shape))


def source_of(chosen: list[index.Chosen], dtype: str) -> dict[str, Any]:
    """What decides the statistics."""
    manifests = sorted(one.manifest.sha256 for one in chosen)
    return {
        "format": "canonical", "part": NAME, "method": canonical.METHOD, "manifests": manifests, "dtype": dtype
    }  # fmt: skip


def bytes_of(one: index.Chosen) -> int:
    """About how many bytes the statistics take on the disk; `one` is any of the collections, which are alike."""
    return 2 * 4 * sum(rows * columns for rows, columns in layout_of(one).values())


def write(steps: Callable[[], Iterable[dict[str, "torch.Tensor"]]], folder: Path) -> None:
    """Write mean.safetensors, std.safetensors and stats.json to the new folder `folder`.

    Args:
        steps: gives the canonical factors of one checkpoint after the other, all with the same keys and shapes.
        folder: where nothing exists.

    The deviation is the population's (divided by the number of checkpoints). stats.json has `checkpoints`, their
    number, and of each key the mean and deviation of all its entries in all of them.
    """
    from safetensors.torch import save_file

    count, mean, squares = moments(steps())
    deviation = {key: (values / count).sqrt() for key, values in squares.items()}
    folder.mkdir()
    for name, values in (("mean", mean), ("std", deviation)):
        tensors = {key: value.float().contiguous() for key, value in values.items()}
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    keys = {}
    for key, entries in mean.items():
        spread = (deviation[key].square().mean() + entries.var(correction=0)).sqrt()
        keys[key] = {"mean": float(entries.mean()), "std": float(spread)}
    (folder / "stats.json").write_bytes(json.dumps({"checkpoints": count, "keys": keys}, indent=1).encode())


def moments(
    steps: Iterable[dict[str, "torch.Tensor"]],
) -> "tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]":
    """(number of checkpoints, mean, sum of squared distances from it) of each entry, float64, in one pass (Welford)."""
    import torch

    count, mean, squares = 0, {}, {}
    for tensors in steps:
        count += 1
        for key, tensor in tensors.items():
            if key not in mean:
                mean[key], squares[key] = (torch.zeros(tensor.shape, dtype=torch.float64) for _ in range(2))
            distance = tensor.double() - mean[key]
            mean[key] += distance / count
            squares[key] += distance * (tensor.double() - mean[key])
    return count, mean, squares
