"""The packed engine under CUDA graphs on an NVIDIA GPU: what test_packed_*.py tests on the CPU.

`make test-gpu` runs them; on a machine without one they are skipped.
"""

import numpy as np
import pytest
import test_packed_divergence
import test_packed_dropout
import torch

from paragen.packed import dropout, kernels, layers, step_runners
from paragen.packed.batches import Row, Step, to_batch
from paragen.packed.dropout import LayerDropout
from paragen.packed.engine import Engine
from paragen.packed.step_context import AdapterGroups, StepContext
from paragen.training import deterministic

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("case", test_packed_divergence.CASES)
def test_an_adapter_that_diverges_does_not_change_the_others(case):
    test_packed_divergence.assert_the_others_train_as_without_it(test_packed_divergence.model().cuda(), case)


@pytest.mark.parametrize("call", test_packed_dropout.CALLS)
def test_the_kernel_of_dropout_keeps_what_the_formula_keeps(call):
    x, out, *how, _ = test_packed_dropout.arguments(*call, False)
    *tensors, layer = how
    there = LayerDropout(*(tensor.cuda() for tensor in tensors), layer)
    expected = LayerDropout(*how).kept(x)
    assert torch.equal(there.kept(x.cuda()).cpu(), expected)
    total = out.cuda()
    there.add_kept(x.cuda(), total)
    torch.testing.assert_close(total.cpu(), out + expected)


def test_a_pack_with_dropout_trains_as_on_the_cpu_and_twice_to_the_same_bits():
    """The hash gives the same masks there."""
    found = {}
    for device, name in (("cpu", "cpu"), ("cuda", "once"), ("cuda", "twice")):
        base = test_packed_divergence.model().to(device)
        adapters = test_packed_divergence.adapters_of(base, [0.01] * test_packed_divergence.STEPS, 1.0)
        for adapter, dropped in zip(adapters, (0.0, 0.1, 0.5), strict=True):
            adapter.dropout = dropped
        steps = test_packed_divergence.steps_of(np.random.default_rng(0))
        for step, stream in zip(steps, dropout.streams(42, range(1, len(steps) + 1)), strict=True):
            step.streams = [stream] * len(adapters)
        found[name], *_ = test_packed_divergence.train(Engine(base, adapters, torch.float32), steps)
    for one, two, expected in zip(found["once"], found["twice"], found["cpu"], strict=True):
        assert torch.equal(one, two)
        assert (one.cpu() - expected).norm() <= 1e-3 * expected.norm()


def test_graphs_are_captured_whatever_the_alignment_of_a_batchs_keys(monkeypatch):
    """An odd number of learned tokens puts them beside a multiple of 16 bytes; the largest graph is captured first."""
    monkeypatch.setattr(step_runners, "STEPS_PER_BUCKET", 1)
    kernels._keep.device_caches.clear()  # what other tests have loaded
    base = test_packed_divergence.model().cuda()
    adapters = test_packed_divergence.adapters_of(base, [0.01] * test_packed_divergence.STEPS, 1.0)
    steps = []
    for number in range(4):
        tokens = np.arange(1, 20 * (number + 1) + number % 2)
        steps.append(Step([[Row(tokens % 60, tokens % 60)]] * len(adapters), [number] * len(adapters)))
    for adapter in adapters:
        adapter.dropout = 0.1
    engine = Engine(base, adapters, torch.float32)
    engine.prepare(steps)
    assert isinstance(engine.runner, step_runners.GraphRunner)
    assert len({shape.learned % 2 for shape in engine.runner.shapes}) == 2
    _, losses, _ = test_packed_divergence.train(engine, steps)
    assert len(losses) == len(steps)


@pytest.mark.parametrize("window", [None, 5])
def test_attention_within_sequences_is_attention_within_padded_rows(monkeypatch, window):
    """Also where two heads share keys and values, and where tokens see a part of their row; forwards and backwards."""
    heads, size = (4, 2, 2), 64
    step = Step([[Row(np.arange(1, length), np.arange(1, length)) for length in (40, 9, 130)], [], []])
    groups = AdapterGroups([64, 64, 8])
    shape = step.shape(groups)
    shape = shape._replace(tokens=shape.tokens + 300, rows=shape.rows + 2)
    context = StepContext(groups, [1.0] * 3, torch.device("cuda"))
    context.begin_step(to_batch(step, groups, torch.device("cuda"), shape))
    module = torch.nn.Module()
    vars(module)["step_context"] = context
    torch.manual_seed(0)
    count = shape.tokens * groups.count
    inputs = [torch.randn(1, each, count, size, device="cuda", dtype=torch.bfloat16) for each in heads]
    real = context.batch.adapter < 3
    found = []
    for either in (True, False):
        monkeypatch.setattr(layers, "takes_any_length", lambda *heads, either=either: either)
        given = [one.clone().requires_grad_() for one in inputs]
        out, _ = layers.attend_within_rows(module, *given, None, sliding_window=window)
        (out[0, real].float() ** 2).sum().backward()
        found.append([out[0, real], *(one.grad[0][:, real] for one in given)])
    for one, other in zip(*found, strict=True):
        assert (one - other).float().norm() <= 2e-2 * other.float().norm()


def test_a_pack_in_bfloat16_takes_rows_of_any_length_and_gives_the_same_bits_twice():
    base = test_packed_divergence.model().cuda().bfloat16()
    adapters = test_packed_divergence.adapters_of(base, [0.01] * test_packed_divergence.STEPS, 1.0)
    steps = test_packed_divergence.steps_of(np.random.default_rng(0))
    found = []
    with deterministic.chosen_kernels():
        for _ in range(2):
            vectors, *_ = test_packed_divergence.train(Engine(base, adapters, torch.bfloat16), steps)
            found.append(vectors)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
