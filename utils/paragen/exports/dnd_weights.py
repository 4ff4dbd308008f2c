"""The weights of Drag-and-Drop LLMs' loss: criterion_weight.pt, one number per token of a dataset's checkpoints.

Its training reads workspace/datasets/<task>/<dataset>/criterion_weight.pt and stops where there is none. Its scripts
workspace/datasets/criterion_weight_for_*.py compute it so, for tokens of `rank` rows and `width` columns: a factor (B
transposed) is cut into chunks of `width` columns; a chunk is standardised by its own mean and deviation, which also
stand, scaled, in its last two rows and columns; the weight of a token is the mean of its entries' deviations across
the checkpoints, relative to the mean over all tokens.
"""

import io
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from paragen.collection import checkpoints
from paragen.collection.index import Chosen
from paragen.common import parallel
from paragen.common.cli import UserError
from paragen.exports import parts

if TYPE_CHECKING:
    import torch

METHOD = "token-deviation-1"  # to be changed whenever the numbers change
FILE = "criterion_weight.pt"
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")  # of the tokens within a layer
VALUES = 1 << 20  # that a thread computes with at once
MEAN_SCALE, DEVIATION_BIAS = 8.0, 1.6  # how its tokenizers scale a chunk's mean, and the logarithm of its deviation


def name_of(task: str, dataset: str) -> str:
    """The file's path in a Drag-and-Drop checkout."""
    return f"workspace/datasets/{task}/{dataset}/{FILE}"


def check(chosen: Chosen, out: Path, name: str) -> None:
    """Raise UserError where a collection has no weights, or where they would replace others without FORCE=1."""
    if len(chosen.manifest.checkpoints) < 2:
        raise UserError(
            f"{chosen.name}: has one checkpoint; Drag-and-Drop weights its loss with the deviation across several. "
            "Collect again with KEEP=50"
        )
    if parts.is_foreign(out, name):
        ours = f"those of {chosen.manifest.dataset}"
        parts.check_may_replace(out / name, "weights that were computed from other checkpoints", ours)


def write(chosen: Chosen, out: Path, name: str, keys: dict[str, str], width: int, dtype: str) -> None:
    """Write the weights of a collection to OUT/<name>; a file that no export made is kept beside it.

    Args:
        chosen: the collection.
        out: the export's folder.
        name: the file's path in it.
        keys: Drag-and-Drop's key by the collection's.
        width: the columns of a token.
        dtype: of the exported checkpoints.
    """
    parts.set_aside(out, name)
    source = {"format": "dnd", "weights": METHOD, "sha256": chosen.manifest.sha256, "width": width, "dtype": dtype}
    parts.make(out, name, source, partial(save, chosen, keys, width, dtype))


def save(chosen: Chosen, keys: dict[str, str], width: int, dtype: str, path: Path) -> None:
    """Compute the weights and save them at `path`: float32, 1-D, for torch.load."""
    import torch

    content = io.BytesIO()  # a path's name would become part of the bytes
    torch.save(weights(chosen, keys, width, dtype), content)
    path.write_bytes(content.getvalue())


def weights(chosen: Chosen, keys: dict[str, str], width: int, dtype: str) -> "torch.Tensor":
    """The weight of each token, mean 1, in the order of Drag-and-Drop's tokens: float32."""
    import torch

    handles = list(checkpoints.open_all(chosen.folder, chosen.manifest.checkpoints))

    def of_key(key: str) -> torch.Tensor:
        factors = torch.stack([handle.get_tensor(key).to(getattr(torch, dtype)) for handle in handles])
        return token_deviations(factors.mT if "lora_B" in key else factors, width)

    found = torch.cat(list(parallel.each(of_key, in_token_order(keys))))
    if not found.isfinite().all() or not found.any():
        raise UserError(
            f"{chosen.name}: Drag-and-Drop has no weights for it: its checkpoints are all equal, or have a part whose "
            "values are all equal; make verify says more"
        )
    return (found / found.mean()).float()


def in_token_order(keys: dict[str, str]) -> list[str]:
    """A collection's keys in the order in which Drag-and-Drop's tokenizer takes them: by layer, projection, A before B.

    `keys` has its keys by the collection's.
    """

    def place(key: str) -> tuple[int, int, str]:
        found = re.search(r"layers\.(\d+)\..*\.(\w+)\.lora_([AB])\.weight$", keys[key])
        assert found is not None  # `dnd.dnd_key` makes no others
        return int(found[1]), ORDER.index(found[2]), found[3]

    return sorted(keys, key=place)


def token_deviations(factors: "torch.Tensor", width: int) -> "torch.Tensor":
    """The mean deviation across checkpoints of the entries of each token.

    Args:
        factors: one factor in all checkpoints, steps x rank x columns.
        width: the columns of a token; divides those of the factor.

    Returns one value per token, float64.
    """
    import torch

    steps, rank, columns = factors.shape
    at_once = max(1, VALUES // (steps * rank * width))
    if columns > at_once * width:
        return torch.cat([token_deviations(part, width) for part in factors.split(at_once * width, 2)])
    tokens = factors.double().reshape(steps, rank, columns // width, width).transpose(1, 2)
    mean, deviation = tokens.mean((2, 3)), tokens.flatten(2).std(2)
    tokens = (tokens - mean[..., None, None]) / deviation[..., None, None]
    scales = torch.stack([mean * MEAN_SCALE, (deviation * 0.9 + 0.1).log() + DEVIATION_BIAS], -1)[:, :, None]
    tokens[:, :, -2:, :] = scales.repeat(1, 1, 2, width // 2)
    tokens[:, :, :, -2:] = scales.repeat(1, 1, rank, 1)
    return tokens.std(0, correction=0).mean((1, 2))


def token_width(shapes: Sequence[tuple[str, list[int]]]) -> int:
    """The columns of a token: the width of the key projection, for all models that Drag-and-Drop has a tokenizer for.

    `shapes` are its keys with the shapes of their tensors.
    """
    return next(shape[0] for key, shape in shapes if key.endswith("k_proj.lora_B.weight"))
