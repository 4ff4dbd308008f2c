"""Scores a base model and adapters of it on a split, in groups that go through the model together."""

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paragen.collection.evaluation import BASE, MOST
from paragen.collection.index import Chosen
from paragen.common import devices
from paragen.common.cli import UserError
from paragen.scoring import attention, factors, peft_comparison
from paragen.scoring.base_model import BaseModel, naming
from paragen.scoring.checkpoint_scores import CheckpointScore, score_checkpoint
from paragen.scoring.factor_reader import CheckpointReader, FactorReader, MemoryReader
from paragen.scoring.factors import Factors
from paragen.scoring.generation import Answers
from paragen.scoring.likelihoods import QuestionResult
from paragen.scoring.questions import Encoder, Question, Split
from paragen.scoring.scorer import Scorer
from paragen.scoring.stacked_model import StackedModel

GROUP_SIZE = 8  # adapters that go through the model together; the base counts as one
MAX_WAITING = 4  # groups on a GPU whose answers are generated together; scores are written as often
MAX_WAITING_BYTES = 2**30  # of their factors
SWITCH_INTERVAL = 1e-4  # seconds; with Python's 5e-3, a GPU waits for the thread that launches its kernels


class PendingGroup(NamedTuple):
    """A group of steps whose forward passes have been queued."""

    steps: list[int]
    factors: Factors
    results: Future[list[list[QuestionResult]]]


class AdapterScorer:
    """Scores the adapters that a reader reads.

    Args:
        reader: the adapters; its numbers are the steps below.
        base: their base model.
        split: the rows to score on.
        metric: what they are scored by, a key of evaluation.METRICS.
    """

    def __init__(self, reader: FactorReader, base: BaseModel, split: Split, metric: str):
        self.reader, self.base, self.metric = reader, base, metric
        with naming(base.folder):
            self.encoder = Encoder(base.tokenizer_module, base.data_args, base.max_tokens)
        self.questions = self.encoder.questions(split, metric)

    def scores(self, steps: list[int]) -> Iterator[dict[int, CheckpointScore]]:
        """The scores of steps (evaluation.BASE: the base model), some at a time.

        On a GPU the next group is computed meanwhile. Raises UserError where what is computed here is not what PEFT
        computes for this model.
        """
        if not gc.get_freeze_count():
            gc.freeze()  # imported modules stay, and looking through them again and again would hold up all threads
        few = peft_comparison.questions_to_compare(self.questions)
        try:
            stacked = self._compared(few, self._expected(few, self.base))
        except peft_comparison.WrongScores as wrong:
            stacked = self._compared_again(wrong)
        try:
            yield from self._score_all(self.scorer_of(stacked, self.questions), steps)
        finally:
            stacked.close()

    def _compared_again(self, wrong: peft_comparison.WrongScores) -> StackedModel:
        """As `_compared`, where one of two questions was off: a large adapter, as a generator can write it, amplifies
        what half precision rounds in a short response, so that many questions tell more.

        The model has got kernels for scoring by now, so that PEFT's losses are those of a model that is loaded again.
        """
        if self.base.dtype is torch.float32:
            raise wrong
        many = peft_comparison.questions_to_compare(self.questions, peft_comparison.MANY)
        try:
            expected = self._expected(many, self.base.another())
        except torch.OutOfMemoryError:
            raise wrong from None
        devices.free_memory()
        return self._compared(many, expected)

    def _expected(self, questions: list[Question], base: BaseModel) -> list[list[float]]:
        """PEFT's losses of questions. Raises UserError where PEFT does not load the compared adapter."""
        adapter = self.reader.read(self.reader.compared)
        return peft_comparison.peft_losses(base.model, self.reader.config, adapter, questions, self.reader.name)

    def _compared(self, questions: list[Question], expected: list[list[float]]) -> StackedModel:
        """The model with stacked adapters. Raises WrongScores where it does not give questions the expected losses."""
        self.base.use_fused_kernels()
        stacked = StackedModel(self.base.model, self.reader.layers)
        try:
            self._check(self.scorer_of(stacked, questions), expected)
        except BaseException:
            stacked.close()
            raise
        return stacked

    def scorer_of(self, stacked: StackedModel, questions: list[Question]) -> Scorer:
        """A scorer of some questions for the model with stacked adapters."""
        tokenizer = self.encoder.tokenizer
        return Scorer(stacked, questions, self.encoder.stops, tokenizer.pad_token_id or tokenizer.eos_token_id or 0)

    def _check(self, scorer: Scorer, expected: list[list[float]]) -> None:
        """Raise UserError unless the compared questions get PEFT's losses, and answers follow from the forward pass.

        A model for which our attention gives other losses continues with its own attention.
        """
        both = self.reader.stack([BASE, self.reader.compared])
        try:
            peft_comparison.check_losses(scorer.score(both), expected, self.base.dtype)
        except (UserError, RuntimeError, ValueError):
            if not attention.has_shared_attention(self.base.model):
                raise
            attention.disable_shared_attention(self.base.model)
            peft_comparison.check_losses(scorer.score(both), expected, self.base.dtype)
        if self.metric in MOST:
            peft_comparison.check_answers(scorer, both.select([1]), self.base.dtype)

    def _score_all(self, scorer: Scorer, steps: list[int]) -> Iterator[dict[int, CheckpointScore]]:
        """The scores of steps; also those that were pending when an error is raised."""
        pending: list[PendingGroup] = []
        try:
            with contextlib.closing(self._begin_groups(scorer, steps)) as groups:
                for group in groups:
                    pending.append(group)
                    if len(pending) > self._max_waiting(group.factors):
                        ready = pending[:-1] or pending  # on a GPU the newest is being computed
                        pending = pending[len(ready) :]
                        yield self._finish_groups(scorer, ready)
        except UserError:
            if pending:
                yield self._finish_groups(scorer, pending)
            raise
        if pending:
            yield self._finish_groups(scorer, pending)

    def _begin_groups(self, scorer: Scorer, steps: list[int]) -> Generator[PendingGroup, None, None]:
        """Groups of steps, each as soon as its forward passes have been queued; the next one is read meanwhile."""
        parts = [steps[start : start + GROUP_SIZE] for start in range(0, len(steps), GROUP_SIZE)]
        with ThreadPoolExecutor(2) as executor, short_switch_interval():
            ready = self.reader.stack_ahead(executor, parts[0])
            for part, following in zip(parts, [*parts[1:], None], strict=True):
                stacked = retry_with_free_memory(ready, functools.partial(self.reader.stack, part))
                if following is not None:
                    ready = self.reader.stack_ahead(executor, following)
                yield PendingGroup(part, stacked, executor.submit(scorer.finish, scorer.begin(stacked)))

    def _max_waiting(self, stacked: Factors) -> int:
        """How many groups wait to have their answers generated together, while the next one is computed."""
        return max(1, min(MAX_WAITING, MAX_WAITING_BYTES // stacked.nbytes)) if self.reader.on_gpu else 0

    def _finish_groups(self, scorer: Scorer, groups: list[PendingGroup]) -> dict[int, CheckpointScore]:
        """The scores of pending groups, by step."""
        results = {step: one for group in groups for step, one in zip(group.steps, group.results.result(), strict=True)}
        generated = self._generate(scorer, groups, results)
        scores = {}
        for step, one in results.items():
            texts = {number: self.encoder.decode(tokens) for number, tokens in generated.get(step, {}).items()}
            scores[step] = score_checkpoint(self.metric, self.questions, one, texts)
        return scores

    def _generate(
        self, scorer: Scorer, groups: list[PendingGroup], results: dict[int, list[QuestionResult]]
    ) -> dict[int, Answers]:
        """The answers that have to be generated, by step, for all groups at once."""
        if self.metric not in MOST:
            return {}
        open_questions = {
            step: [number for number, result in enumerate(one) if result.needs_generation]
            for step, one in results.items()
        }
        open_questions = {step: numbers for step, numbers in open_questions.items() if numbers}
        if not open_questions:
            return {}
        places = [[place for place, step in enumerate(group.steps) if step in open_questions] for group in groups]

        def selected() -> Factors:
            pairs = zip(groups, places, strict=True)
            return factors.concatenate([group.factors.select(which) for group, which in pairs if which])

        stacked = retry_with_free_memory(selected, selected)
        found = scorer.generate(stacked, [*open_questions.values()], MOST[self.metric])
        return dict(zip(open_questions, found, strict=True))


class CollectionScorer(AdapterScorer):
    """Scores the checkpoints of one collection, by step.

    Args:
        chosen: the collection.
        base, split, metric: as AdapterScorer takes them.
    """

    def __init__(self, chosen: Chosen, base: BaseModel, split: Split, metric: str):
        super().__init__(CheckpointReader(chosen.folder, chosen.manifest, base), base, split, metric)


def score_adapters(
    adapters: Sequence[dict[str, Tensor] | None],
    config: dict[str, Any],
    base: BaseModel,
    split: Split,
    metric: str,
    name: str = "adapters",
) -> list[CheckpointScore]:
    """Score adapters in memory as checkpoints are scored.

    Args:
        adapters: the tensors of each by PEFT's keys, of equal keys and shapes; None for the base model. At least one is
            not None.
        config: the content of their adapter_config.json, checked (collection/adapter_config.py).
        base, split, metric: as AdapterScorer takes them.
        name: what messages call the adapters.

    Returns a score for each, in order. Raises UserError for a kind of LoRA that cannot be scored here, for adapters
    that PEFT does not load onto the base model, and where what is computed here is not what PEFT computes.
    """
    numbered = {number: one for number, one in enumerate(adapters, BASE + 1) if one is not None}
    scorer = AdapterScorer(MemoryReader(numbered, config, base, name), base, split, metric)
    wanted = [*([BASE] if None in adapters else []), *numbered]
    scores = {number: one for some in scorer.scores(wanted) for number, one in some.items()}
    return [scores[BASE if one is None else number] for number, one in enumerate(adapters, BASE + 1)]


@contextlib.contextmanager
def short_switch_interval() -> Iterator[None]:
    """While the body runs, a computing thread gives way to another one after SWITCH_INTERVAL."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def retry_with_free_memory(work: Callable[[], Factors], again: Callable[[], Factors]) -> Factors:
    """What `work` returns or, where the device is out of memory, what `again` returns after freeing unused memory.

    Raises UserError where that is not enough.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        pass  # memory is freed outside of this block, because the error refers to tensors
    devices.free_memory()
    try:
        return again()
    except torch.OutOfMemoryError:
        raise UserError("out of device memory for the adapters; score on another device") from None
