"""What several adapters make of questions in forward passes over their options: likelihoods, losses, greedy choices.

Every pass computes the same rows for all adapters. Logits are computed only where a response's tokens are predicted.
Results stay on the device until all batches of a group of adapters have been queued.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from paragen.packed.model import text_config
from paragen.scoring import attention, option_trees
from paragen.scoring.decoding import logits_only_at
from paragen.scoring.factors import Factors
from paragen.scoring.option_trees import START, OptionTree, PackedBatch
from paragen.scoring.questions import Question
from paragen.scoring.stacked_model import StackedModel

MAX_TOKENS = {"cpu": 768, "cuda": 65536}  # of all adapters together in one pass, to begin with
MAX_LOGITS = {"cpu": 2**28, "cuda": 2**30}  # elements of the logits of one pass
LOGIT_ROWS = 512  # rows of logits that are reduced at a time, in float32


class QuestionResult(NamedTuple):
    """What one adapter makes of one question."""

    likelihoods: list[float]  # the log-likelihood of each option's text, in nats
    loss: float  # the negative log-likelihood of the right response with what ends it, in nats
    token_count: int  # the tokens that the loss is summed over
    answer: int | None  # the option that greedy generation gives; None where it ends before one or leaves the options
    needs_generation: bool  # whether greedy generation leaves the options, so that its answer is not known yet


class PendingScores(NamedTuple):
    """The results of some adapters on their way from the device."""

    adapter_count: int
    # per batch: log-probabilities of the edges [adapters, edges], most likely tokens at the logit places [adapters, ..]
    results: list[tuple[PackedBatch, Tensor, Tensor]]
    arrived: torch.cuda.Event | None  # after which they can be read; None: they already can


class LikelihoodPasses:
    """Forward passes over all options of some questions.

    Args:
        stacked: the model.
        questions: all of them have the same metric.
        stops: the tokens that end an answer.

    `token_limit` is the largest number of tokens in one pass, of all adapters together; it may be changed between
    passes.
    """

    def __init__(self, stacked: StackedModel, questions: list[Question], stops: list[int]):
        self.stacked, self.model, self.questions, self.stops = stacked, stacked.model, questions, stops
        self.device, self.config = self.model.device, text_config(self.model)
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.token_limit, self.max_logits = MAX_TOKENS[kind], MAX_LOGITS[kind]
        self.trees = [option_trees.build_tree(question) for question in questions]
        self.prefix = option_trees.shared_prefix(questions)
        self.prefix_tokens = torch.tensor([self.prefix], dtype=torch.int64, device=self.device)
        pairs = zip(questions, self.trees, strict=True)
        self.lengths = [option_trees.row_length(question, tree, len(self.prefix)) for question, tree in pairs]
        self.window = attention.window_for(self.model, len(self.prefix) + max(self.lengths))
        self.batches: dict[tuple[int, int], list[PackedBatch]] = {}  # on the device, by token limit and adapter count

    def run(self, factors: Factors) -> PendingScores:
        """Queue the passes for some adapters; the host does not wait for a GPU."""
        results: list[tuple[PackedBatch, Tensor, Tensor]] = []
        arrived = None
        with self.stacked.using(factors):
            prefix_cache = self._prefix_cache(factors.count)
            for batch in self._batches(factors.count):
                edges, best = self._pass(batch, factors.count, prefix_cache)
                results.append((batch, edges.to("cpu", non_blocking=True), best.to("cpu", non_blocking=True)))
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return PendingScores(factors.count, results, arrived)

    def read(self, pending: PendingScores) -> list[list[QuestionResult]]:
        """Wait for results that are pending; returns them by adapter, by question."""
        if pending.arrived is not None:
            pending.arrived.synchronize()
        found: list[dict[int, QuestionResult]] = [{} for _ in range(pending.adapter_count)]  # by question
        for batch, *both in pending.results:
            log_probabilities, best_tokens = (one.tolist() for one in both)
            for adapter in range(pending.adapter_count):
                for row, number in enumerate(batch.numbers):
                    first = batch.first_edge[row]
                    best = {node: best_tokens[adapter][at] for node, at in batch.logits_of[row].items()}
                    edges = log_probabilities[adapter][first : first + len(self.trees[number].edges)]
                    found[adapter][number] = self._result(number, edges, best)
        return [[results[number] for number in range(len(self.questions))] for results in found]

    def _result(self, number: int, edges: list[float], best: dict[int, int]) -> QuestionResult:
        """The result of a question from the log-probability of each edge and the most likely token after each node."""
        tree, question = self.trees[number], self.questions[number]
        likelihoods = [
            sum(edges[edge] for edge in path[:length]) for path, length in zip(tree.paths, tree.lengths, strict=True)
        ]
        right = tree.paths[question.right]
        answer, needs_generation = self._follow(question, tree, best)
        return QuestionResult(likelihoods, -sum(edges[edge] for edge in right), len(right), answer, needs_generation)

    def _follow(self, question: Question, tree: OptionTree, best: dict[int, int]) -> tuple[int | None, bool]:
        """Follow greedy generation through the tree.

        Returns (the option whose text it completes, whether it leaves the tree before it ends or completes one).
        """
        if len(question.continuations) == 1:
            return None, True
        texts = {tuple(one.tokens[: one.text_length]): number for number, one in enumerate(question.continuations)}
        nodes = {step: node for node, step in enumerate(zip(tree.parents, tree.tokens, strict=True))}
        at = START
        generated: tuple[int, ...] = ()
        while True:
            token = best[at]
            generated = (*generated, token)
            if generated in texts:
                return texts[generated], False
            if token in self.stops:
                return None, False
            if (at, token) not in nodes or nodes[at, token] not in best:
                return None, True
            at = nodes[at, token]

    def _batches(self, count: int) -> list[PackedBatch]:
        """The batches of all questions for `count` adapters, on the device."""
        key = (self.token_limit, count)
        if key not in self.batches:
            logit_counts = [len({node for node, _ in tree.edges}) for tree in self.trees]
            max_logits = self.max_logits // self.config.vocab_size // count
            parts = option_trees.make_batches(self.lengths, self.token_limit // count, logit_counts, max_logits)
            packed = [option_trees.pack_questions(part, self.questions, self.trees, len(self.prefix)) for part in parts]
            self.batches[key] = [batch.to(self.device) for batch in packed]
        return self.batches[key]

    def _prefix_cache(self, count: int) -> DynamicCache | None:
        """The keys and values of the shared prefix for each adapter; None where there is no prefix."""
        if not self.prefix:
            return None
        cache = DynamicCache()
        with logits_only_at(self.model, torch.zeros(1, dtype=torch.int64, device=self.device)):
            self.model(input_ids=self.prefix_tokens.expand(count, -1), past_key_values=cache, use_cache=True)
        return cache

    def _pass(self, batch: PackedBatch, count: int, prefix_cache: DynamicCache | None) -> tuple[Tensor, Tensor]:
        """A forward pass with `count` adapters.

        Returns the log-probability of each edge, [adapters, edges] float32, and the most likely token at each place
        with logits, [adapters, logits] int64.
        """
        rows, length = batch.tokens.shape
        cache = None if prefix_cache is None else attention.cache_after_prefix(self.model, prefix_cache, rows)
        starts = torch.arange(count, device=self.device)[:, None] * (rows * length)
        mask = None if batch.visible_until is None else self._mask(batch, count)
        with logits_only_at(self.model, (starts + batch.logit_places).view(-1)):
            logits = self.model(
                input_ids=batch.tokens.repeat(count, 1), position_ids=batch.positions.repeat(count, 1),
                attention_mask=mask, past_key_values=cache, use_cache=cache is not None,
            ).logits[0]  # fmt: skip
        totals, best = reduce_logits(logits)
        at = torch.arange(count, device=self.device)[:, None] * len(batch.logit_places) + batch.edges[:, 0]
        log_probabilities = logits[at, batch.edges[:, 1]].float() - totals[at]
        return log_probabilities, best.view(count, -1)

    def _mask(self, batch: PackedBatch, count: int) -> Tensor | dict[str, Tensor]:
        """The masks of a batch, as the model takes them."""
        mask, prefix = option_trees.tree_mask(batch, len(self.prefix)), len(self.prefix)
        near = None if self.window is None else mask & option_trees.window_mask(batch, prefix, self.window)
        return attention.mask_for(self.model, mask, near, count)


def reduce_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of each row's exponentials, [rows] float32, and the index of its maximum, [rows] int64.

    Args:
        logits: [rows, vocabulary].
    """
    if logits.device.type == "cuda":
        from paragen.scoring import kernels

        return kernels.reduce_logits(logits)
    totals, best = [], []
    for part in logits.split(LOGIT_ROWS):
        totals.append(part.float().logsumexp(-1))
        best.append(part.argmax(-1))
    return torch.cat(totals), torch.cat(best)
