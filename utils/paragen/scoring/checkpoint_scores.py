"""The scores of a collection's base and checkpoints on a split: the entries of evaluation.json.

Imported by evaluate.py. Checkpoints are read once, the next ones while the device is busy.
"""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from paragen.collection import checkpoints, run_files
from paragen.collection.evaluation import BASE, MOST
from paragen.collection.index import Chosen
from paragen.common import devices
from paragen.common.cli import UserError
from paragen.scoring import answers, attention, lora_stack, scored_base
from paragen.scoring.lora_stack import Factors, Stacked
from paragen.scoring.model_passes import Marks, Scorer
from paragen.scoring.questions import Encoder, Question, Split
from paragen.scoring.scored_base import Base

AT_ONCE = 8  # adapters that go through the model together; the base counts as one
HELD = 4  # groups on a GPU whose answers are generated together; scores are written as often
HELD_BYTES = 2**30  # of their factors
SWITCH = 1e-4  # seconds; Python's 5e-3 starve a GPU, whose thread asks for its turn at each call
COMPARED = 1024  # tokens of a question that PEFT's forward pass, which makes all logits, is tried with


Answers = dict[int, list[int]]  # of questions, by number, the tokens generated


class Graded(NamedTuple):
    """A checkpoint's score and, of each question, the answer that was generated (empty where none was)."""

    score: dict[str, Any]
    answers: list[str]


class Begun(NamedTuple):
    """A group of steps that went through the model."""

    steps: list[int]
    factors: Factors
    marks: Future[list[list[Marks]]]


class Grader:
    """Scores the checkpoints of one collection.

    Args:
        chosen: the collection.
        base: its base model.
        split: the rows to score on; metric: what they are scored by, a key of evaluation.METRICS.
    """

    def __init__(self, chosen: Chosen, base: Base, split: Split, metric: str):
        self.base, self.metric = base, metric
        self.on_gpu = torch.cuda.is_available()
        self.folder, manifest = chosen.folder, chosen.manifest
        self.entries = {entry.step: entry for entry in manifest.checkpoints}
        self.scaling = lora_stack.scaling_of(checkpoints.adapter_config(self.folder, manifest))
        self.last = manifest.steps[-1]
        self.layers = checkpoints.layers_of(self._read(self.last))
        self.encoder = Encoder(base.tokenizer_module, base.data_args, base.longest)
        self.questions = self.encoder.questions(split, metric)

    def groups(self, steps: list[int]) -> Iterator[dict[int, Graded]]:
        """The grades of steps (evaluation.BASE: the base model), some at a time.

        A GPU computes the next group meanwhile. Raises UserError when what is computed here is not what PEFT computes
        for this model.
        """
        if not gc.get_freeze_count():
            gc.freeze()  # what was imported stays: to look through it again and again holds up all threads
        tried = self._tried()
        theirs = scored_base.expected(self.base.model, self.folder, self._read(self.last), tried)
        self.base.fuse()
        stacked = Stacked(self.base.model, self.layers)
        try:
            self._compare(stacked, tried, theirs)
            yield from self._scored(self._scorer(stacked, self.questions), steps)
        finally:
            stacked.close()

    def _compare(self, stacked: Stacked, tried: list[Question], theirs: list[list[float]]) -> None:
        """Raise UserError unless questions get what PEFT makes of them (`theirs`, as scored_base.expected gives it); a
        model that does not get it by our attention goes on with its own."""
        scorer, both = self._scorer(stacked, tried), self._stack([BASE, self.last])
        try:
            scored_base.compare(scorer.marks(both), theirs, self.base.dtype)
        except (UserError, RuntimeError, ValueError):
            if not attention.is_shared(self.base.model):
                raise
            attention.unshare(self.base.model)
            scored_base.compare(scorer.marks(both), theirs, self.base.dtype)
        if self.metric in MOST:
            scored_base.compare_answers(scorer, both.of([1]), self.base.dtype)

    def _scored(self, scorer: Scorer, steps: list[int]) -> Iterator[dict[int, Graded]]:
        begun: list[Begun] = []
        try:
            with contextlib.closing(self._begun(scorer, steps)) as groups:
                for group in groups:
                    begun.append(group)
                    if len(begun) > self._held(group.factors):
                        ready = begun[:-1] or begun  # on a GPU the newest is being computed
                        begun = begun[len(ready) :]
                        yield self._graded(scorer, ready)
        except UserError:
            if begun:
                yield self._graded(scorer, begun)
            raise
        if begun:
            yield self._graded(scorer, begun)

    def _begun(self, scorer: Scorer, steps: list[int]) -> Iterator[Begun]:
        """Groups of steps, each as soon as the device has it to do."""
        parts = [steps[start : start + AT_ONCE] for start in range(0, len(steps), AT_ONCE)]
        with ThreadPoolExecutor(2) as aside, quick_switches():
            ready = self._ahead(aside, parts[0])
            for part, after in zip(parts, [*parts[1:], None], strict=True):
                factors = fitting(ready, lambda part=part: self._stack(part))
                if after is not None:
                    ready = self._ahead(aside, after)
                yield Begun(part, factors, aside.submit(scorer.finish, scorer.begin(factors)))

    def _ahead(self, aside: ThreadPoolExecutor, steps: list[int]) -> Callable[[], Factors]:
        """Read checkpoints in a thread, while the device works; returns what waits for their factors.

        Beside a CPU's work that thread does not compute with PyTorch: threads of its own for a second caller were seen
        to slow down the first one's by a fifth.
        """
        if self.on_gpu:
            return aside.submit(self._stack, steps).result
        hashed = aside.submit(self._hash, steps)

        def stacked() -> Factors:
            hashed.result()
            return self._stack(steps)

        return stacked

    def _held(self, factors: Factors) -> int:
        """How many groups wait for their answers to be generated together, while the next one is computed."""
        return max(1, min(HELD, HELD_BYTES // factors.bytes)) if self.on_gpu else 0

    def _graded(self, scorer: Scorer, begun: list[Begun]) -> dict[int, Graded]:
        marks = {step: one for group in begun for step, one in zip(group.steps, group.marks.result(), strict=True)}
        said = self._generated(scorer, begun, marks)
        return {
            step: grade(self.metric, self.questions, one, {
                number: self.encoder.text_of(tokens) for number, tokens in said.get(step, {}).items()
            }) for step, one in marks.items()
        }  # fmt: skip

    def _generated(self, scorer: Scorer, begun: list[Begun], marks: dict[int, list[Marks]]) -> dict[int, Answers]:
        """The answers to what was left open, for all groups at once."""
        asked = {step: [number for number, mark in enumerate(one) if mark.is_open] for step, one in marks.items()}
        asked = {step: numbers for step, numbers in asked.items() if numbers and self.metric in MOST}
        if not asked:
            return {}
        places = [[place for place, step in enumerate(group.steps) if step in asked] for group in begun]

        def joined() -> Factors:
            pairs = zip(begun, places, strict=True)
            return lora_stack.joined([group.factors.of(which) for group, which in pairs if which])

        found = scorer.generate(fitting(joined, joined), [*asked.values()], MOST[self.metric])
        return dict(zip(asked, found, strict=True))

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
        return checkpoints.load(self._file(step), entry.bytes, entry.sha256)

    def _hash(self, steps: list[int]) -> None:
        """Read the checkpoints of steps and check them, so that they come from memory afterwards."""
        for step in steps:
            if step != BASE:
                entry = self.entries[step]
                checkpoints.verified(self._file(step), entry.bytes, entry.sha256)

    def _file(self, step: int) -> Path:
        return self.folder / run_files.checkpoint_name(step)

    def _stack(self, steps: list[int]) -> Factors:
        adapters = [None if step == BASE else self._read(step) for step in steps]
        where = self.layers, self.scaling, self.base.model.device, self.base.dtype
        if adapters == [None]:  # the base by itself takes its adapter's shapes from the last checkpoint
            return lora_stack.stack([None, self._read(self.last)], *where).of([0])
        return lora_stack.stack(adapters, *where)


@contextlib.contextmanager
def quick_switches() -> Iterator[None]:
    """While the body runs, a thread that computes keeps another one waiting for SWITCH seconds at most."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def fitting(work: Callable[[], Factors], again: Callable[[], Factors]) -> Factors:
    """What `work` returns, or `again` with the device's memory tidied. Raises UserError where that does not help."""
    try:
        return work()
    except torch.OutOfMemoryError:
        pass  # outside, so that what it holds is let go
    devices.free_memory()
    try:
        return again()
    except torch.OutOfMemoryError:
        raise UserError("out of device memory for the adapters; score on another device") from None


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
            mark.likelihoods.index(max(mark.likelihoods)) == question.right
            for question, mark in zip(questions, marks, strict=True)
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
