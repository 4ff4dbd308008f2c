"""The prompts of a collection are the rows it was trained on, or those it was not, and nothing that changed since."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from paragen.collection import prompts
from paragen.collection.manifest import Manifest, read_manifest
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, row_texts


@pytest.fixture
def data(collected) -> Path:
    """The folder of dataset_info.json; Toy has 64 rows, of which the collection was trained on 48."""
    return collected.top / "data"


@pytest.fixture
def manifest(collected, data) -> Manifest:
    return read_manifest(collected.run_folder("finetune"))


def toy(data: Path) -> Path:
    return data / "common-sense-reasoning" / "Toy.json"


def change_rows(data: Path, change) -> None:
    rows = json.loads(toy(data).read_text())
    change(rows)
    toy(data).write_text(json.dumps(rows))


def change_info(data: Path, change) -> None:
    info = dataset_info.read_info(data)
    change(info)
    (data / "dataset_info.json").write_text(json.dumps(info))


def questions(found: list[dict]) -> list[int]:
    return [int(row["prompt"].split()[1]) for row in found]


def test_the_rows_trained_on_and_the_others(manifest, data):
    train = prompts.of_collection(manifest, "train", data)
    assert train[1] == {"system": "answer", "prompt": "is 1 even?", "response": "[B]", "images": []}
    assert questions(train) == list(range(48))
    assert questions(prompts.of_collection(manifest, "test", data)) == list(range(48, 64))


def test_a_registered_test_set_goes_before_the_rest_of_the_file(manifest, data):
    (data / "math").mkdir()
    (data / "math" / "T.json").write_text(json.dumps([{"question": "is 99 even?"}]))
    entry = {"file_name": "math/T.json", "columns": {"prompt": "question"}, "prompts_only": True}
    change_info(data, lambda info: info.update(Toy_test=entry))
    assert prompts.of_collection(manifest, "test", data) == [
        {"system": "", "prompt": "is 99 even?", "response": "", "images": []}
    ]
    change_info(data, lambda info: info.pop("Toy_test"))
    assert len(prompts.of_collection(manifest, "test", data)) == 16


def test_only_the_rows_kept_back_are_test_rows(manifest, data):
    manifest.data[0].entry["held_out"] = 5
    assert questions(prompts.of_collection(manifest, "test", data)) == list(range(59, 64))


@pytest.mark.parametrize("split", prompts.SPLITS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda data: change_rows(data, lambda rows: rows[3].update(prompt="?")),
            "first 48 rows are not those that Toy",
        ),
        (lambda data: change_rows(data, lambda rows: rows.pop(0)), "first 48 rows are not those that Toy"),
        (lambda data: change_rows(data, lambda rows: rows.__delitem__(slice(40, None))), "first 48 rows are not"),
        (lambda data: toy(data).unlink(), "the prompts are gone"),
        (lambda data: toy(data).write_text("["), "broken JSON"),
    ],
)
def test_a_data_file_changed_since_is_refused_also_when_it_was_read_before(manifest, data, split, change, said):
    prompts.of_collection(manifest, split, data)
    change(data)
    with pytest.raises(UserError, match=said):
        prompts.of_collection(manifest, split, data)


def test_rows_changed_behind_those_trained_on_concern_only_the_test_split(manifest, data):
    change_rows(data, lambda rows: rows[50].update(prompt="is 51 even?"))
    assert len(prompts.of_collection(manifest, "train", data)) == 48
    with pytest.raises(UserError, match="changed since Toy was trained, behind the rows trained on.*Toy_test"):
        prompts.of_collection(manifest, "test", data)


def test_half_a_surrogate_pair_is_named(manifest, data):
    change_rows(data, lambda rows: rows[3].update(prompt="\ud800"))
    with pytest.raises(UserError, match=r"Toy\.json: its rows hold half of a surrogate pair"):
        prompts.of_collection(manifest, "train", data)


def test_a_file_is_read_once_while_it_stays_unchanged(manifest, data, monkeypatch):
    read, load_rows = [], dataset_info.load_rows
    monkeypatch.setattr(dataset_info, "load_rows", lambda path: read.append(path.name) or load_rows(path))
    for _ in range(3):
        prompts.of_collection(manifest, "train", data)
        prompts.of_collection(manifest, "test", data)
    assert read == ["Toy.json"]


@pytest.mark.parametrize(
    ("change", "split", "said"),
    [
        (lambda manifest: manifest, "dev", "split 'dev' is not known; known: train, test"),
        (lambda manifest: replace(manifest, data=None), "train", "does not know the data"),
        (
            lambda manifest: replace(manifest, data=(replace(manifest.data[0], file="math/gone.json"),)),
            "train",
            "gone.json: the prompts are gone",
        ),
    ],
)
def test_what_is_not_there_is_named(manifest, data, change, split, said):
    manifest = change(manifest)
    with pytest.raises(UserError, match=said):
        prompts.of_collection(manifest, split, data)


def test_a_dataset_trained_on_whole_has_no_test_split(manifest, data):
    change_rows(data, lambda rows: rows.__delitem__(slice(48, None)))
    with pytest.raises(UserError, match="Toy: has no Toy_test in dataset_info.json and was trained on all its rows"):
        prompts.of_collection(manifest, "test", data)


def test_a_collection_of_two_datasets_has_the_prompts_of_both(manifest, data):
    manifest = replace(manifest, data=manifest.data * 2)
    assert questions(prompts.of_collection(manifest, "train", data)) == [*range(48), *range(48)]


def test_prompt_and_query_are_joined_and_a_history_comes_before():
    entry = {"columns": {"prompt": "p", "query": "q", "response": "r", "history": "h", "images": "i"}}
    row = {"p": "Add.", "q": "1 2", "r": "3", "i": "a.png"}
    assert row_texts.texts_of(row, entry) == {
        "system": "", "prompt": "Add.\n1 2", "response": "3", "images": ["a.png"]
    }  # fmt: skip
    messages = row_texts.texts_of({**row, "h": [["hello", "hi"]]}, entry)["messages"]
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "hello"), ("assistant", "hi"), ("user", "Add.\n1 2"), ("assistant", "3")
    ]  # fmt: skip


def test_a_conversation_gives_its_first_question_its_last_answer_and_all_of_it():
    entry = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
    said = [("system", "be brief"), ("human", "one?"), ("gpt", "1"), ("human", "two?"), ("gpt", "2")]
    found = row_texts.texts_of({"conversations": [{"from": who, "value": text} for who, text in said]}, entry)
    assert (found["system"], found["prompt"], found["response"]) == ("be brief", "one?", "2")
    assert [message["role"] for message in found["messages"]] == ["system", "user", "assistant", "user", "assistant"]
