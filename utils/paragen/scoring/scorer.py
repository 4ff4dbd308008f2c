"""Scores questions with several adapters of a model at once, in batches that fit into the device's memory."""

from collections.abc import Callable

import torch
from transformers import GenerationConfig

from paragen.common import devices
from paragen.common.cli import UserError
from paragen.scoring import decoding
from paragen.scoring.factors import Factors
from paragen.scoring.generation import AnswerGenerator, Answers
from paragen.scoring.likelihoods import LikelihoodPasses, PendingScores, QuestionResult
from paragen.scoring.questions import Question
from paragen.scoring.stacked_model import StackedModel

MIN_TOKENS = 32  # at once; where so few do not fit, fewer adapters are tried


class Scorer:
    """Likelihoods, losses and greedy answers of questions.

    Args:
        stacked: the model; its generation settings are replaced by greedy ones.
        questions: all of them have the same metric.
        stops: the tokens that end an answer.
        pad: a token for padding.
    """

    def __init__(self, stacked: StackedModel, questions: list[Question], stops: list[int], pad: int):
        self.stacked, self.model, self.questions, self.stops, self.pad = stacked, stacked.model, questions, stops, pad
        self.passes = LikelihoodPasses(stacked, questions, stops)
        limit = min(4 * self.passes.token_limit, decoding.max_cache_tokens(self.model))
        self.generator = AnswerGenerator(stacked, questions, stops, pad, limit)
        # the model's own settings may ask for sampling or penalties
        self.model.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=stops)

    def score(self, factors: Factors) -> list[list[QuestionResult]]:
        """What each adapter makes of each question: by adapter, by question."""
        return self.finish(self.begin(factors))

    def begin(self, factors: Factors) -> list[PendingScores]:
        """Queue the forward passes for some adapters; the host does not wait for a GPU."""
        return self._within_memory(self.passes, lambda some, _: [self.passes.run(some)], factors)

    def finish(self, pending: list[PendingScores]) -> list[list[QuestionResult]]:
        """Wait for the results of `begin`."""
        return [results for part in pending for results in self.passes.read(part)]

    def generate(self, factors: Factors, numbers: list[list[int]], max_new_tokens: int) -> list[Answers]:
        """Generate greedy answers; arguments and result as for AnswerGenerator.generate."""

        def work(some: Factors, which: list[int]) -> list[Answers]:
            return self.generator.generate(some, [numbers[adapter] for adapter in which], max_new_tokens)

        return self._within_memory(self.generator, work, factors)

    def _within_memory(
        self,
        part: LikelihoodPasses | AnswerGenerator,
        work: Callable[[Factors, list[int]], list],
        factors: Factors,
        which: list[int] | None = None,
    ) -> list:
        """Call `work` with as many tokens and adapters at once as the device has memory for.

        Each time that it runs out of memory, the part's token limit is halved, and at MIN_TOKENS the adapters are.

        Args:
            part: does the work; its `token_limit` is lowered for good.
            work: takes some adapters' factors and their numbers; returns a list that can be joined to others.
            factors: those of all adapters.
            which: the adapters to do (default: all).

        Raises UserError where there is not enough memory for a single row of one adapter.
        """
        which = list(range(factors.count)) if which is None else which
        while True:
            try:
                with torch.inference_mode():
                    return work(factors.select(which), which)
            except torch.OutOfMemoryError:
                half, is_least = len(which) // 2, part.token_limit // 2 < MIN_TOKENS
                if is_least and half == 0:
                    raise UserError("out of device memory, even with single rows; score on another device") from None
            self.passes.batches.clear()
            devices.free_memory()
            if is_least:
                halves = [self._within_memory(part, work, factors, some) for some in (which[:half], which[half:])]
                return halves[0] + halves[1]
            part.token_limit //= 2
