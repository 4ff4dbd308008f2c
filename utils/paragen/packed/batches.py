"""The batches of packed training: which rows each adapter sees at which step, laid out as one sequence of tokens.

All rows are known before the first step, so the shapes of the steps can be sorted into a few buckets, each of which is
captured once as a CUDA graph.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from paragen.packed import dropout
from paragen.packed.step_context import AdapterGroups, Batch

IGNORED = -100  # the label of a token that has no loss
ROUND_TO = 16  # tokens; the lengths of rows and of groups are rounded up to multiples of this


class Row(NamedTuple):
    """A tokenised row, as LLaMA-Factory makes it."""

    tokens: np.ndarray  # [length] int64
    labels: np.ndarray  # [length] int64, IGNORED for tokens without a loss


class Shape(NamedTuple):
    """The size of a step's batch. Each group and each row has room for at least one token of padding."""

    tokens: int  # per group of adapters
    rows: int
    row_length: int
    learned: int  # tokens with a loss

    def covers(self, other: "Shape") -> bool:
        """Whether a batch of the other shape fits into this one."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))


@dataclass
class Step:
    """The rows of one step."""

    rows: list[list[Row]]  # by adapter; an adapter whose training is complete has none
    streams: list[int] | None = None  # by adapter, see dropout.py; None where no adapter has dropout

    @property
    def has_rows(self) -> bool:
        """Whether any adapter has a row."""
        return any(self.rows)

    def without(self, adapters: Container[int]) -> "Step":
        """The step without the rows of some adapters."""
        return Step([[] if index in adapters else rows for index, rows in enumerate(self.rows)], self.streams)

    def shape(self, groups: AdapterGroups) -> Shape:
        """The smallest shape that holds the step."""
        tokens = [0] * groups.count
        for adapter, rows in enumerate(self.rows):
            tokens[groups.group_of[adapter]] += sum(len(row.tokens) for row in rows)
        all_rows = [row for rows in self.rows for row in rows]
        longest = max((len(row.tokens) for row in all_rows), default=1)
        learned = sum(int((row.labels[1:] != IGNORED).sum()) for row in all_rows)
        return Shape(max(tokens) + 1, len(all_rows), longest + 1, learned)


def choose_buckets(shapes: list[Shape], count: int) -> list[Shape]:
    """A few shapes, ascending in tokens: each of the given ones is covered by one of them, with the fewest tokens.

    Args:
        shapes: those of all steps.
        count: the largest number of buckets.
    """
    by_tokens: dict[int, list[Shape]] = {}
    for shape in shapes:
        by_tokens.setdefault(round_up(shape.tokens), []).append(shape)
    sizes = sorted(by_tokens)
    chosen: list[Shape] = []
    start = 0
    for end in cut_sizes(sizes, [len(by_tokens[size]) for size in sizes], count):
        part = [shape for size in sizes[start:end] for shape in by_tokens[size]]
        largest = Shape(*(max(values) for values in zip(*part, strict=True)))
        chosen.append(largest._replace(tokens=sizes[end - 1], row_length=round_up(largest.row_length)))
        start = end
    return chosen


def cut_sizes(sizes: list[int], steps: list[int], count: int) -> list[int]:
    """Cut sizes into parts so that all steps together are smallest, each padded to the largest size of its part.

    Args:
        sizes: ascending, without repetition.
        steps: how many steps each size has.
        count: the largest number of parts.

    Returns the ends of the parts, each one past the place of its last size. Dynamic programming: the best cut of the
    first sizes into n + 1 parts has a best cut of fewer sizes into n parts before its last part.
    """
    before = np.cumsum([0, *steps])  # by place, the steps of the sizes before it
    least = [0.0, *[np.inf] * len(sizes)]  # by end, the total of the best cut of the sizes before it
    begins: list[list[int]] = []  # by number of parts and end, where the last part begins
    for _ in range(min(count, len(sizes))):
        totals, begin = np.array(least), [0]
        least = [np.inf]
        for end, size in enumerate(sizes, 1):
            candidates = totals[:end] + (before[end] - before[:end]) * size
            begin.append(int(candidates.argmin()))
            least.append(float(candidates.min()))
        begins.append(begin)
    ends = [len(sizes)]
    for begin in reversed(begins[1:]):
        ends.append(begin[ends[-1]])
    return ends[::-1]


def round_up(tokens: int) -> int:
    """The next multiple of ROUND_TO."""
    return -(-tokens // ROUND_TO) * ROUND_TO


def lay_out(step: Step, groups: AdapterGroups, shape: Shape) -> dict[str, np.ndarray]:
    """A step's rows as the arrays of a Batch (its fields give their shapes and dtypes), padded to `shape`.

    The last token of the first group and the last place of the first row are always padding. The weights of an
    adapter's losses are 1 / n, where n is the number of labelled tokens that LLaMA-Factory's trainer divides by.
    """
    size, adapters = shape.tokens * groups.count, len(step.rows)
    out: dict[str, np.ndarray] = {
        "tokens": np.zeros(size, np.int64),
        "positions": np.zeros(size, np.int64),
        "adapter": np.full(size, adapters, np.int64),
        # padding is copied from padding, forwards and backwards, so that it contributes no gradient
        "to_rows": np.full(shape.rows * shape.row_length, shape.tokens - 1, np.int64),
        "to_tokens": np.full(size, shape.row_length - 1, np.int64),
        "sequences": np.full(shape.rows + groups.count * -(-shape.tokens // shape.row_length) + 1, size, np.int64),
        "predicting": np.zeros(shape.learned, np.int64),
        "to_losses": np.full(size, shape.learned, np.int64),
        "targets": np.zeros(shape.learned, np.int64),
        "weights": np.zeros(shape.learned, np.float32),
        "loss_adapter": np.zeros(shape.learned, np.int64),
    }
    streams, row_of = np.zeros(size, np.int64), np.zeros(size, np.int64)  # what the keys of dropout are made from
    filled = [group * shape.tokens for group in range(groups.count)]
    starts: list[int] = []
    row_number = learned = 0
    for adapter, rows in enumerate(step.rows):
        labelled = sum(int((row.labels != IGNORED).sum()) for row in rows)
        for number, row in enumerate(rows):
            start, length = filled[groups.group_of[adapter]], len(row.tokens)
            place = np.arange(length)
            here, row_start = slice(start, start + length), row_number * shape.row_length
            out["tokens"][here], out["positions"][here], out["adapter"][here] = row.tokens, place, adapter
            out["to_rows"][row_start : row_start + length] = start + place
            out["to_tokens"][here] = row_start + place
            if step.streams is not None:
                streams[here], row_of[here] = step.streams[adapter], number
            predicting = np.flatnonzero(row.labels[1:] != IGNORED)
            losses = slice(learned, learned + len(predicting))
            out["predicting"][losses], out["targets"][losses] = start + predicting, row.labels[1:][predicting]
            out["to_losses"][start + predicting] = np.arange(losses.start, losses.stop)
            out["weights"][losses], out["loss_adapter"][losses] = 1 / labelled, adapter
            filled[groups.group_of[adapter]] += length
            row_number, learned = row_number + 1, learned + len(predicting)
            starts.append(start)
    for group, end in enumerate(filled):
        starts.extend(range(end, (group + 1) * shape.tokens, shape.row_length))
    out["sequences"][: len(starts)] = sorted(starts)
    if step.streams is not None:
        out["dropout_keys"] = dropout.token_keys(streams, row_of, out["positions"])
    out["tokens"], out["positions"] = out["tokens"][None], out["positions"][None]
    return out


def token_spans(step: Step, groups: AdapterGroups, shape: Shape) -> list[tuple[int, int]]:
    """Each adapter's tokens in the layout of a step, as (first, one past the last)."""
    filled, spans = [group * shape.tokens for group in range(groups.count)], []
    for adapter, rows in enumerate(step.rows):
        start = filled[groups.group_of[adapter]]
        filled[groups.group_of[adapter]] += sum(len(row.tokens) for row in rows)
        spans.append((start, filled[groups.group_of[adapter]]))
    return spans


def to_batch(step: Step, groups: AdapterGroups, device: torch.device, shape: Shape | None = None) -> Batch:
    """A step as a Batch on a device.

    Args:
        shape: the batch's shape; by default the step's own.
    """
    shape = shape or step.shape(groups)
    tensors = {name: torch.from_numpy(array).to(device) for name, array in lay_out(step, groups, shape).items()}
    spans = token_spans(step, groups, shape) if device.type == "cpu" else None
    return Batch(**tensors, row_length=shape.row_length, spans=spans)
