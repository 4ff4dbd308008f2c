"""The batches of packed training: which rows each adapter sees at which step, laid out as one sequence of tokens.

Imported by packed_engine.py. All is known before the first step, so that the shapes of the steps can be sorted into a
few buckets, each of which is captured once as a CUDA graph.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from paragen.packed.layers import Batch, Bins

IGNORED = -100  # the label of a token that is not learned
GRAIN = 16  # tokens; a row's length and a bin's are rounded up to multiples


class Row(NamedTuple):
    """A tokenised row, as LLaMA-Factory makes it."""

    tokens: np.ndarray  # [length] int64
    labels: np.ndarray  # [length] int64, IGNORED where nothing is learned


class Shape(NamedTuple):
    """The size of a step's batch. Each bin and each row has room for at least one token of padding."""

    tokens: int  # per bin
    rows: int
    row_length: int
    learned: int  # tokens with a loss

    def covers(self, other: "Shape") -> bool:
        """Whether a batch of the other shape fits."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


@dataclass
class Step:
    """The rows of one step, by adapter; an adapter that is through has none."""

    rows: list[list[Row]]

    def shape(self, bins: Bins) -> Shape:
        """The smallest shape that holds the step."""
        tokens = [0] * bins.count
        for adapter, rows in enumerate(self.rows):
            tokens[bins.bin_of[adapter]] += sum(len(row.tokens) for row in rows)
        every = [row for rows in self.rows for row in rows]
        longest = max((len(row.tokens) for row in every), default=1)
        learned = sum(int((row.labels[1:] != IGNORED).sum()) for row in every)
        return Shape(max(tokens) + 1, len(every), longest + 1, learned)


def buckets(shapes: list[Shape], count: int) -> list[Shape]:
    """A few shapes, ascending, of which some cover each of the given ones, with little padding.

    Args:
        shapes: of all steps.
        count: buckets at most.
    """
    by_size = sorted(shapes)
    ends = sorted({-(-len(by_size) * part // count) - 1 for part in range(1, count + 1)})
    found, start = [], 0
    for end in ends:
        some = by_size[start : end + 1]
        shape = Shape(*(max(values) for values in zip(*some, strict=True)))
        shape = shape._replace(tokens=rounded(shape.tokens), row_length=rounded(shape.row_length))
        if found and found[-1].covers(shape):
            pass
        elif found and found[-1].tokens == shape.tokens:
            found[-1] = Shape(*(max(pair) for pair in zip(found[-1], shape, strict=True)))
        else:
            found.append(shape)
        start = end + 1
    return found


def rounded(tokens: int) -> int:
    """Up to a multiple of GRAIN."""
    return -(-tokens // GRAIN) * GRAIN


def lay_out(step: Step, bins: Bins, shape: Shape) -> dict[str, np.ndarray]:
    """A step's rows as the arrays of a Batch (see there for their shapes), padded to `shape`.

    The last token of the first bin and the last place of the first row are padding for sure.
    An adapter's weights add up to 1 over the tokens that LLaMA-Factory's trainer divides by: all labelled ones.
    """
    size, adapters = shape.tokens * bins.count, len(step.rows)
    out = {
        "tokens": np.zeros(size, np.int64),
        "positions": np.zeros(size, np.int64),
        "adapter": np.full(size, adapters, np.int64),
        # padding is made of padding, forwards and backwards, so that no gradient comes from it
        "to_rows": np.full(shape.rows * shape.row_length, shape.tokens - 1, np.int64),
        "to_tokens": np.full(size, shape.row_length - 1, np.int64),
        "predicting": np.zeros(shape.learned, np.int64),
        "targets": np.zeros(shape.learned, np.int64),
        "weights": np.zeros(shape.learned, np.float32),
        "loss_of": np.zeros(shape.learned, np.int64),
    }
    filled = [number * shape.tokens for number in range(bins.count)]
    row_number = learned = 0
    for adapter, rows in enumerate(step.rows):
        labelled = sum(int((row.labels != IGNORED).sum()) for row in rows)
        for row in rows:
            start, length = filled[bins.bin_of[adapter]], len(row.tokens)
            place = np.arange(length)
            here, there = slice(start, start + length), row_number * shape.row_length
            out["tokens"][here], out["positions"][here], out["adapter"][here] = row.tokens, place, adapter
            out["to_rows"][there : there + length] = start + place
            out["to_tokens"][here] = there + place
            at = np.flatnonzero(row.labels[1:] != IGNORED)
            losses = slice(learned, learned + len(at))
            out["predicting"][losses], out["targets"][losses] = start + at, row.labels[1:][at]
            out["weights"][losses], out["loss_of"][losses] = 1 / labelled, adapter
            filled[bins.bin_of[adapter]] += length
            row_number, learned = row_number + 1, learned + len(at)
    out["tokens"], out["positions"] = out["tokens"][None], out["positions"][None]
    return out


def spans_of(step: Step, bins: Bins, shape: Shape) -> list[tuple[int, int]]:
    """Where each adapter's tokens stand in the layout of a step: the first and the one after the last."""
    filled, spans = [number * shape.tokens for number in range(bins.count)], []
    for adapter, rows in enumerate(step.rows):
        start = filled[bins.bin_of[adapter]]
        filled[bins.bin_of[adapter]] += sum(len(row.tokens) for row in rows)
        spans.append((start, filled[bins.bin_of[adapter]]))
    return spans


def to_batch(step: Step, bins: Bins, device: torch.device, shape: Shape | None = None) -> Batch:
    """A step as a Batch on a device, of its own shape or a larger one."""
    shape = shape or step.shape(bins)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in lay_out(step, bins, shape).items()}
    return Batch(
        **tensors, row_length=shape.row_length, spans=spans_of(step, bins, shape) if device.type == "cpu" else None
    )
