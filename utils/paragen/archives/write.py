"""Writes archives, with the checkpoints cast to another dtype where that is requested.

archive.py describes the format.
"""

import functools
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from paragen.archives import byte_planes
from paragen.archives.read import FORMAT, HEAD, codec, threads
from paragen.collection import checkpoints, evaluation, run_files
from paragen.collection.manifest import CheckpointEntry, Manifest, check_manifest, require_manifest, sealed
from paragen.common import files, paths, safetensors_header
from paragen.common.cli import UserError

SUFFIX = ".archive"
GROUP, STRIDE = 16, 4  # steps
PAYS = 0.9  # a plane is stored compressed when that takes at most this share of its size
INDEX_BLOCK = 140  # the most bytes that a block takes in the index


def write(folder: Path, manifest: Manifest, target: Path, part_bytes: int | None = None) -> list[Path]:
    """Write a collection to an archive. Use a staging path: a killed process leaves half a file at `target`.

    Args:
        folder: the collection; each file is checked against its manifest as it is read.
        manifest: its manifest, or the one that `converted` made from it, with which the checkpoints are cast.
        target: the archive's path.
        part_bytes: the most bytes of a file. A larger archive is split into `<name>-00001-of-00003.archive` and so on,
            each of which begins with a checkpoint that is stored alone.

    An evaluation.json is included unless the checkpoints are cast, since its scores are not those of cast ones.

    Returns the files written, flushed to the disk. Takes the memory of about six checkpoints. Raises UserError, and
    leaves no file, for a file that differs from its manifest and for a `part_bytes` too small for one checkpoint.
    """
    dtype, manifest_bytes = _source_of(folder, manifest)
    small = {paths.MANIFEST: manifest_bytes, paths.ADAPTER_CONFIG: checkpoints.adapter_config_bytes(folder, manifest)}
    beside = (run_files.LOG, run_files.PICTURE)
    small |= {name: (folder / name).read_bytes() for name in beside if (folder / name).is_file()}
    if dtype is None and (scores := evaluation.bytes_in(folder)) is not None:  # they are not of cast checkpoints
        evaluation.parse(scores, manifest, paths.relative(folder / evaluation.FILE))
        small[evaluation.FILE] = scores
    left = list(manifest.checkpoints)
    parts: list[Path] = []
    try:
        while left or not parts:
            parts.append(target if part_bytes is None else target.with_name(f"{target.name}.part-{len(parts) + 1}"))
            done = _write_part(parts[-1], folder, dtype, manifest.sha256, small, left, part_bytes)
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


def _source_of(folder: Path, manifest: Manifest) -> tuple[str | None, bytes]:
    """(The dtype to cast to or None, the bytes of manifest.json) for an archive of a collection with this manifest."""
    own = require_manifest(folder)
    if own.sha256 == manifest.sha256:
        return None, (folder / paths.MANIFEST).read_bytes()
    if manifest.converted and manifest.converted.manifest_sha256 == own.sha256:
        text = json.dumps(manifest.content, indent=2, ensure_ascii=False) + "\n"
        return manifest.converted.to_dtype, text.encode()
    raise UserError(f"{paths.relative(folder)}: was replaced while it was archived; run it again")


def _write_part(
    path: Path, folder: Path, dtype: str | None, seal: str, small: dict, entries: list, part_bytes: int | None
) -> int:
    """Write as many checkpoints as fit into an archive of `part_bytes`; returns their number."""
    zstd = codec()
    index: dict[str, Any] = {"manifest": seal, "files": {}, "headers": [], "steps": []}
    known: dict[bytes, int] = {}  # header -> its number
    blocks = len(small)
    bases: dict[int, list[np.ndarray]] = {}  # position -> planes of a checkpoint that a later one may be stored against
    with open(path, "wb") as file, ThreadPoolExecutor(threads()) as pool:
        file.write(bytes(HEAD))
        for name, data in small.items():
            index["files"][name] = {"bytes": len(data), "block": _put(file, "zstd", zstd.compress(data, asbytes=True))}
        for position, entry in enumerate(entries):
            data = _checkpoint(folder, entry, dtype)
            header = safetensors_header.header_in(data)
            if part_bytes and _bound(file.tell(), blocks, data, header) > part_bytes:
                if not position:
                    raise UserError(f"{part_bytes} bytes are too few for one checkpoint of {paths.relative(folder)}")
                break
            if header not in known:
                known[header] = len(known)
                block = _put(file, "zstd", zstd.compress(header, asbytes=True))
                index["headers"].append({"bytes": len(header), "block": block})
            runs = byte_planes.runs_of(header, len(data) - len(header))
            planes = byte_planes.split(np.frombuffer(data, np.uint8)[len(header) :], runs)
            base = base_of(position)
            if base is not None and index["steps"][base]["header"] != known[header]:
                base = None
            pack = functools.partial(_packed, zstd)
            packed = pool.map(pack, planes, bases[base] if base is not None else [None] * len(planes))
            stored = [_put(file, *one) for one in packed]
            index["steps"].append({
                "step": entry.step, "bytes": len(data), "header": known[header], "base": base, "planes": stored,
            })  # fmt: skip
            bases = {place: bases[place] for place in bases if place % STRIDE == 0 and position - place < STRIDE}
            bases[position] = planes
            blocks += len(stored) + 2
        text = json.dumps(index, separators=(",", ":")).encode()
        _finish(file, zstd.compress(text, asbytes=True), len(text))
    return len(index["steps"])


def base_of(position: int) -> int | None:
    """The position of the checkpoint that the one at `position` is stored against; None: it is stored alone."""
    within = position % GROUP
    return None if not within else position - (1 if within % STRIDE else STRIDE)


def _checkpoint(folder: Path, entry: CheckpointEntry, dtype: str | None) -> bytes:
    """A checkpoint's bytes for an archive, cast to `dtype` if given, checked against `entry`."""
    path = folder / entry.file_name
    if dtype is None:
        return checkpoints.read(path, entry.bytes, entry.sha256)
    data, _ = cast(path.read_bytes(), dtype, path)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise UserError(f"{paths.relative(path)}: changed while it was archived; make verify names what differs")
    return data


def _bound(written: int, blocks: int, data: bytes, header: bytes) -> int:
    """An upper bound on an archive's bytes: `written` in `blocks` blocks, then the checkpoint `data` with `header`."""
    planes = len(byte_planes.sizes_of(byte_planes.runs_of(header, len(data) - len(header))))
    return written + len(data) + (blocks + planes + 4) * INDEX_BLOCK + 500


def _packed(zstd, plane: np.ndarray, base: np.ndarray | None) -> tuple[str, Any]:
    """(kind, bytes): how a plane is stored."""
    packed = zstd.compress(plane if base is None else plane ^ base)
    if packed.size > PAYS * plane.size:
        return "raw", plane
    return "zstd" if base is None else "xor", packed


def _put(file, kind: str, data: Any) -> list:
    """Append a block; returns its entry in the index: [kind, offset in `blocks`, bytes, sha256]."""
    offset, view = file.tell() - HEAD, memoryview(data)
    file.write(view)
    return [kind, offset, view.nbytes, hashlib.sha256(view).hexdigest()]


def _finish(file, index: bytes, index_bytes: int) -> None:
    """Append the compressed index (uncompressed: `index_bytes`) and the seal, then write the header at the front."""
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


def converted(folder: Path, manifest: Manifest, dtype: str) -> Manifest:
    """The manifest of a collection cast to another dtype; the same manifest where no tensor has to change.

    Args:
        folder, manifest: the collection.
        dtype: float32, bfloat16 or float16. Values are rounded to the nearest, ties to even; integers stay.

    Its checkpoints have the cast files' bytes and sha256. Its key `converted` names both dtypes and the sha256 of the
    manifest that it was made from. Raises UserError for a value that the dtype cannot hold.
    """
    before, entries = set(), []
    for entry in manifest.checkpoints:
        path = folder / entry.file_name
        data, found = cast(checkpoints.read(path, entry.bytes, entry.sha256), dtype, path)
        before |= found
        entries.append(replace(entry, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    if not before:
        return manifest
    mark: dict[str, Any] = {"from": ", ".join(sorted(before)), "to": dtype, "sha256": manifest.sha256}
    if "converted" in manifest.content:
        mark["before"] = manifest.content["converted"]
    changed = {"checkpoints": [asdict(entry) for entry in entries], "converted": mark}
    return check_manifest(sealed(manifest.content | changed), paths.relative(folder), "run: make verify")


def cast(data: bytes, dtype: str, path: Path) -> tuple[bytes, set[str]]:
    """(A checkpoint's bytes with its floating-point tensors cast, the dtypes that changed); the same bytes if none.

    `data` is verified by the caller: before it is cast, or by the hash of what comes out.
    """
    import torch
    from safetensors.torch import load, save

    tensors, to, before = load(data), getattr(torch, dtype), set()
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != to:
            before.add(str(tensor.dtype).removeprefix("torch."))
            tensors[key] = checkpoints.cast(tensor, to, key, path)
    return (save(tensors, {"format": "pt"}), before) if before else (data, before)
