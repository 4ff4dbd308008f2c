"""Greedy answers of several adapters to questions of their own, in batches that all adapters share equally."""

from typing import Any, cast

import torch
from transformers import GenerationConfig

from paragen.packed.model import text_config
from paragen.scoring import decoding
from paragen.scoring.factors import Factors
from paragen.scoring.questions import Question
from paragen.scoring.stacked_model import StackedModel

Answers = dict[int, list[int]]  # the generated tokens, by the number of the question


class AnswerGenerator:
    """Generates answers with adapters of a model.

    Args:
        stacked: the model.
        questions: those that may be answered.
        stops: the tokens that end an answer.
        pad: a token for padding.
        token_limit: the largest number of tokens in one batch, answers included; it may be changed between batches.
    """

    def __init__(self, stacked: StackedModel, questions: list[Question], stops: list[int], pad: int, token_limit: int):
        self.stacked, self.model, self.questions, self.stops, self.pad = stacked, stacked.model, questions, stops, pad
        self.token_limit = token_limit

    def generate(self, factors: Factors, numbers: list[list[int]], max_new_tokens: int) -> list[Answers]:
        """Generate answers.

        Args:
            numbers: for each adapter, the questions to be answered.
            max_new_tokens: the largest length of an answer.

        Returns for each adapter its answers, without the token that ended them.
        """
        found: list[Answers] = [{} for _ in numbers]
        while left := self._unanswered(found, numbers):
            # Answers that the model's last position cuts short are generated apart: beside others, each answer is as
            # long as it would be alone.
            length = min(self._answer_length(wanted[0], max_new_tokens) for wanted in left.values())
            due = {
                adapter: [one for one in wanted if self._answer_length(one, max_new_tokens) == length]
                for adapter, wanted in left.items()
            }
            due = {adapter: wanted for adapter, wanted in due.items() if wanted}
            longest = max(self._prompt_length(wanted[0]) for wanted in due.values()) + length
            due = dict([*due.items()][: max(1, self.token_limit // longest)])
            rows = max(1, self.token_limit // longest // len(due))
            # adapters with fewer rows repeat theirs, because each has an equal part of the batch
            rows = min(rows, max(len(wanted) for wanted in due.values()))
            batch = [[wanted[place % len(wanted)] for place in range(rows)] for wanted in due.values()]
            with self.stacked.using(factors.select(list(due))):
                answers = self._generate_batch([number for wanted in batch for number in wanted], length)
            for place, adapter in enumerate(due):
                part = answers[place * rows : (place + 1) * rows]
                found[adapter] |= dict(zip(batch[place], part, strict=True))
        return found

    def _unanswered(self, found: list[Answers], numbers: list[list[int]]) -> dict[int, list[int]]:
        """By adapter, the questions without an answer, those with the longest prompts first; only adapters with any."""
        left = {
            adapter: sorted(set(wanted) - found[adapter].keys(), key=self._prompt_length, reverse=True)
            for adapter, wanted in enumerate(numbers)
        }
        return {adapter: wanted for adapter, wanted in left.items() if wanted}

    def _answer_length(self, number: int, max_new_tokens: int) -> int:
        """The largest length of an answer: `max_new_tokens`, or what the model's positions leave of them."""
        positions = getattr(text_config(self.model), "max_position_embeddings", None)
        return max(1, min(max_new_tokens, positions - self._prompt_length(number))) if positions else max_new_tokens

    def _prompt_length(self, number: int) -> int:
        return len(self.questions[number].tokens)

    def _generate_batch(self, numbers: list[int], max_new_tokens: int) -> list[list[int]]:
        """The answers to some questions in one batch, by our own decoding or else by transformers'."""
        prompts = [self.questions[number].tokens for number in numbers]
        if decoding.supports(self.model):
            rows = decoding.generate_greedily(self.model, prompts, max_new_tokens, self.stops, self.pad)
            return [before_stop(row, self.stops) for row in rows]
        longest = max(map(len, prompts))
        tokens = torch.tensor([[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=self.stops, pad_token_id=self.pad,
            use_cache=True,
        )  # fmt: skip
        device = self.model.device
        generated = cast(Any, self.model).generate(  # which PreTrainedModel itself lacks
            input_ids=tokens.to(device), attention_mask=mask.to(device), generation_config=settings
        )
        return [before_stop(row, self.stops) for row in generated[:, longest:].tolist()]


def before_stop(tokens: list[int], stops: list[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in stops), len(tokens))]
