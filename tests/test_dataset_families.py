"""Families: which datasets a measurement leaves out together."""

import json
from pathlib import Path

import pytest

from paragen.dataset import dataset_info, prepared, sources
from paragen.dataset.families import families_of

DATA = Path(__file__).resolve().parent.parent / "data"
COLUMNS = {"prompt": "prompt", "response": "response"}


def test_prepared_datasets_of_one_form_or_origin_are_a_family():
    found = families_of(["ARC-c", "ARC-e", "OBQA", "OBQA_test", "BoolQ", "MATH", "Competition_Math", "mine"], DATA)
    assert [*found.values()] == ["ARC", "ARC", "ARC", "ARC", "BoolQ", "MATH", "MATH", "mine"]


def test_an_entry_states_the_family_of_its_dataset_and_of_its_test_split(tmp_path):
    entries = {name: {"file_name": f"math/{name}.json", "columns": COLUMNS} for name in ("A", "A_test", "B")}
    entries["A"]["family"] = "letters"
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    assert families_of(entries, tmp_path) == {"A": "letters", "A_test": "letters", "B": "B"}


def test_a_prepared_file_is_registered_with_its_family(tmp_path):
    (tmp_path / "common-sense-reasoning").mkdir()
    rows = [{"prompt": f"{n}?", "response": f"{n}"} for n in range(3)]
    (tmp_path / "common-sense-reasoning" / "OBQA_train.json").write_text(json.dumps(rows))
    prepared.register(
        "OBQA_train.json", sources.table(DATA / "sources.yaml")["files"]["OBQA_train.json"], False, tmp_path
    )
    assert dataset_info.read_info(tmp_path)["OBQA"]["family"] == "ARC"


@pytest.mark.parametrize("value", [3, ["ARC"], None])
def test_a_family_is_a_text(value):
    entry = {"file_name": "math/A.json", "columns": COLUMNS, "family": value}
    assert dataset_info.entry_faults(entry) == ["family is not a text"]
    listed = sources.table(DATA / "sources.yaml")["files"]["OBQA_train.json"] | {"family": value or 0}
    assert sources.entry_fault("OBQA_train.json", listed) == f"family {value or 0!r} is not a text"


def test_neither_family_nor_metric_makes_a_run_stale():
    """They say with what a dataset is compared and how it is scored, not how it is trained on."""
    entry = {"file_name": "math/A.json", "columns": COLUMNS}
    assert dataset_info.without_marks(entry | {"family": "letters", "metric": "exact"}) == entry


@pytest.mark.parametrize("value", ["loss", 3, None, ["exact"]])
def test_a_metric_is_exact_or_left_out(value):
    entry = {"file_name": "math/A.json", "columns": COLUMNS}
    assert dataset_info.entry_faults(entry | {"metric": "exact"}) == []
    (fault,) = dataset_info.entry_faults(entry | {"metric": value})
    assert fault.startswith(f"metric is {value!r}; it can be 'exact'")
