"""Questions laid out as batches: each row a prompt and behind it the tree of its possible responses.

Imported by scoring.py. The options of a choice share their prompt and their first tokens, so that one pass over the
prompt and a few tokens more gives the log-likelihood of each and, where greedy generation stays among the options, what
it would have generated. A response that is the only one is a tree without branches. What the prompts of all rows begin
with alike, the system's text mostly, is left to a pass of its own.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from questions import Question

START = -1  # the place in a tree where the prompt ends
WORTH = 8  # tokens that prompts have to share before it pays to compute them apart


class Tree(NamedTuple):
    """The responses of a question as a tree of tokens."""

    parents: list[int]  # of each node that goes through the model, the node before it, or START
    tokens: list[int]
    depths: list[int]
    edges: list[tuple[int, int]]  # (from node, to token): what has a log-probability
    paths: list[list[int]]  # of each option, the edges of its text; of the right one, all of its response
    lengths: list[int]  # how many of them are the text's


class Sheet(NamedTuple):
    """A batch of rows as tensors, for any number of adapters.

    A row holds the prompt without the shared prefix, the nodes of its tree, and padding.
    """

    numbers: list[int]  # which questions
    tokens: Tensor  # [rows, length] int64
    positions: Tensor  # [rows, length] int64
    mask: Tensor | None  # [rows, 1, length, prefix + length] bool; None where it is simply causal
    near: Tensor | None  # the same for layers that see no further than a window; None where all rows lie within it
    picks: Tensor  # [picks] int64: places in the flattened rows whose logits are needed
    edges: Tensor  # [edges, 2] int64: number of the pick, token
    pick_of: list[dict[int, int]]  # of each row, the number of the pick by node
    edge_of: list[int]  # of each row, the number of its first edge


def tree_of(question: Question) -> Tree:
    """The tree of a question's options; of the right one's response all tokens, of the others' those of the text."""
    tree = Tree([], [], [], [], [], [])
    edge_numbers: dict[tuple[int, int], int] = {}
    nodes: dict[tuple[int, int], int] = {}
    for number, path in enumerate(question.paths):
        used = path.tokens if number == question.right else path.tokens[: path.length]
        at, edges = START, []
        for depth, token in enumerate(used):
            if depth:
                step = (at, used[depth - 1])
                if step not in nodes:
                    nodes[step] = len(tree.tokens)
                    tree.parents.append(at)
                    tree.tokens.append(used[depth - 1])
                    tree.depths.append(depth - 1)
                at = nodes[step]
            edge = (at, token)
            if edge not in edge_numbers:
                edge_numbers[edge] = len(tree.edges)
                tree.edges.append(edge)
            edges.append(edge_numbers[edge])
        tree.paths.append(edges)
        tree.lengths.append(path.length)
    return tree


def prefix_of(questions: list[Question]) -> list[int]:
    """The tokens with which all prompts begin, but for the last token of the shortest; none where they are too few."""
    first = questions[0].tokens
    length = min(len(question.tokens) for question in questions) - 1
    for question in questions:
        same = np.equal(first[:length], question.tokens[:length])
        length = length if same.all() else int(same.argmin())
    return first[:length] if length >= WORTH else []


def length_of(question: Question, tree: Tree, prefix: int) -> int:
    """How long a question's row is."""
    return len(question.tokens) - prefix + len(tree.tokens)


def deal(lengths: list[int], most: int, heights: list[int], tallest: int) -> list[list[int]]:
    """Rows by their lengths, the longest first, in batches.

    Args:
        lengths: of each row.
        most: tokens that a batch may have with its padding; one row may have more.
        heights: of each row, how many logits it needs; `tallest`: how many a batch may have.
    """
    batches: list[list[int]] = []
    needed = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        batch = batches[-1] if batches else []
        full = batch and ((len(batch) + 1) * lengths[batch[0]] > most or needed + heights[number] > tallest)
        if full or not batches:
            batches.append([])
            needed = 0
        batches[-1].append(number)
        needed += heights[number]
    return batches


def sheet_of(
    numbers: list[int], questions: list[Question], trees: list[Tree], prefix: int, window: int | None
) -> Sheet:
    """Some questions as a batch.

    Args:
        prefix: tokens at the beginning of each prompt that are computed apart.
        window: how far back some of the model's layers see; None: to the beginning.
    """
    length = max(length_of(questions[number], trees[number], prefix) for number in numbers)
    tokens, positions = np.zeros((2, len(numbers), length), np.int64)
    picks, edges, pick_of, edge_of = [], [], [], []
    for row, number in enumerate(numbers):
        prompt, tree = questions[number].tokens[prefix:], trees[number]
        size, end = len(prompt), len(prompt) + len(tree.tokens)
        tokens[row, :end] = [*prompt, *tree.tokens]
        positions[row, :size] = np.arange(prefix, prefix + size)
        positions[row, size:end] = np.asarray(tree.depths, np.int64) + prefix + size
        pick_of.append({})
        edge_of.append(len(edges))
        for node, token in tree.edges:
            if node not in pick_of[-1]:
                pick_of[-1][node] = len(picks)
                picks.append(row * length + size + node)
            edges.append((pick_of[-1][node], token))
    mask = near = None
    if any(is_branched(trees[number]) for number in numbers) or prefix:
        seen = seen_by(numbers, questions, trees, prefix, length)
        mask = torch.from_numpy(seen)
        near = None if window is None else torch.from_numpy(seen & within(window, positions, prefix))
    return Sheet(
        numbers, torch.from_numpy(tokens), torch.from_numpy(positions), mask, near, torch.tensor(picks),
        torch.tensor(edges), pick_of, edge_of,
    )  # fmt: skip


def is_branched(tree: Tree) -> bool:
    """Whether a tree is more than a chain."""
    return tree.parents != list(range(START, len(tree.parents) - 1))


def seen_by(numbers: list[int], questions: list[Question], trees: list[Tree], prefix: int, length: int) -> np.ndarray:
    """What each token sees, [rows, 1, length, prefix + length]: what stands before it, of its tree what leads to it."""
    seen = np.ones((len(numbers), length, prefix + length), bool)
    seen[:, :, prefix:] = np.tri(length, dtype=bool)
    for row, number in enumerate(numbers):
        start, tree = len(questions[number].tokens) - prefix, trees[number]
        for node, parent in enumerate(tree.parents):
            seen[row, start + node, prefix + start :] = False
            if parent != START:
                seen[row, start + node, prefix + start :] = seen[row, start + parent, prefix + start :]
            seen[row, start + node, prefix + start + node] = True
    return seen[:, None]


def within(window: int, positions: np.ndarray, prefix: int) -> np.ndarray:
    """Which tokens are less than a window apart by their positions, [rows, 1, length, prefix + length]."""
    rows, length = positions.shape
    keys = np.concatenate([np.broadcast_to(np.arange(prefix), (rows, prefix)), positions], 1)
    near = positions[:, :, None] - keys[:, None, :] < window
    near |= np.eye(length, prefix + length, prefix, dtype=bool)  # padding sees itself, so that it sees something
    return near[:, None]
