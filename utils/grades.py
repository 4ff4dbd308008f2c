"""The scores of a collection's base and checkpoints on a split: the entries of evaluation.json.

Imported by evaluate.py. Checkpoints are read once, the next ones while the device is busy.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

import answers
import checkpoints
import collection
import lora_stack
import scored_base
from evaluation import BASE, MOST
from lora_stack import Factors, Stacked
from questions import Encoder, Question, Split
from scored_base import Base
from scoring import Marks, Scorer

AT_ONCE = 8  # adapters that go through the model together; the base counts as one
COMPARED = 1024  # tokens of a question that PEFT's forward pass, which makes all logits, is tried with


class Graded(NamedTuple):
    """A checkpoint's score and, of each question, the answer that was generated (empty where none was)."""

    score: dict[str, Any]
    answers: list[str]


class Grader:
    """Scores the checkpoints of one collection.

    Args:
        folder, manifest: the collection's.
        base: its base model, loaded.
        split: the rows to score on; metric: what they are scored by, a key of evaluation.METRICS.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], base: Base, split: Split, metric: str):
        self.folder, self.base, self.metric = folder, base, metric
        self.entries = {entry["step"]: entry for entry in manifest["checkpoints"]}
        self.scaling = lora_stack.scaling_of(checkpoints.adapter_config(folder, manifest))
        self.last = manifest["checkpoints"][-1]["step"]
        self.layers = checkpoints.layers_of(self._read(self.last))
        self.encoder = Encoder(base.tokenizer_module, base.data_args, base.longest)
        self.questions = self.encoder.questions(split, metric)

    def groups(self, steps: list[int]) -> Iterator[dict[int, Graded]]:
        """The grades of steps (evaluation.BASE: the base model), some at a time.

        Raises UserError when what is computed here is not what PEFT computes for this model.
        """
        tried = self._tried()
        theirs = scored_base.expected(self.base.model, self.folder, self._read(self.last), tried)
        self.base.fuse()
        stacked = Stacked(self.base.model, [layer.removeprefix(lora_stack.PREFIX) for layer in self.layers])
        try:
            found = self._scorer(stacked, tried).marks(self._on_device(self._stack([BASE, self.last])))
            scored_base.compare(found, theirs, self.base.dtype)
            scorer = self._scorer(stacked, self.questions)
            parts = [steps[start : start + AT_ONCE] for start in range(0, len(steps), AT_ONCE)]
            with ThreadPoolExecutor(1) as reader:
                coming = reader.submit(self._stack, parts[0])
                for part, after in zip(parts, [*parts[1:], None], strict=True):
                    factors = self._on_device(coming.result())
                    coming = reader.submit(self._stack, after) if after else None
                    yield dict(zip(part, self._graded(scorer, factors), strict=True))
        finally:
            stacked.close()

    def _graded(self, scorer: Scorer, factors: Factors) -> list[Graded]:
        marks = scorer.marks(factors)
        if self.metric == "loss":
            return [grade(self.metric, self.questions, one, {}) for one in marks]
        asked = [[number for number, mark in enumerate(one) if mark.is_open] for one in marks]
        generated = scorer.generate(factors, asked, MOST[self.metric])
        read = self.encoder.tokenizer.decode
        texts = [
            {number: read(tokens, skip_special_tokens=True) for number, tokens in one.items()} for one in generated
        ]
        return [grade(self.metric, self.questions, *both) for both in zip(marks, texts, strict=True)]

    def _scorer(self, stacked: Stacked, questions: list[Question]) -> Scorer:
        tokenizer = self.encoder.tokenizer
        return Scorer(stacked, questions, self.encoder.stops, tokenizer.pad_token_id or tokenizer.eos_token_id or 0)

    def _tried(self) -> list[Question]:
        """A short question and the longest that a plain forward pass can be asked."""
        by_length = sorted(self.questions, key=lambda question: len(question.tokens) + len(question.paths[0].tokens))
        short = [one for one in by_length if len(one.tokens) + len(one.paths[0].tokens) <= COMPARED] or by_length[:1]
        return [short[0], short[-1]]

    def _read(self, step: int) -> dict[str, Tensor]:
        entry = self.entries[step]
        return checkpoints.load(self.folder / collection.checkpoint_name(step), entry["bytes"], entry["sha256"])

    def _stack(self, steps: list[int]) -> Factors:
        adapters = [None if step == BASE else self._read(step) for step in steps]
        if adapters == [None]:  # the base by itself takes its adapter's shapes from the last checkpoint
            return lora_stack.stack([None, self._read(self.last)], self.layers, self.scaling).of([0])
        return lora_stack.stack(adapters, self.layers, self.scaling)

    def _on_device(self, factors: Factors) -> Factors:
        return factors.to(self.base.model.device, self.base.dtype)


def grade(metric: str, questions: list[Question], marks: list[Marks], generated: dict[int, str]) -> Graded:
    """One checkpoint's grades.

    Args:
        metric: a key of evaluation.METRICS.
        marks: of each question.
        generated: texts of the questions that were answered by generation.
    """
    sums, counts = (np.array([getattr(mark, name) for mark in marks]) for name in ("loss", "count"))
    score: dict[str, Any] = {"score": None, "interval": None, "unparsed": 0}
    score |= {"loss": float(sums.sum() / counts.sum()), "loss_interval": answers.loss_interval(sums, counts)}
    if metric == "loss":
        return Graded(score, [""] * len(questions))
    judge = choice if metric == "choice" else result
    texts = [
        generated[number] if number in generated else question.options[mark.answer] if mark.answer is not None else ""
        for number, (question, mark) in enumerate(zip(questions, marks, strict=True))
    ]
    verdicts = [judge(question, text) for question, text in zip(questions, texts, strict=True)]
    right = sum(verdict is True for verdict in verdicts)
    score |= {"score": right / len(questions), "interval": answers.wilson(right, len(questions))}
    score["unparsed"] = sum(verdict is None for verdict in verdicts)
    if metric == "choice":
        likelier = sum(
            int(np.argmax(mark.likelihoods)) == question.right for question, mark in zip(questions, marks, strict=True)
        )
        score["likelihood_score"] = likelier / len(questions)
        score["likelihood_interval"] = answers.wilson(likelier, len(questions))
    return Graded(score, texts)


def choice(question: Question, text: str) -> bool | None:
    """Whether a text chooses the right option; None where it cannot be told what it chooses."""
    chosen = answers.chosen(text, question.options)
    return None if chosen is None else chosen == question.options[question.right]


def result(question: Question, text: str) -> bool | None:
    """Whether a text comes to the response's result; None where no result can be read in it."""
    return answers.same_result(question.response, text)
