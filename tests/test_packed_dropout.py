"""LoRA's dropout in the packed engine: its own random numbers, the same in any pack, distributed as PEFT's."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import test_packed_divergence
import torch
from helpers import packed_project, triton_kernels
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from paragen.packed import dropout, kernels
from paragen.packed.batches import Row, Shape, Step, lay_out, to_batch
from paragen.packed.dropout import LayerDropout
from paragen.packed.engine import Engine
from paragen.packed.layers import PackedLinear
from paragen.packed.step_context import AdapterGroups, StepContext

WORD = 2**32
PROBABILITIES = (0.05, 0.1, 0.5)


def layer_dropout(seed: int = 7, step: int = 3, layer: int = 2, dropped: float = 0.1, tokens: int = 64) -> LayerDropout:
    """The dropout of a layer for a row of tokens."""
    (stream,) = dropout.streams(seed, range(step, step + 1))
    keys = dropout.token_keys(np.full(tokens, stream), np.zeros(tokens, np.int64), np.arange(tokens))
    thresholds = torch.full((tokens,), dropout.threshold_of(dropped), dtype=torch.int32)
    return LayerDropout(torch.from_numpy(keys), thresholds, layer)


def by_hand(seed: int, step: int, row: int, position: int, layer: int, feature: int) -> int:
    """The random number of a feature, from -2**31 to 2**31 - 1, in Python's own whole numbers."""

    def finalise(number: int) -> int:
        number = ((number ^ (number >> 16)) * 0x85EBCA6B) % WORD
        number = ((number ^ (number >> 13)) * 0xC2B2AE35) % WORD
        return number ^ (number >> 16)

    key = finalise(seed % WORD)
    for value in (step, row, position, layer):
        key = finalise(((key + 0x9E3779B9) % WORD) ^ value)
    number = finalise((key + feature * 0x9E3779B9) % WORD)
    return number if number < WORD // 2 else number - WORD


def test_masks_are_the_documented_hash():
    for seed in (0, 42, 2**40 + 1):
        found = layer_dropout(seed, step=1234, layer=209, dropped=0.3, tokens=5).mask(40)
        for position in range(5):
            expected = [by_hand(seed, 1234, 0, position, 209, feature) >= (0.3 - 0.5) * WORD for feature in range(40)]
            assert found[position].tolist() == expected


@pytest.mark.parametrize("dropped", PROBABILITIES)
def test_as_many_features_are_dropped_as_by_pytorchs_dropout(dropped):
    """In all, by feature and by token: the counts lie as far from their mean as a fair coin's."""
    kept = torch.stack([layer_dropout(step=step, dropped=dropped).mask(512) for step in range(64)])
    counts = (~kept).double()
    for axes in ((0, 1, 2), (0, 1), (0, 2), (1, 2)):
        sums = counts.sum(axes)
        tries = kept.numel() / sums.numel()
        far = (sums - tries * dropped) / (tries * dropped * (1 - dropped)) ** 0.5
        assert far.abs().max() < 5
        if far.numel() > 1:
            assert 0.7 < far.std() < 1.3
    fair = nn.functional.dropout(torch.ones(kept.shape, dtype=torch.float64), dropped) == 0
    assert abs(fair.double().mean() - counts.mean()) < 5 * (2 * dropped * (1 - dropped) / kept.numel()) ** 0.5


def test_masks_of_different_seeds_steps_rows_tokens_layers_and_features_are_independent():
    size = 256, 512
    first = layer_dropout(dropped=0.5, tokens=size[0]).mask(size[1])
    others = {
        "seed": layer_dropout(8, dropped=0.5, tokens=size[0]).mask(size[1]),
        "step": layer_dropout(step=4, dropped=0.5, tokens=size[0]).mask(size[1]),
        "layer": layer_dropout(layer=3, dropped=0.5, tokens=size[0]).mask(size[1]),
        "token": first.roll(1, 0),
        "feature": first.roll(1, 1),
        "both": first.roll((1, 1), (0, 1)),
    }
    for name, other in others.items():
        far = ((first == other).double().mean() - 0.5) / 0.5 * (size[0] * size[1]) ** 0.5
        assert far.abs() < 5, name


def test_cells_of_different_seeds_share_no_masks_at_any_steps():
    """Of 2 x 1000 random numbers of 32 bits, two are equal once in 4000 times."""
    of_seeds = [set(dropout.streams(seed, range(1, 1001))) for seed in range(10)]
    for one, other in itertools.combinations(of_seeds, 2):
        assert len(one & other) <= 2


def test_where_nothing_is_dropped_all_features_are_kept():
    assert layer_dropout(dropped=0.0).mask(4096).all()


def row(length: int, first: int = 5) -> Row:
    tokens = np.arange(first, first + length)
    return Row(tokens, tokens)


def test_a_cells_keys_are_the_same_alone_and_in_any_pack_and_padding():
    mine, stream = [row(7), row(4)], 99
    found = []
    for rows, streams, at in (
        ([mine], [stream], 0),
        ([[row(9)], mine, [row(3), row(2)]], [5, stream, 6], 1),
        ([[row(3)] * 4, [], mine], [5, 6, stream], 2),
    ):
        groups = AdapterGroups([64] * len(rows))
        step = Step(rows, streams)
        shape = step.shape(groups)
        for wider in (0, 9):
            out = lay_out(
                step, groups, Shape(shape.tokens + wider, shape.rows + wider, shape.row_length, shape.learned)
            )
            keys = out["dropout_keys"][out["adapter"] == at]
            found.append(keys.tolist())
    assert all(keys == found[0] for keys in found) and len(set(found[0])) == 11


class Masked(nn.Module):
    """In the place of PEFT's dropout: these masks, scaled as it scales."""

    def __init__(self, mask: Tensor, dropped: float):
        super().__init__()
        self.mask, self.dropped = mask, dropped

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask / (1 - self.dropped)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked, as on a GPU", "sliced, as on a CPU"])
def test_a_layer_computes_what_pefts_computes_with_the_same_masks(stacked):
    """Forward and backward pass, in a pack with cells that have another probability of dropout, or none."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    ranks, dropped, alpha = [64, 64, 8, 4], [0.2, 0.0, 0.5, 0.1], 4
    step = Step([[row(7), row(4)], [], [row(5)], [row(9), row(3)]], [11, 12, 13, 14])
    groups = AdapterGroups(ranks)
    base = nn.Linear(12, 10).requires_grad_(False)
    context = StepContext(groups, [alpha / rank for rank in ranks], torch.device("cpu"), dropped)
    layer = PackedLinear(base, context, torch.float32, 5)
    for factor in (layer.a, layer.b):
        nn.init.normal_(factor)
    batch = to_batch(step, groups, torch.device("cpu"))
    context.begin_step(dataclasses.replace(batch, spans=None) if stacked else batch)
    x = torch.randn(1, len(batch.adapter), 12, requires_grad=True)
    y = layer(x)
    pull = torch.randn_like(y)
    y.backward(pull)
    for adapter, rank in enumerate(ranks):
        here = batch.adapter == adapter
        tokens = LayerDropout(batch.dropout_keys[here], context.thresholds.index_select(0, batch.adapter[here]), 5)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropped[adapter], target_modules=["0"])
        theirs = get_peft_model(nn.Sequential(base), config).base_model.model[0]
        theirs.lora_dropout["default"] = Masked(tokens.mask(12), dropped[adapter])
        a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
        a.data.copy_(layer.block(layer.a.detach(), adapter)), b.data.copy_(layer.block(layer.b.detach(), adapter).T)
        mine = x.detach()[:, here].requires_grad_()
        alone = theirs(mine)
        alone.backward(pull[:, here])
        torch.testing.assert_close(y[:, here], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad[:, here], mine.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.block(layer.a.grad, adapter), a.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.block(layer.b.grad, adapter), b.grad.T, rtol=1e-4, atol=1e-4)


def test_outputs_are_distributed_as_pefts():
    """Mean and standard deviation of a token's output over many masks; PEFT draws its own."""
    torch.manual_seed(0)
    a, b, x, dropped, tries = torch.randn(4, 64), torch.randn(10, 4), torch.randn(64), 0.3, 20000
    ours = layer_dropout(dropped=dropped, tokens=tries).mask(64) * x / (1 - dropped)
    theirs = nn.functional.dropout(x.expand(tries, 64), dropped)
    ours, theirs = (seen @ a.T @ b.T for seen in (ours, theirs))
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * theirs.std(0) * (2 / tries) ** 0.5).all()
    assert ((ours.std(0) / theirs.std(0) - 1).abs() < 0.05).all()


CALLS = [(3, 40, torch.float32), (5, kernels.BLOCK + 7, torch.float32), (4, 130, torch.bfloat16)]


def arguments(tokens: int, features: int, dtype: torch.dtype, adds: bool) -> tuple:
    """The arguments of `kernels.keep`."""
    torch.manual_seed(tokens)
    keys, thresholds, layer = layer_dropout(dropped=0.4, layer=tokens, tokens=tokens)
    thresholds[0] = dropout.threshold_of(0)
    x, out = torch.randn(2, tokens, features).to(dtype)
    return x, out, keys, thresholds, layer, adds


def test_the_kernel_keeps_what_the_formula_keeps(tmp_path):
    asked = [("keep", arguments(*call, adds)) for call in CALLS for adds in (False, True)]
    for (_, (x, out, *how, adds)), (found, _) in zip(
        asked, triton_kernels.interpret("paragen.packed.kernels", asked, tmp_path), strict=True
    ):
        expected = LayerDropout(*how).kept(x)
        if adds:  # the interpreter rounds a sum in bfloat16 towards zero
            torch.testing.assert_close(found, out + expected)
        else:
            assert torch.equal(found, expected)
        assert (expected == 0).any() and expected[0].all()


@pytest.mark.parametrize("capability", [80, *(pytest.param(other, marks=pytest.mark.slow) for other in (89, 90))])
def test_the_kernel_compiles_for_the_gpus_that_it_is_for(monkeypatch, tmp_path, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    asked: list = []
    monkeypatch.setattr(kernels, "_keep", triton_kernels.Noted(kernels._keep, asked))
    for adds in (False, True):
        kernels.keep(*arguments(4, 130, torch.bfloat16, adds))
    assert len(asked) == 2
    triton_kernels.assert_compiled(asked, capability)


def test_the_kernel_has_one_variant_wherever_a_batch_has_its_keys():
    """In a CUDA graph none can be loaded; a bucket's keys are at any multiple of 8 bytes (see StaticBatch)."""
    binder = create_function_from_signature(
        kernels._keep.signature, kernels._keep.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    _, _, keys, thresholds, *_ = arguments(4, 130, torch.bfloat16, False)
    x = torch.empty(4, 130, dtype=torch.bfloat16)
    longer = torch.cat([keys, keys])
    variants = [
        binder(x, x, longer[first : first + 4], thresholds, layer, 130, False, kernels.BLOCK)[1]
        for first in (0, 1)
        for layer in (1, 16)
    ]
    assert all(variant == variants[0] for variant in variants), variants


DROPS = {"lora_dropout": 0.2}


@pytest.fixture
def project(tmp_path, model_folder) -> packed_project.Packable:
    return packed_project.Packable(tmp_path / "my project", model_folder)


def trained(dropped: list[float], kept: list[int]) -> list[Tensor]:
    """Some of three adapters, trained in a pack; each has its own probability of dropout."""
    base = test_packed_divergence.model()
    adapters = test_packed_divergence.adapters_of(base, [0.01] * test_packed_divergence.STEPS, 1.0)
    steps = test_packed_divergence.steps_of(np.random.default_rng(0))
    for adapter, probability in zip(adapters, dropped, strict=True):
        adapter.dropout = probability
    for step, stream in zip(steps, dropout.streams(42, range(1, len(steps) + 1)), strict=True):
        step.rows, step.streams = [step.rows[index] for index in kept], [stream] * len(kept)
    engine = Engine(base, [adapters[index] for index in kept], torch.float32)
    return test_packed_divergence.train(engine, steps)[0]


def test_an_adapter_with_dropout_is_the_same_alone_in_a_pack_and_again():
    together = trained([0.0, 0.1, 0.5], [0, 1, 2])
    assert all(map(torch.equal, together, trained([0.0, 0.1, 0.5], [0, 1, 2])))
    for index in range(3):
        (alone,) = trained([0.0, 0.1, 0.5], [index])
        assert (alone - together[index]).norm() <= packed_project.BOUND * alone.norm()
    for index in (1, 2):
        (without,) = trained([0.0, 0.0, 0.0], [index])
        assert (without - together[index]).norm() > 100 * packed_project.BOUND * without.norm()


@pytest.mark.runs
def test_a_cell_with_dropout_is_packed_and_its_files_say_what_it_had(project):
    project.collect(project.cell(rank=2), project.cell(pretrain=DROPS, finetune=DROPS))
    for rank, stream in ((2, None), (4, "packed")):
        for phase in ("pretrain", "finetune"):
            assert packed_project.manifest_of(project.folder(phase, rank=rank)).get("dropout_stream") == stream
    config = json.loads((project.folder("finetune") / "adapter_config.json").read_text())
    assert config["lora_dropout"] == DROPS["lora_dropout"]


@pytest.mark.slow
@pytest.mark.runs
def test_a_collection_with_dropout_is_the_same_alone_and_in_a_pack(project):
    cells = [project.cell(rank=rank, pretrain=keys, finetune=keys) for rank, keys in ((2, {}), (4, DROPS), (8, DROPS))]
    project.collect(*cells)
    together = project.set_aside("together")
    project.collect(cells[1])
    place = project.folder("finetune").relative_to(project.saves)
    packed_project.assert_same_adapters(project.saves / place, together / place)
    again = packed_project.hashes(project.folder("finetune"))
    assert project.packed(cells[1], FORCE="1").status == 0
    assert packed_project.hashes(project.folder("finetune")) == again


@pytest.mark.slow
@pytest.mark.runs
def test_dropout_of_all_features_is_left_to_the_ordinary_path(project):
    keys = {"lora_dropout": 1.0}
    result = project.packed(project.cell(pretrain=keys, finetune=keys))
    assert result.status == 1 and "lora_dropout is 1.0" in result.output, result.output
