"""Scoring on an NVIDIA GPU: the tests of test_scoring.py and test_scoring_kernels.py without Triton's interpreter.

`make test-gpu` runs them; on a machine without one they are skipped.
"""

import pytest
import torch
from helpers import tiny_models
from helpers.model_fixtures import Scene, prompts, question
from test_scoring import LENGTHS, assert_right, targets
from test_scoring_kernels import HEADS, SIZES, WORDS, activations, heads_of, logits
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from paragen.scoring import attention, kernels, likelihoods, stacked_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

CLOSE = 5e-3  # nats; in float32, with adapters that are larger than trained ones


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.KIN])
def test_every_architecture_gets_the_scores_and_answers_of_the_plain_model(every_model, name):
    scene = Scene(every_model / name, lora=targets(name), dtype=torch.float32, device="cuda")
    for shared in (0, 12):
        assert_right(scene, scene.questions_for(prompts(LENGTHS, shared)), CLOSE)


@pytest.mark.parametrize("name", ["mistral-7b", "gemma-3-text"])
def test_layers_with_a_window_attend_no_further(every_model, name):
    config = {"sliding_window": 7}
    scene = Scene(every_model / name, config=config, dtype=torch.float32, device="cuda")
    for shared in (0, 12):
        assert_right(scene, scene.questions_for(prompts([3, 40, 8], shared)), CLOSE)


def test_a_checkpoint_alone_has_the_scores_it_has_among_others(every_model):
    scene = Scene(every_model / "qwen2.5-0.5b", count=7, dtype=torch.float32, device="cuda")
    questions = scene.questions_for(prompts([1, 9, 3, 33, 2, 14, 5, 70, 21, 8], 10))
    together = scene.scorer(questions).score(scene.factors())
    for number in (0, 3, 7):
        (alone,) = scene.scorer(questions).score(scene.factors(number))
        for one, other in zip(alone, together[number], strict=True):
            assert one.likelihoods == pytest.approx(other.likelihoods, abs=1e-3)
            assert (one.answer, one.needs_generation) == (other.answer, other.needs_generation)


def test_blocks_with_the_kernel_give_what_they_give_without_it(tmp_path, monkeypatch):
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    scene = Scene(tmp_path, dtype=torch.bfloat16, device="cuda")
    questions = [question(prompt, [[20], [21]]) for prompt in prompts(LENGTHS, 12)]
    plain = scene.scorer(questions).score(scene.factors())
    called = []
    monkeypatch.setattr(stacked_model, "MIN_KERNEL_ROWS", 1)
    kernel = kernels.gated
    monkeypatch.setattr(kernels, "gated", lambda *given: called.append(given) or kernel(*given))
    found = scene.scorer(questions).score(scene.factors())
    assert called
    for results, others in zip(found, plain, strict=True):
        for result, other in zip(results, others, strict=True):
            assert result.loss / result.token_count == pytest.approx(other.loss / other.token_count, rel=5e-3)


@pytest.mark.parametrize("name", HEADS)
def test_attention_is_that_of_pytorch(name):
    given = heads_of(**HEADS[name])
    expected = attention.plain_attention(*given)
    for dtype, off in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        query, key, value = moved(given[:3], dtype)
        if kernels.can_attend(query, value):
            first = given[5] and tuple(moved(given[5], dtype))
            found = kernels.attend(query, key, value, given[3].cuda(), given[4], first)
            assert (found.float().cpu() - expected).norm() <= off * expected.norm()
        else:
            assert dtype is torch.float32 and query.shape[-1] == 256


@pytest.mark.parametrize("sizes", SIZES)
def test_gated_activations_apply_their_factors(sizes):
    given = activations(*sizes)
    there = moved(given, torch.bfloat16)
    for one, other in ((stacked_model.gated(*there), stacked_model.gated(*given)), (there[0], given[0])):
        assert (one.float().cpu() - other).norm() <= 1e-2 * other.norm()


@pytest.mark.parametrize("words", WORDS)
def test_logits_are_reduced(words):
    given = logits(words)
    totals, best = likelihoods.reduce_logits(given.cuda())
    torch.testing.assert_close(totals.cpu(), given.logsumexp(-1))
    assert best.tolist() == given.argmax(-1).tolist()


def test_rotary_positions_are_those_of_transformers():
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    torch.manual_seed(0)
    query, key = torch.randn(3, 5, 4, 16).transpose(1, 2), torch.randn(3, 5, 2, 16).transpose(1, 2)
    half = torch.randn(2, 3, 5, 8)
    cos, sin = torch.cat([half, half], -1)
    expected = apply_rotary_pos_emb(query, key, cos, sin)
    found = attention.as_one_row(liger_rotary_pos_emb)(*moved((query, key, cos, sin), torch.float32))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other)


def moved(tensors: tuple, dtype: torch.dtype) -> list[Tensor]:
    """Tensors on the GPU."""
    return [one.to("cuda", dtype) for one in tensors]
