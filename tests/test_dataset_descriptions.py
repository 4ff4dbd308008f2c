"""Descriptions of a dataset's task: where they are read, what is refused, and that they make nothing stale."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import handmade

import describe
from paragen.collection import run_identity, task_descriptions
from paragen.collection.manifest import read_manifest
from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, descriptions, names, registration, sources

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
    with pytest.raises(UserError, match="1 descriptions, 20 are needed.*make describe DATASET=Sums"):
        task_descriptions.required(manifest, 20, place.data)


def test_a_manifest_with_broken_descriptions_is_refused(place):
    columns = {"prompt": "prompt", "response": "response", "system": "system"}
    run = place.collect(dataset="Sums", entry={"columns": columns, "descriptions": ["Add.", "Add."]})
    with pytest.raises(UserError, match="descriptions"):
        read_manifest(run)


def test_a_collection_without_descriptions_names_the_command(place):
    manifest = read_manifest(place.collect(dataset="My Sums"))
    with pytest.raises(UserError, match="has no descriptions.*make describe DATASET=MySums"):
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


def test_every_prepared_dataset_has_twenty_of_its_own():
    table = yaml.safe_load((paths.DATA / descriptions.TABLE).read_text(encoding="utf-8"))
    prepared = {names.prepared_dataset(one["dataset"]) for one in sources.table()["files"].values()}
    assert table["datasets"].keys() == prepared | {"Demo"}
    for name in table["datasets"]:
        ((source, texts),) = descriptions.prepared(name, paths.DATA).items()
        assert len(texts) == 20 and source == table["source"], name
    everything = [descriptions.alike(text) for texts in table["datasets"].values() for text in texts]
    assert len(set(everything)) == len(everything)
    assert descriptions.descriptions_of(dataset_info.entry_of("Demo")) == table["datasets"]["Demo"]


@pytest.mark.parametrize(
    "content", ["[", "datasets: {}", "source: us", "source: us\ndatasets:\n  Sums: [Add., Add.]\n", "[]"]
)
def test_a_broken_table_of_descriptions_is_named(tmp_path, content):
    (tmp_path / descriptions.TABLE).write_text(content)
    with pytest.raises(UserError, match=descriptions.TABLE):
        descriptions.prepared("Sums", tmp_path)


@pytest.fixture
def described(place, monkeypatch, capsys):
    """A data folder with the dataset `My Sums`; calls make describe and returns what it printed."""
    columns = {"prompt": "prompt", "response": "response", "system": "system"}
    handmade.register(place.data, "math", "My Sums", handmade.texts("Sums"), {"columns": columns, "license": "mit"})

    def call(**given: str) -> str:
        with monkeypatch.context() as patch:
            for name in ("DATASET", "TEXT", "FILE", "SOURCE"):
                patch.delenv(name, raising=False)
            for name, value in given.items():
                patch.setenv(name, str(value))
            describe.main()
        return capsys.readouterr().out

    return call


def entry_in(data: Path) -> dict:
    return json.loads((data / "dataset_info.json").read_text(encoding="utf-8"))["My Sums"]


def test_describe_adds_texts_by_their_source(described, place, tmp_path):
    assert "1 descriptions added; it has 1" in described(DATASET="mysums", TEXT=TEXTS[0])
    (tmp_path / "more.txt").write_text("\n".join([TEXTS[0].upper(), TEXTS[1]]))
    told = described(DATASET="mysums", FILE=tmp_path / "more.txt", SOURCE="a colleague")
    assert "1 descriptions added, 1 are there already; it has 2" in told
    entry = entry_in(place.data)
    assert entry["descriptions"] == {"own": TEXTS[:1], "a colleague": TEXTS[1:]} and entry["license"] == "mit"
    before = (place.data / "dataset_info.json").read_bytes()
    assert "0 descriptions added" in described(DATASET="mysums", FILE=tmp_path / "more.txt")
    assert (place.data / "dataset_info.json").read_bytes() == before
    assert described(DATASET="mysums") == f"own:\n  {TEXTS[0]}\na colleague:\n  {TEXTS[1]}\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "name a dataset"),
        ({"DATASET": "mysums other", "TEXT": "Add."}, "name one dataset"),
        ({"DATASET": "Gone", "TEXT": "Add."}, "'Gone' is not known"),
        ({"DATASET": "mysums"}, "has no descriptions; add them: make describe DATASET=MySums"),
        ({"DATASET": "mysums", "TEXT": "Add.\nThem."}, "one line"),
        ({"DATASET": "mysums", "TEXT": "Add.", "FILE": "x.txt"}, "give one of them"),
        ({"DATASET": "mysums", "FILE": "gone.txt"}, "gone.txt: cannot be read"),
    ],
)
def test_describe_refuses_in_one_line_and_writes_nothing(described, place, given, message):
    before = (place.data / "dataset_info.json").read_bytes()
    with pytest.raises(UserError, match=message) as error:
        described(**given)
    assert "\n" not in str(error.value) and (place.data / "dataset_info.json").read_bytes() == before


def test_a_file_with_a_text_twice_is_named_and_nothing_is_written(described, place, tmp_path):
    (tmp_path / "twice.txt").write_text("Add.\nSum up.\nadd\n")
    before = (place.data / "dataset_info.json").read_bytes()
    with pytest.raises(UserError, match="twice.txt: descriptions 1 and 3 are the same"):
        described(DATASET="mysums", FILE=tmp_path / "twice.txt")
    assert (place.data / "dataset_info.json").read_bytes() == before


def test_a_registered_dataset_takes_up_those_that_are_prepared_for_it_and_keeps_its_own(tmp_path):
    (tmp_path / "math").mkdir()
    for name in ("GSM8K", "Other", "GSM8K_test"):
        rows = [{"prompt": f"{name} {n}?", "response": str(n)} for n in range(3)]
        (tmp_path / "math" / f"{name}.json").write_text(json.dumps(rows))
    shutil.copy(paths.DATA / descriptions.TABLE, tmp_path)
    prepared = descriptions.prepared("GSM8K", tmp_path)

    def registered(name: str) -> dict:
        registration.register(tmp_path / "math" / f"{name}.json", registration.Request(name), tmp_path)
        return dataset_info.entry_of(name, tmp_path)

    assert registered("GSM8K")["descriptions"] == prepared
    assert "descriptions" not in registered("Other") and "descriptions" not in registered("GSM8K_test")
    registration.describe("GSM8K", TEXTS, "own", tmp_path)
    assert registered("GSM8K")["descriptions"] == {**prepared, "own": TEXTS}
