"""Scoring's kernels do what PyTorch's operations do, and compile for the GPUs they are for. No GPU is needed."""

import pytest
import torch
from helpers import triton_kernels
from torch import Tensor

from paragen.scoring import attention, kernels, stacked_model

LEAST_SHARED = 99 * 1024  # bytes of shared memory of a block, on GPUs of capability 8.6 and 8.9

SIZES = [(2, 70, 160, 8), (3, 5, 128, 4), (1, 64, 72, 20), (2, 130, 96, 64), (1, 1, 70, 1)]
WORDS = [7, 8192, 20001]
KINDS = [(64, torch.bfloat16), (128, torch.bfloat16), (256, torch.float16), (128, torch.float32)]  # of heads
HEADS = {
    "a shared prefix": {"heads": 14, "shared": 2, "length": 80, "prefix": 70},
    "short rows": {"heads": 14, "shared": 2, "length": 5, "prefix": 9},
    "no prefix": {"heads": 8, "shared": 8, "length": 33, "adapters": 1, "masks": 6, "width": 16},
    "one more token": {"heads": 6, "shared": 2, "length": 1, "keys": 100, "adapters": 1, "masks": 6, "width": 80},
    "wide heads": {"heads": 4, "shared": 2, "length": 20, "prefix": 66, "width": 256, "scale": 0.1},
    "values apart": {"heads": 4, "shared": 4, "length": 6, "prefix": 9, "apart": 20},
    "prompts and room behind": {"heads": 6, "shared": 1, "length": 9, "keys": 33, "width": 12},
}  # fmt: skip


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> list[tuple]:
    """What the kernels make of `activations`, `logits` and `heads_of`: (result, the arguments afterwards)."""
    asked = [("gated", activations(*sizes)) for sizes in SIZES] + [
        ("reduce_logits", (logits(words),)) for words in WORDS
    ]
    asked += [("attend", heads_of(**sizes)) for sizes in HEADS.values()]
    return triton_kernels.interpret("paragen.scoring.kernels", asked, tmp_path_factory.mktemp("interpreted"))


def activations(count: int, rows: int, inner: int, rank: int) -> tuple[Tensor, ...]:
    """The arguments of `gated`."""
    torch.manual_seed(rows)
    shapes = [(count * rows, inner), (count * rows, inner), (count, rows, 2 * rank), (count, rank, inner),
              (count, rank, inner), (count, inner, rank)]  # fmt: skip
    return tuple(torch.randn(shape) for shape in shapes)


def logits(words: int) -> Tensor:
    """Rows with the largest twice, all very small, half of them impossible, and plain ones."""
    torch.manual_seed(words)
    found = 9 * torch.randn(5, words)
    found[0, [words // 3, words - 1]] = found.max() + 1
    found[1] -= 1e4
    found[2, : words // 2] = -torch.inf
    return found


def heads_of(
    heads: int, shared: int, length: int, keys: int | None = None, width: int = 64, prefix: int = 0,
    adapters: int = 3, masks: int = 2, apart: int = 0, scale: float = 0.3,
) -> tuple:  # fmt: skip
    """The arguments of `attend` for six rows.

    Args:
        keys: the rows' own, where they are others than the tokens'.
        apart: numbers between one head's value and the next's.
        scale: of the scores; at 0.3, those of wide heads are so large that float32 rounds them by more than is allowed.
    """
    torch.manual_seed(length)
    sizes = [(6, length, heads, width), (6, keys or length, shared, width), (6, keys or length, shared, width + apart)]
    mask = torch.rand(masks, 1, length, prefix + (keys or length)) < 0.6
    if keys is None:
        mask[..., prefix:] &= torch.ones(length, length, dtype=torch.bool).tril()
        mask[..., prefix:] |= torch.eye(length, dtype=torch.bool)
    mask[..., 0] = True
    first = tuple(torch.randn(adapters, shared, prefix, width) for _ in range(2)) if prefix else None
    return *(torch.randn(size)[..., :width].transpose(1, 2) for size in sizes), attention.pack_mask(mask), scale, first


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_the_gated_activation_applies_its_factors(interpreted, number):
    gate, up, hidden, b_gate, b_up, a_down = activations(*SIZES[number])
    count, rows, inner, rank = SIZES[number]
    one = gate.view(count, rows, -1) + hidden[..., :rank] @ b_gate
    by_hand = torch.nn.functional.silu(one) * (up.view(count, rows, -1) + hidden[..., rank:] @ b_up)
    plain = stacked_model.gated(gate, up, hidden, b_gate, b_up, a_down)  # what stands in for the kernel on a CPU
    result, given = interpreted[number]
    for made, found in ((given[0], result), (gate, plain)):
        torch.testing.assert_close(made.view_as(by_hand), by_hand, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found, by_hand @ a_down, rtol=1e-4, atol=1e-3)


def test_activations_that_triton_gets_wrong_are_refused():
    with pytest.raises(ValueError, match="activations of 64 are too narrow"):
        kernels.gated(*activations(1, 8, 64, 20))


@pytest.mark.parametrize("number", range(len(WORDS)))
def test_logits_are_reduced_as_pytorch_does_it(interpreted, number):
    (totals, best), (given,) = interpreted[len(SIZES) + number]
    torch.testing.assert_close(totals, given.logsumexp(-1))
    assert best.tolist() == given.argmax(-1).tolist()
    assert best[0] == WORDS[number] // 3, "of equals, the first"


@pytest.mark.parametrize("width", [1, 64, 65, 200])
def test_a_mask_is_packed_and_unpacked(width):
    torch.manual_seed(width)
    mask = torch.rand(3, 1, 5, width) < 0.5
    found = attention.unpack_mask(attention.pack_mask(mask))
    assert torch.equal(found[..., :width], mask) and not found[..., width:].any()
    assert attention.pack_mask(mask).shape == (3, 1, 5, -(-width // 64))


@pytest.mark.parametrize("name", HEADS)
def test_rows_attend_to_their_prefix_and_to_what_the_mask_shows(interpreted, name):
    found, _ = interpreted[len(SIZES) + len(WORDS) + [*HEADS].index(name)]
    query, key, value, mask, scale, first = heads_of(**HEADS[name])
    adapters, times = (len(first[0]), 6 // len(first[0])) if first else (1, 6)
    for row in range(6):
        own = [one[row] for one in (key, value)]
        if first:
            assert adapters * times == 6
            own = [torch.cat([before[row // times], one], 1) for before, one in zip(first, own, strict=True)]
        keys, values = (one.repeat_interleave(query.shape[1] // len(one), 0) for one in own)
        visible = attention.unpack_mask(mask[row % len(mask)])[..., : keys.shape[1]]
        scores = (query[row].double() @ keys.double().mT * scale).masked_fill(~visible, -torch.inf)
        by_hand = (scores.softmax(-1) @ values.double()).float()
        torch.testing.assert_close(found[row].transpose(0, 1), by_hand)
    torch.testing.assert_close(attention.plain_attention(query, key, value, mask, scale, first), found)


@pytest.mark.parametrize("capability", [80, *(pytest.param(other, marks=pytest.mark.slow) for other in (89, 90))])
@pytest.mark.parametrize(
    ("rank", "kinds"),
    [(1, KINDS[:1]), (8, ()), (stacked_model.MAX_KERNEL_RANK, ()), pytest.param(8, KINDS, marks=pytest.mark.slow)],
)
def test_they_compile_for_the_gpus_that_they_are_for(monkeypatch, tmp_path, capability, rank, kinds):
    """Compiled as a first call on such a GPU would, and with room in its shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    asked = []
    for name in ("_gated", "_reduce_logits", "_attend"):
        monkeypatch.setattr(kernels, name, triton_kernels.Noted(getattr(kernels, name), asked))
    gate, up = torch.zeros(2, 2 * 80, 96, dtype=torch.bfloat16)
    hidden, a_down = torch.zeros(2, 80, 2 * rank).bfloat16(), torch.zeros(2, 96, rank).bfloat16()
    b_gate, b_up = torch.zeros(2, 2, rank, 96, dtype=torch.bfloat16)
    kernels.gated(gate, up, hidden, b_gate, b_up, a_down)
    kernels.reduce_logits(torch.zeros(3, 151936, dtype=torch.bfloat16))
    for width, dtype in kinds:
        for length, keys in ((80, None), (1, 100)):
            *heads, mask, scale, first = heads_of(14, 2, length, keys, width, 0 if keys else 70)
            assert kernels.can_attend(heads[0].to(dtype), heads[2].to(dtype))
            first = first and tuple(one.to(dtype) for one in first)
            kernels.attend(*(one.to(dtype) for one in heads), mask, scale, first)
    triton_kernels.assert_compiled(asked, capability)
