"""What scoring does on an NVIDIA GPU in one pass over memory, where PyTorch's operations need several (Triton).

Imported by lora_stack.py and scoring.py. Sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TALL, WIDE = 64, 64  # rows and columns of an activation that are computed at a time
WORDS = 8192  # logits that are read at a time


def gated(gate: Tensor, up: Tensor, hidden: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor) -> Tensor:
    """Of n adapters with `rows` rows each: silu(gate + hidden[:, :, :r] b_gate) * (up + hidden[:, :, r:] b_up).

    Two wide activations are read and one is written, nothing else of their size.

    Args:
        gate, up: what the base's layers make, [n * rows, inner], contiguous; `gate` is overwritten with the result.
        hidden: what the first factors make of the block's input, gate's and behind it up's, [n, rows, 2 * rank].
        b_gate, b_up: [n, rank, inner], contiguous.
        a_down: [n, inner, rank], contiguous.

    Returns the result times a_down, [n, rows, rank].
    """
    count, rows, width = hidden.shape
    rank, inner = width // 2, gate.shape[-1]
    result = torch.empty(count, rows, rank, dtype=gate.dtype, device=gate.device)
    padded = max(16, triton.next_power_of_2(rank))
    registers = {"maxnreg": 128} if padded == 16 else {}  # four blocks on a multiprocessor, not three
    _gated[triton.cdiv(rows, TALL), count](
        gate, up, hidden.contiguous(), b_gate, b_up, a_down, result, rows, inner, rank, padded, TALL, WIDE,
        num_warps=4, num_stages=2, **registers,
    )  # fmt: skip
    return result


@triton.jit
def _gated(
    gate, up, hidden, b_gate, b_up, a_down, result, rows,
    INNER: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One adapter's next TALL rows, WIDE columns at a time."""
    adapter = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * TALL
    begin = adapter * rows + first  # only this is large; what follows are offsets from it
    gate, up = gate + begin * INNER, up + begin * INNER
    hidden, result = hidden + begin * 2 * RANK, result + begin * RANK
    size = adapter * RANK * INNER
    b_gate, b_up, a_down = b_gate + size, b_up + size, a_down + size
    row, ranks = tl.arange(0, TALL)[:, None], tl.arange(0, PADDED)
    is_row, is_rank = first + row < rows, ranks < RANK
    side = row * (2 * RANK) + ranks[None, :]
    of_gate = tl.load(hidden + side, mask=is_row & is_rank[None, :], other=0.0)
    of_up = tl.load(hidden + RANK + side, mask=is_row & is_rank[None, :], other=0.0)
    found = tl.zeros((TALL, PADDED), tl.float32)
    for start in range(0, INNER, WIDE):
        column = start + tl.arange(0, WIDE)
        is_column = column < INNER
        is_here = is_row & is_column[None, :]
        here = row * INNER + column[None, :]
        second = ranks[:, None] * INNER + column[None, :]
        is_second = is_rank[:, None] & is_column[None, :]
        one = tl.load(gate + here, mask=is_here, other=0.0).to(tl.float32)
        other = tl.load(up + here, mask=is_here, other=0.0).to(tl.float32)
        b = tl.load(b_gate + second, mask=is_second, other=0.0)
        one = tl.dot(of_gate, b, one, input_precision="ieee")
        b = tl.load(b_up + second, mask=is_second, other=0.0)
        other = tl.dot(of_up, b, other, input_precision="ieee")
        made = (one * tl.sigmoid(one) * other).to(gate.dtype.element_ty)
        tl.store(gate + here, made, mask=is_here)
        factor = column[:, None] * RANK + ranks[None, :]
        a = tl.load(a_down + factor, mask=is_column[:, None] & is_rank[None, :], other=0.0)
        found = tl.dot(made, a, found, input_precision="ieee")
    at = row * RANK + ranks[None, :]
    tl.store(result + at, found.to(result.dtype.element_ty), mask=is_row & is_rank[None, :])


def reduced(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows of logits [rows, words] the logarithm of the sum of their exponentials and the place of the largest."""
    rows, words = logits.shape
    totals = torch.empty(rows, dtype=torch.float32, device=logits.device)
    best = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _reduced[rows,](logits.contiguous(), totals, best, words, WORDS, num_warps=8)
    return totals, best


@triton.jit
def _reduced(logits, totals, best, COUNT: tl.constexpr, WORDS: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), -3.0e38, tl.float32)  # of words that are all impossible, too, the difference is a number
    total = tl.zeros((), tl.float32)
    place = tl.zeros((), tl.int32)
    for start in range(0, COUNT, WORDS):
        word = start + tl.arange(0, WORDS)
        x = tl.load(logits + row * COUNT + word, mask=word < COUNT, other=-float("inf")).to(tl.float32)
        here, at = tl.max(x, 0, return_indices=True)
        place = tl.where(here > largest, start + at, place)
        more = tl.maximum(largest, here)
        total = total * tl.exp(largest - more) + tl.sum(tl.exp(x - more), 0)
        largest = more
    tl.store(totals + row, largest + tl.log(total))
    tl.store(best + row, place.to(tl.int64))
