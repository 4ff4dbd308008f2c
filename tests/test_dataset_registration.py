"""What a user relies on when registering a data file with `make register`: what it prints, writes and refuses."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import in_process
from helpers.forked_python import PYTHON

from paragen.common.cli import UserError
from paragen.dataset import dataset_info

SCRIPT = Path(__file__).resolve().parent.parent / "utils" / "register_dataset.py"
CATEGORIES = ("coding", "common-sense-reasoning", "math", "multimodal", "made")


@pytest.fixture
def data(tmp_path):
    """An empty data folder."""
    for category in CATEGORIES:
        (tmp_path / "data" / category).mkdir(parents=True)
    return tmp_path / "data"


def put(data, place, rows):
    """Write `rows` (text: as it is) to data/`place`."""
    text = rows if isinstance(rows, str) else json.dumps(rows)
    (data / place).write_text(text, encoding="utf-8")
    return data / place


def call(data, *arguments):
    """Run the script's `main` on `data`; no input may ever end in a traceback."""
    return in_process.call("register_dataset", "--data-dir", data, *arguments)


def started(data, *arguments, cwd=None):
    """Run the script on `data` in a process of its own, as `make register` does."""
    command = [PYTHON, SCRIPT, "--data-dir", data, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    assert "Traceback" not in done.stderr
    return done


def registered(data, *arguments):
    """Register, expecting success; returns the manifest and what was printed."""
    done = call(data, *arguments)
    assert done.returncode == 0, done.stderr
    return manifest(data), done.stdout


def refused(data, *arguments):
    """Register, expecting a refusal that writes nothing; returns the lines of stderr."""
    before = sorted((path, path.read_bytes()) for path in data.rglob("*") if path.is_file())
    done = call(data, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert sorted((path, path.read_bytes()) for path in data.rglob("*") if path.is_file()) == before
    assert done.stderr.startswith("error: ")
    return done.stderr.splitlines()


def manifest(data):
    return json.loads((data / "dataset_info.json").read_text(encoding="utf-8"))


def sums(count=3, **more):
    return [{"prompt": f"{n} + 1?", "response": str(n + 1), **more} for n in range(count)]


def chat(*turns, role="from", content="value"):
    return [{role: speaker, content: text} for speaker, text in turns]


TALK = chat(("human", "<image> what is it?"), ("gpt", "a cat"))


# What is registered


def test_a_train_file_gets_the_name_without_train_and_its_category_folder(data):
    info, printed = registered(data, put(data, "math/Sums_train.json", sums(system="")))
    columns = {"prompt": "prompt", "response": "response", "system": "system"}
    assert info == {"Sums": {"file_name": "math/Sums_train.json", "columns": columns}}
    assert "Sums: registered" in printed and "3 rows" in printed and "system=system" in printed
    assert "note:" not in printed


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"instruction": "a", "input": "", "output": "b"},
            {"prompt": "instruction", "query": "input", "response": "output"},
        ),
        ({"question": "a", "answer": "b", "id": 7}, {"prompt": "question", "response": "answer"}),
        ({"prompt": "", "query": "q", "response": "b"}, {"prompt": "prompt", "query": "query", "response": "response"}),
        (
            {"prompt": "a", "response": "b", "history": [["q", "r"]]},
            {"prompt": "prompt", "response": "response", "history": "history"},
        ),
        (
            {"prompt": "é\r\n\u2028", "response": "雪", "system": None},
            {"prompt": "prompt", "response": "response", "system": "system"},
        ),
        (
            {"prompt": "<image>?", "response": "b", "image": "images/a.png", "meta": [[1, [2]], {"k": None}]},
            {"prompt": "prompt", "response": "response", "images": "image"},
        ),
    ],
)
def test_the_columns_of_alpaca_rows_are_inferred(data, row, columns):
    info, _ = registered(data, put(data, "math/A.json", [row]))
    assert info["A"] == {"file_name": "math/A.json", "columns": columns}


def test_the_user_names_columns(data):
    file = put(data, "math/A.json", [{"text": "a", "question": "x", "label": "b", "input": "not for the model"}])
    info, printed = registered(data, file, "--columns", "prompt=text", "response=label", "query=")
    assert info["A"]["columns"] == {"prompt": "text", "response": "label"}
    assert "note: columns that nothing reads: 'question', 'input'" in printed


def test_sharegpt_rows_with_llama_factorys_own_tags_need_no_tags(data):
    rows = [{"conversations": TALK, "image": "a.png"}, {"conversations": TALK, "image": "b.png"}]
    info, printed = registered(data, put(data, "multimodal/Pets.json", rows))
    columns = {"messages": "conversations", "images": "image"}
    assert info["Pets"] == {"file_name": "multimodal/Pets.json", "formatting": "sharegpt", "columns": columns}
    assert "note: 2 of 2 pictures are not in data/; the first: 'a.png'" in printed


def test_sharegpt_rows_with_role_and_content_get_all_tags(data):
    talk = chat(("system", ""), ("user", "<image><image>"), ("assistant", "b"), role="role", content="content")
    (data / "a.png").touch()
    rows = [{"messages": talk, "images": ["a.png", "a.png"]}]
    info, printed = registered(data, put(data, "multimodal/Pets.json", rows))
    assert info["Pets"]["columns"] == {"messages": "messages", "images": "images"}
    tags = info["Pets"]["tags"]
    assert tags.keys() == dataset_info.DEFAULT_TAGS.keys()  # LLaMA-Factory fills in none that is missing
    assert [tags[tag] for tag in dataset_info.REQUIRED_TAGS] == ["role", "content", "user", "assistant"]
    assert "note:" not in printed


def test_name_and_category_find_the_file(data):
    put(data, "math/Sums_train.json", sums())
    info, _ = registered(data, "--name", "Sums", "--category", "math")
    assert info["Sums"]["file_name"] == "math/Sums_train.json"
    put(data, "math/Sums.json", sums())
    assert "holds both Sums.json and Sums_train.json" in refused(data, "--name", "Sums", "--category", "math")[0]
    assert "holds neither" in refused(data, "--name", "Other", "--category", "math")[0]


def test_names_with_blanks_relative_paths_and_links_to_the_repository_work(data):
    put(data, "math/My sums_train.json", sums())
    assert started(data, "data/math/My sums_train.json", cwd=data / "math").returncode == 0
    (data.parent / "link").symlink_to(data)
    assert call(data, data.parent / "link/math/My sums_train.json").returncode == 0
    assert manifest(data)["My sums"]["file_name"] == "math/My sums_train.json"


def test_llama_factory_reads_every_row_that_was_accepted(data):
    pytest.importorskip("llamafactory")
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import get_dataset_list

    turns = ("user", "a"), ("function_call", "{}"), ("observation", "1"), ("assistant", "b")
    files = {
        "math/Sums.json": sums(system="s"),
        "math/Past.json": [{"instruction": "", "input": "q", "output": "b", "history": [["q", "r"]]}],
        "multimodal/Pets.json": [{"conversations": TALK, "image": "a.png"}],
        "coding/Tools.json": [{"messages": chat(*turns, role="role", content="content")}],
    }
    for place, rows in files.items():
        registered(data, put(data, place, rows))
    registered(data, put(data, "math/Asks.json", [{"prompt": "a"}]), "--prompts-only")
    gap = [*sums(), {"prompt": "a", "response": ""}]
    registered(data, put(data, "math/Gap.json", gap), "--accept-rows", 4, "--held-out", 1)
    names = list(manifest(data))
    for name, attributes in zip(names, get_dataset_list(names, str(data)), strict=True):
        convert = get_dataset_converter(attributes.formatting, attributes, SimpleNamespace(media_dir=str(data)))
        for row in dataset_info.load_rows(dataset_info.data_file(name, data)):
            read = convert(row)
            assert len(read["_prompt"]) % 2 == 1 and len(read["_response"]) == (name != "Asks")


def test_rows_with_gaps_are_accepted_only_by_number_and_only_where_there_is_one(data):
    rows = sums() + [{"prompt": "a", "response": ""}, {"prompt": "b", "response": None}]
    file = put(data, "math/Gap.json", rows)
    assert refused(data, file, "--accept-rows", 4) == [f"error: {file}: row 5: empty response (column 'response')"]
    assert "row 1: stands among the accepted_rows, but nothing is" in refused(data, file, "--accept-rows", 1, 4, 5)[0]
    assert "accepted_rows: no row 6" in refused(data, file, "--accept-rows", 4, 5, 6)[0]
    info, _ = registered(data, file, "--accept-rows", 4, 5)
    assert info["Gap"]["accepted_rows"] == [4, 5]
    put(data, "math/Gap.json", sums() + [{"prompt": 1, "response": ""}, {"prompt": "b", "response": ""}])
    assert "row 4: the column 'prompt' holds a number, not text" in refused(data, file)[0]


# What happens to dataset_info.json


def test_other_entries_keep_every_byte_and_a_new_one_goes_to_the_end(data):
    text = (
        '{\n    "B": { "file_name": "math/B.json", "columns": {"prompt": "caf\\u00e9"} },\n\n    "A": {"x": 1e1}\n}\n'
    )
    put(data, "dataset_info.json", text)
    registered(data, put(data, "math/Été.json", sums()))
    after = (data / "dataset_info.json").read_text(encoding="utf-8")
    assert after.startswith(text.removesuffix("\n}\n") + ',\n  "Été": {\n    "file_name": "math/Été.json"')
    assert after.endswith('"response"\n    }\n  }\n}\n') and list(manifest(data)) == ["B", "A", "Été"]


def test_registering_again_changes_only_what_changed_and_stays_in_place(data):
    registered(data, put(data, "math/A.json", sums()))
    registered(data, put(data, "math/B.json", sums(4)))
    before = (data / "dataset_info.json").read_bytes()
    assert json.dumps(manifest(data), indent=2).encode() + b"\n" == before
    _, printed = registered(data, data / "math/A.json")
    assert "nothing to change" in printed and (data / "dataset_info.json").read_bytes() == before
    put(data, "math/A.json", sums(system="s"))
    info, printed = registered(data, data / "math/A.json")
    assert "registered anew" in printed and list(info) == ["A", "B"] and info["A"]["columns"]["system"] == "system"


def test_keys_that_are_not_ours_outlive_a_new_registration_of_the_same_file(data):
    put(data, "dataset_info.json", {"A": {"file_name": "math/A.json", "num_samples": 2}})
    info, _ = registered(data, put(data, "math/A.json", sums()))
    assert info["A"]["num_samples"] == 2


def test_a_name_of_another_file_needs_replace(data):
    registered(data, put(data, "math/A.json", sums()))
    other = put(data, "coding/A.json", sums(2))
    assert "'A' is already registered for 'math/A.json'" in refused(data, other)[0]
    assert registered(data, other, "--replace")[0]["A"]["file_name"] == "coding/A.json"


@pytest.mark.parametrize("text", ['{"A": ', "[]", '{"A": {}, "A": {}}', "\ufeff{}"])
def test_a_broken_manifest_is_refused_and_left_alone(data, text):
    put(data, "dataset_info.json", text)
    assert "dataset_info.json: " in refused(data, put(data, "math/A.json", sums()))[0]
    assert "dataset_info.json: " in refused(data, "--check")[0]


def test_registrations_at_once_lose_none(data):
    files = [put(data, f"math/A{number}.json", sums(number + 1)) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda file: started(data, file).returncode, files))
    assert results == [0] * 8 and len(manifest(data)) == 8
    assert [path.name for path in data.iterdir() if path.is_file()] == ["dataset_info.json"]


# What is refused


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ('[{"prompt": "a",]', "broken JSON: "),
        ("[" * 100000, "broken JSON: "),
        ('\ufeff[{"prompt": "a", "response": "b"}]', "broken JSON: "),
        ({"prompt": "a", "response": "b"}, "is an object, not a list of rows"),
        ([], "is an empty list"),
        ([*sums(), ["a", "b"]], "row 4: is a list, not an object"),
        ([*sums(16, system="s"), *sums(1)], "row 17: lacks the column 'system', which others have (row 1)"),
        ([*sums(1), {"prompt": "a", "response": 5}], "row 2: the column 'response' holds a number, not text"),
        ([*sums(1), {"prompt": ["a"], "response": "b"}], "row 2: the column 'prompt' holds a list, not text"),
        (sums(2, system={}), "row 1: the column 'system' holds an object, not text"),
        ([*sums(1), {"prompt": " \n", "response": "b"}], "row 2: empty prompt (column 'prompt')"),
        ([{"instruction": "", "input": "", "output": "b"}], "row 1: empty prompt (column 'instruction')"),
        ([*sums(1), {"prompt": "a", "response": ""}], "row 2: empty response (column 'response')"),
        ([*sums(1), {"prompt": "a", "response": None}], "row 2: empty response (column 'response')"),
        ([{"prompt": "a \ud800", "response": "b"}], "row 1: the column 'prompt' holds half of a surrogate pair"),
        (
            [{"prompt": "a", "response": "b", "\ud800": "c"}],
            r"row 1: the name of the column '\ud800' is not Unicode text",
        ),
        (sums(2, history=["a", "b"]), "row 1: the history (column 'history') is not a list of [prompt, response]"),
        (sums(2, history=[["a", 1]]), "row 1: the history (column 'history') is not a list of [prompt, response]"),
        ([*sums(1, id=1), *sums(1, id="one")], "row 2: the column 'id' holds text, but a number in row 1"),
        (
            [{"Text": "a", "response": "b"}],
            "no column is plainly the prompt; there are 'Text', 'response'; say MAP=",
        ),
        (
            [{"prompt": "a", "text": "b"}],
            "the rows have no response; there are 'prompt', 'text'; say MAP=\"response=",
        ),
        ([{"prompt": "a", "question": "q", "answer": "b"}], "the prompt can be 'prompt' or 'question'; say MAP="),
        ([{"prompt": "a", "messages": TALK}], 'say MAP="messages=messages" or MAP="prompt=prompt"'),
    ],
)
def test_faulty_rows_are_refused_with_file_row_and_cause(data, rows, cause):
    first = refused(data, put(data, "math/A.json", rows))[0]
    assert first.startswith(f"error: {data / 'math/A.json'}: ") and cause in first


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"conversations": "hello"}, "the messages are text, not a list"),
        ({"conversations": ["hello"]}, "message 1 is text, not an object"),
        ({"conversations": []}, "there are no messages"),
        ({"conversations": [{"value": "a"}]}, "message 1 has no role (key 'from')"),
        (
            {"conversations": chat(("human", "a"), ("gpt", 5))},
            "message 2 holds a number, not Unicode text (key 'value')",
        ),
        ({"conversations": chat(("human", "a"), ("gpt", ""))}, "message 2 is an empty response"),
        ({"conversations": chat(("human", ""), ("gpt", "b"))}, "message 1 is an empty prompt"),
        ({"conversations": chat(("human", "a"), ("human", "b"))}, "message 2 is from 'human' where 'gpt' is due"),
        ({"conversations": chat(("human", "a"), ("system", "s"))}, "message 2 is from 'system' where 'gpt' is due"),
        ({"conversations": chat(("human", "a"), ("user", "b"))}, "message 2 is from 'user' where 'gpt' is due"),
        ({"conversations": chat(("human", "a"), ("gpt", "b"), ("human", "c"))}, "the last message is from 'human'"),
        ({"conversations": TALK, "image": "/etc/cat.png"}, "the picture '/etc/cat.png' lies outside data/"),
        ({"conversations": TALK, "images": ["../cat.png"]}, "the picture '../cat.png' lies outside data/"),
        ({"conversations": TALK, "images": [""]}, "the picture '' is not a path"),
        ({"conversations": TALK, "image": 3}, "the picture 3 is not a path"),
        ({"conversations": TALK, "images": ["a.png", "b.png"]}, "2 pictures, but 1 <image> marks in the texts"),
        ({"conversations": TALK, "image": None}, "0 pictures, but 1 <image> marks in the texts"),
    ],
)
def test_faulty_sharegpt_rows_are_refused(data, row, cause):
    assert f"A.json: row 1: {cause}" in refused(data, put(data, "multimodal/A.json", [row]))[0]


def test_many_faulty_rows_are_named_in_part_and_counted(data):
    rows = [row | {"response": ""} for row in sums(9)] + sums(1)
    lines = refused(data, put(data, "math/A.json", rows))
    assert len(lines) == 6 and "row 5: " in lines[4] and lines[5].endswith("9 faults in all")


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        (["prompt=question"], "prompt=question: no row has the column 'question'; there are 'prompt', 'response'"),
        (["promt=prompt"], "alpaca rows have no 'promt' to map; known: prompt, query, response, system, history"),
        (["prompt"], "write kind=column"),
        (["prompt=prompt", "response=prompt"], "the column 'prompt' is mapped twice"),
    ],
)
def test_columns_that_cannot_be_are_refused(data, columns, cause):
    assert cause in refused(data, put(data, "math/A.json", sums()), "--columns", *columns)[0]


def test_files_elsewhere_are_refused(data):
    outside = put(data, "../A.json", sums())
    assert "lies outside data/" in refused(data, outside)[0]
    assert "lies outside data/" in refused(data, data / "math/../../A.json")[0]
    (data / "maths/deep").mkdir(parents=True)
    unknown = refused(data, put(data, "maths/A.json", sums()))[0]
    assert "A.json: unknown category 'maths'; the categories are coding, common-sense-reasoning, math, multi" in unknown
    assert "unknown category 'Math'; the categories are coding" in refused(data, "--name", "A", "--category", "Math")[0]
    assert "does not lie right in data/<category>/" in refused(data, put(data, "A.json", sums()))[0]
    assert "is not a .json file" in refused(data, put(data, "math/A.txt", sums()))[0]
    assert "there is no such file" in refused(data, data / "math/None.json")[0]
    assert "there is no such file" in refused(data, data / "math")[0]


@pytest.mark.parametrize("name", ["a,b", "a/b", "../a", " a", "-a"])
def test_names_that_are_no_folder_or_split_at_a_comma_are_refused(data, name):
    assert f"{name!r} is no dataset name" in refused(data, put(data, "math/A.json", sums()), f"--name={name}")[0]


# Prompts without responses


def test_prompts_register_only_when_asked_for_and_training_on_them_says_why_not(data):
    file = put(data, "math/Asks.json", [{"prompt": "a", "response": ""}, {"prompt": "b", "response": ""}])
    assert "the rows have no response" in refused(data, file)[0]
    info, printed = registered(data, file, "--prompts-only")
    assert info["Asks"] == {"file_name": "math/Asks.json", "columns": {"prompt": "prompt"}, "prompts_only": True}
    assert "prompts only: not for training" in printed
    with pytest.raises(UserError, match=r"'Asks' \(math/Asks.json\) cannot be trained on: it holds prompts only"):
        dataset_info.require_trainable("Asks", dataset_info.entry_of("Asks", data))
    registered(data, put(data, "math/Sums.json", sums()))
    dataset_info.require_trainable("Sums", dataset_info.entry_of("Sums", data))


def test_rows_with_responses_are_no_prompts_only_file(data):
    file = put(data, "math/A.json", sums())
    assert "the column 'response' holds responses" in refused(data, file, "--prompts-only")[0]
    file = put(data, "multimodal/A.json", [{"conversations": TALK}])
    assert "row 1: the last message is from 'gpt', which leaves a response" in refused(data, file, "--prompts-only")[0]


def test_sharegpt_prompts_end_on_the_user(data):
    file = put(data, "coding/A.json", [{"conversations": chat(("human", "a"))}])
    assert "which leaves no response (PROMPTS_ONLY=1 is for such files)" in refused(data, file)[0]
    assert registered(data, file, "--prompts-only")[0]["A"]["prompts_only"] is True


# Near misses


def test_what_is_odd_about_the_rows_is_told_in_a_line_each(data):
    file = put(data, "math/A_train.json", [*sums(4), *sums(2)])
    _, printed = registered(data, file)
    assert "warning: repeated prompts: 2, up to 2 times each, in 4 of 6 rows (66.7 %); row 5 repeats row 1\n" in printed
    _, printed = registered(data, put(data, "math/A_test.json", sums(1)))
    assert "warning: prompts that also stand in A: 1 of 1 rows (100 %); row 1 is row 1 there\n" in printed
    done = call(data, "--check")
    assert done.returncode == 0 and [line for line in done.stdout.splitlines() if line.startswith("warning: ")] == [
        "warning: A: repeated prompts: 2, up to 2 times each, in 4 of 6 rows (66.7 %); row 5 repeats row 1",
        "warning: A_test: prompts that also stand in A: 1 of 1 rows (100 %); row 1 is row 1 there",
    ]


@pytest.mark.parametrize(("first", "second"), [("A_train", "A_test"), ("A_validation", "A_train"), ("A", "A_test")])
def test_a_test_split_equal_to_its_train_split_is_refused_whichever_comes_first(data, first, second):
    registered(data, put(data, f"math/{first}.json", sums()))
    line = refused(data, put(data, f"math/{second}.json", json.dumps(sums()[::-1], indent=4)))[0]
    assert f"{second}.json: has the same rows as {first}.json: a test split must differ from its train split" in line


def test_a_test_dataset_on_the_train_file_is_refused(data):
    file = put(data, "math/A_train.json", sums())
    told = f"{file}: is a train split by its name, A_test a test split: rename one of them"
    assert told in refused(data, file, "--name", "A_test")[0]
    registered(data, file)
    assert told in refused(data, file, "--name", "A_test")[0]
    file = put(data, "math/B.json", sums())
    registered(data, file)
    assert "B.json: is the file of B, too: a test split must" in refused(data, file, "--name", "B_test")[0]


@pytest.mark.parametrize(("file", "name"), [("GSM8K", "GSM8K_test"), ("x", "foo_test"), ("x_test", "x_validation")])
def test_a_file_is_not_compared_with_itself(data, file, name):
    file = put(data, f"math/{file}.json", sums())
    assert name in registered(data, file, "--name", name)[0]
    _, printed = registered(data, file, "--name", name)
    assert "nothing to change" in printed
    assert call(data, "--check").returncode == 0
    train = put(data, f"math/{name.removesuffix('_test').removesuffix('_validation')}_train.json", sums(4))
    registered(data, train)
    assert call(data, "--check").returncode == 0


def test_slips_in_names_are_noted(data):
    registered(data, put(data, "math/BoolQ_validation.json", sums()))
    _, printed = registered(data, data / "math/BoolQ_validation.json", "--name", "Bool-Q_test")
    assert "note: the name says test, the file BoolQ_validation.json says validation" in printed
    assert "note: its file is the same as that of BoolQ_validation (BoolQ_validation.json)" in printed
    _, printed = registered(data, put(data, "math/Other.json", sums(2)), "--name", "boolq-test")
    assert "note: its name is almost that of Bool-Q_test" in printed


# make check-data


def test_check_passes_a_sound_manifest(data):
    registered(data, put(data, "math/A_train.json", sums(id=7)))
    registered(data, put(data, "math/A_test.json", [{"prompt": "a", "response": "b"}]))
    done = call(data, "--check")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[0] == "note: A: columns that nothing reads: 'id'"
    assert done.stdout.splitlines()[1].endswith("dataset_info.json: 2 datasets, no faults")


def test_check_lists_every_fault_of_every_entry(data):
    both = {"prompt": "prompt", "response": "response"}
    put(data, "math/Sums_train.json", sums())
    put(data, "math/Sums_test.json", sums())
    put(data, "math/Asks.json", [{"prompt": "a"}])
    put(data, "coding/Bad.json", [*sums(1), {"prompt": "", "response": "b"}, {"prompt": "c", "response": ""}])
    put(data, "Root.json", sums(2))
    put(data, "math/Broken.json", "[{]")
    entries = {
        "Sums": {"file_name": "math/Sums_train.json", "columns": both},
        "Sums_test": {"file_name": "math/Sums_test.json", "columns": both},
        "Asks": {"file_name": "math/Asks.json", "columns": both},
        "Marked": {"file_name": "math/Asks.json", "columns": both, "prompts_only": True},
        "Unmarked": {"file_name": "math/Asks.json", "columns": {"prompt": "prompt"}},
        "Bad": {"file_name": "coding/Bad.json", "columns": both},
        "Root": {"file_name": "Root.json", "columns": both},
        "Absolute": {"file_name": "/math/Sums_train.json", "columns": both},
        "Missing": {"file_name": "math/Missing.json", "columns": both},
        "Long": {"file_name": f"math/{'x' * 300}.json", "columns": both},
        "Broken": {"file_name": "math/Broken.json", "columns": both},
        "Defaults": {"file_name": "math/Sums_train.json"},
        "Typo": {"file_name": "math/Sums_train.json", "columns": both | {"sytem": "system"}},
        "Tags": {"file_name": "A.json", "formatting": "sharegpt", "columns": {}, "tags": {"role_tag": "role"}},
        "Remote": {"file_name": "math/Sums_train.json", "columns": both, "script_url": "evil.py"},
        "Strange": {"file_name": "math/Sums_train.json", "formatting": ["alpaca"]},
        "Odd": {"file_name": "math/Sums_train.json", "columns": ["prompt"]},
        "Nothing": {},
        "a,b": [],
    }
    put(data, "dataset_info.json", entries)
    done = call(data, "--check")
    lines = [line.replace(f"{data}/", "") for line in done.stderr.splitlines()]
    assert done.returncode == 1
    assert lines[:-1] == [
        "error: Sums_test: math/Sums_test.json: has the same rows as Sums_train.json: "
        "a test split must differ from its train split",
        "error: Asks: math/Asks.json: response is mapped to 'response', which no row has; there are 'prompt'",
        "error: Marked: the entry has a response column and prompts_only; "
        "register the file again, with PROMPTS_ONLY=1 if it has prompts only",
        "error: Unmarked: the entry has no response column; "
        "register the file again, with PROMPTS_ONLY=1 if it has prompts only",
        "error: Bad: coding/Bad.json: row 2: empty prompt (column 'prompt')",
        "error: Bad: coding/Bad.json: row 3: empty response (column 'response')",
        "error: Root: Root.json: does not lie right in data/<category>/; the categories are "
        "coding, common-sense-reasoning, math, multimodal, made",
        "error: Absolute: /math/Sums_train.json: lies outside data/",
        "error: Missing: math/Missing.json: no such file",
        f"error: Long: math/{'x' * 300}.json: no such file",
        "error: Broken: math/Broken.json: broken JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 3 (char 2)",
        "error: Defaults: math/Sums_train.json: prompt is mapped to 'instruction', which no row has; "
        "there are 'prompt', 'response'",
        "error: Defaults: math/Sums_train.json: query is mapped to 'input', which no row has; "
        "there are 'prompt', 'response'",
        "error: Defaults: math/Sums_train.json: response is mapped to 'output', which no row has; "
        "there are 'prompt', 'response'",
        "error: Typo: alpaca rows have no 'sytem' to map; known: prompt, query, response, system, history, images",
        "error: Tags: no column is mapped as messages",
        "error: Tags: tags lack content_tag, for which LLaMA-Factory then has no default",
        "error: Tags: tags lack user_tag, for which LLaMA-Factory then has no default",
        "error: Tags: tags lack assistant_tag, for which LLaMA-Factory then has no default",
        "error: Remote: key 'script_url' has no place in an entry here",
        "error: Strange: formatting ['alpaca'] is not known here; known: alpaca, sharegpt",
        "error: Odd: columns is not an object of names",
        "error: Nothing: the entry has no file_name",
        "error: a,b: 'a,b' is no dataset name: letters, digits, . + - _ and single blanks",
        "error: a,b: the entry is a list, not an object",
    ]
    assert lines[-1].startswith("error: dataset_info.json: faults: 25, in 18 of 19 datasets; correct the files")


def test_checking_nothing_is_an_error(data):
    assert "there is nothing registered" in refused(data, "--check")[0]


# What training code asks


def test_an_unregistered_dataset_names_the_way_out(data):
    put(data, "math/Sums_train.json", sums())
    with pytest.raises(UserError, match=r"'Sums' is not registered in .*`make register FILE=.*math/Sums_train.json`"):
        dataset_info.entry_of("Sums", data)
    with pytest.raises(UserError, match=r"make register FILE=.*data/<category>/<file>.json`; registered: none yet"):
        dataset_info.entry_of("Other", data)
    table = Path(__file__).parent.parent / "data" / "sources.yaml"
    put(data, "sources.yaml", table.read_text(encoding="utf-8"))
    with pytest.raises(UserError, match=r"'ARC-c' is not registered in .*: `make data DATASET=ARC-c`"):
        dataset_info.entry_of("ARC-c", data)


def test_a_file_that_went_away_is_named(data):
    file = put(data, "math/Sums_train.json", sums())
    registered(data, file)
    assert dataset_info.data_file("Sums", data) == file
    os.remove(file)
    with pytest.raises(UserError, match=r"math/Sums_train.json: dataset 'Sums' has no such file"):
        dataset_info.data_file("Sums", data)


def test_an_entry_that_would_run_code_or_leave_data_is_not_handed_out(data):
    put(
        data, "dataset_info.json", {"A": {"file_name": "../A.json"}, "B": {"file_name": "B.json", "script_url": "b.py"}}
    )
    with pytest.raises(UserError, match="lies outside data/"):
        dataset_info.entry_of("A", data)
    with pytest.raises(UserError, match="script_url"):
        dataset_info.data_file("B", data)


def test_a_row_number_that_is_none_is_named(data, monkeypatch):
    monkeypatch.setenv("ACCEPT", "17,40")
    told = refused(data, put(data, "math/Sums.json", sums()))
    assert told == ["error: ACCEPT=17,40: '17,40' is no number of a row; give them with blanks between"]


def test_a_file_below_the_home_folder_is_found_where_the_shell_leaves_its_tilde(data, tmp_path, monkeypatch):
    from paragen.dataset import registration

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "table.csv").write_text("a")
    assert registration.find_file("~/table.csv", data) == tmp_path / "table.csv"
