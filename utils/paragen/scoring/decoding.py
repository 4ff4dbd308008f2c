"""Greedy answers of many rows with a cache of fixed size, whose step an NVIDIA GPU replays as a CUDA graph.

Imported by scoring.py. transformers' `generate` launches each kernel of each token from Python, which takes far longer
than a small model's arithmetic.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer

from paragen.common import devices
from paragen.packed.model import config_of, positions_vary
from paragen.scoring import attention

NOTHING = -1  # in place of a token that was not said: padding may end an answer
FAR = 2**30  # a position that no token reaches
LOOK = 4  # tokens after which is looked whether all answers have ended


def greedy(model: nn.Module, prompts: list[list[int]], most: int, stops: list[int], pad: int) -> list[list[int]]:
    """Of each prompt the tokens that the model says; behind one of `stops` there may be any.

    Args:
        model: one that `suits`.
        most: tokens that an answer may have.
        pad: a token for padding.
    """
    rows, ends = Rows(model, prompts, most, pad), torch.tensor(stops, device=model.device)
    rows.begin()
    step = rows.step
    for turn in range(1, most):
        if turn % LOOK == 0 and torch.isin(rows.said, ends).any(1).all():
            break
        if turn == 2 and model.device.type == "cuda":  # what the first step sets up is not for the graph
            step = captured(rows.step)
        step()
    return rows.said.tolist()


def suits(model: nn.Module) -> bool:
    """Whether `greedy` can do a model: its masks are ours, and nothing in its step has to be looked at by the host."""
    return attention.is_shared(model) and not positions_vary(model)


def most_tokens(model: nn.Module) -> int:
    """How many tokens a cache may hold: half of the device's free memory."""
    config = config_of(model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * attention.key_heads(config) * width  # of keys and values per token
    return devices.free_bytes(model.device) // 2 // (numbers * model.dtype.itemsize)


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """The same work as one CUDA graph; it is not done yet. Other threads may use the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class Rows:
    """Prompts and what is said behind them, a token at a time. Prompts are padded behind, all answers begin there."""

    def __init__(self, model: nn.Module, prompts: list[list[int]], most: int, pad: int):
        self.model, device = model, model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
        self.longest = max(map(len, prompts))
        self.window = attention.window_of(model, self.longest + most)
        self.tokens = torch.tensor([row + [pad] * (self.longest - len(row)) for row in prompts], device=device)
        self.slots = torch.arange(-(-(self.longest + most) // 8) * 8, device=device)[None]  # of the cache
        layers = config_of(model).num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(self.slots.numel()) for _ in range(layers)])
        is_answer, is_prompt = self.slots >= self.longest, self.slots < lengths
        answers = (lengths + self.slots - self.longest).masked_fill(~is_answer, FAR)
        self.positions = torch.where(is_prompt, self.slots, answers)  # of what lies in the slots, [rows, slots]
        self.newest, self.at = self.tokens.gather(1, lengths - 1), lengths - 1  # token, and its position
        self.said = torch.full((len(prompts), most), NOTHING, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Read the prompts and say the first token."""
        places = self.slots[:, : self.longest]
        ends = torch.arange(len(self.tokens), device=self.at.device) * self.longest + self.at[:, 0]
        with picking(self.model, ends):
            logits = self._logits(self.tokens, places.expand_as(self.tokens), self._mask(places, self.slots))[0]
        self._say(logits.argmax(-1, keepdim=True))

    def step(self) -> None:
        """Say one more token; all that changes stays where it is in memory."""
        logits = self._logits(self.newest, self.at, self._mask(self.at, self.positions))[:, -1]
        self.turn.add_(1)
        self._say(logits.argmax(-1, keepdim=True))

    def _say(self, tokens: Tensor) -> None:
        self.newest.copy_(tokens)
        self.said.index_copy_(1, self.turn, tokens)
        self.at.add_(1)

    def _logits(self, tokens: Tensor, at: Tensor, mask: Tensor | dict[str, Tensor]) -> Tensor:
        return self.model(
            input_ids=tokens, position_ids=at, attention_mask=mask, past_key_values=self.cache, use_cache=True
        ).logits

    def _mask(self, at: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """What tokens at positions [rows, length] see of slots with positions [rows, slots]."""
        back = at[:, None, :, None] - positions[:, None, None, :]
        seen = back >= 0
        return attention.mask_for(self.model, seen, None if self.window is None else seen & (back < self.window))


@contextmanager
def picking(model: nn.Module, places: Tensor) -> Iterator[None]:
    """While the body runs, the model makes logits at these places of its flattened batch alone, [1, places, words].

    Whatever it does behind its output layer (scaling, capping) is done to them.
    """

    def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, places)[None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()
