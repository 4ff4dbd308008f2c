"""Reads the checkpoints of collections, and refuses a file that differs from what its manifest recorded.

A process hashes a file when it first reads it, and again only after it changed. Tensors are memory-mapped.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paragen.collection import adapter_config as adapter_configs
from paragen.collection.manifest import CheckpointEntry, Manifest
from paragen.common import files, paths
from paragen.common.cli import UserError

if TYPE_CHECKING:
    import torch

_verified: dict[str, tuple[tuple, str]] = {}  # the files that were hashed: path -> (its stamp, its sha256)

PIECE = 1 << 20  # bytes that are read and hashed at once, while they are in the processor's cache
PEFT_PREFIX = "base_model.model."  # what PEFT puts before the names of a model's layers


class UnsupportedAdapter(UserError):
    """An adapter with other tensors than the LoRA factors of linear layers."""


def verified(path: Path, size: int, sha256: str) -> Path:
    """`path`, checked to hold the bytes that were recorded.

    Args:
        path: a checkpoint file.
        size: its recorded length, bytes.
        sha256: its recorded hash, hexadecimal.

    Raises UserError naming the file when it is gone, has another length or other content.
    """
    stat = verified_length(path, size)
    stamp, known = files.stamp_of(stat), _verified.get(str(path))
    if known is None or known[0] != stamp:
        known = _verified[str(path)] = stamp, files.sha256_of(path)
    if known[1] != sha256:
        raise UserError(f"{paths.relative(path)}: does not have its recorded sha256; {_way_out(path)}")
    return path


def verified_length(path: Path, size: int) -> os.stat_result:
    """A checkpoint file's stat; raises UserError when it is gone or has another length than recorded."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{paths.relative(path)}: is gone; collect it again, or run: make index") from None
    except OSError as error:
        raise UserError(f"{paths.relative(path)}: cannot be read: {error.strerror}; {_way_out(path)}") from None
    if stat.st_size != size:
        raise UserError(f"{paths.relative(path)}: has {stat.st_size} bytes, {size} were recorded; {_way_out(path)}")
    return stat


def stamp_of(path: Path) -> tuple[int, ...]:
    """A file's size and times, which differ once it was changed. Raises FileNotFoundError when it is gone."""
    return files.stamp_of(os.stat(path))


def mark_verified(path: Path, stamp: tuple[int, ...], sha256: str) -> None:
    """Record that another process hashed a file: with this `stamp` it has this hash. It is not hashed again here."""
    _verified[str(path)] = stamp, sha256


def _way_out(path: Path) -> str:
    return f"make verify names what else differs in {path.parent.name}; put the file back or collect again with FORCE=1"


def read(path: Path, size: int, sha256: str) -> bytes:
    """The bytes of a checkpoint file, hashed after they were read; arguments and errors as for `verified`."""
    verified_length(path, size)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{paths.relative(path)}: does not have its recorded sha256; {_way_out(path)}")
    return data


def read_into(path: Path, size: int, sha256: str, buffer: memoryview | None) -> bytes:
    """Read a checkpoint file once: its tensors into `buffer`, hashed as they come unless the file was hashed before.

    Arguments and errors as for `verified`. Returns the header (JSON text), which tells where in the buffer each tensor
    is. Without a buffer, the header alone is read, and nothing is hashed.
    """
    stamp, known = files.stamp_of(verified_length(path, size)), _verified.get(str(path))
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), size))
        if buffer is None or known == (stamp, sha256):
            if buffer is not None:
                file.readinto(buffer)
            return header
        digest = hashlib.sha256(length + header)
        for start in range(0, size - 8 - len(header), PIECE):
            piece = buffer[start : min(start + PIECE, size - 8 - len(header))]
            digest.update(piece[: file.readinto(piece)])
    _verified[str(path)] = stamp, digest.hexdigest()
    verified(path, size, sha256)
    return header


def opened(path: Path, size: int, sha256: str) -> Any:
    """An open `safetensors.safe_open` handle on a verified checkpoint (memory-mapped, PyTorch tensors, CPU)."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(verified(path, size, sha256), "pt")
    except SafetensorError as error:
        raise UserError(f"{paths.relative(path)}: is not a safetensors file: {error}") from None


def load(path: Path, size: int, sha256: str) -> "dict[str, torch.Tensor]":
    """All tensors of a verified checkpoint by PEFT's key, in natural order (layer 2 before layer 10).

    They are memory-mapped: nothing is copied, and no file stays open. Do not write into them.
    """
    handle = opened(path, size, sha256)
    return {key: handle.get_tensor(key) for key in in_natural_order(tuple(handle.keys()))}


@lru_cache(maxsize=256)
def in_natural_order(keys: tuple[str, ...]) -> tuple[str, ...]:
    """PEFT's keys in the order of their layers' numbers and names, lora_A before lora_B."""
    return tuple(sorted(keys, key=_by_number))


def open_all(folder: Path, entries: Iterable[CheckpointEntry]) -> Iterator[Any]:
    """A handle per checkpoint of a collection, in the order of `entries` (the manifest's `checkpoints`)."""
    for entry in entries:
        yield opened(folder / entry.file_name, entry.bytes, entry.sha256)


def layout_of(handle: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in an open checkpoint, by PEFT's key."""
    return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118 (not a dict)


def cast(tensor: "torch.Tensor", dtype: "torch.dtype", key: str, path: Path) -> "torch.Tensor":
    """A checkpoint's tensor in another dtype. Raises UserError naming `key` and `path` where that is not finite."""
    result = tensor.to(dtype)
    if not result.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"{paths.relative(path)}: {key} holds values that {name} cannot; choose another DTYPE")
    return result


def dtype_of(handle: Any) -> str:
    """The dtype of an open checkpoint as DTYPE names it: that of its first tensor by key."""
    kind = handle.get_slice(min(handle.keys())).get_dtype()
    return {"BF16": "bfloat16", "F16": "float16"}.get(kind, "float32")


def in_chunks(folder: Path, entries: Sequence[CheckpointEntry], size: int) -> Iterator[tuple[slice, list[Any]]]:
    """The checkpoints of a collection, `size` at a time: (which of `entries`, an open handle each).

    Raises UserError for a checkpoint whose keys or shapes are not the first one's.
    """
    layout = None
    for start in range(0, len(entries), size):
        part = slice(start, min(start + size, len(entries)))
        handles = list(open_all(folder, entries[part]))
        for entry, handle in zip(entries[part], handles, strict=True):
            layout = layout or layout_of(handle)
            if layout_of(handle) != layout:
                path = folder / entry.file_name
                raise UserError(
                    f"{paths.relative(path)}: has other keys or shapes than the collection's first checkpoint; "
                    "make verify names all such files"
                )
        yield part, handles


def factors_of(
    folder: Path, entries: Sequence[CheckpointEntry], handles: list[Any], layer: str
) -> "tuple[torch.Tensor, torch.Tensor]":
    """One layer's factors in some open checkpoints, as float64: (A, steps x r x inputs; B, steps x outputs x r).

    Raises UserError naming the checkpoint that holds a value that is not finite.
    """
    import torch

    both = []
    for key in (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"):
        values = torch.stack([handle.get_tensor(key) for handle in handles]).double()
        finite = values.sum((1, 2)).isfinite()  # a sum of float32 cannot overflow float64
        if not finite.all():
            path = folder / entries[finite.tolist().index(False)].file_name
            raise UserError(f"{paths.relative(path)}: {key} holds values that are not finite; collect it again")
        both.append(values)
    return both[0], both[1]


def adapter_config(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The content of a collection's adapter_config.json, its hash and its values checked (see adapter_config.py).

    Raises UserError when it is gone or was edited, or for a kind of adapter that is not loaded here.
    """
    return adapter_configs.parse(adapter_config_bytes(folder, manifest), paths.relative(folder / paths.ADAPTER_CONFIG))


def adapter_config_bytes(folder: Path, manifest: Manifest) -> bytes:
    """The bytes of a collection's adapter_config.json. Raises UserError when it is gone or was edited."""
    path = folder / paths.ADAPTER_CONFIG
    try:
        data = files.read_up_to(path, adapter_configs.LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"{paths.relative(path)}: is gone; put it back or collect again with FORCE=1") from None
    except OSError as error:
        raise UserError(f"{paths.relative(path)}: cannot be read: {error.strerror}; {_way_out(path)}") from None
    if hashlib.sha256(data).hexdigest() != manifest.adapter_config_sha256:
        raise UserError(f"{paths.relative(path)}: does not have its recorded sha256; {_way_out(path)}")
    return data


def layers_of(keys: Iterable[str]) -> list[str]:
    """The names of the adapted layers among PEFT's keys, sorted by their numbers then names.

    A layer `X` has the factors `X.lora_A.weight` (rank x inputs) and `X.lora_B.weight` (outputs x rank).

    Raises UnsupportedAdapter for a key that is no such factor (DoRA's magnitudes, embeddings' factors), or a lone half.
    """
    halves: dict[str, set[str]] = {}
    for key in keys:
        layer, _, end = key.rpartition(".lora_")
        if not layer or end not in ("A.weight", "B.weight"):
            raise UnsupportedAdapter(
                f"{key}: is no LoRA factor of a linear layer; other adapters are not supported here"
            )
        halves.setdefault(layer, set()).add(end)
    incomplete = [layer for layer, ends in halves.items() if len(ends) < 2]
    if incomplete:
        raise UnsupportedAdapter(f"{incomplete[0]}: has only one of lora_A and lora_B")
    return sorted(halves, key=_by_number)


def _by_number(name: str) -> list:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def short_layer(layer: str) -> str:
    """A layer's name as pictures and tables show it: without PEFT's and the model's prefixes."""
    return layer.removeprefix(PEFT_PREFIX).removeprefix("model.")
