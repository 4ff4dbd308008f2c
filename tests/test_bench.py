"""The measurements under bench/ take minutes; what is tested here is that they start, and what they count."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from shapes import ROOT, Work, adapter_parameters, base_parameters, flops


@pytest.mark.parametrize("part", [[], ["whole"], ["grow"], ["cpu"], ["--cpu"]])
def test_packed_says_what_it_measures(part):
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "packed.py", *part, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_parameters_are_those_of_the_real_model():
    assert base_parameters("qwen2.5-0.5b") == 357_826_560
    assert adapter_parameters("qwen2.5-0.5b", 8) == 4_399_104  # as PEFT counts them for lora_target: all


def test_flops_count_tokens_attention_and_learned_tokens():
    shape, rank = "qwen2.5-0.5b", 8
    per_token = 4 * base_parameters(shape) + 6 * adapter_parameters(shape, rank)
    assert flops(shape, rank, Work(100, 0, 0)) == 100 * per_token
    assert flops(shape, rank, Work(0, 100**2, 0)) == 6 * 24 * 896 * 100**2
    assert flops(shape, rank, Work(0, 0, 5)) == 5 * 4 * 896 * 151936
    both = Work(100, 100**2, 5) + Work(10, 10**2, 1)
    assert both == Work(110, 10100, 6)
