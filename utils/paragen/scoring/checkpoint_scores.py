"""The score of a checkpoint, an entry of evaluation.json, from what it makes of each question."""

from typing import Any, NamedTuple

import numpy as np

from paragen.scoring import answers
from paragen.scoring.likelihoods import QuestionResult
from paragen.scoring.questions import Question


class CheckpointScore(NamedTuple):
    """A checkpoint's score on a split."""

    score: dict[str, Any]  # the entry in evaluation.json, without its step
    answers: list[str]  # the answer to each question; empty where none was generated
    losses: list[float]  # of each question: the negative log-likelihood of the right response, in nats
    token_counts: list[int]  # that these are summed over
    right: list[bool]  # whether each answer is right; empty where the metric is the loss


def score_checkpoint(
    metric: str, questions: list[Question], results: list[QuestionResult], generated: dict[int, str]
) -> CheckpointScore:
    """Compute the score of one checkpoint.

    Args:
        metric: a key of evaluation.METRICS.
        questions: those of the split.
        results: what the checkpoint makes of each question.
        generated: the texts of generated answers, by the number of the question.
    """
    sums = np.array([result.loss for result in results])
    counts = np.array([result.token_count for result in results])
    score: dict[str, Any] = {"score": None, "interval": None, "unparsed": 0}
    score |= {"loss": float(sums.sum() / counts.sum()), "loss_interval": answers.loss_interval(sums, counts)}
    if metric == "loss":
        return CheckpointScore(score, [""] * len(questions), sums.tolist(), counts.tolist(), [])
    texts = [
        generated[number] if number in generated else question.options[one.answer] if one.answer is not None else ""
        for number, (question, one) in enumerate(zip(questions, results, strict=True))
    ]
    verdicts = [IS_RIGHT[metric](question, text) for question, text in zip(questions, texts, strict=True)]
    right = [verdict is True for verdict in verdicts]
    score |= {"score": sum(right) / len(right), "interval": answers.share_interval(sum(right), len(right))}
    score["unparsed"] = sum(verdict is None for verdict in verdicts)
    if metric == "choice":
        likeliest = sum(
            result.likelihoods.index(max(result.likelihoods)) == question.right
            for question, result in zip(questions, results, strict=True)
        )
        score["likelihood_score"] = likeliest / len(questions)
        score["likelihood_interval"] = answers.share_interval(likeliest, len(questions))
    return CheckpointScore(score, texts, sums.tolist(), counts.tolist(), right)


def is_right_option(question: Question, text: str) -> bool | None:
    """Whether a text chooses the right option; None where it chooses none."""
    chosen = answers.chosen_option(text, question.options)
    return None if chosen is None else chosen == question.options[question.right]


def is_right_result(question: Question, text: str) -> bool | None:
    """Whether a text has the response's result; None where no result can be read in it."""
    return answers.same_result(question.response, text)


def is_response(question: Question, text: str) -> bool:
    """Whether a text is the response; blanks around either do not count."""
    return text.strip() == question.response.strip()


IS_RIGHT = {"choice": is_right_option, "math": is_right_result, "exact": is_response}
