"""Greedy generation for many rows with a cache of fixed size, whose step an NVIDIA GPU replays as a CUDA graph.

transformers' `generate` launches each kernel of each token from Python, which takes far longer than a small model's
arithmetic.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from paragen.common import devices
from paragen.packed.model import positions_depend_on_batch, text_config
from paragen.scoring import attention

NO_TOKEN = -1  # where no token has been generated; padding's id may be one that ends an answer
UNREACHED = 2**30  # a position behind all tokens
CHECK_EVERY = 4  # tokens between two checks whether all answers have ended


def generate_greedily(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, stops: list[int], pad: int
) -> list[list[int]]:
    """Generate an answer to each prompt.

    Args:
        model: one that `supports`.
        prompts: tokens; they are computed together as one batch.
        max_new_tokens: the largest length of an answer.
        stops: the tokens that end an answer.
        pad: a token for padding.

    Returns the tokens of each answer; those after the first stop are arbitrary.
    """
    rows, ends = GeneratedRows(model, prompts, max_new_tokens, pad), torch.tensor(stops, device=model.device)
    rows.begin()
    step = rows.step
    for turn in range(1, max_new_tokens):
        if turn % CHECK_EVERY == 0 and torch.isin(rows.generated, ends).any(1).all():
            break
        if turn == 2 and model.device.type == "cuda":  # the first step initialises libraries, which cannot be captured
            step = capture_graph(rows.step)
        step()
    return rows.generated.tolist()


def supports(model: PreTrainedModel) -> bool:
    """Whether `generate_greedily` works for a model: it uses our masks, and its step needs no synchronisation."""
    return attention.has_shared_attention(model) and not positions_depend_on_batch(model)


def max_cache_tokens(model: PreTrainedModel) -> int:
    """How many tokens' keys and values fit into half of the device's free memory."""
    config = text_config(model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    elements = 2 * config.num_hidden_layers * attention.key_head_count(config) * width  # per token
    return devices.free_bytes(model.device) // 2 // (elements * model.dtype.itemsize)


def capture_graph(work: Callable[[], None]) -> Callable[[], None]:
    """The same work as one CUDA graph. Capturing does not run it; other threads may use the GPU meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


class GeneratedRows:
    """Prompts and the tokens generated after them, one token of each row at a time.

    Prompts are padded on the right, so that all answers begin at the same place of the cache.

    Args: as for generate_greedily.

    `generated` is [rows, max_new_tokens] int64, NO_TOKEN where nothing has been generated yet.
    """

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, pad: int):
        self.model, device = model, model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
        self.longest = max(map(len, prompts))
        self.window = attention.window_for(model, self.longest + max_new_tokens)
        self.tokens = torch.tensor([row + [pad] * (self.longest - len(row)) for row in prompts], device=device)
        self.slots = torch.arange(-(-(self.longest + max_new_tokens) // 8) * 8, device=device)[None]  # of the cache
        layers = text_config(model).num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(self.slots.numel()) for _ in range(layers)])
        is_answer, is_prompt = self.slots >= self.longest, self.slots < lengths
        answers = (lengths + self.slots - self.longest).masked_fill(~is_answer, UNREACHED)
        self.positions = torch.where(is_prompt, self.slots, answers)  # of the tokens in the slots, [rows, slots]
        # the newest token of each row, and its position: [rows, 1]
        self.newest, self.newest_position = self.tokens.gather(1, lengths - 1), lengths - 1
        self.generated = torch.full((len(prompts), max_new_tokens), NO_TOKEN, device=device)
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)

    def begin(self) -> None:
        """Compute the prompts and the first token of each answer."""
        places = self.slots[:, : self.longest]
        last = self.newest_position[:, 0]
        ends = torch.arange(len(self.tokens), device=last.device) * self.longest + last
        with logits_only_at(self.model, ends):
            logits = self._logits(self.tokens, places.expand_as(self.tokens), self._mask(places, self.slots))[0]
        self._append(logits.argmax(-1, keepdim=True))

    def step(self) -> None:
        """Compute the next token of each answer. All tensors keep their addresses, as CUDA graphs need it."""
        mask = self._mask(self.newest_position, self.positions)
        logits = self._logits(self.newest, self.newest_position, mask)[:, -1]
        self.turn.add_(1)
        self._append(logits.argmax(-1, keepdim=True))

    def _append(self, tokens: Tensor) -> None:
        self.newest.copy_(tokens)
        self.generated.index_copy_(1, self.turn, tokens)
        self.newest_position.add_(1)

    def _logits(self, tokens: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor]) -> Tensor:
        return self.model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True
        ).logits

    def _mask(self, positions: Tensor, slot_positions: Tensor) -> Tensor | dict[str, Tensor]:
        """Which slots tokens attend to.

        Args:
            positions: of the tokens, [rows, length].
            slot_positions: of the tokens in the slots, [rows, slots].
        """
        back = positions[:, None, :, None] - slot_positions[:, None, None, :]
        mask = back >= 0
        return attention.mask_for(self.model, mask, None if self.window is None else mask & (back < self.window))


@contextmanager
def logits_only_at(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """While the body runs, the model computes logits at these places alone and returns [1, places, vocabulary].

    What the model does after its output layer (scaling, capping) applies to them.

    Args:
        places: int64, in the batch with its rows flattened into one.
    """

    def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, places)[None],)

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()
