"""What the packed layers of a model share: which adapters are stacked together, and the batch of the present step."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paragen.packed.dropout import LayerDropout, threshold_of

GROUP_WIDTH = 128  # ranks per group; wider products of zeros would cost more than another batched product
WIDTH_MULTIPLE = 16  # ranks; tensor cores want the width of a stack in multiples of this


@dataclass
class Batch:
    """The rows of a step as one sequence of tokens, on the model's device.

    N tokens, of which each group of adapters has N / groups; R rows of up to L tokens; P positions with a loss; S
    sequences, which are the rows, pieces of the groups' padding, and empty ones at the end.
    """

    tokens: Tensor  # [1, N] int64
    positions: Tensor  # [1, N] int64, within the token's row
    adapter: Tensor  # [N] int64, the token's adapter; the number of adapters for padding
    to_rows: Tensor  # [R * L] int64, the token at each place of the padded rows
    to_tokens: Tensor  # [N] int64, each token's place in the padded rows
    sequences: Tensor  # [S + 1] int64, where each sequence begins, and N; for kernels that take rows of any length
    predicting: Tensor  # [P] int64, the tokens whose next token has a loss
    to_losses: Tensor  # [N] int64, each token's place among those; P for a token without a loss
    targets: Tensor  # [P] int64, those next tokens
    weights: Tensor  # [P] float32, the factor of each loss in the sum; 0 for padding
    loss_adapter: Tensor  # [P] int64, the adapter of each loss
    row_length: int  # L
    # By adapter (first token, one past the last): with them, adapters are multiplied one after another, without a mask.
    spans: list[tuple[int, int]] | None
    dropout_keys: Tensor | None = None  # [N] int64, see dropout.py; None where no adapter has dropout


class AdapterGroups:
    """Which adapters share a stack of factors.

    Args:
        ranks: the rank of each adapter.
        loads: about how many tokens each adapter sees per step; groups get equal shares (default: all the same).
        width: about how many ranks a group has.

    There are `count` groups of `width` ranks. Adapter i has the rows `start[i]` to `start[i] + ranks[i]` in the stack
    of group `group_of[i]`.
    """

    def __init__(self, ranks: list[int], loads: list[float] | None = None, width: int = GROUP_WIDTH):
        loads = loads or [1.0] * len(ranks)
        self.ranks, self.group_of, self.start = ranks, [0] * len(ranks), [0] * len(ranks)
        self.count = -(-sum(ranks) // width)
        assigned, used = [0.0] * self.count, [0] * self.count  # tokens and ranks of each group so far
        for adapter in sorted(range(len(ranks)), key=lambda i: (-loads[i], -ranks[i])):
            group = min(range(self.count), key=lambda one: (assigned[one], used[one]))
            self.group_of[adapter], self.start[adapter] = group, used[group]
            assigned[group] += loads[adapter]
            used[group] += ranks[adapter]
        self.count = sum(width > 0 for width in used)  # fewer where there are fewer adapters than groups
        self.width = -(-max(used) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    def place_of(self, adapter: int) -> tuple[int, slice]:
        """Where an adapter's factors are: its group, and its rows in the group's stack."""
        start = self.start[adapter]
        return self.group_of[adapter], slice(start, start + self.ranks[adapter])


class AdapterSlice(NamedTuple):
    """An adapter's part of a step."""

    tokens: slice
    group: int
    rows: slice  # in the group's stack
    scale: float
    drops: bool  # whether it has dropout


class StepContext:
    """What all packed layers of a model need to know about the current step.

    Args:
        groups: the adapters' groups.
        scaling: PEFT's scaling of each adapter.
        device: the model's.
        dropout: each adapter's probability of dropout (default: none has any). As in PEFT, what is kept is scaled by
            1 / (1 - probability); here the products' scaling contains that.
    """

    def __init__(
        self, groups: AdapterGroups, scaling: list[float], device: torch.device, dropout: list[float] | None = None
    ):
        self.groups = groups
        self.dropout = dropout or [0.0] * len(scaling)
        self.scaling = [scale / (1 - dropped) for scale, dropped in zip(scaling, self.dropout, strict=True)]
        # [adapters + 1, width] float32, as exact as PEFT's own; the last row is padding's
        self.scales = torch.zeros(len(scaling) + 1, groups.width, device=device)
        for adapter, scale in enumerate(self.scaling):
            self.scales[adapter, groups.place_of(adapter)[1]] = scale
        self.mask: Tensor | None = None  # [groups, tokens per group, width] float32
        # by adapter, the last one is padding's: [adapters + 1] int32, and by token, [N]; None without dropout
        self.thresholds: Tensor | None = None
        if any(self.dropout):
            self.thresholds = torch.tensor([*map(threshold_of, self.dropout), threshold_of(0)], dtype=torch.int32).to(
                device
            )
        self.token_thresholds: Tensor | None = None
        self.sequences: Tensor | None = None  # of the batch, [S + 1] int32; None on a CPU
        self.batch: Batch  # of the current step, see begin_step

    def begin_step(self, batch: Batch) -> None:
        """Set the step's batch and its mask: a token has its adapter's scaling at that adapter's ranks, else 0."""
        self.batch = batch
        self.sequences = batch.sequences.int() if batch.sequences.is_cuda else None
        if self.thresholds is not None:
            self.token_thresholds = self.thresholds.index_select(0, batch.adapter)
        if batch.spans is None:  # otherwise adapters are multiplied one after another
            self.mask = self.scales.index_select(0, batch.adapter).view(self.groups.count, -1, self.groups.width)

    def adapter_slices(self) -> list[AdapterSlice]:
        """The parts of all adapters that have rows in this step."""
        spans = self.batch.spans
        assert spans is not None  # only such batches have their adapters multiplied one after another
        return [
            AdapterSlice(slice(*span), *self.groups.place_of(adapter), self.scaling[adapter], self.dropout[adapter] > 0)
            for adapter, span in enumerate(spans)
            if span[0] < span[1]
        ]

    def layer_dropout(self, layer: int) -> LayerDropout | None:
        """The dropout of a layer in this step, None where no adapter has any."""
        if self.token_thresholds is None:
            return None
        assert self.batch.dropout_keys is not None  # all steps of a pack with dropout have them
        return LayerDropout(self.batch.dropout_keys, self.token_thresholds, layer)
