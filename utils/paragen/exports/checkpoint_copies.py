"""Copies of a collection's checkpoints in an export: the same bytes, or cast to another dtype, or with other keys."""

import json
import shutil
from pathlib import Path
from typing import Any

from paragen.collection import checkpoints
from paragen.collection.manifest import CheckpointEntry
from paragen.common import paths
from paragen.common.cli import UserError


def bytes_of(entry: CheckpointEntry, stored: str, dtype: str | None) -> int:
    """About how many bytes a checkpoint takes in an export; `stored` is its dtype, `dtype` the requested one."""
    if dtype in (None, stored):
        return entry.bytes
    return entry.bytes * (4 if dtype == "float32" else 2) // (4 if stored == "float32" else 2)


def write_checkpoint(
    folder: Path, entry: CheckpointEntry, target: Path, dtype: str | None = None, rename: dict[str, str] | None = None
) -> None:
    """Write one checkpoint of a collection at `target`: the same bytes, unless it is cast or its keys are renamed.

    Args:
        folder: the collection's.
        entry: the checkpoint's entry in the manifest, against which the file is checked.
        target: a path where nothing exists.
        dtype: what its tensors are cast to (`float32`, `bfloat16`, `float16`); None keeps them.
        rename: the key to write for each of its keys; None keeps them. It has to name exactly the file's keys.

    Raises UserError naming the file when it differs from its entry, has other keys, or values too large for `dtype`.
    """
    import torch
    from safetensors.torch import save_file

    path = folder / entry.file_name
    tensors = checkpoints.load(path, entry.bytes, entry.sha256)
    if rename is not None and rename.keys() != tensors.keys():
        differing = min(rename.keys() ^ tensors.keys())
        raise UserError(f"{paths.relative(path)}: has not the keys of the other steps ({differing}); run: make verify")
    wanted = getattr(torch, dtype) if dtype else None
    as_it_is = wanted is None or all(tensor.dtype == wanted for tensor in tensors.values())
    if as_it_is and (rename is None or all(old == new for old, new in rename.items())):
        with (
            open(path, "rb") as source,
            open(target, "xb") as copy,
        ):  # shutil.copyfile would blame the source for a full disk
            shutil.copyfileobj(source, copy, 1 << 20)
        return
    if wanted is not None:
        tensors = {key: checkpoints.cast(tensor, wanted, key, path) for key, tensor in tensors.items()}
    written = {(rename or {}).get(key, key): tensor for key, tensor in tensors.items()}
    save_file(written, target, metadata={"format": "pt"})


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write an adapter_config.json into a new folder."""
    (folder / paths.ADAPTER_CONFIG).write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
