"""Scores are those of the plain model: likelihoods as by PEFT row by row, answers as by transformers' generation."""

import json

import packed
import pytest
import tiny_models
import torch
from scored import CLOSE, LONGEST, STOPS, Scene, prompts, question
from transformers import GenerationConfig

import lora_stack
import scored_base
import scoring
from cli import UserError
from questions import Question
from scoring import Marks

LENGTHS = [1, 23, 4, 60, 5, 17, 2, 30]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of tiny models of every architecture, by name."""
    folder = tmp_path_factory.mktemp("m")
    packed.make_models(folder, *tiny_models.NAMES, *tiny_models.KIN)
    return folder


def targets(name: str) -> dict:
    known = tiny_models.NAMES.get(name) or tiny_models.KIN[name]
    names = known.lora_target.split(",")
    return {} if names == ["all"] else {"target_modules": names}


def assert_right(scene: Scene, asked: list[Question]) -> list[list[Marks]]:
    """What is computed for all adapters at once is what PEFT and transformers make of each question by itself."""
    scorer = scene.scorer(asked)
    found = scorer.marks(scene.factors())
    is_open = [[number for number, mark in enumerate(marks) if mark.is_open] for marks in found]
    generated = scorer.generate(scene.factors(), is_open, LONGEST)
    for adapter, marks in enumerate(found):
        assert list(generated[adapter]) != [] or not is_open[adapter]
        for number, (one, mark) in enumerate(zip(asked, marks, strict=True)):
            texts, loss = scene.likelihoods(adapter, one)
            assert mark.likelihoods == pytest.approx(texts, abs=CLOSE)
            assert mark.loss == pytest.approx(loss, abs=CLOSE) and mark.count == len(one.paths[one.right].tokens)
            said = scene.greedy(adapter, one.tokens)
            if mark.is_open:
                assert mark.answer is None
                assert generated[adapter][number] == scoring.until(said, STOPS)
            else:
                assert mark.answer == first_option(one, said)
    return found


def first_option(one: Question, said: list[int]) -> int | None:
    """The option that a text begins with."""
    return next(
        (number for number, path in enumerate(one.paths) if said[: path.length] == path.tokens[: path.length]), None
    )


@pytest.mark.parametrize("shared", [0, 12], ids=["prompts of their own", "prompts with a common beginning"])
@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.KIN])
def test_every_architecture_gets_the_scores_and_answers_of_the_plain_model(tiny, name, shared):
    scene = Scene(tiny / name, lora=targets(name))
    asked = scene.asked(prompts(LENGTHS, shared))
    found = assert_right(scene, asked)
    answers = [[mark.answer for mark in marks] for marks in found]
    assert len({tuple(one) for one in answers}) > 1, "the adapters answer differently"
    assert any(answer is not None for one in answers for answer in one)
    assert any(mark.is_open for marks in found for mark in marks)


@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize("name", ["mistral-7b", "gemma-3-text", "gemma-3-4b"])
def test_rows_longer_than_what_attention_sees_are_scored_with_its_window(tiny, name, shared):
    """Mistral's layers see the last 7 tokens alone, one of Gemma's two; of prompts, their beginning and options."""
    narrow, wide = (Scene(tiny / name, config={"sliding_window": window}) for window in (7, 128))
    asked = narrow.asked(prompts([3, 40, 8], shared))
    asked.append(question(prompts([20], shared)[0], [[*range(50, 70)], [50, 51], [*range(50, 65)]]))
    assert_right(narrow, asked)
    assert abs(narrow.likelihoods(1, asked[1])[1] - wide.likelihoods(1, asked[1])[1]) > 0.01


def test_unusual_questions_are_scored_as_any_other(tiny):
    scene = Scene(tiny / "smollm2-135m", count=1)
    some = prompts([30, 1, 5])
    sets = {
        "one row": [question(some[0], [[20], [21]])],
        "one row of one token": [question(some[1], [[20], [21, 22]], 1)],
        "one prompt for all": [question(some[0], [[20 + n], [30, 40 + n]]) for n in range(5)],
        "one prompt begins another": [question(some[0][:n], [[20, 21], [22]]) for n in (9, 10, 30)],
        "single tokens": [question(prompt, [[20], [21], [22]], 2) for prompt in some],
        "a stem": [question(prompt, [[*range(20, 29), last] for last in (60, 61, 62)], 1) for prompt in some],
        "of all lengths": [question(prompt, [[20], [21, 22], list(range(23, 40))], 1) for prompt in some],
        "many": [question(prompt, [[20, tens, ones] for tens in (30, 31) for ones in range(40, 46)]) for prompt in some],
        "long chains": [question(prompt, [[*range(20, 60), 20, 21]]) for prompt in some],
        "responses of one token": [question(prompt, [[20]]) for prompt in some],
    }  # fmt: skip
    for asked in sets.values():
        assert_right(scene, asked)


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 1, "lora_alpha": 1}, {"target_modules": ["v_proj"]}, {"r": 5, "lora_alpha": 3, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
    ids=["rank 1", "one kind of layer", "rank-stabilised", "some layers of one block"],
)  # fmt: skip
def test_every_shape_of_adapter_is_applied_as_peft_applies_it(tiny, lora):
    scene = Scene(tiny / "qwen2.5-0.5b", lora=lora)
    found = assert_right(scene, scene.asked(prompts(LENGTHS, 12)))
    losses = [sum(mark.loss for mark in marks) for marks in found]
    assert min(abs(losses[one] - losses[other]) for one, other in ((0, 1), (0, 2), (1, 2))) > 0.1
