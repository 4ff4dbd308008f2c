"""The score of a checkpoint: what counts as right, as wrong, as unread, and the score's interval."""

import numpy as np
import pytest
from scipy.stats import binomtest

from paragen.scoring.checkpoint_scores import score_checkpoint
from paragen.scoring.likelihoods import QuestionResult
from paragen.scoring.questions import Continuation, Question

LETTERS = ["[A]", "[B]", "[C]"]


def choice(response: str, options: list[str] = LETTERS) -> Question:
    return Question([1], [Continuation(text, [5], 1) for text in options], options.index(response), response, "")


def result(
    answer: int | None = None, likelihoods=(-1.0, -2.0, -3.0), loss: float = 2.0, count: int = 4
) -> QuestionResult:
    return QuestionResult(list(likelihoods), loss, count, answer, answer is None)


def test_choices_are_right_wrong_or_unread():
    questions = [choice("[B]")] * 7
    results = [result(1), result(0), *[result()] * 5]
    generated = {2: "I say [b ], not [A]", 3: "[A] or [B]", 4: "B", 5: "[D]", 6: "[D], no: [B]"}
    scored = score_checkpoint("choice", questions, results, generated)
    assert scored.score["score"] == pytest.approx(2 / 7), "[B] without generation, and [b ]"
    assert scored.score["unparsed"] == 3, "no brackets, or in the first no option"
    assert scored.answers == ["[B]", "[A]", *generated.values()]
    interval = binomtest(2, 7).proportion_ci(0.95, "wilson")
    assert scored.score["interval"] == pytest.approx([interval.low, interval.high])


def test_an_answer_that_ended_without_an_option_is_unread():
    ended = QuestionResult([-1.0, -2.0, -3.0], 2.0, 4, None, False)
    scored = score_checkpoint("choice", [choice("[A]")], [ended], {})
    assert (scored.score["score"], scored.score["unparsed"], scored.answers) == (0, 1, [""])


def test_a_generated_answer_counts_before_the_tree_s():
    scored = score_checkpoint("choice", [choice("[A]")] * 2, [result(0), result(1)], {0: "[C]", 1: "[A]"})
    assert scored.score["score"] == 0.5 and scored.answers == ["[C]", "[A]"]


def test_choices_by_likelihood_take_the_likeliest_option():
    questions = [choice("[A]"), choice("[B]"), choice("[C]"), choice("[2]", ["[1]", "[2]"])]
    results = [result(0), result(0), result(0, (-3.0, -2.0, -1.5)), result(0, (-8.0, -7.5))]
    scored = score_checkpoint("choice", questions, results, {})
    assert scored.score["likelihood_score"] == 0.75 and scored.score["score"] == 0.25
    interval = binomtest(3, 4).proportion_ci(0.95, "wilson")
    assert scored.score["likelihood_interval"] == pytest.approx([interval.low, interval.high])


def test_results_are_compared_by_value():
    responses = ["so 1/2 \\boxed{\\frac{1}{2}}", "#### 1,000", "12", "\\boxed{7}", "\\boxed{x+1}"]
    questions = [choice(response, [response]) for response in responses]
    generated = dict(enumerate(["it is \\boxed{0.5}", "... #### 1000", "\\boxed{13}", "I cannot say", "\\boxed{1+x}"]))
    scored = score_checkpoint("math", questions, [result()] * 5, generated)
    assert scored.score["score"] == 0.6 and scored.score["unparsed"] == 1
    interval = binomtest(3, 5).proportion_ci(0.95, "wilson")
    assert scored.score["interval"] == pytest.approx([interval.low, interval.high])
    assert "likelihood_score" not in scored.score and scored.answers == list(generated.values())


def test_an_exact_answer_is_the_response_without_surrounding_blanks():
    questions = [choice(response, [response]) for response in ("red, blue", " red\n", "red", "Red", "a  b")]
    generated = dict(enumerate(["red, blue", "\n red ", "red.", "red", "a b"]))
    scored = score_checkpoint("exact", questions, [result()] * 5, generated)
    assert scored.score["score"] == 0.4 and scored.score["unparsed"] == 0 and scored.score["loss"] == 0.5
    interval = binomtest(2, 5).proportion_ci(0.95, "wilson")
    assert scored.score["interval"] == pytest.approx([interval.low, interval.high])
    assert "likelihood_score" not in scored.score and scored.answers == list(generated.values())


def test_the_loss_is_the_mean_over_tokens_not_over_rows():
    results = [result(loss=3.0, count=1), result(loss=4.0, count=9)]
    scored = score_checkpoint("loss", [choice("[A]")] * 2, results, {})
    assert scored.score["loss"] == pytest.approx(0.7)
    low, high = scored.score["loss_interval"]
    assert 0 <= low < 0.7 < high
    assert scored.score["score"] is None and scored.score["interval"] is None and scored.score["unparsed"] == 0
    assert scored.answers == ["", ""]


def test_the_interval_of_a_loss_holds_the_true_loss_as_often_as_it_claims():
    """500 splits of 150 rows, the longer ones with more loss a token."""
    drawn = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        counts = drawn.integers(1, 40, 150)
        losses = drawn.gamma(4, 0.25, 150) * counts * (0.5 + counts / 40)
        results = [result(loss=float(loss), count=int(count)) for loss, count in zip(losses, counts, strict=True)]
        low, high = score_checkpoint("loss", [choice("[A]")] * 150, results, {}).score["loss_interval"]
        held += low <= TRUTH <= high
    assert 0.92 <= held / 500 <= 0.975


LONGS = np.arange(1, 40)
TRUTH = float((LONGS * (0.5 + LONGS / 40)).mean() / LONGS.mean())


def test_one_row_is_a_score_too():
    scored = score_checkpoint("choice", [choice("[A]")], [result(0)], {})
    assert scored.score["score"] == 1 and scored.score["interval"][1] == pytest.approx(1)
    assert scored.score["loss_interval"] == [0.5, 0.5]
