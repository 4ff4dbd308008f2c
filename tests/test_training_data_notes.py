"""How many tokenised rows a recipe's `cutoff_len` cuts, and that a process says it once."""

import datasets
import pytest

from paragen.training import data_notes


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"cutoff_len": 8}, ["cutoff_len 8 is reached by 1 of 4 rows (25.0 %): what is longer is cut off"]),
        ({"cutoff_len": 9}, []),
        ({}, []),
        ({"cutoff_len": 8, "packing": True}, []),
        ({"cutoff_len": 8, "neat_packing": True}, []),
    ],
)
def test_rows_that_reach_the_limit(config, told):
    assert data_notes.cut_rows([3, 8, 1, 7], config) == told


def test_the_limit_of_a_recipe_that_names_none_is_llamafactorys():
    assert data_notes.cut_rows([2048, 5], {})[0].startswith("cutoff_len 2048 is reached by 1 of 2 rows")


def test_lengths_are_those_of_the_rows_that_are_trained_on():
    whole = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in range(1, 9)], "images": [None] * 8})
    assert data_notes.lengths_in(whole) == list(range(1, 9))
    assert data_notes.lengths_in(whole.select([7, 0, 3])) == [8, 1, 4]


def test_a_warning_is_printed_once_per_process(capsys):
    data_notes.announce(["Toy: one answer", "Toy: another"])
    data_notes.announce(["Toy: one answer", "Other: one answer"])
    assert capsys.readouterr().out.splitlines() == [
        "warning: Toy: one answer",
        "warning: Toy: another",
        "warning: Other: one answer",
    ]
