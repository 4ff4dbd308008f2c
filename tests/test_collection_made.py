"""Collections of made tasks: exports, scores and pairs take them where they are named, so that nothing is mixed."""

import pyarrow.compute as pc
import pytest

from pairs import Pairs
from paragen.analysis import report_cells
from paragen.collection import index, selection
from paragen.common import paths
from paragen.common.cli import UserError


@pytest.fixture
def mixed(place):
    """A real collection and one of a made task."""
    place.collect(category="math", dataset="MATH")
    place.collect(category="made", dataset="made-word-third")
    return place


def datasets() -> list[str]:
    return [chosen.manifest.dataset for chosen in index.chosen()[0]]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, ["MATH"]),
        ({"CATEGORY": "all"}, ["MATH"]),
        ({"MODEL": "Tiny"}, ["MATH"]),
        ({"CATEGORY": "made"}, ["made-word-third"]),
        ({"DATASET": "made-word-third MATH"}, ["made-word-third", "MATH"]),
    ],
)
def test_collections_of_made_tasks_are_chosen_where_they_are_named(mixed, monkeypatch, given, taken):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert datasets() == taken


def test_a_broken_collection_of_a_made_task_stops_no_other(mixed):
    (mixed.saves / "made" / "made-word-third" / "Tiny_lora-rank_4_finetune" / "checkpoint-5.safetensors").unlink()
    assert datasets() == ["MATH"]


def test_where_only_those_fit_the_way_to_take_them_is_said(place, monkeypatch):
    place.collect(category="made", dataset="made-word-third")
    with pytest.raises(UserError, match="all collections that fit are of made tasks; CATEGORY=made takes them"):
        index.chosen()
    with pytest.raises(UserError, match="all checkpoints that fit are of made tasks; category='made' takes them"):
        Pairs(prompts=0)
    monkeypatch.setenv("RANK", "64")
    with pytest.raises(UserError, match="no collection fits RANK=64"):
        index.chosen()


def test_pairs_hold_made_tasks_where_a_filter_names_them(mixed):
    index.update()

    def held(**filters) -> set[str]:
        pairs = Pairs(prompts=1, **filters)
        return {pairs.row(number)["dataset"] for number in range(len(pairs))}

    assert held() == held(rank=4) == held(where=pc.field("step") > 5) == {"MATH"}
    assert held(category="made") == held(dataset="made-word-third") == {"made-word-third"}
    assert held(category=["made", "math"]) == {"made-word-third", "MATH"}


def test_the_index_and_verification_leave_none_out(mixed):
    table, faults = index.update()
    assert {*table["dataset"].to_pylist()} == {"MATH", "made-word-third"} and not faults
    folders = [mixed.saves / name for name in sorted({*table["collection"].to_pylist()})]
    assert selection.selected_folders(folders) == folders


def test_the_report_has_no_empty_cells_of_made_tasks(mixed, monkeypatch):
    scripts = mixed.saves.parent / "collect_scripts"
    for task in ("made-word-third", "made-word-last"):
        (scripts / "made" / task).mkdir(parents=True)
        for phase in paths.PHASES:
            (scripts / "made" / task / f"tiny_{task}_{phase}.yaml").touch()
    monkeypatch.setattr(paths, "SCRIPTS", scripts)
    assert report_cells.states_of([], selection.requested_filters())[0] == []
    monkeypatch.setenv("CATEGORY", "made")
    assert len(report_cells.states_of([], selection.requested_filters())[0]) == 2 * 5


def test_drag_and_drop_llms_has_no_task_for_them(mixed):
    line = mixed.refused("dnd", CATEGORY="made")
    assert "made-word-third" in line and "lies in no category that has a task there; those are common-sense" in line
