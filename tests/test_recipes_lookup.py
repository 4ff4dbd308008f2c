"""Which cells a selection takes: those of made tasks have to be named."""

from pathlib import Path

import pytest

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.recipes import lookup


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """A folder with the pairs of a real dataset and of a made task, which are not read here."""
    for place in ("math/MATH", "made/made-word-third"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        for phase in paths.PHASES:
            (folder / f"gpt2_{folder.name}_{phase}.yaml").touch()
    monkeypatch.setattr(paths, "SCRIPTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, {"MATH"}),
        ({"CATEGORY": "all"}, {"MATH"}),
        ({"CATEGORY": "math"}, {"MATH"}),
        ({"MODEL": "gpt2"}, {"MATH"}),
        ({"CATEGORY": "made"}, {"made-word-third"}),
        ({"DATASET": "madewordthird"}, {"made-word-third"}),
        ({"CATEGORY": "all", "DATASET": "made-word-third MATH"}, {"MATH", "made-word-third"}),
    ],
)
def test_made_tasks_are_taken_where_they_are_named(scripts, monkeypatch, given, taken):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert {cell.dataset for cell in lookup.chosen_cells()} == taken


def test_where_all_recipes_are_of_made_tasks_the_way_to_take_them_is_said(scripts):
    for recipe in (scripts / "math" / "MATH").iterdir():
        recipe.unlink()
    with pytest.raises(UserError, match="all pairs of recipes are of made tasks; CATEGORY=made takes them"):
        lookup.chosen_cells()
