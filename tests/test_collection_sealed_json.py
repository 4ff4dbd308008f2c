"""Sealed JSON files: a user gets one line, whatever they hold.

They are generated.json, scores.json, benchmark.json and its parts, and a generator's manifest.
"""

import json

import pytest

from paragen.analysis import benchmark_page
from paragen.benchmark import rows
from paragen.collection import adapter_folders, manifest_kinds, sealed_json
from paragen.collection.manifest import sealed
from paragen.common import files
from paragen.common.cli import UserError
from paragen.generator import generate, saved
from paragen.scoring import generated

READERS = [
    (adapter_folders.RECORD, adapter_folders.FORMAT, lambda path: adapter_folders.read_record(path.parent)),
    (generated.SCORES, generated.FORMAT, lambda path: generated.read(path.parent)),
    (benchmark_page.FILE, benchmark_page.FORMAT, benchmark_page.read),
    ("A.json", rows.FORMAT, lambda path: rows.read_part(path, None, False)),
    ("manifest.json", saved.FORMAT, lambda path: saved.manifest_of(path.parent)),
]


@pytest.mark.parametrize(("name", "format_name", "read"), READERS, ids=[name for name, *_ in READERS])
def test_a_file_that_is_none_of_its_kind_is_one_line_with_a_way_out(tmp_path, name, format_name, read):
    path = tmp_path / name
    for text, said in {
        "[]": f"broken (not of format {format_name}); ",
        '"text"': f"broken (not of format {format_name}); ",
        "{": "broken (Expecting property name",
        "[" * 10**5: "broken (maximum recursion depth exceeded",
        "[" * 20 + "]" * 20: "broken (nested more than 16 levels deep); ",
        json.dumps({"format": format_name}): "broken (was edited after it was written); ",
        json.dumps(sealed({"format": format_name})): " is missing); ",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError) as error:
            read(path)
        assert name in str(error.value) and said in str(error.value) and "\n" not in str(error.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"{name}: cannot be read: Is a directory"):
        read(path)


def test_what_was_sealed_is_read_again_and_nothing_where_there_is_none(tmp_path):
    path, kinds = tmp_path / "x.json", {"n": manifest_kinds.COUNT}
    assert sealed_json.read(path, "f", kinds, "way out") is None
    files.write_json(path, sealed({"format": "f", "n": 1}))
    assert sealed_json.read(path, "f", kinds, "way out")["n"] == 1
    files.write_json(path, sealed({"format": "f", "n": True}))
    with pytest.raises(UserError, match=r"x.json: broken \(n is True, not a whole number from 1 up\); way out"):
        sealed_json.read(path, "f", kinds, "way out")


SCORE = {"score": 0.5, "interval": None, "loss": 1.0, "loss_interval": None}
EVALUATION = {
    "split": "A_test", "paired": True, "limit": None, "metric": "exact", "rows": 2, "prompts_sha256": "0",
    "base": SCORE, "settings": {}, "engine": "e", "dtype": None, "device": None, "versions": {}, "adapters": {},
    "samples": [{"sample": "1", **SCORE}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("evaluations", "said"),
    [
        (5, "evaluations is 5, not a list"),
        ([1], "holds no list of evaluations"),
        ([{key: value for key, value in EVALUATION.items() if key != "rows"}], "lacks something"),
        ([{**EVALUATION, "samples": [{**SCORE, "loss": "low"}]}], "holds a score that is none"),
        ([{**EVALUATION, "samples": [SCORE]}], "does not name its adapters"),
        ([{**EVALUATION, "adapters": None}], "does not name its adapters"),
    ],
)  # fmt: skip
def test_scores_of_a_stranger_are_checked(tmp_path, evaluations, said):
    files.write_json(tmp_path / generated.SCORES, sealed({"format": generated.FORMAT, "evaluations": evaluations}))
    with pytest.raises(UserError) as error:
        generated.read(tmp_path)
    assert said in str(error.value) and str(error.value).endswith("remove it and score again")


def test_sound_scores_are_read(tmp_path):
    files.write_json(tmp_path / generated.SCORES, sealed({"format": generated.FORMAT, "evaluations": [EVALUATION]}))
    assert generated.read(tmp_path) == [EVALUATION]


@pytest.mark.parametrize("group", [1, {}, {"name": "x", "rows": [{}], "totals": {}}])
def test_a_benchmark_whose_tables_lack_something_is_named_in_the_report(tmp_path, group):
    path = tmp_path / "benchmarks" / "mine" / benchmark_page.FILE
    path.parent.mkdir(parents=True)
    known = {"format": benchmark_page.FORMAT, "base_model": "m", "rank": 4, "collections": {}, "groups": [group]}
    files.write_json(path, sealed(known))
    (section,) = benchmark_page.sections(tmp_path)
    assert "benchmark.json: its tables cannot be shown (" in section["fault"]


def test_only_a_folder_that_was_generated_is_replaced(tmp_path, monkeypatch):
    record = {"format": adapter_folders.FORMAT, "dataset": "A", "seed": 0}
    assert not generate.is_there(record, tmp_path)
    (tmp_path / "A").mkdir()
    files.write_json(tmp_path / "A" / adapter_folders.RECORD, record)  # without the files' hashes, and unsealed
    with pytest.raises(
        UserError, match="generated.json: broken .was edited.*; generate the adapters again with FORCE=1"
    ):
        generate.is_there(record, tmp_path)
    monkeypatch.setenv("FORCE", "1")
    assert not generate.is_there(record, tmp_path), "FORCE=1 replaces it"
    for content in ('{"format": "another"}', "[" * 10**5, "[]"):
        (tmp_path / "A" / adapter_folders.RECORD).write_text(content)
        with pytest.raises(UserError, match="A: is there already, and was not generated here; choose another OUT"):
            generate.is_there(record, tmp_path)
