"""An adapter that diverges in a pack is left out from that step on, and the others get what they get without it."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import packed_project
from torch import Tensor

from paragen.packed import step_runners
from paragen.packed.adapter import Adapter
from paragen.packed.batches import IGNORED, Row, Step
from paragen.packed.engine import Engine

RANKS = (4, 2, 8)  # in one group, so that stacked products multiply each one's factors by the others' tokens
DIVERGES = 1
STEPS = 7
TOO_LARGE = "its factors become too large"
LATE = "after its last step"  # where it has no rows, so that only its factors can reach the others


def model() -> "torch.nn.Module":
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def steps_of(drawn: np.random.Generator) -> list[Step]:
    def row(length: int) -> Row:
        tokens = drawn.integers(0, 64, length)
        return Row(tokens, np.where(np.arange(length) > 1, tokens, IGNORED))

    return [Step([[row(5 + adapter), row(9)] for adapter in range(len(RANKS))]) for _ in range(STEPS)]


def adapters_of(base: "torch.nn.Module", rates: list[float], scale: float) -> list[Adapter]:
    """Adapters of the two kinds of layer; the one that diverges has these learning rates and factors."""
    names = [name for name, _ in base.named_modules() if name.endswith(("q_proj", "down_proj"))]
    made = []
    for number, rank in enumerate(RANKS):
        torch.manual_seed(number)
        shapes = {name: base.get_submodule(name).weight.shape for name in names}
        factors = {name: (torch.randn(rank, ins), torch.randn(outs, rank)) for name, (outs, ins) in shapes.items()}
        if number == DIVERGES:
            factors = {name: (a * scale, b * scale) for name, (a, b) in factors.items()}
        settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
        made.append(Adapter(factors, 0.5, rates if number == DIVERGES else [0.01] * STEPS, settings, 1.0))
    return made


def train(engine: Engine, steps: list[Step]) -> tuple[list[Tensor], list[list[float]], list[int]]:
    """The adapters after all steps, their losses by step, and the steps after which something could be saved."""
    after: list[int] = []
    losses = [losses for _, losses in engine.train(steps, after.append)]
    engine.close()
    return [vector.detach().clone() for vector in engine.vectors], losses, after


def stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have adapters multiplied as on a GPU."""
    laid_out = step_runners.to_batch
    monkeypatch.setattr(step_runners, "to_batch", lambda *given: dataclasses.replace(laid_out(*given), spans=None))


CASES = {
    TOO_LARGE: ([0.01, 0.01, 1e30, *[0.01] * 4], 1.0, 3),
    "its factors overflow": ([0.01, 0.01, 3e38, 3e38, *[0.01] * 3], 1.0, 3),
    "its first loss is not finite": ([0.01] * STEPS, 1e19, 0),
    LATE: ([0.01, float("inf"), *[0.0] * 5], 1.0, 2),
}


@pytest.mark.parametrize("ahead", [0, 3], ids=["at once", "steps ahead"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked, as on a GPU", "sliced, as on a CPU"])
@pytest.mark.parametrize("case", CASES)
def test_the_others_train_as_without_it(monkeypatch, case, stacked, ahead):
    if stacked:
        stack(monkeypatch)
    assert_the_others_train_as_without_it(model(), case, stacked, ahead)


def assert_the_others_train_as_without_it(
    base: "torch.nn.Module", case: str, stacked: bool = True, ahead: int | None = None
) -> None:
    """For test_gpu_packed.py, too; `ahead` is how many steps the host queues (None: as many as it does)."""
    rates, scale, step = CASES[case]
    steps = steps_of(np.random.default_rng(0))
    if case == LATE:
        steps = [one if number < 2 else one.without({DIVERGES}) for number, one in enumerate(steps)]
    engine = Engine(base, adapters_of(base, rates, scale), torch.float32)
    engine.steps_ahead = engine.steps_ahead if ahead is None else ahead
    found, losses, after = train(engine, steps)
    spreads = stacked or case != LATE
    assert engine.diverged == ({DIVERGES: step} if spreads else {})
    assert sorted(set(after)) == list(range(STEPS)) and len(losses) == STEPS
    assert all(np.isfinite(each).all() for each in losses)
    without = [one.without({DIVERGES}) for one in steps]
    expected, other_losses, _ = train(Engine(base, adapters_of(base, [0.0] * STEPS, 1.0), torch.float32), without)
    for index in range(len(RANKS)):
        if index != DIVERGES:
            assert (found[index] - expected[index]).norm() <= packed_project.BOUND * expected[index].norm()
            assert [one[index] for one in losses] == pytest.approx([one[index] for one in other_losses], rel=1e-4)
    assert not found[DIVERGES].any() if spreads else not found[DIVERGES].isfinite().all()


@pytest.mark.parametrize("ahead", [0, 3], ids=["at once", "steps ahead"])
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked, as on a GPU", "sliced, as on a CPU"])
def test_training_ends_where_the_last_one_with_rows_diverges(monkeypatch, stacked, ahead):
    """The others are complete by then: they keep what they have."""
    if stacked:
        stack(monkeypatch)
    base, others, complete = model(), {0, 2}, 2
    rates, _, step = CASES[TOO_LARGE]
    steps = steps_of(np.random.default_rng(0))
    steps = [one.without(others) if number >= complete else one for number, one in enumerate(steps)]
    adapters = adapters_of(base, rates, 1.0)
    for index in others:
        adapters[index].rates = adapters[index].rates[:complete]
    engine = Engine(base, adapters, torch.float32)
    engine.steps_ahead = ahead
    found, losses, _ = train(engine, steps)
    assert engine.diverged == {DIVERGES: step} and len(losses) == step
    expected, *_ = train(Engine(base, adapters, torch.float32), steps[:complete])
    for index in others:
        assert (found[index] - expected[index]).norm() <= packed_project.BOUND * expected[index].norm()
    assert not found[DIVERGES].any()


def test_training_ends_where_all_have_diverged():
    base = model()
    engine = Engine(base, adapters_of(base, [0.01] * STEPS, 1e19)[DIVERGES : DIVERGES + 1], torch.float32)
    steps = [Step([one.rows[DIVERGES]]) for one in steps_of(np.random.default_rng(0))]
    _, losses, after = train(engine, steps)
    assert engine.diverged == {0: 0} and not losses and after == [0]


def test_nothing_is_left_out_where_all_values_are_finite():
    base = model()
    engine = Engine(base, adapters_of(base, [0.01] * STEPS, 1.0), torch.float32)
    _, losses, after = train(engine, steps_of(np.random.default_rng(0)))
    assert not engine.diverged and after == list(range(STEPS)) and len(losses) == STEPS
