"""Scores many checkpoints of one base model at once: log-likelihoods, losses and greedy answers of questions.

Imported by evaluate.py. Every pass takes the same rows for several adapters (lora_stack.py); logits are made only where
a response's tokens are predicted. Nothing is fetched from the device before a group of adapters is through.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from paragen.common import devices
from paragen.common.cli import UserError
from paragen.packed.model import config_of
from paragen.scoring import attention, decoding, option_trees
from paragen.scoring.decoding import picking
from paragen.scoring.lora_stack import Factors, Stacked
from paragen.scoring.option_trees import START, Sheet, Tree
from paragen.scoring.questions import Question

TOKENS = {"cpu": 768, "cuda": 65536}  # of all adapters together that go through the model at once, to begin with
LOGITS = {"cpu": 2**28, "cuda": 2**30}  # numbers that the logits of one pass may have
AT_ONCE = 512  # rows of logits that are reduced at a time, in float32
LARGE = 32  # a logit that is rounded to an eighth in bfloat16
LEAST = 32  # tokens at once; where even so few do not fit, nothing does


class Marks(NamedTuple):
    """What one adapter makes of one question."""

    likelihoods: list[float]  # the log-likelihood of each option's text, in nats
    loss: float  # the negative log-likelihood of the right response with what ends it, in nats
    count: int  # its tokens
    answer: int | None  # the option that greedy generation gives; None: it ended or left the options
    is_open: bool  # whether it left them, so that it has to be generated


class Passed(NamedTuple):
    """What some adapters made of all sheets, on its way from the device."""

    count: int
    results: list[tuple[Sheet, Tensor, Tensor]]  # log-probabilities of edges, likeliest tokens at picks, by adapter
    arrived: torch.cuda.Event | None


class Scorer:
    """Scores questions with adapters of a model.

    Args:
        stacked: the model, whose adapted layers take factors.
        questions: all of them have the same metric.
        stops: the tokens that end an answer.
        pad: a token for padding.
    """

    def __init__(self, stacked: Stacked, questions: list[Question], stops: list[int], pad: int):
        self.stacked, self.model, self.questions, self.stops, self.pad = stacked, stacked.model, questions, stops, pad
        self.device = self.model.device
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.budget, self.most_logits = TOKENS[kind], LOGITS[kind]
        self.room = min(4 * self.budget, decoding.most_tokens(self.model))  # tokens that answers' rows may have
        self.trees = [option_trees.tree_of(question) for question in questions]
        self.prefix = option_trees.prefix_of(questions)
        self.beginning = torch.tensor([self.prefix], dtype=torch.int64, device=self.device)
        self.config = config_of(self.model)
        lengths = zip(questions, self.trees, strict=True)
        self.lengths = [option_trees.length_of(question, tree, len(self.prefix)) for question, tree in lengths]
        self.window = attention.window_of(self.model, len(self.prefix) + max(self.lengths))
        self.made: dict[tuple[int, int], list[Sheet]] = {}
        # the model's own may ask for sampling or penalties
        self.model.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=stops)

    def marks(self, factors: Factors) -> list[list[Marks]]:
        """What each adapter makes of each question: by adapter, by question."""
        return self.finish(self.begin(factors))

    def begin(self, factors: Factors) -> list[Passed]:
        """Have the device compute the marks; the host does not wait for a GPU."""
        return self._within_memory("budget", self._passes, factors, list(range(factors.count)))

    def finish(self, passed: list[Passed]) -> list[list[Marks]]:
        """The marks that were begun."""
        return [marks for one in passed for marks in self._read(one)]

    def generate(self, factors: Factors, numbers: list[list[int]], most: int) -> list[dict[int, list[int]]]:
        """Greedy answers.

        Args:
            numbers: of each adapter, the questions to be answered.
            most: tokens that an answer may have.

        Returns, of each adapter, the tokens by question, without what ended them.
        """

        def work(some: Factors, which: list[int]) -> list[dict[int, list[int]]]:
            return self._generate(some, [numbers[adapter] for adapter in which], most)

        return self._within_memory("room", work, factors, list(range(factors.count)))

    def _within_memory(
        self, limit: str, work: Callable[[Factors, list[int]], list], factors: Factors, which: list[int]
    ) -> list:
        """What `work` returns of adapters (`which`, of `factors`): with half as many tokens at once (`limit` names
        what says how many) as often as it needs more memory than there is, in the end with half of the adapters."""
        while True:
            try:
                with torch.inference_mode():
                    return work(factors.of(which), which)
            except torch.OutOfMemoryError:
                half, is_least = len(which) // 2, getattr(self, limit) // 2 < LEAST
                if is_least and half == 0:
                    raise UserError("out of device memory, even with single rows; score on another device") from None
            self.made.clear()
            devices.free_memory()
            if is_least:
                parts = [self._within_memory(limit, work, factors, part) for part in (which[:half], which[half:])]
                return parts[0] + parts[1]
            setattr(self, limit, getattr(self, limit) // 2)

    def _passes(self, factors: Factors, _: list[int]) -> list[Passed]:
        results, arrived = [], None
        with self.stacked.using(factors):
            before = self._prefix_cache(factors.count)
            for sheet in self._sheets(factors.count):
                both = self._pass(sheet, factors.count, before)
                results.append((sheet, *(one.to("cpu", non_blocking=True) for one in both)))
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return [Passed(factors.count, results, arrived)]

    def _read(self, passed: Passed) -> list[list[Marks]]:
        if passed.arrived is not None:
            passed.arrived.synchronize()
        found: list[list[Marks | None]] = [[None] * len(self.questions) for _ in range(passed.count)]
        for sheet, scores, best in passed.results:
            scores, best = scores.tolist(), best.tolist()
            for adapter in range(passed.count):
                for row, number in enumerate(sheet.numbers):
                    first = sheet.edge_of[row]
                    picks = {node: best[adapter][pick] for node, pick in sheet.pick_of[row].items()}
                    edges = scores[adapter][first : first + len(self.trees[number].edges)]
                    found[adapter][number] = self._marks_of(number, edges, picks)
        return found

    def _marks_of(self, number: int, edges: list[float], best: dict[int, int]) -> Marks:
        tree, question = self.trees[number], self.questions[number]
        likelihoods = [
            sum(edges[edge] for edge in path[:length]) for path, length in zip(tree.paths, tree.lengths, strict=True)
        ]
        right = tree.paths[question.right]
        answer, is_open = self._followed(question, tree, best)
        return Marks(likelihoods, -sum(edges[edge] for edge in right), len(right), answer, is_open)

    def _followed(self, question: Question, tree: Tree, best: dict[int, int]) -> tuple[int | None, bool]:
        """Where greedy generation leads: (the option whose text it completes, whether it leaves the tree before)."""
        if len(question.paths) == 1:
            return None, True
        ends = {tuple(path.tokens[: path.length]): number for number, path in enumerate(question.paths)}
        nodes = {step: node for node, step in enumerate(zip(tree.parents, tree.tokens, strict=True))}
        at, said = START, ()
        while True:
            token = best[at]
            said = (*said, token)
            if said in ends:
                return ends[said], False
            if token in self.stops:
                return None, False
            if (at, token) not in nodes or nodes[at, token] not in best:
                return None, True
            at = nodes[at, token]

    def _sheets(self, count: int) -> list[Sheet]:
        """The batches of all questions for so many adapters at once, on the device."""
        key = (self.budget, count)
        if key not in self.made:
            heights = [len({node for node, _ in tree.edges}) for tree in self.trees]
            tallest = self.most_logits // self.config.vocab_size // count
            batches = option_trees.deal(self.lengths, self.budget // count, heights, tallest)
            made = [option_trees.sheet_of(batch, self.questions, self.trees, len(self.prefix)) for batch in batches]
            self.made[key] = [
                Sheet(*(part.to(self.device) if isinstance(part, Tensor) else part for part in sheet)) for sheet in made
            ]
        return self.made[key]

    def _prefix_cache(self, count: int) -> DynamicCache | None:
        """Keys and values of what all prompts begin with, for each adapter."""
        if not self.prefix:
            return None
        before = DynamicCache()
        with picking(self.model, torch.zeros(1, dtype=torch.int64, device=self.device)):
            self.model(input_ids=self.beginning.expand(count, -1), past_key_values=before, use_cache=True)
        return before

    def _pass(self, sheet: Sheet, count: int, before: DynamicCache | None) -> tuple[Tensor, Tensor]:
        """A forward pass: the log-probability of each edge [adapters, edges], the likeliest token at each pick."""
        rows, length = sheet.tokens.shape
        past = None if before is None else attention.behind(self.model, before, rows)
        starts = torch.arange(count, device=self.device)[:, None] * (rows * length)
        seen = None if sheet.until is None else self._seen(sheet, count)
        with picking(self.model, (starts + sheet.picks).view(-1)):
            logits = self.model(
                input_ids=sheet.tokens.repeat(count, 1), position_ids=sheet.positions.repeat(count, 1),
                attention_mask=seen, past_key_values=past, use_cache=past is not None,
            ).logits[0]  # fmt: skip
        totals, best = reduced(logits)
        at = torch.arange(count, device=self.device)[:, None] * len(sheet.picks) + sheet.edges[:, 0]
        scores = logits[at, sheet.edges[:, 1]].float() - totals[at]
        return scores, best.view(count, -1)

    def _seen(self, sheet: Sheet, count: int) -> Tensor | dict[str, Tensor]:
        """What the tokens of a sheet see, as the model takes it."""
        seen = option_trees.seen_in(sheet, len(self.prefix))
        near = None if self.window is None else seen & option_trees.near_in(sheet, len(self.prefix), self.window)
        return attention.mask_for(self.model, seen, near, count)

    def _generate(self, factors: Factors, numbers: list[list[int]], most: int) -> list[dict[int, list[int]]]:
        found: list[dict[int, list[int]]] = [{} for _ in numbers]
        while left := self._left(found, numbers):
            # rows that end where the model does are answered apart: beside others an answer is as long as by itself
            room = min(self._room(wanted[0], most) for wanted in left.values())
            due = {
                adapter: [one for one in wanted if self._room(one, most) == room] for adapter, wanted in left.items()
            }
            due = {adapter: wanted for adapter, wanted in due.items() if wanted}
            longest = max(self._length(wanted[0]) for wanted in due.values()) + room
            due = dict([*due.items()][: max(1, self.room // longest)])
            rows = max(1, self.room // longest // len(due))
            # adapters with fewer rows are filled up with what they have: each takes an equal part of the batch
            rows = min(rows, max(len(wanted) for wanted in due.values()))
            batch = [[wanted[place % len(wanted)] for place in range(rows)] for wanted in due.values()]
            with self.stacked.using(factors.of(list(due))):
                answers = self._answers([number for wanted in batch for number in wanted], room)
            for place, adapter in enumerate(due):
                part = answers[place * rows : (place + 1) * rows]
                found[adapter] |= dict(zip(batch[place], part, strict=True))
        return found

    def _left(self, found: list[dict[int, list[int]]], numbers: list[list[int]]) -> dict[int, list[int]]:
        """By adapter the questions without an answer yet, the longest first; adapters that have all are left out."""
        left = {
            adapter: sorted(set(wanted) - found[adapter].keys(), key=self._length, reverse=True)
            for adapter, wanted in enumerate(numbers)
        }
        return {adapter: wanted for adapter, wanted in left.items() if wanted}

    def _room(self, number: int, most: int) -> int:
        """How many tokens an answer may have: `most`, or what the model's positions leave of them."""
        positions = getattr(self.config, "max_position_embeddings", None)
        return max(1, min(most, positions - self._length(number))) if positions else most

    def _length(self, number: int) -> int:
        return len(self.questions[number].tokens)

    def _answers(self, numbers: list[int], most: int) -> list[list[int]]:
        prompts = [self.questions[number].tokens for number in numbers]
        if decoding.suits(self.model):
            said = decoding.greedy(self.model, prompts, most, self.stops, self.pad)
            return [until(row, self.stops) for row in said]
        longest = max(map(len, prompts))
        tokens = torch.tensor([[self.pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        there = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings = GenerationConfig(
            max_new_tokens=most, do_sample=False, eos_token_id=self.stops, pad_token_id=self.pad, use_cache=True
        )
        whole = self.model.generate(
            input_ids=tokens.to(self.device), attention_mask=there.to(self.device), generation_config=settings
        )
        return [until(row, self.stops) for row in whole[:, longest:].tolist()]


def until(tokens: list[int], stops: list[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in stops), len(tokens))]


def reduced(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows of logits the logarithm of the sum of their exponentials, in float32, and the place of the largest."""
    if logits.device.type == "cuda":
        from paragen.scoring import kernels

        return kernels.reduced(logits)
    totals, best = [], []
    for part in logits.split(AT_ONCE):
        totals.append(part.float().logsumexp(-1))
        best.append(part.argmax(-1))
    return torch.cat(totals), torch.cat(best)


def reference(model: nn.Module, question: Question) -> float:
    """The negative log-likelihood of a question's right response in nats, by the model's own plain forward pass."""
    response = question.paths[question.right].tokens
    logits = logits_of(model, question.tokens, response)
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(response, device=logits.device)[:, None])
    return -float(chosen.double().sum())


def missed(model: nn.Module, prompt: list[int], said: list[int]) -> float:
    """How far, in nats, greedy tokens behind a prompt are at most from the likeliest of a plain forward pass.

    Logits of a size above LARGE count as if they were scaled to it: so is what they are rounded to.
    """
    logits = logits_of(model, prompt, said)
    likeliest = logits.amax(-1)
    off = likeliest - logits.gather(1, torch.tensor(said, device=logits.device)[:, None])[:, 0]
    return float((off / (likeliest.abs() / LARGE).clamp(min=1)).amax())


def logits_of(model: nn.Module, prompt: list[int], said: list[int]) -> Tensor:
    """By a plain forward pass, what predicts each token that is said behind a prompt, [tokens, words] float32."""
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([prompt + said], device=model.device)).logits
        return found[0, len(prompt) - 1 : -1].float()
