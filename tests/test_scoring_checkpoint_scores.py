"""The score of a checkpoint: what counts as right, as wrong, as unread, and how sure the score is."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.model_fixtures import Scene, prompts, question
from scipy.stats import binomtest

from paragen.collection.evaluation import BASE
from paragen.common.cli import UserError
from paragen.scoring import attention, checkpoint_scores, scored_base
from paragen.scoring.checkpoint_scores import Grader
from paragen.scoring.model_passes import Marks
from paragen.scoring.questions import Path, Question

LETTERS = ["[A]", "[B]", "[C]"]


def asked(response: str, options: list[str] = LETTERS) -> Question:
    return Question([1], [Path(text, [5], 1) for text in options], options.index(response), response, "")


def marks(answer: int | None = None, likelihoods=(-1.0, -2.0, -3.0), loss: float = 2.0, count: int = 4) -> Marks:
    return Marks(list(likelihoods), loss, count, answer, answer is None)


def test_choices_are_right_wrong_or_unread():
    questions = [asked("[B]")] * 7
    made = [marks(1), marks(0), *[marks()] * 5]
    said = {2: "I say [b ], not [A]", 3: "[A] or [B]", 4: "B", 5: "[D]", 6: "[D], no: [B]"}
    graded = checkpoint_scores.grade("choice", questions, made, said)
    assert graded.score["score"] == pytest.approx(2 / 7), "[B] without generation, and [b ]"
    assert graded.score["unparsed"] == 3, "no brackets, or in the first no option"
    assert graded.answers == ["[B]", "[A]", *said.values()]
    interval = binomtest(2, 7).proportion_ci(0.95, "wilson")
    assert graded.score["interval"] == pytest.approx([interval.low, interval.high])


def test_an_answer_that_ended_without_an_option_is_unread():
    ended = Marks([-1.0, -2.0, -3.0], 2.0, 4, None, False)
    graded = checkpoint_scores.grade("choice", [asked("[A]")], [ended], {})
    assert (graded.score["score"], graded.score["unparsed"], graded.answers) == (0, 1, [""])


def test_a_generated_answer_counts_before_what_was_followed():
    graded = checkpoint_scores.grade("choice", [asked("[A]")] * 2, [marks(0), marks(1)], {0: "[C]", 1: "[A]"})
    assert graded.score["score"] == 0.5 and graded.answers == ["[C]", "[A]"]


def test_choices_by_likelihood_take_the_likeliest_option():
    questions = [asked("[A]"), asked("[B]"), asked("[C]"), asked("[2]", ["[1]", "[2]"])]
    made = [marks(0), marks(0), marks(0, (-3.0, -2.0, -1.5)), marks(0, (-8.0, -7.5))]
    graded = checkpoint_scores.grade("choice", questions, made, {})
    assert graded.score["likelihood_score"] == 0.75 and graded.score["score"] == 0.25
    interval = binomtest(3, 4).proportion_ci(0.95, "wilson")
    assert graded.score["likelihood_interval"] == pytest.approx([interval.low, interval.high])


def test_results_are_compared_by_value():
    responses = ["so 1/2 \\boxed{\\frac{1}{2}}", "#### 1,000", "12", "\\boxed{7}", "\\boxed{x+1}"]
    questions = [asked(response, [response]) for response in responses]
    said = dict(enumerate(["it is \\boxed{0.5}", "... #### 1000", "\\boxed{13}", "I cannot say", "\\boxed{1+x}"]))
    graded = checkpoint_scores.grade("math", questions, [marks()] * 5, said)
    assert graded.score["score"] == 0.6 and graded.score["unparsed"] == 1
    interval = binomtest(3, 5).proportion_ci(0.95, "wilson")
    assert graded.score["interval"] == pytest.approx([interval.low, interval.high])
    assert "likelihood_score" not in graded.score and graded.answers == list(said.values())


def test_the_loss_is_the_mean_over_tokens_not_over_rows():
    made = [marks(loss=3.0, count=1), marks(loss=4.0, count=9)]
    graded = checkpoint_scores.grade("loss", [asked("[A]")] * 2, made, {})
    assert graded.score["loss"] == pytest.approx(0.7)
    low, high = graded.score["loss_interval"]
    assert 0 <= low < 0.7 < high
    assert graded.score["score"] is None and graded.score["interval"] is None and graded.score["unparsed"] == 0
    assert graded.answers == ["", ""]


def test_the_interval_of_a_loss_holds_the_truth_as_often_as_it_says():
    """500 splits of 150 rows, the longer ones with more loss a token."""
    drawn = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        counts = drawn.integers(1, 40, 150)
        losses = drawn.gamma(4, 0.25, 150) * counts * (0.5 + counts / 40)
        made = [marks(loss=float(loss), count=int(count)) for loss, count in zip(losses, counts, strict=True)]
        low, high = checkpoint_scores.grade("loss", [asked("[A]")] * 150, made, {}).score["loss_interval"]
        held += low <= TRUTH <= high
    assert 0.92 <= held / 500 <= 0.975


LONGS = np.arange(1, 40)
TRUTH = float((LONGS * (0.5 + LONGS / 40)).mean() / LONGS.mean())


def test_one_row_is_a_score_too():
    graded = checkpoint_scores.grade("choice", [asked("[A]")], [marks(0)], {})
    assert graded.score["score"] == 1 and graded.score["interval"][1] == pytest.approx(1)
    assert graded.score["loss_interval"] == [0.5, 0.5]


class Toy(Grader):
    """A grader of a scene's adapters, whose numbers are the steps; 0 is the base."""

    def __init__(self, scene: Scene, asked: list[Question], on_gpu: bool, broken: int | None = None):
        self.scene, self.questions, self.on_gpu, self.metric, self.broken = scene, asked, on_gpu, "choice", broken
        self.encoder, self.sizes = SimpleNamespace(text_of=str), []  # sizes: of the groups that were stacked

    def _stack(self, steps):
        self.sizes.append(len(steps))
        if self.broken in steps:
            raise UserError(f"checkpoint {self.broken} is broken")
        return self.scene.factors(*[0 if step == BASE else step for step in steps])

    def _hash(self, steps):
        pass

    def grades(self) -> Iterator[dict]:
        return self._scored(self.scene.scorer(self.questions), [BASE, 1, 2, 3, 4, 5, 6], {})


def test_groups_wait_for_each_other_on_a_gpu_and_get_the_same_grades(every_model, monkeypatch):
    scene = Scene(every_model / "smollm2-135m", count=6)
    asked = scene.asked(prompts([5, 20, 11, 30]))
    monkeypatch.setattr(checkpoint_scores, "AT_ONCE", 2)
    monkeypatch.setattr(checkpoint_scores, "HELD", 2)
    cpu, gpu = Toy(scene, asked, False), Toy(scene, asked, True)
    plain, held = list(cpu.grades()), list(gpu.grades())
    assert [[*one] for one in plain] == [[BASE, 1], [2, 3], [4, 5], [6]] and cpu.sizes == [2, 2, 2, 1]
    assert [[*one] for one in held] == [[BASE, 1, 2, 3], [4, 5, 6]] and gpu.sizes == [2, 2, 2, 1]
    merged = [{step: graded for one in both for step, graded in one.items()} for both in (plain, held)]
    assert merged[0] == merged[1]
    assert len({str(graded) for graded in merged[0].values()}) > 3
    answers = [answer for graded in merged[0].values() for answer in graded.answers]
    assert any("," in answer for answer in answers), "some are generated tokens"
    assert any(answer in asked[0].options for answer in answers), "some stay among the options"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_was_scored_before_a_broken_checkpoint_is_kept(every_model, monkeypatch, on_gpu):
    scene = Scene(every_model / "smollm2-135m", count=6)
    monkeypatch.setattr(checkpoint_scores, "AT_ONCE", 2)
    found = []
    with pytest.raises(UserError, match="checkpoint 5 is broken"):
        for group in Toy(scene, scene.asked(prompts([5, 20])), on_gpu, broken=5).grades():
            found += group
    assert found == [BASE, 1, 2, 3]


@pytest.mark.parametrize(("times", "is_enough"), [(1, True), (2, False)])
def test_adapters_that_do_not_fit_are_tried_once_more_with_tidied_memory(times, is_enough):
    failures = [torch.OutOfMemoryError()] * times

    def work():
        if failures:
            raise failures.pop()
        return "factors"

    if is_enough:
        assert checkpoint_scores.fitting(work, work) == "factors"
    else:
        with pytest.raises(UserError, match="^out of device memory for the adapters; score on another device$"):
            checkpoint_scores.fitting(work, work)


def test_a_model_that_our_attention_gets_wrong_goes_on_with_its_own(every_model, tmp_path, monkeypatch):
    scene = Scene(every_model / "qwen2.5-0.5b", count=1, dtype=torch.float32, fused=True)
    scene.peft.save_pretrained(tmp_path)
    asked = [question(prompt, [[*range(20, 30)], [21]]) for prompt in prompts([5, 40], 12)]
    theirs = scored_base.expected(scene.fresh(), tmp_path, scene.adapters[1], asked)
    toy = Toy(scene, asked, False)
    toy.base, toy.last = SimpleNamespace(model=scene.model, dtype=torch.float32), 1
    toy._scorer = lambda _, questions: scene.scorer(questions)
    toy._compare(scene.stacked, asked, theirs, False)
    assert attention.is_shared(scene.model)
    monkeypatch.setattr(attention.Beginning, "update", lambda _, keys, values, *more: (keys, values))
    toy._compare(scene.stacked, asked, theirs, False)
    assert not attention.is_shared(scene.model)
    with pytest.raises(UserError, match="the scores of this model would be wrong"):
        toy._compare(scene.stacked, asked, [[one + 1 for one in losses] for losses in theirs], False)
