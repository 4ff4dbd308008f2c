"""What scoring does on an NVIDIA GPU in one pass over memory, where PyTorch's operations need several (Triton).

Imported by attention.py, lora_stack.py and scoring.py. Sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TALL, WIDE = 64, 64  # rows and columns of an activation, or tokens and keys, that are computed at a time
LOW = 16  # tokens of an answer that are: one for each head that shares its keys
LOG2_E = 1.4426950408889634
WORDS = 8192  # logits that are read at a time
WIDEST = 512  # bytes of a head, for whose keys and values there is room
NEVER = tl.constexpr(-1.0e30)  # of what is not seen; of tokens that see nothing, too, the difference is a number


def can_gate(inner: int) -> bool:
    """Whether `gated` can do activations of this width: of a loop of one round, Triton 3.6 made wrong numbers on an
    H100 (with ranks from 17 to 32)."""
    return inner > WIDE


def gated(gate: Tensor, up: Tensor, hidden: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor) -> Tensor:
    """Of n adapters with `rows` rows each: silu(gate + hidden[:, :, :r] b_gate) * (up + hidden[:, :, r:] b_up).

    Two wide activations are read and one is written, nothing else of their size. Raises ValueError for activations that
    `can_gate` refuses.

    Args:
        gate, up: what the base's layers make, [n * rows, inner], contiguous; `gate` is overwritten with the result.
        hidden: what the first factors make of the block's input, gate's and behind it up's, [n, rows, 2 * rank].
        b_gate, b_up: [n, rank, inner], contiguous.
        a_down: [n, inner, rank], contiguous.

    Returns the result times a_down, [n, rows, rank].
    """
    count, rows, width = hidden.shape
    rank, inner = width // 2, gate.shape[-1]
    if not can_gate(inner):
        raise ValueError(f"activations of {inner} are too narrow")
    result = torch.empty(count, rows, rank, dtype=gate.dtype, device=gate.device)
    padded = max(16, triton.next_power_of_2(rank))
    registers = {"maxnreg": 128} if padded == 16 else {}  # four blocks on a multiprocessor, not three
    _gated[triton.cdiv(rows, TALL), count](
        gate, up, hidden.contiguous(), b_gate, b_up, a_down, result, rows, inner, rank, padded, TALL, WIDE,
        num_warps=4, num_stages=2, **registers,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["rows"])
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


def can_attend(query: Tensor, value: Tensor) -> bool:
    """Whether `attend` can do heads of these widths."""
    width = query.shape[-1]
    return value.shape[-1] == width and triton.next_power_of_2(width) * query.dtype.itemsize <= WIDEST


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, beginning: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention of rows that share what they see and, if they do, what they begin with.

    Args:
        query: [rows, heads, length, width]; key, value: [rows, heads / groups, keys, width]. Where there are as many
            keys as tokens they belong to them, and none is seen from before it, whatever `seen` says.
        seen: which of the beginning's and their own keys, as attention.packed gives it, [some, 1, length, words]; the
            rows are a multiple of them, and have them in turn.
        scale: what products of queries and keys are multiplied by.
        beginning: keys and values before the rows' own, [adapters, heads / groups, beginning, width], contiguous; each
            is the beginning of equally many rows that follow one another.

    Returns [rows, length, heads, width], contiguous.
    """
    rows, heads, length, width = query.shape
    shared, keys = key.shape[1:3]
    result = torch.empty(rows, length, heads, width, dtype=query.dtype, device=query.device)
    query, key, value = (spaced(one) for one in (query, key, value))
    strides = [stride // width for one in (query, key, value) for stride in one.stride()[:3]]
    first, values = beginning or (key, value)
    before, adapters = (first.shape[2], len(first)) if beginning else (0, 1)
    groups, padded = heads // shared, max(16, triton.next_power_of_2(width))
    is_low = groups * length <= LOW
    tall = LOW if is_low else TALL
    _attend[rows * shared, triton.cdiv(groups * length, tall)](
        query, key, value, first, values, seen.contiguous(), result, *strides, length, keys, before,
        rows // adapters, len(seen), scale * LOG2_E, shared, groups, width, padded, tall,
        WIDE if padded * query.dtype.itemsize <= WIDEST // 2 else WIDE // 2, keys == length,
        num_warps=2 if is_low else 4, num_stages=2,
    )  # fmt: skip
    return result


def spaced(heads: Tensor) -> Tensor:
    """Heads whose distances in memory are multiples of their width; a copy where they are not."""
    width = heads.shape[-1]
    is_even = heads.stride(3) == 1 and not any(stride % width for stride in heads.stride()[:3])
    return heads if is_even else heads.contiguous()


@triton.jit(do_not_specialize=[
    "query_row", "query_head", "query_token", "key_row", "key_head", "key_token", "value_row", "value_head",
    "value_token", "length", "keys", "before", "rows_each", "masks",
])  # fmt: skip
def _attend(
    query, key, value, first_key, first_value, seen, result, query_row, query_head, query_token, key_row, key_head,
    key_token, value_row, value_head, value_token, length, keys, before, rows_each, masks, scale,
    KEY_HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr, IS_SELF: tl.constexpr,
):  # fmt: skip
    """The next TALL queries of a row's heads that share keys, token by token; strides are in heads."""
    row, head = (tl.program_id(0) // KEY_HEADS).to(tl.int64), tl.program_id(0) % KEY_HEADS
    start = tl.program_id(1) * TALL
    place = start + tl.arange(0, TALL)
    token, own_head = place // GROUPS, head * GROUPS + place % GROUPS
    is_token, number = token < length, tl.arange(0, PADDED)
    is_number = number[None, :] < WIDTH
    is_here = is_token[:, None] & is_number
    side = own_head * query_head + token * query_token
    q = tl.load(query + row * query_row * WIDTH + side[:, None] * WIDTH + number[None, :], mask=is_here, other=0.0)
    key += (row * key_row + head * key_head) * WIDTH
    value += (row * value_row + head * value_head) * WIDTH
    common_at = ((row // rows_each) * KEY_HEADS + head) * before * WIDTH
    total = before + keys
    seen += ((row % masks) * length + token) * tl.cdiv(total, 64)
    # of tokens that see only what stands before them, the last of these
    end = before + tl.minimum(keys, (start + TALL - 1) // GROUPS + 1) if IS_SELF else total
    largest, sums = tl.full((TALL,), NEVER, tl.float32), tl.zeros((TALL,), tl.float32)
    found = tl.zeros((TALL, PADDED), tl.float32)
    for at in range(0, end, WIDE):
        other = at + tl.arange(0, WIDE)
        own = other - before
        is_first, is_other = own[:, None] < 0, (other < total)[:, None] & is_number
        common = common_at + other[:, None] * WIDTH + number[None, :]
        where = tl.where(is_first, first_key + common, key + own[:, None] * key_token * WIDTH + number[None, :])
        k = tl.load(where, mask=is_other, other=0.0)
        where = tl.where(is_first, first_value + common, value + own[:, None] * value_token * WIDTH + number[None, :])
        v = tl.load(where, mask=is_other, other=0.0)
        word = tl.load(seen + at // 64, mask=is_token, other=0)
        is_seen = (word[:, None] >> (other % 64)[None, :]) & 1
        score = tl.where(is_seen != 0, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, NEVER)
        more = tl.maximum(largest, tl.max(score, 1))
        weight, less = tl.exp2(score - more[:, None]), tl.exp2(largest - more)
        sums = sums * less + tl.sum(weight, 1)
        found = tl.dot(weight.to(v.dtype), v, found * less[:, None], input_precision="ieee")
        largest = more
    to = (row * length * KEY_HEADS * GROUPS) * WIDTH + (token * KEY_HEADS * GROUPS + own_head)[:, None] * WIDTH
    tl.store(result + to + number[None, :], (found / sums[:, None]).to(result.dtype.element_ty), mask=is_here)
