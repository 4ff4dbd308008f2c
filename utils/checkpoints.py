"""Reads the checkpoints of collections: never one that differs from what its manifest recorded.

Imported by all that uses collected weights. A file is hashed when a process first reads it, not again while it stays
unchanged; its tensors are memory-mapped.
"""

import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import files
import paths
from cli import UserError

if TYPE_CHECKING:
    import torch

_verified: dict[str, tuple[tuple, str]] = {}  # what was hashed: path -> (its stamp, its sha256)


def verified(path: Path, size: int, sha256: str) -> Path:
    """`path`, checked to hold the bytes that were recorded.

    Args:
        path: a checkpoint file.
        size: its recorded length, bytes.
        sha256: its recorded hash, hexadecimal.

    Raises UserError naming the file when it is gone, has another length or other content.
    """
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{paths.relative(path)}: is gone; collect it again, or run: make index") from None
    if stat.st_size != size:
        raise UserError(f"{paths.relative(path)}: has {stat.st_size} bytes, {size} were recorded; {_way_out(path)}")
    stamp, known = _stamp(stat), _verified.get(str(path))
    if known is None or known[0] != stamp:
        known = _verified[str(path)] = stamp, files.sha256_of(path)
    if known[1] != sha256:
        raise UserError(f"{paths.relative(path)}: does not have its recorded sha256; {_way_out(path)}")
    return path


def stamp_of(path: Path) -> tuple[int, ...]:
    """What tells whether a file is still the one that was hashed. Raises FileNotFoundError when it is gone."""
    return _stamp(os.stat(path))


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def vouch(path: Path, stamp: tuple[int, ...], sha256: str) -> None:
    """Take over what another process found: the file that had this `stamp` has this hash. It is not hashed here."""
    _verified[str(path)] = stamp, sha256


def _way_out(path: Path) -> str:
    return f"make verify tells what else differs in {path.parent.name}; put the file back or collect again with FORCE=1"


def opened(path: Path, size: int, sha256: str) -> Any:
    """An open `safetensors.safe_open` handle on a verified checkpoint (memory-mapped, PyTorch tensors, CPU)."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(verified(path, size, sha256), "pt")
    except SafetensorError as error:
        raise UserError(f"{paths.relative(path)}: is not a safetensors file: {error}") from None


def load(path: Path, size: int, sha256: str) -> "dict[str, torch.Tensor]":
    """All tensors of a verified checkpoint by PEFT's key, in natural order (layer 2 before layer 10).

    They are memory-mapped, nothing is copied and no file stays open; do not write into them.
    """
    handle = opened(path, size, sha256)
    return {key: handle.get_tensor(key) for key in in_natural_order(tuple(handle.keys()))}


@lru_cache(maxsize=256)
def in_natural_order(keys: tuple[str, ...]) -> tuple[str, ...]:
    """PEFT's keys by the numbers and names of their layers, lora_A before lora_B."""
    return tuple(sorted(keys, key=_by_number))


def open_all(folder: Path, entries: Iterable[dict]) -> Iterator[Any]:
    """A handle per checkpoint of a collection, in the order of `entries` (the manifest's `checkpoints`)."""
    for entry in entries:
        yield opened(folder / f"checkpoint-{entry['step']}.safetensors", entry["bytes"], entry["sha256"])


def layers_of(keys: Iterable[str]) -> list[str]:
    """The names of the adapted layers among PEFT's keys, sorted by their numbers then names.

    A layer `X` has the factors `X.lora_A.weight` (rank x inputs) and `X.lora_B.weight` (outputs x rank).

    Raises UserError for a key that is no such factor (DoRA's magnitudes, embeddings' factors) or has no other half.
    """
    halves: dict[str, set[str]] = {}
    for key in keys:
        layer, _, end = key.rpartition(".lora_")
        if not layer or end not in ("A.weight", "B.weight"):
            raise UserError(f"{key}: is not a LoRA factor of a linear layer, which is all that is understood here")
        halves.setdefault(layer, set()).add(end)
    lonely = [layer for layer, ends in halves.items() if len(ends) < 2]
    if lonely:
        raise UserError(f"{lonely[0]}: has only one of lora_A and lora_B")
    return sorted(halves, key=_by_number)


def _by_number(name: str) -> list:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def short_layer(layer: str) -> str:
    """A layer's name as pictures and tables show it: without PEFT's and the model's prefixes."""
    return layer.removeprefix("base_model.model.").removeprefix("model.")
