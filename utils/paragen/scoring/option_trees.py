"""Questions laid out as batches: each row a prompt and behind it the tree of its possible responses.

Imported by scoring.py. The options of a choice share their prompt and their first tokens, so that one pass over the
prompt and a few tokens more gives the log-likelihood of each and, where greedy generation stays among the options, what
it would have generated. A response that is the only one is a tree without branches. What the prompts of all rows begin
with alike, the system's text mostly, is left to a pass of its own.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from paragen.scoring.questions import Question

START = -1  # the place in a tree where the prompt ends
WORTH = 8  # tokens that prompts have to share before it pays to compute them apart


class Tree(NamedTuple):
    """The responses of a question as a tree of tokens; behind each node come all that follow from it."""

    parents: list[int]  # of each node that goes through the model, the node it follows, or START
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
    until: Tensor | None  # [rows, length] int64: the place from which on a token is unseen; None: simply causal
    picks: Tensor  # [picks] int64: places in the flattened rows whose logits are needed
    edges: Tensor  # [edges, 2] int64: number of the pick, token
    pick_of: list[dict[int, int]]  # of each row, the number of the pick by node
    edge_of: list[int]  # of each row, the number of its first edge


def tree_of(question: Question) -> Tree:
    """The tree of a question's options; of the right one's response all tokens, of the others' those of the text."""
    used = [path.tokens if number == question.right else path.tokens[: path.length]
            for number, path in enumerate(question.paths)]  # fmt: skip
    tree = Tree([], [], [], [], [[] for _ in used], [path.length for path in question.paths])
    nodes: dict[tuple[int, int], int] = {}
    edges: dict[tuple[int, int], int] = {}
    for number in sorted(range(len(used)), key=used.__getitem__):  # so that a branch is whole before the next begins
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


def sheet_of(numbers: list[int], questions: list[Question], trees: list[Tree], prefix: int) -> Sheet:
    """Some questions as a batch; `prefix`: tokens at the beginning of each prompt that are computed apart."""
    length = max(length_of(questions[number], trees[number], prefix) for number in numbers)
    tokens, positions, until = np.zeros((3, len(numbers), length), np.int64)
    until[:] = np.arange(1, length + 1)  # padding sees itself
    picks, edges, pick_of, edge_of = [], [], [], []
    for row, number in enumerate(numbers):
        prompt, tree = questions[number].tokens[prefix:], trees[number]
        size, end = len(prompt), len(prompt) + len(tree.tokens)
        tokens[row, :end] = [*prompt, *tree.tokens]
        positions[row, :size] = np.arange(prefix, prefix + size)
        positions[row, size:end] = np.asarray(tree.depths, np.int64) + prefix + size
        until[row, :size] = length
        until[row, size:end] = np.asarray(ends_of(tree), np.int64) + size
        pick_of.append({})
        edge_of.append(len(edges))
        for node, token in tree.edges:
            if node not in pick_of[-1]:
                pick_of[-1][node] = len(picks)
                picks.append(row * length + size + node)
            edges.append((pick_of[-1][node], token))
    is_simple = not prefix and not any(is_branched(trees[number]) for number in numbers)
    return Sheet(
        numbers, torch.from_numpy(tokens), torch.from_numpy(positions), None if is_simple else torch.from_numpy(until),
        torch.tensor(picks), torch.tensor(edges), pick_of, edge_of,
    )  # fmt: skip


def is_branched(tree: Tree) -> bool:
    """Whether a tree is more than a chain."""
    return tree.parents != list(range(START, len(tree.parents) - 1))


def ends_of(tree: Tree) -> list[int]:
    """Of each node the place behind all that follow from it."""
    ends = [*range(1, len(tree.parents) + 1)]
    for node in reversed(range(len(ends))):
        if (parent := tree.parents[node]) != START:
            ends[parent] = max(ends[parent], ends[node])
    return ends


def seen_in(sheet: Sheet, prefix: int) -> Tensor:
    """What each token of a sheet that is not simply causal sees, [rows, 1, length, prefix + length] bool: the prefix,
    its prompt so far, and of its tree what leads to it."""
    at = torch.arange(sheet.tokens.shape[1], device=sheet.tokens.device)
    own = (at <= at[:, None]) & (at[:, None] < sheet.until[:, None, :])
    return nn.functional.pad(own, (prefix, 0), value=True)[:, None]


def near_in(sheet: Sheet, prefix: int, window: int) -> Tensor:
    """Which tokens are less than a window apart by their positions, or one: [rows, 1, length, prefix + length] bool."""
    first = torch.arange(prefix, device=sheet.tokens.device).expand(len(sheet.tokens), -1)
    keys = torch.cat([first, sheet.positions], 1)
    near = sheet.positions[:, :, None] < keys[:, None, :] + window
    near |= torch.eye(*near.shape[1:], dtype=torch.bool, device=near.device).roll(prefix, 1)  # padding sees itself
    return near[:, None]
