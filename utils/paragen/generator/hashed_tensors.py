"""Tensors in a training's staging folder: a safetensors file behind the SHA-256 of its bytes, checked at each reading.

A flipped bit in what a killed training left would otherwise train on wrong numbers, and nothing would notice.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from paragen.common import files, safetensors_header

DIGEST = hashlib.sha256().digest_size


def write(path: Path, tensors: dict[str, Tensor], about: Any = None) -> None:
    """Write tensors on the CPU, and a JSON value about them."""
    content = save(tensors, {"about": json.dumps(about)})
    files.write_atomically(path, hashlib.sha256(content).digest(), content, durable=False)


def read(path: Path) -> tuple[dict[str, Tensor], Any] | None:
    """The tensors and the value about them; None where the file is missing, or is not as it was written."""
    try:
        content = files.read_up_to(path)
    except OSError:
        return None
    digest, content = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    header = json.loads(safetensors_header.header_in(content)[safetensors_header.LENGTH_BYTES :])
    return load(content), json.loads(header["__metadata__"]["about"])
