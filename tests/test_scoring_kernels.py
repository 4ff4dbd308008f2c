"""Scoring's kernels do what PyTorch's operations do, and compile for the GPUs they are for. No GPU is needed."""

import os
import subprocess
import sys

import pytest
import torch
import triton
from conftest import ROOT
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lora_stack
import scoring_kernels

LEAST_SHARED = 99 * 1024  # bytes of shared memory of a block, on GPUs of capability 8.6 and 8.9


# Triton is told when it is imported that its kernels are to be interpreted, on the CPU: so in a process of their own.
INTERPRETER = """
import sys, torch, scoring_kernels
found = [(getattr(scoring_kernels, name)(*given), given) for name, given in torch.load(sys.argv[1])]
torch.save(found, sys.argv[1])
"""
SIZES = [(2, 70, 160, 8), (3, 5, 128, 4), (1, 64, 64, 20), (2, 130, 96, 64), (1, 1, 40, 1)]
WORDS = [7, 8192, 20001]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> list[tuple]:
    """What the kernels make of `activations` and `logits`: (result, the arguments afterwards) of each."""
    file = tmp_path_factory.mktemp("interpreted") / "tensors.pt"
    asked = [("gated", activations(*sizes)) for sizes in SIZES] + [("reduced", (logits(words),)) for words in WORDS]
    torch.save(asked, file)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "utils")}
    subprocess.run([sys.executable, "-c", INTERPRETER, file], env=environment, check=True)
    return torch.load(file)


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


@pytest.mark.parametrize("number", range(len(SIZES)))
def test_the_activation_takes_up_its_factors(interpreted, number):
    gate, up, hidden, b_gate, b_up, a_down = activations(*SIZES[number])
    count, rows, inner, rank = SIZES[number]
    one = gate.view(count, rows, -1) + hidden[..., :rank] @ b_gate
    by_hand = torch.nn.functional.silu(one) * (up.view(count, rows, -1) + hidden[..., rank:] @ b_up)
    plain = lora_stack.gated(gate, up, hidden, b_gate, b_up, a_down)  # what stands in for the kernel on a CPU
    result, given = interpreted[number]
    for made, found in ((given[0], result), (gate, plain)):
        torch.testing.assert_close(made.view_as(by_hand), by_hand, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found, by_hand @ a_down, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("number", range(len(WORDS)))
def test_logits_are_reduced_as_pytorch_does_it(interpreted, number):
    (totals, best), (given,) = interpreted[len(SIZES) + number]
    torch.testing.assert_close(totals, given.logsumexp(-1))
    assert best.tolist() == given.argmax(-1).tolist()
    assert best[0] == WORDS[number] // 3, "of equals, the first"


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("rank", [1, 8, lora_stack.MOST])
def test_they_compile_for_the_gpus_that_they_are_for(monkeypatch, tmp_path, capability, rank):
    """Compiled as a first call on such a GPU would, and with room in its shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    asked = {}
    for name in ("_gated", "_reduced"):
        monkeypatch.setattr(scoring_kernels, name, Noted(getattr(scoring_kernels, name), asked))
    gate, up = torch.zeros(2, 2 * 80, 96, dtype=torch.bfloat16)
    hidden, a_down = torch.zeros(2, 80, 2 * rank).bfloat16(), torch.zeros(2, 96, rank).bfloat16()
    b_gate, b_up = torch.zeros(2, 2, rank, 96, dtype=torch.bfloat16)
    scoring_kernels.gated(gate, up, hidden, b_gate, b_up, a_down)
    scoring_kernels.reduced(torch.zeros(3, 151936, dtype=torch.bfloat16))
    assert asked.keys() == {"_gated", "_reduced"}
    for source, options in asked.values():
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"] and made.metadata.shared <= LEAST_SHARED


class Noted:
    """In a kernel's place: notes what it would be compiled from."""

    def __init__(self, kernel: triton.JITFunction, asked: dict):
        self.kernel, self.asked = kernel, asked

    def __getitem__(self, grid: tuple):
        def launch(*given, **options):
            named = dict(zip(self.kernel.arg_names, given, strict=True))
            types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
            constant = {key: value for key, value in named.items() if key.isupper()}
            signature = {
                key: "constexpr" if key.isupper() else types[value.dtype] if torch.is_tensor(value) else "i32"
                for key, value in named.items()
            }
            aligned = {
                (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if "*" in kind
            }
            self.asked[self.kernel.__name__] = ASTSource(self.kernel, signature, constant, aligned), options

        assert all(isinstance(size, int) and size > 0 for size in grid)
        return launch
