"""Descriptions of a dataset's task: where they are read, what is refused, and that they make nothing stale."""

import json

import pytest
from helpers import handmade

from paragen.collection import run_identity, task_descriptions
from paragen.collection.manifest import read_manifest
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, descriptions

TEXTS = ["Add two small numbers.", "Work out a sum and give the result alone."]
ENTRY = {"file_name": "math/Sums.json", "columns": {"prompt": "prompt", "response": "response"}}


@pytest.mark.parametrize("value", [TEXTS, {"own": TEXTS}, {"own": TEXTS[:1], "theirs": TEXTS[1:]}])
def test_an_entry_has_descriptions_as_a_list_or_by_source(value):
    entry = {**ENTRY, "descriptions": value}
    assert dataset_info.entry_faults(entry) == []
    assert descriptions.descriptions_of(entry) == TEXTS
    assert descriptions.descriptions_of(ENTRY) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Add.", "neither a list"),
        ({"own": "Add."}, "own: is not a list"),
        ({"": TEXTS}, "a source without a name"),
        ([1], "1 is not a text"),
        (["Add.", " "], "2 is empty"),
        (["Add\nthem."], "one line"),
        ([" Add."], "blanks at its ends"),
        (["Add them.", "Sum.", "add  them"], "1 and 3 are the same"),
        ({"own": ["Add."], "theirs": ["Add."]}, "1 and 2 are the same"),
    ],
)
def test_descriptions_that_are_no_texts_or_repeat_are_faults_of_their_entry(value, message):
    (fault,) = dataset_info.entry_faults({**ENTRY, "descriptions": value})
    assert message in fault


def test_descriptions_make_no_run_stale():
    old = {"recipe": None, "data": [{"name": "Sums", "rows_sha256": "0", "entry": ENTRY}], "base_model": None}
    old |= {"tokenizer": None, "pretrain": None}
    new = {
        **old,
        "recipe": {},
        "data": [{"name": "Sums", "rows_sha256": "0", "entry": ENTRY | {"descriptions": TEXTS}}],
    }
    assert run_identity.changes(old, new) == []
    other = {**ENTRY, "columns": {"prompt": "other", "response": "response"}, "descriptions": TEXTS}
    assert run_identity.changes(old, {**new, "data": [{**new["data"][0], "entry": other}]})


def test_a_manifest_carries_them_and_those_registered_now_count(place):
    columns = {"prompt": "prompt", "response": "response", "system": "system"}
    run = place.collect(dataset="Sums", entry={"columns": columns, "descriptions": {"own": TEXTS[:1]}})
    manifest = read_manifest(run)
    assert descriptions.descriptions_of(manifest.data[0].entry) == TEXTS[:1]
    handmade.register(place.data, "math", "Sums", handmade.texts("Sums"), {"columns": columns, "descriptions": TEXTS})
    assert task_descriptions.required(manifest, 2, place.data) == TEXTS
    handmade.register(place.data, "math", "Sums", handmade.texts("Sums"), {"columns": columns})
    assert task_descriptions.of_collection(manifest, place.data) == TEXTS[:1]
    (place.data / "dataset_info.json").unlink()
    assert task_descriptions.of_collection(manifest, place.data) == TEXTS[:1]
    with pytest.raises(UserError, match='1 descriptions, 20 are needed.*make describe DATASET="Sums"'):
        task_descriptions.required(manifest, 20, place.data)


def test_a_manifest_with_broken_descriptions_is_refused(place):
    columns = {"prompt": "prompt", "response": "response", "system": "system"}
    run = place.collect(dataset="Sums", entry={"columns": columns, "descriptions": ["Add.", "Add."]})
    with pytest.raises(UserError, match="descriptions"):
        read_manifest(run)


def test_a_collection_without_descriptions_names_the_command(place):
    manifest = read_manifest(place.collect(dataset="My Sums"))
    with pytest.raises(UserError, match='has no descriptions.*make describe DATASET="My Sums"'):
        task_descriptions.required(manifest, data_dir=place.data)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "\n".join(["", *TEXTS, ""])),
        ("texts.json", json.dumps(TEXTS)),
        ("metadata.yaml", "descriptions:\n- " + "\n- ".join(TEXTS)),
    ],
)
def test_a_file_of_descriptions_is_read(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert descriptions.read_file(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "\n"), ("a.json", "{"), ("a.yaml", "texts: []"), ("a.yaml", "a: ["), ("a.csv", "x"), ("gone.txt", None)],
)
def test_a_file_without_descriptions_is_named(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        descriptions.read_file(tmp_path / name)
