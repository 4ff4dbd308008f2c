"""Triton kernels for scoring on an NVIDIA GPU, each in one pass over memory where PyTorch's operations need several.

Sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROW_BLOCK = 64  # rows of an activation, or queries, that a program computes at a time
COLUMN_BLOCK = 64  # columns of an activation, or keys
FEW_QUERIES = 16  # a smaller block of queries, for one new token and the heads that share its keys
LOG2_E = 1.4426950408889634
LOGIT_BLOCK = 8192  # logits that are read at a time
MAX_HEAD_BYTES = 512  # of a head for whose keys and values the shared memory has room
MASKED = tl.constexpr(-1.0e30)  # the score of a masked key; finite, so that queries with masked keys alone give no NaN


def can_gate(inner: int) -> bool:
    """Whether `gated` supports activations of this width.

    For a loop of a single iteration, Triton 3.6 computed wrong numbers on an H100 (with ranks from 17 to 32).
    """
    return inner > COLUMN_BLOCK


def gated(gate: Tensor, up: Tensor, hidden: Tensor, b_gate: Tensor, b_up: Tensor, a_down: Tensor) -> Tensor:
    """The activation of a gated block with n adapters, silu(gate + h_gate b_gate) * (up + h_up b_up).

    Two wide activations are read and one is written, nothing else of their size.

    Args:
        gate, up: the outputs of the base's layers, [n * rows, inner], contiguous; `gate` is overwritten by the
            activation.
        hidden: the block's input times the first factors, h_gate and h_up side by side, [n, rows, 2 * rank].
        b_gate, b_up: second factors, [n, rank, inner], contiguous.
        a_down: the down projection's first factors, [n, inner, rank], contiguous.

    Returns the activation times a_down, [n, rows, rank]. Raises ValueError for widths that `can_gate` refuses.
    """
    count, rows, width = hidden.shape
    rank, inner = width // 2, gate.shape[-1]
    if not can_gate(inner):
        raise ValueError(f"activations of {inner} are too narrow")
    result = torch.empty(count, rows, rank, dtype=gate.dtype, device=gate.device)
    padded = max(16, triton.next_power_of_2(rank))
    registers = {"maxnreg": 128} if padded == 16 else {}  # so that four programs fit on a multiprocessor, not three
    _gated[triton.cdiv(rows, ROW_BLOCK), count](
        gate, up, hidden.contiguous(), b_gate, b_up, a_down, result, rows, inner, rank, padded, ROW_BLOCK,
        COLUMN_BLOCK, num_warps=4, num_stages=2, **registers,
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["rows"])
def _gated(
    gate, up, hidden, b_gate, b_up, a_down, result, rows,
    INNER: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """ROW_BLOCK rows of an adapter, COLUMN_BLOCK columns at a time."""
    adapter = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROW_BLOCK
    begin = adapter * rows + first  # only this needs int64; all others are offsets from it
    gate, up = gate + begin * INNER, up + begin * INNER
    hidden, result = hidden + begin * 2 * RANK, result + begin * RANK
    size = adapter * RANK * INNER
    b_gate, b_up, a_down = b_gate + size, b_up + size, a_down + size
    row, ranks = tl.arange(0, ROW_BLOCK)[:, None], tl.arange(0, PADDED)
    is_row, is_rank = first + row < rows, ranks < RANK
    hidden_at = row * (2 * RANK) + ranks[None, :]
    hidden_gate = tl.load(hidden + hidden_at, mask=is_row & is_rank[None, :], other=0.0)
    hidden_up = tl.load(hidden + RANK + hidden_at, mask=is_row & is_rank[None, :], other=0.0)
    projected = tl.zeros((ROW_BLOCK, PADDED), tl.float32)
    for start in range(0, INNER, COLUMN_BLOCK):
        column = start + tl.arange(0, COLUMN_BLOCK)
        is_column = column < INNER
        is_block = is_row & is_column[None, :]
        block_at = row * INNER + column[None, :]
        b_at = ranks[:, None] * INNER + column[None, :]
        is_b = is_rank[:, None] & is_column[None, :]
        gate_block = tl.load(gate + block_at, mask=is_block, other=0.0).to(tl.float32)
        up_block = tl.load(up + block_at, mask=is_block, other=0.0).to(tl.float32)
        b = tl.load(b_gate + b_at, mask=is_b, other=0.0)
        gate_block = tl.dot(hidden_gate, b, gate_block, input_precision="ieee")
        b = tl.load(b_up + b_at, mask=is_b, other=0.0)
        up_block = tl.dot(hidden_up, b, up_block, input_precision="ieee")
        activation = (gate_block * tl.sigmoid(gate_block) * up_block).to(gate.dtype.element_ty)
        tl.store(gate + block_at, activation, mask=is_block)
        a_at = column[:, None] * RANK + ranks[None, :]
        a = tl.load(a_down + a_at, mask=is_column[:, None] & is_rank[None, :], other=0.0)
        projected = tl.dot(activation, a, projected, input_precision="ieee")
    result_at = row * RANK + ranks[None, :]
    tl.store(result + result_at, projected.to(result.dtype.element_ty), mask=is_row & is_rank[None, :])


def reduce_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of each row's exponentials, [rows] float32, and the index of its maximum, [rows] int64.

    Args:
        logits: [rows, vocabulary].
    """
    rows, vocabulary = logits.shape
    totals = torch.empty(rows, dtype=torch.float32, device=logits.device)
    best = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _reduce_logits[rows,](logits.contiguous(), totals, best, vocabulary, LOGIT_BLOCK, num_warps=8)
    return totals, best


@triton.jit
def _reduce_logits(logits, totals, best, VOCABULARY: tl.constexpr, LOGIT_BLOCK: tl.constexpr):
    """One row, LOGIT_BLOCK logits at a time."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), -3.0e38, tl.float32)  # finite, so that logits that are all -inf give no NaN
    total = tl.zeros((), tl.float32)
    place = tl.zeros((), tl.int32)
    for start in range(0, VOCABULARY, LOGIT_BLOCK):
        token = start + tl.arange(0, LOGIT_BLOCK)
        x = tl.load(logits + row * VOCABULARY + token, mask=token < VOCABULARY, other=-float("inf")).to(tl.float32)
        block_largest, block_place = tl.max(x, 0, return_indices=True)
        place = tl.where(block_largest > largest, start + block_place, place)
        new_largest = tl.maximum(largest, block_largest)
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), 0)
        largest = new_largest
    tl.store(totals + row, largest + tl.log(total))
    tl.store(best + row, place.to(tl.int64))


def can_attend(query: Tensor, value: Tensor) -> bool:
    """Whether `attend` supports heads of these widths."""
    width = query.shape[-1]
    return value.shape[-1] == width and triton.next_power_of_2(width) * query.dtype.itemsize <= MAX_HEAD_BYTES


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, prefix: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attention of rows that share masks and, if there is one, a prefix.

    Args:
        query: [rows, heads, length, width].
        key, value: [rows, key heads, keys, width]. Where there are as many keys as queries they belong to the same
            tokens, and a key after the query is never attended to, whatever the mask says.
        mask: which of the prefix's and the rows' own keys are attended to, as attention.pack_mask returns it,
            [masks, 1, length, words]; `rows` is a multiple of `masks`, and the masks are repeated in order.
        scale: what products of queries and keys are multiplied by.
        prefix: keys and values before the rows' own, [adapters, key heads, prefix, width], contiguous; each adapter
            has equally many rows, in order.

    Returns [rows, length, heads, width], contiguous.
    """
    rows, heads, length, width = query.shape
    key_heads, keys = key.shape[1:3]
    result = torch.empty(rows, length, heads, width, dtype=query.dtype, device=query.device)
    query, key, value = (with_even_strides(one) for one in (query, key, value))
    strides = [stride // width for one in (query, key, value) for stride in one.stride()[:3]]
    prefix_key, prefix_value = prefix or (key, value)
    prefix_length, adapters = (prefix_key.shape[2], len(prefix_key)) if prefix else (0, 1)
    groups, padded = heads // key_heads, max(16, triton.next_power_of_2(width))
    is_small = groups * length <= FEW_QUERIES
    row_block = FEW_QUERIES if is_small else ROW_BLOCK
    column_block = COLUMN_BLOCK if padded * query.dtype.itemsize <= MAX_HEAD_BYTES // 2 else COLUMN_BLOCK // 2
    _attend[rows * key_heads, triton.cdiv(groups * length, row_block)](
        query, key, value, prefix_key, prefix_value, mask.contiguous(), result, *strides, length, keys, prefix_length,
        rows // adapters, len(mask), scale * LOG2_E, key_heads, groups, width, padded, row_block, column_block,
        keys == length, num_warps=2 if is_small else 4, num_stages=2,
    )  # fmt: skip
    return result


def with_even_strides(heads: Tensor) -> Tensor:
    """Heads whose strides are multiples of their width; a copy where they are not.

    Args:
        heads: [rows, heads, length, width].
    """
    width = heads.shape[-1]
    is_even = heads.stride(3) == 1 and not any(stride % width for stride in heads.stride()[:3])
    return heads if is_even else heads.contiguous()


@triton.jit(do_not_specialize=[
    "query_row", "query_head", "query_token", "key_row", "key_head", "key_token", "value_row", "value_head",
    "value_token", "length", "keys", "prefix_length", "rows_each", "masks",
])  # fmt: skip
def _attend(
    query, key, value, prefix_key, prefix_value, mask_words, result, query_row, query_head, query_token, key_row,
    key_head, key_token, value_row, value_head, value_token, length, keys, prefix_length, rows_each, masks, scale,
    KEY_HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr, IS_SELF: tl.constexpr,
):  # fmt: skip
    """ROW_BLOCK queries of a row: those of the heads that share a key head (GROUPS of them), token by token.

    Strides are in units of WIDTH.
    """
    row, head = (tl.program_id(0) // KEY_HEADS).to(tl.int64), tl.program_id(0) % KEY_HEADS
    start = tl.program_id(1) * ROW_BLOCK
    place = start + tl.arange(0, ROW_BLOCK)
    token, own_head = place // GROUPS, head * GROUPS + place % GROUPS
    is_token, column = token < length, tl.arange(0, PADDED)
    is_column = column[None, :] < WIDTH
    is_query = is_token[:, None] & is_column
    query_at = own_head * query_head + token * query_token
    q = tl.load(query + row * query_row * WIDTH + query_at[:, None] * WIDTH + column[None, :], mask=is_query, other=0.0)
    key += (row * key_row + head * key_head) * WIDTH
    value += (row * value_row + head * value_head) * WIDTH
    prefix_start = ((row // rows_each) * KEY_HEADS + head) * prefix_length * WIDTH
    total = prefix_length + keys
    mask_words += ((row % masks) * length + token) * tl.cdiv(total, 64)
    # with keys of the same tokens, those after the block's last query are not read
    end = prefix_length + tl.minimum(keys, (start + ROW_BLOCK - 1) // GROUPS + 1) if IS_SELF else total
    largest, sums = tl.full((ROW_BLOCK,), MASKED, tl.float32), tl.zeros((ROW_BLOCK,), tl.float32)
    weighted = tl.zeros((ROW_BLOCK, PADDED), tl.float32)
    for first in range(0, end, COLUMN_BLOCK):
        key_place = first + tl.arange(0, COLUMN_BLOCK)
        own_place = key_place - prefix_length
        in_prefix, is_key = own_place[:, None] < 0, (key_place < total)[:, None] & is_column
        offset = prefix_start + key_place[:, None] * WIDTH + column[None, :]
        source = tl.where(
            in_prefix, prefix_key + offset, key + own_place[:, None] * key_token * WIDTH + column[None, :]
        )
        k = tl.load(source, mask=is_key, other=0.0)
        source = tl.where(
            in_prefix, prefix_value + offset, value + own_place[:, None] * value_token * WIDTH + column[None, :]
        )
        v = tl.load(source, mask=is_key, other=0.0)
        word = tl.load(mask_words + first // 64, mask=is_token, other=0)
        is_visible = (word[:, None] >> (key_place % 64)[None, :]) & 1
        score = tl.where(is_visible != 0, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, MASKED)
        new_largest = tl.maximum(largest, tl.max(score, 1))
        weight, correction = tl.exp2(score - new_largest[:, None]), tl.exp2(largest - new_largest)
        sums = sums * correction + tl.sum(weight, 1)
        weighted = tl.dot(weight.to(v.dtype), v, weighted * correction[:, None], input_precision="ieee")
        largest = new_largest
    result_at = (row * length * KEY_HEADS * GROUPS) * WIDTH + (token * KEY_HEADS * GROUPS + own_head)[:, None] * WIDTH
    tl.store(
        result + result_at + column[None, :],
        (weighted / sums[:, None]).to(result.dtype.element_ty),
        mask=is_query,
    )
