"""A collection as one small file, lossless to the bit, of which any step is read without reading all.

Imported by export_archive.py, import_archive.py and what publishes. `write`, `read_manifest`, `load_step`, `verify`
and `restore` are all there is to it.

An archive is a safetensors file of uint8 tensors:
    blocks   one after another: adapter_config.json, manifest.json and the other small files; the distinct headers of the
             checkpoints; per checkpoint its byte planes (byte_planes.py)
    index    zstd-compressed JSON: where each block lies, how it is stored, its sha256
    seal     the SHA-256 of the file's first HEAD bytes and of `index`
so every byte is under a hash. A plane is stored as it is (`raw`), compressed (`zstd`), or as the compressed XOR with
the same plane of an earlier step (`xor`): noise stays raw, since XOR makes no less of it. Every GROUP-th checkpoint is
full; in between, each is stored against the step before, every STRIDE-th against the one STRIDE steps before, so that a
step takes at most 7 blocks per plane. A collection may be cut into parts: archives of some of its steps, each whole in
itself. Figures: bench/archive.py.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import byte_planes
import checkpoints
import collection
import files
import paths
from cli import UserError

if TYPE_CHECKING:
    import torch

FORMAT = "1"
SUFFIX = ".archive"
HEAD = 512  # bytes at the front: the safetensors header, padded with spaces as that format allows
GROUP, STRIDE = 16, 4  # steps
LEVEL = 1  # zstd's; 3, 6 and 9 make files within 1 % of it and take up to seven times as long
PAYS = 0.97  # a plane is compressed when that leaves at most this share of it
SMALL = ("adapter_config.json", collection.LOG, collection.PICTURE)  # files beside manifest and checkpoints
INDEX_BLOCK = 140  # bytes that a block takes in the index, at most


class Opened(NamedTuple):
    """An archive whose seal was found whole; its blocks are checked as they are read."""

    path: Path
    index: dict[str, Any]
    positions: dict[int, int]  # step -> where it stands in index["steps"]


def _codec():
    import pyarrow

    return pyarrow.Codec("zstd", compression_level=LEVEL)


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Writing


def write(folder: Path, manifest: dict, target: Path, part_bytes: int | None = None) -> list[Path]:
    """Write a collection to an archive. Call it on a staging path: a kill leaves a half file at `target`.

    Args:
        folder: the collection; each file is checked against its manifest as it is read.
        manifest: its manifest, or what `converted` made of that: the checkpoints are then cast while they are read.
        target: the archive's path.
        part_bytes: no file is to have more bytes; where one would, `<name>-00001-of-00003.archive` and so on are
            written in its place, cut where a full checkpoint begins.

    Returns the files written, flushed to the disk. Memory: about six checkpoints. Raises UserError, leaving nothing,
    for a file that differs from what was recorded and for a `part_bytes` too small for one checkpoint.
    """
    dtype, manifest_bytes = _source_of(folder, manifest)
    small = {paths.MANIFEST: manifest_bytes}
    small |= {name: (folder / name).read_bytes() for name in SMALL if (folder / name).is_file()}
    left, parts = list(manifest["checkpoints"]), []
    try:
        while left or not parts:
            parts.append(target if part_bytes is None else target.with_name(f"{target.name}.part-{len(parts) + 1}"))
            done = _write_part(parts[-1], folder, dtype, manifest["sha256"], small, left, part_bytes)
            left = left[done:]
        return parts if part_bytes is None else _named(parts, target)
    except BaseException:
        for path in parts:
            path.unlink(missing_ok=True)
        raise


def _named(parts: list[Path], target: Path) -> list[Path]:
    """Give the written parts their names, now that their number is known."""
    stem = target.name.removesuffix(SUFFIX)
    for number, path in enumerate(parts, 1):
        name = target.name if len(parts) == 1 else f"{stem}-{number:05}-of-{len(parts):05}{SUFFIX}"
        parts[number - 1] = path.rename(target.with_name(name))
    files.sync_folder(target.parent)
    return parts


def _source_of(folder: Path, manifest: dict) -> tuple[str | None, bytes]:
    """(The dtype to cast to or None, the bytes of manifest.json) of a collection to be archived with this manifest."""
    own = collection.read_manifest(folder)
    if own is None:
        raise UserError(f"{paths.relative(folder)}: has no {paths.MANIFEST}, so it is no finished collection")
    if own["sha256"] == manifest["sha256"]:
        return None, (folder / paths.MANIFEST).read_bytes()
    if manifest.get("converted", {}).get("sha256") == own["sha256"]:
        return manifest["converted"]["to"], (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    raise UserError(f"{paths.relative(folder)}: was replaced while it was worked on; run it again")


def _write_part(
    path: Path, folder: Path, dtype: str | None, seal: str, small: dict, entries: list, part_bytes: int | None
) -> int:
    """Write as many of the checkpoints as fit into an archive of `part_bytes`; returns how many."""
    codec, threads = _codec(), _threads()
    index: dict[str, Any] = {"manifest": seal, "files": {}, "headers": [], "steps": []}
    known: dict[bytes, int] = {}  # header -> its number
    bases: dict[int, list[np.ndarray]] = {}  # position -> planes, of those that a later one may be stored against
    with open(path, "wb") as file, ThreadPoolExecutor(threads) as pool:
        file.write(bytes(HEAD))
        for name, data in small.items():
            index["files"][name] = {"bytes": len(data), "block": _put(file, "zstd", codec.compress(data, asbytes=True))}
        for position, entry in enumerate(entries):
            data = _checkpoint(folder, entry, dtype)
            header = byte_planes.header_of(data)
            if part_bytes and _bound(file.tell(), index, data, header) > part_bytes:
                if not position:
                    raise UserError(f"{part_bytes} bytes are too few for one checkpoint of {paths.relative(folder)}")
                break
            if header not in known:
                known[header] = len(known)
                block = _put(file, "zstd", codec.compress(header, asbytes=True))
                index["headers"].append({"bytes": len(header), "block": block})
            runs = byte_planes.runs_of(header, len(data) - len(header))
            planes = byte_planes.split(np.frombuffer(data, np.uint8)[len(header) :], runs)
            base = base_of(position)
            if base is not None and index["steps"][base]["header"] != known[header]:
                base = None
            pack = functools.partial(_packed, codec)
            packed = pool.map(pack, planes, bases[base] if base is not None else [None] * len(planes))
            stored = [_put(file, *one) for one in packed]
            index["steps"].append({
                "step": entry["step"], "bytes": len(data), "header": known[header], "base": base, "planes": stored,
            })  # fmt: skip
            bases = {place: bases[place] for place in bases if place % STRIDE == 0 and position - place < STRIDE}
            bases[position] = planes
        text = json.dumps(index, separators=(",", ":")).encode()
        _finish(file, codec.compress(text, asbytes=True), len(text))
    return len(index["steps"])


def base_of(position: int) -> int | None:
    """Which checkpoint one is stored against, both by their place in the archive; None: it is full."""
    within = position % GROUP
    return None if not within else position - (1 if within % STRIDE else STRIDE)


def _checkpoint(folder: Path, entry: dict, dtype: str | None) -> bytes:
    """A checkpoint's bytes as they go into an archive, checked to be those recorded in `entry`."""
    path = folder / collection.checkpoint_name(entry["step"])
    if dtype is None:
        return checkpoints.read(path, entry["bytes"], entry["sha256"])
    data, _ = cast(path.read_bytes(), dtype, path)
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise UserError(f"{paths.relative(path)}: changed while it was worked on; make verify tells what differs")
    return data


def _bound(written: int, index: dict, data: bytes, header: bytes) -> int:
    """The most bytes that an archive has which takes this checkpoint, too, and ends with it."""
    planes = len(byte_planes.runs_of(header, len(data) - len(header))) * 8
    blocks = 10 + len(index["headers"]) + sum(len(step["planes"]) + 1 for step in index["steps"]) + planes
    return written + len(data) + blocks * INDEX_BLOCK + 100


def _packed(codec, plane: np.ndarray, base: np.ndarray | None) -> tuple[str, Any]:
    """(How, bytes) a plane is stored."""
    packed = codec.compress(plane if base is None else plane ^ base)
    if packed.size > PAYS * plane.size:
        return "raw", plane
    return "zstd" if base is None else "xor", packed


def _put(file, kind: str, data: Any) -> list:
    """Append a block; what the index says of it: [kind, offset in `blocks`, bytes, sha256]."""
    offset, view = file.tell() - HEAD, memoryview(data)
    file.write(view)
    return [kind, offset, view.nbytes, hashlib.sha256(view).hexdigest()]


def _finish(file, index: bytes, index_bytes: int) -> None:
    """Append the compressed index (`index_bytes` long before) and the seal; write the header in front of it all."""
    ends = [0, file.tell() - HEAD]
    ends += [ends[1] + len(index), ends[1] + len(index) + 32]
    table: dict[str, Any] = {"__metadata__": {"paragen_archive": FORMAT, "index_bytes": str(index_bytes)}}
    for number, name in enumerate(("blocks", "index", "seal")):
        span = ends[number : number + 2]
        table[name] = {"dtype": "U8", "shape": [span[1] - span[0]], "data_offsets": span}
    head = (HEAD - 8).to_bytes(8, "little") + json.dumps(table).encode().ljust(HEAD - 8)
    file.write(index + hashlib.sha256(head + index).digest())
    file.seek(0)
    file.write(head)
    file.flush()
    os.fsync(file.fileno())


# Another dtype


def converted(folder: Path, manifest: dict, dtype: str) -> dict:
    """The manifest of a collection cast to another dtype; the same one where no tensor has to change.

    Args:
        folder, manifest: the collection.
        dtype: float32, bfloat16 or float16. Values are rounded to the nearest, ties to even; integers stay.

    Its checkpoints have the cast files' bytes and sha256; its key `converted` says from what to what, and the sha256 of
    the manifest it was made from. Raises UserError for a value that the dtype cannot hold.
    """
    before, entries = set(), []
    for entry in manifest["checkpoints"]:
        path = folder / collection.checkpoint_name(entry["step"])
        data, found = cast(checkpoints.read(path, entry["bytes"], entry["sha256"]), dtype, path)
        before |= found
        entries.append({**entry, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    if not before:
        return manifest
    mark: dict[str, Any] = {"from": ", ".join(sorted(before)), "to": dtype, "sha256": manifest["sha256"]}
    if "converted" in manifest:
        mark["before"] = manifest["converted"]
    return collection.sealed({**manifest, "checkpoints": entries, "converted": mark})


def cast(data: bytes, dtype: str, path: Path) -> tuple[bytes, set[str]]:
    """(A checkpoint's bytes with its floating-point tensors cast, the dtypes that changed); the same bytes if none."""
    import torch
    from safetensors.torch import load, save

    tensors, to, before = load(data), getattr(torch, dtype), set()
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != to:
            before.add(str(tensor.dtype).removeprefix("torch."))
            tensors[key] = tensor.to(to)
            if not torch.isfinite(tensors[key]).all():
                raise UserError(f"{paths.relative(path)}: {key} holds values that {dtype} cannot; choose another DTYPE")
    return (save(tensors, {"format": "pt"}), before) if before else (data, before)


# Reading


def opened(path: Path) -> Opened:
    """An archive, its seal checked. Raises UserError naming the file when it is truncated, damaged or no archive."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{paths.relative(path)}: no such archive") from None
    return _opened(path, (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@functools.lru_cache(maxsize=16)
def _opened(path: Path, _stamp: tuple) -> Opened:
    from safetensors import SafetensorError, safe_open

    name = paths.relative(path)
    try:
        with safe_open(path, "np") as file:
            marks = file.metadata() or {}
            if marks.get("paragen_archive") != FORMAT:
                raise UserError(f"{name}: is no archive of format {FORMAT}, or its header is damaged")
            index, seal = (file.get_tensor(part).tobytes() for part in ("index", "seal"))
            size = file.get_slice("blocks").get_shape()[0]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name}: is truncated, damaged in its header, or no archive ({error})") from None
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if hashlib.sha256(head + index).digest() != seal:
        raise UserError(f"{name}: its header or its index is damaged; get it again")
    try:
        index = json.loads(_codec().decompress(index, int(marks["index_bytes"]), asbytes=True))
        _check_index(index, size)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{name}: its index is not one of format {FORMAT} ({error!r})") from None
    return Opened(path, index, {step["step"]: place for place, step in enumerate(index["steps"])})


def _check_index(index: dict, size: int) -> None:
    """Raise ValueError (or what a missing key raises) unless an index makes sense, every byte of `blocks` in a block."""
    blocks = [entry["block"] for entry in (*index["files"].values(), *index["headers"])]
    for place, step in enumerate(index["steps"]):
        blocks += step["planes"]
        base = step["base"]
        if not all(isinstance(step[key], int) and step[key] >= 0 for key in ("step", "bytes", "header")):
            raise ValueError(f"checkpoint {place}: {step['step']!r}")
        if base is None and any(kind == "xor" for kind, *_ in step["planes"]):
            raise ValueError(f"checkpoint {place} has no base")
        if base is not None and (not 0 <= base < place or index["steps"][base]["header"] != step["header"]):
            raise ValueError(f"checkpoint {place} has the base {base}")
    end = 0
    for kind, offset, length, _ in sorted(blocks, key=lambda block: block[1]):
        if kind not in ("raw", "zstd", "xor") or offset != end or length < 0:
            raise ValueError(f"a block of kind {kind!r} at {offset}, expected at {end}")
        end += length
    if end != size or len({step["step"] for step in index["steps"]}) != len(index["steps"]):
        raise ValueError("bytes outside of the blocks, or a step twice")


def _block(archive: Opened, handle: int, block: list, size: int, what: str) -> bytes:
    """The content of a block: `size` bytes. Raises UserError naming it when it is damaged."""
    kind, offset, length, sha256 = block
    data = os.pread(handle, length, HEAD + offset)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(
            f"{paths.relative(archive.path)}: {what} is damaged (its sha256 differs); get the archive again"
        )
    try:
        data = data if kind == "raw" else _codec().decompress(data, size, asbytes=True)
    except OSError as error:
        raise UserError(f"{paths.relative(archive.path)}: {what} cannot be decompressed ({error})") from None
    if len(data) != size:
        raise UserError(f"{paths.relative(archive.path)}: {what} has {len(data)} bytes, not {size}")
    return data


def read_files(path: Path) -> dict[str, bytes]:
    """The collection's files beside its checkpoints, by name: manifest.json, adapter_config.json, log and picture."""
    archive = opened(path)
    with open(path, "rb") as file:
        return {
            name: _block(archive, file.fileno(), entry["block"], entry["bytes"], name)
            for name, entry in archive.index["files"].items()
        }


def read_manifest(path: Path) -> dict:
    """The manifest of the collection in an archive (a part has that of the whole). Raises UserError if it is not sound."""
    archive = opened(path)
    entry = archive.index["files"].get(paths.MANIFEST)
    if entry is None:
        raise UserError(f"{paths.relative(path)}: has no {paths.MANIFEST}")
    with open(path, "rb") as file:
        data = _block(archive, file.fileno(), entry["block"], entry["bytes"], paths.MANIFEST)
    return collection.parse_manifest(data, f"{paths.relative(path)}: {paths.MANIFEST}", "get the archive again")


def steps_of(path: Path) -> list[int]:
    """The steps that an archive holds, in its order."""
    return list(opened(path).positions)


def load_step(path: Path, step: int) -> "dict[str, torch.Tensor]":
    """The tensors of one checkpoint by PEFT's key, in the order of the keys, reading no more of the file than needed.

    Raises UserError naming what is damaged, or the steps there are.
    """
    from safetensors.torch import load

    archive = opened(path)
    if step not in archive.positions:
        there = list(archive.positions)
        span = f"{there[0]} to {there[-1]}" if there else "none"
        raise UserError(f"{paths.relative(path)}: does not hold step {step}; it holds {span}")
    with open(path, "rb") as file, ThreadPoolExecutor(_threads()) as pool:
        data, _ = _restored(archive, file.fileno(), archive.positions[step], {}, {}, pool)
    tensors = load(bytes(data))
    return {key: tensors[key] for key in sorted(tensors)}


def read_all(path: Path) -> Iterator[tuple[int, bytearray]]:
    """Each (step, bytes of its checkpoint file) of an archive, in its order, every block read once.

    Memory: a few checkpoints. Raises UserError naming what is damaged.
    """
    archive = opened(path)
    steps = archive.index["steps"]
    last_use = {step["base"]: place for place, step in enumerate(steps)}
    known: dict[int, list[np.ndarray]] = {}
    headers: dict[int, bytes] = {}
    with open(path, "rb") as file, ThreadPoolExecutor(_threads()) as pool:
        for place, step in enumerate(steps):
            data, planes = _restored(archive, file.fileno(), place, known, headers, pool)
            known = {base: known[base] for base in known if last_use[base] > place}
            if last_use.get(place, 0) > place:
                known[place] = planes
            yield step["step"], data


def _restored(
    archive: Opened, handle: int, place: int, known: dict, headers: dict, pool: ThreadPoolExecutor
) -> tuple[bytearray, list[np.ndarray]]:
    """(The bytes, the planes) of one checkpoint; `known` has the planes of others, `headers` what was read of those."""
    step = archive.index["steps"][place]
    what, number = f"checkpoint {step['step']}", step["header"]
    if number not in headers:
        entry = archive.index["headers"][number]
        headers[number] = _block(archive, handle, entry["block"], entry["bytes"], f"the header of {what}")
    try:
        header = headers[number]
        runs = byte_planes.runs_of(header, step["bytes"] - len(header))
        sizes = byte_planes.sizes_of(runs)
    except ValueError as error:
        raise UserError(f"{paths.relative(archive.path)}: {what} {error}") from None
    if len(sizes) != len(step["planes"]):
        raise UserError(f"{paths.relative(archive.path)}: {what} has {len(step['planes'])} planes, not {len(sizes)}")
    plane = functools.partial(_plane, archive, handle, place, known)
    planes = list(pool.map(plane, range(len(sizes)), sizes))
    return byte_planes.join(header, planes, runs), planes


def _plane(archive: Opened, handle: int, place: int, known: dict, number: int, size: int) -> np.ndarray:
    """One plane of a checkpoint (uint8): its own block, and where that is a difference, those it is one from."""
    found = None
    while True:
        step, ready = archive.index["steps"][place], known.get(place)
        kind = None if ready else step["planes"][number][0]
        what = f"byte plane {number} of checkpoint {step['step']}"
        block = (
            ready[number]
            if ready
            else np.frombuffer(_block(archive, handle, step["planes"][number], size, what), np.uint8)
        )
        found = block if found is None else np.bitwise_xor(found, block)
        if kind != "xor":
            return found
        place = step["base"]


# Bringing back


def verify(path: Path) -> None:
    """Read all of an archive; raise UserError naming the first thing that is damaged or not what its manifest records."""
    entries = {entry["step"]: entry for entry in read_manifest(path)["checkpoints"]}
    read_files(path)
    for step, data in read_all(path):
        check_recorded(path, entries, step, data)


def check_recorded(path: Path, entries: dict[int, dict], step: int, data: bytearray) -> None:
    """Raise UserError unless an archive's checkpoint is the one that the manifest's entries record."""
    entry = entries.get(step)
    if entry is None or entry["bytes"] != len(data) or entry["sha256"] != hashlib.sha256(data).hexdigest():
        raise UserError(f"{paths.relative(path)}: checkpoint {step} is not the one that its manifest records")
