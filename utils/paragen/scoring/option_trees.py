"""Questions laid out as batches: each row is a prompt followed by the tree of its possible responses.

The options of a multiple choice share their prompt and their first tokens. One pass over the prompt and a few more
tokens therefore gives the log-likelihood of each option and, where greedy generation stays among the options, the
generated answer. A single response is a tree without branches. The prefix that all prompts share, mostly the system
prompt, is left to a pass of its own.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from paragen.scoring.questions import Question

START = -1  # the node before all others: the end of the prompt
MIN_PREFIX = 8  # tokens; a shorter shared prefix is not worth a pass of its own


class OptionTree(NamedTuple):
    """The responses of a question as a tree of tokens, in depth-first order: a node's descendants follow it.

    A node is a token that goes through the model. An edge is a token whose log-probability is needed; the last token of
    a response is an edge and no node.
    """

    parents: list[int]  # of each node, the node before it, or START
    tokens: list[int]  # of each node
    depths: list[int]  # of each node, from 0
    edges: list[tuple[int, int]]  # (the node before, the token)
    paths: list[list[int]]  # of each option, the edges of its text; of the right one, of its whole response
    lengths: list[int]  # of each option, how many of these edges belong to its text


class PackedBatch(NamedTuple):
    """A batch of rows as tensors, for any number of adapters.

    A row holds the prompt without the shared prefix, the nodes of its tree, and padding.
    """

    numbers: list[int]  # of each row, the number of its question
    tokens: Tensor  # [rows, length] int64
    positions: Tensor  # [rows, length] int64
    visible_until: Tensor | None  # [rows, length] int64, the first place that cannot see the token; None: plain causal
    logit_places: Tensor  # [logits] int64, the places in the flattened rows whose logits are needed
    edges: Tensor  # [edges, 2] int64: (the number of the logits, the token)
    logits_of: list[dict[int, int]]  # of each row, the number of the logits by node
    first_edge: list[int]  # of each row, the number of its first edge

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch with its tensors on a device."""
        moved: dict[str, Any] = {
            name: field.to(device) for name, field in self._asdict().items() if isinstance(field, Tensor)
        }
        return self._replace(**moved)


def build_tree(question: Question) -> OptionTree:
    """The tree of a question's options; the right one has its whole response in it, the others their texts alone."""
    used = [
        option.tokens if number == question.right else option.tokens[: option.text_length]
        for number, option in enumerate(question.continuations)
    ]
    tree = OptionTree([], [], [], [], [[] for _ in used], [option.text_length for option in question.continuations])
    nodes: dict[tuple[int, int], int] = {}
    edges: dict[tuple[int, int], int] = {}
    for number in sorted(range(len(used)), key=used.__getitem__):  # so that a branch is complete before the next begins
        at = START
        for depth, token in enumerate(used[number]):
            if depth:
                step = (at, used[number][depth - 1])
                if step not in nodes:
                    nodes[step] = len(tree.tokens)
                    tree.parents.append(at)
                    tree.tokens.append(step[1])
                    tree.depths.append(depth - 1)
                at = nodes[step]
            edge = (at, token)
            if edge not in edges:
                edges[edge] = len(tree.edges)
                tree.edges.append(edge)
            tree.paths[number].append(edges[edge])
    return tree


def shared_prefix(questions: list[Question]) -> list[int]:
    """The tokens that all prompts begin with; empty where they are fewer than MIN_PREFIX.

    At least the last token of each prompt is left out, because its logits are needed in each row.
    """
    first = questions[0].tokens
    length = min(len(question.tokens) for question in questions) - 1
    for question in questions:
        same = np.equal(first[:length], question.tokens[:length])
        length = length if same.all() else int(same.argmin())
    return first[:length] if length >= MIN_PREFIX else []


def row_length(question: Question, tree: OptionTree, prefix: int) -> int:
    """The number of tokens in a question's row, without a prefix of `prefix` tokens and without padding."""
    return len(question.tokens) - prefix + len(tree.tokens)


def make_batches(lengths: list[int], max_tokens: int, logit_counts: list[int], max_logits: int) -> list[list[int]]:
    """Assign rows to batches, the longest first; a batch is a list of row numbers.

    Args:
        lengths: of each row, in tokens.
        max_tokens: the largest size of a batch, with its padding; a single row may exceed it.
        logit_counts: of each row, at how many places logits are needed.
        max_logits: at how many places a batch may need logits; a single row may exceed it.
    """
    batches: list[list[int]] = []
    needed = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        batch = batches[-1] if batches else []
        full = batch and (
            (len(batch) + 1) * lengths[batch[0]] > max_tokens or needed + logit_counts[number] > max_logits
        )
        if full or not batches:
            batches.append([])
            needed = 0
        batches[-1].append(number)
        needed += logit_counts[number]
    return batches


def pack_questions(numbers: list[int], questions: list[Question], trees: list[OptionTree], prefix: int) -> PackedBatch:
    """Some questions as a batch on the CPU.

    Args:
        numbers: which of the questions.
        questions, trees: all of them.
        prefix: the length of the shared prefix, which is not in the batch.
    """
    length = max(row_length(questions[number], trees[number], prefix) for number in numbers)
    tokens, positions, visible_until = np.zeros((3, len(numbers), length), np.int64)
    visible_until[:] = np.arange(1, length + 1)  # padding sees itself
    logit_places: list[int] = []
    edges: list[tuple[int, int]] = []
    logits_of: list[dict[int, int]] = []
    first_edge: list[int] = []
    for row, number in enumerate(numbers):
        prompt, tree = questions[number].tokens[prefix:], trees[number]
        size, end = len(prompt), len(prompt) + len(tree.tokens)
        tokens[row, :end] = [*prompt, *tree.tokens]
        positions[row, :size] = np.arange(prefix, prefix + size)
        positions[row, size:end] = np.asarray(tree.depths, np.int64) + prefix + size
        visible_until[row, :size] = length
        visible_until[row, size:end] = np.asarray(subtree_ends(tree), np.int64) + size
        logits_of.append({})
        first_edge.append(len(edges))
        for node, token in tree.edges:
            if node not in logits_of[-1]:
                logits_of[-1][node] = len(logit_places)
                logit_places.append(row * length + size + node)
            edges.append((logits_of[-1][node], token))
    is_causal = not prefix and not any(is_branched(trees[number]) for number in numbers)
    return PackedBatch(
        numbers, torch.from_numpy(tokens), torch.from_numpy(positions),
        None if is_causal else torch.from_numpy(visible_until), torch.tensor(logit_places), torch.tensor(edges),
        logits_of, first_edge,
    )  # fmt: skip


def is_branched(tree: OptionTree) -> bool:
    """Whether a tree is more than a chain."""
    return tree.parents != list(range(START, len(tree.parents) - 1))


def subtree_ends(tree: OptionTree) -> list[int]:
    """For each node, the index one past its last descendant."""
    ends = [*range(1, len(tree.parents) + 1)]
    for node in reversed(range(len(ends))):
        if (parent := tree.parents[node]) != START:
            ends[parent] = max(ends[parent], ends[node])
    return ends


def tree_mask(batch: PackedBatch, prefix: int) -> Tensor:
    """Which tokens each token of a batch attends to, [rows, 1, length, prefix + length] bool.

    It attends to the shared prefix, to its prompt up to itself, and to its ancestors in the tree. Only for a batch with
    `visible_until`.
    """
    assert batch.visible_until is not None  # a plain causal batch has no mask
    at = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    own = (at <= at[:, None]) & (at[:, None] < batch.visible_until[:, None, :])
    return nn.functional.pad(own, (prefix, 0), value=True)[:, None]


def window_mask(batch: PackedBatch, prefix: int, window: int) -> Tensor:
    """Which tokens lie within a sliding window, [rows, 1, length, prefix + length] bool.

    That is: whose position is less than `window` before the token's own. Padding lies within its own window.
    """
    prefix_positions = torch.arange(prefix, device=batch.tokens.device).expand(len(batch.tokens), -1)
    keys = torch.cat([prefix_positions, batch.positions], 1)
    near = batch.positions[:, :, None] < keys[:, None, :] + window
    near |= torch.eye(*near.shape[1:], dtype=torch.bool, device=near.device).roll(prefix, 1)  # padding sees itself
    return near[:, None]
