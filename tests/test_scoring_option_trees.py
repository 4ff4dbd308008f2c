"""How questions are laid out as batches: trees of options, the shared prefix, masks."""

import numpy as np
import pytest
from helpers.model_fixtures import question

from paragen.scoring import option_trees
from paragen.scoring.option_trees import START
from paragen.scoring.questions import Question


def packed(questions: list[Question], prefix: int = 0) -> option_trees.PackedBatch:
    trees = [option_trees.build_tree(one) for one in questions]
    return option_trees.pack_questions(list(range(len(questions))), questions, trees, prefix)


def mask_of(batch: option_trees.PackedBatch, row: int = 0, prefix: int = 0, window: int | None = None) -> list[str]:
    """What each token of a row attends to, a string of x and . per token."""
    mask = option_trees.tree_mask(batch, prefix)
    if window:
        mask &= option_trees.window_mask(batch, prefix, window)
    return ["".join(".x"[int(there)] for there in line) for line in mask[row, 0]]


def test_options_share_their_first_tokens():
    tree = option_trees.build_tree(question([1], [[5, 6, 8], [5, 7, 8], [9]], right=1))
    # 5 after the prompt, 6 and 7 after it; of the right option also what ends it (2, 7), without the last token
    assert list(zip(tree.parents, tree.tokens, tree.depths, strict=True)) == [
        (START, 5, 0), (0, 6, 1), (0, 7, 1), (2, 8, 2), (3, 2, 3)
    ]  # fmt: skip
    assert [tree.edges[edge] for edge in tree.paths[0]] == [(START, 5), (0, 6), (1, 8)]
    assert [tree.edges[edge] for edge in tree.paths[1]] == [(START, 5), (0, 7), (2, 8), (3, 2), (4, 7)]
    assert [tree.edges[edge] for edge in tree.paths[2]] == [(START, 9)]
    assert tree.lengths == [3, 3, 1]


def test_a_branch_is_complete_before_the_next_begins():
    tree = option_trees.build_tree(question([1], [[5, 6, 8, 8], [5, 7, 8], [5, 6, 9, 8], [4, 4]], right=1))
    assert [tree.tokens[node] for node in range(len(tree.tokens))] == [4, 5, 6, 8, 9, 7, 8, 2]
    assert option_trees.subtree_ends(tree) == [1, 8, 5, 4, 5, 8, 8, 8]
    assert [[tree.edges[edge][1] for edge in path] for path in tree.paths] == [
        [5, 6, 8, 8], [5, 7, 8, 2, 7], [5, 6, 9, 8], [4, 4]
    ]  # fmt: skip


def test_options_of_one_token_need_no_token_but_the_right_one_s():
    tree = option_trees.build_tree(question([1], [[5], [6]]))
    assert tree.tokens == [5, 2] and len(tree.edges) == 4


def test_a_node_attends_to_its_prompt_and_its_ancestors():
    batch = packed([question([1, 3], [[5, 6, 8], [5, 7, 8]])])
    assert batch.tokens.tolist() == [[1, 3, 5, 6, 8, 2, 7]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3]]
    assert mask_of(batch) == ["x......", "xx.....", "xxx....", "xxxx...", "xxxxx..", "xxxxxx.", "xxx...x"]


def test_a_row_attends_to_the_shared_prefix_which_is_not_in_it():
    batch = packed([question([1, 3, 4, 9], [[5], [6]]), question([1, 3, 8], [[5], [6]])], prefix=2)
    assert batch.tokens.tolist() == [[4, 9, 5, 2], [8, 5, 2, 0]]
    assert batch.positions.tolist() == [[2, 3, 4, 5], [2, 3, 4, 0]]
    assert mask_of(batch, 0, 2) == ["xxx...", "xxxx..", "xxxxx.", "xxxxxx"]
    assert mask_of(batch, 1, 2)[:3] == ["xxx...", "xxxx..", "xxxxx."]


def test_a_window_goes_by_position_not_by_place():
    batch = packed([question([1, 3, 4, 9], [[5, 6, 8], [7, 8, 9]])], prefix=2)
    assert batch.positions.tolist() == [[2, 3, 4, 5, 6, 7, 4, 5]]
    assert mask_of(batch, 0, 2, window=3) == [
        "xxx.......", ".xxx......", "..xxx.....", "...xxx....", "....xxx...", ".....xxx..", "..xx....x.", "...x....xx",
    ]  # fmt: skip
    assert mask_of(batch, 0, 2)[-1] == "xxxx....xx"


def test_single_responses_without_a_shared_prefix_are_plain_causal():
    assert packed([question([1, 3], [[5, 6]]), question([1], [[5]])]).visible_until is None
    assert not option_trees.is_branched(option_trees.build_tree(question([1], [[5, 6, 7]])))
    assert option_trees.is_branched(option_trees.build_tree(question([1], [[5, 6], [7, 6]])))


def test_padding_is_neither_attended_to_nor_scored():
    batch = packed([question([1, 3, 4, 9, 9, 9], [[5], [6]]), question([1], [[5, 6], [8, 6]])])
    assert batch.tokens.tolist() == [[1, 3, 4, 9, 9, 9, 5, 2], [1, 5, 6, 2, 8, 0, 0, 0]]
    assert not option_trees.tree_mask(batch, 0)[1, 0, :5, 5:].any()
    assert batch.logit_places.tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert batch.first_edge == [0, 4]
    assert batch.edges[4:].tolist() == [[3, 5], [4, 6], [5, 2], [6, 7], [3, 8], [7, 6]]


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([[*range(20)], [*range(12), 50]], 12),
        ([[*range(20)], [*range(20)]], 19),  # the last token's logits are needed of each row
        ([[*range(20)], [*range(9)]], 8),
        ([[*range(20)]], 19),
        ([[*range(20)], [*range(7), 50, 51]], 0),  # too few to be worth a pass
        ([[1], [1]], 0),
        ([[*range(20)], [50, *range(1, 20)]], 0),
    ],
)
def test_the_shared_prefix_leaves_each_prompt_a_token(prompts, length):
    questions = [question(prompt, [[5], [6]]) for prompt in prompts]
    assert option_trees.shared_prefix(questions) == prompts[0][:length]
    assert option_trees.shared_prefix(questions[::-1]) == prompts[0][:length]


def test_every_row_is_in_one_batch_and_no_batch_is_too_large():
    lengths = np.random.default_rng(0).integers(1, 90, 200).tolist()
    logit_counts = np.random.default_rng(1).integers(1, 9, 200).tolist()
    for max_tokens, max_logits in ((1, 1), (64, 10**9), (500, 30), (10**9, 10**9), (10**9, 20)):
        batches = option_trees.make_batches(lengths, max_tokens, logit_counts, max_logits)
        assert sorted(number for batch in batches for number in batch) == list(range(200))
        for batch in batches:
            padded = len(batch) * max(lengths[number] for number in batch)
            logits = sum(logit_counts[number] for number in batch)
            assert len(batch) == 1 or (padded <= max_tokens and logits <= max_logits)
    assert len(option_trees.make_batches(lengths, 10**9, logit_counts, 10**9)) == 1
