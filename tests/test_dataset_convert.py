"""What a user relies on when registering a table of another kind than .json, or a data set of the hub."""

import datetime
import decimal
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers import in_process

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "utils" / "register_dataset.py"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "my data" / "math").mkdir(parents=True)
    return tmp_path / "my data"


@pytest.fixture
def mine(tmp_path):
    """Write a user's file outside data/: text, or a table as Parquet."""

    def write(name, content):
        path = tmp_path / name
        if isinstance(content, dict):
            pyarrow.parquet.write_table(pyarrow.table(content), path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def call(data, *arguments, **environment):
    """Run the script's `main` on `data`, or the script where HF_ENDPOINT is set: `datasets` reads it on import."""
    if not environment:
        return in_process.call("register_dataset", "--data-dir", data, *arguments)
    command = list(map(str, [sys.executable, SCRIPT, "--data-dir", data, *arguments]))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def registered(data, *arguments, **environment):
    done = call(data, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(data, *arguments, **environment):
    """Register, expecting one line of error and nothing written; that line."""
    before = sorted((path, path.read_bytes()) for path in data.rglob("*") if path.is_file())
    done = call(data, *arguments, **environment)
    assert done.returncode == 1, done.stdout
    assert sorted((path, path.read_bytes()) for path in data.rglob("*") if path.is_file()) == before
    assert done.stderr.startswith("error: ")
    return done.stderr.splitlines()[-1]


def rows(data, name):
    return json.loads((data / name).read_text(encoding="utf-8"))


def manifest(data):
    return json.loads((data / "dataset_info.json").read_text())


def test_a_csv_becomes_json_under_its_category_and_its_values_stay_the_text_they_are(data, mine):
    table = mine("Sums.csv", '\ufeffquestion,answer,id\r\n"a, ""b""\r\nc",007,1\r\nd,NA,2\r\n\r\n雪,1.50,3\r\n')
    printed = registered(data, table, "--category", "math")
    answers = [('a, "b"\r\nc', "007"), ("d", "NA"), ("雪", "1.50")]
    assert rows(data, "math/Sums.json") == [{"prompt": prompt, "response": answer} for prompt, answer in answers]
    columns = {"prompt": "prompt", "response": "response"}
    assert manifest(data) == {"Sums": {"file_name": "math/Sums.json", "columns": columns}}
    assert "Sums: registered" in printed and "columns left out: 'id'" in printed


def test_columns_are_mapped_as_the_user_says_blanks_in_their_names_and_all(data, mine):
    table = mine("T.csv", "My Question,The Answer,system\nq,a,s\n")
    registered(data, table, "--category", "math", "--columns", "prompt=My Question response=The Answer system=")
    assert rows(data, "math/T.json") == [{"prompt": "q", "response": "a"}]


def test_a_jsonl_file_may_lack_keys_and_hold_numbers(data, mine):
    lines = ['{"instruction": "1+1?", "output": 2, "system": "s"}', "", '{"instruction": "x", "output": true}']
    printed = registered(data, mine("T_train.jsonl", "\n".join(lines)), "--category", "math")
    first, second = rows(data, "math/T_train.json")
    assert first == {"prompt": "1+1?", "response": "2", "system": "s"}
    assert second == {"prompt": "x", "response": "true", "system": None}
    assert manifest(data).keys() == {"T"}
    assert "written as text: the column 'output', such as '2' in row 1" in printed


def test_parquet_with_nested_columns_dates_and_what_is_missing(data, mine):
    table = mine("T.parquet", {
        "question": ["a", "b"],
        "answers": [{"text": ["x", "y"], "start": [1, 2]}, {"text": ["z"], "start": [3]}],
        "level": [1.0, float("nan")],
        "day": [datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)],
        "price": [decimal.Decimal("1.10"), decimal.Decimal("2.00")],
    })  # fmt: skip
    said = "prompt=question response=answers.text.0 system=level"
    printed = registered(data, table, "--category", "math", "--columns", said)
    expected = [{"prompt": "a", "response": "x", "system": "1.0"}, {"prompt": "b", "response": "z", "system": None}]
    assert rows(data, "math/T.json") == expected
    assert "columns left out: 'day', 'price'" in printed
    said = "prompt=day response=price"
    registered(data, table, "--category", "math", "--name", "Prices", "--columns", said)
    assert rows(data, "math/Prices.json")[0] == {"prompt": "2020-01-01", "response": "1.10"}


def test_conversations_in_parquet_keep_their_turns_and_tags(data, mine):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    registered(data, mine("Chat.parquet", {"messages": [talk, talk]}), "--category", "coding")
    assert rows(data, "coding/Chat.json") == [{"messages": talk}] * 2
    entry = manifest(data)["Chat"]
    assert entry["formatting"] == "sharegpt" and entry["tags"]["user_tag"] == "user"


def test_prompts_alone_can_be_converted_and_rows_held_out(data, mine):
    registered(data, mine("P.csv", "question\nq\n"), "--category", "math", "--prompts-only")
    assert manifest(data)["P"]["prompts_only"]
    table = mine("H.csv", "question,answer\n" + "q,a\n" * 9)
    registered(data, table, "--category", "math", "--held-out", "2")
    assert manifest(data)["H"]["held_out"] == 2
    assert "held_out is 9, which leaves none of 9 rows" in refused(data, table, "--category=math", "--held-out=9")


def test_a_file_in_its_categorys_folder_needs_no_category_and_another_call_changes_nothing(data, mine):
    table = mine("my data/math/T.csv", "question,answer\nq,a\n")
    registered(data, table)
    before = (data / "math/T.json").stat().st_mtime_ns, (data / "dataset_info.json").read_bytes()
    assert "already registered" in registered(data, table)
    assert ((data / "math/T.json").stat().st_mtime_ns, (data / "dataset_info.json").read_bytes()) == before
    table.write_text("question,answer\nq,b\n")
    assert "T.json: is there with other rows; give another NAME, or REPLACE=1" in refused(data, table)
    registered(data, table, "--replace")
    assert rows(data, "math/T.json") == [{"prompt": "q", "response": "b"}]


def test_a_name_of_another_file_and_a_category_that_is_none_are_refused(data, mine):
    table = mine("T.csv", "question,answer\nq,a\n")
    registered(data, table, "--category", "math")
    assert "'T' is already registered for 'math/T.json'" in refused(data, table, "--category", "coding")
    assert "say which CATEGORY it is of: coding, " in refused(data, table)
    assert "unknown category 'maths'" in refused(data, table, "--category", "maths")
    assert "'a,b' is no dataset name" in refused(data, table, "--category", "math", "--name", "a,b")


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("T.csv", "question,answer\nq\n", "line 2: 1 values for 2 columns"),
        ("T.csv", 'question,answer\n"q,a\n', "broken CSV: unexpected end of data"),
        ("T.csv", "question;answer\nq;a\n", "the columns must be separated by commas"),
        ("T.csv", "answer,answer\nq,a\n", "the header names 'answer' twice"),
        ("T.csv", "question,answer\nq,\xe9\n".encode("latin-1"), "is not UTF-8"),
        ("T.csv", "question,answer\nq,a\nr,\n", "T.csv: row 2: empty response"),
        ("T.csv", "", "there are no rows"),
        ("T.csv", "a,b\nq,a\n", "no column is plainly the prompt; there are 'a', 'b'"),
        ("T.jsonl", '{"question": "q", "answer": "a"}\n{"que', "line 2: broken JSON"),
        ("T.jsonl", "[1, 2]\n", "line 1: is a list, not an object"),
        ("T.jsonl", '{"question": "q", "answer": ["a"]}', "holds a list, not text; name a part of it, e.g. answer.0"),
        ("T.jsonl", '{"question": "q", "answer": {"text": 1}}', "name a part of it, e.g. answer.text"),
        ("T.jsonl", '{"question": "q", "answer": "\\ud800"}', "row 1: the column 'response' holds half of a surrogate"),
        ("T.parquet", b"no table", "is no readable Parquet"),
        ("T.parquet", {"question": ["q"], "answer": [b"\xff"]}, "row 1: the column 'answer' holds bytes, not text"),
    ],
)
def test_what_cannot_be_read_or_trained_on_is_named_and_nothing_is_written(data, mine, name, content, cause):
    assert cause in refused(data, mine(name, content), "--category", "math")


def test_a_part_that_no_row_has_is_named(data, mine):
    table = mine("T.jsonl", '{"question": "q", "answer": {"text": "a"}}')
    error = refused(data, table, "--category", "math", "--columns", "response=answer.txt")
    assert "=answer.txt: no row has this part of a column; there are 'question', 'answer'" in error
    assert "there is no such file" in refused(data, data / "math/None.csv")


# The hub, spoken to over its own protocol


CARD = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.parquet}
  - {split: test, path: main/test.parquet}
dataset_info:
- config_name: main
  features:
  - {name: question, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': even, '1': odd}}}
---
"""


class Hub(BaseHTTPRequestHandler):
    """One data set, me/sums, at one commit."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are sent apart, and each would wait for the other's receipt
    commit = "a" * 40
    files: dict[str, bytes] = {}

    def do_GET(self):
        path = self.path.partition("?")[0]
        place = path.partition(f"/resolve/{self.commit}/")[2] or path.partition("/resolve/main/")[2]
        if "me/sums" in path and place in self.files:
            body = self.files[place]
            self.answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": self.commit})
        elif "/resolve/" in path and "me/sums" in path:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif path.startswith("/api/datasets/me/sums/tree/"):
            self.answer(200, json.dumps([
                {"type": "file", "path": place, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for place, body in self.files.items()
                if place.startswith(path.partition(self.commit)[2].lstrip("/"))
            ]).encode())  # fmt: skip
        elif path.startswith("/api/datasets/me/sums"):
            siblings = [{"rfilename": place} for place in self.files]
            self.answer(200, json.dumps({"id": "me/sums", "sha": self.commit, "siblings": siblings}).encode())
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, state, body, headers=None):
        self.send_response(state)
        for name, value in (
            {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    """The environment with which the hub is our own server."""

    def parquet(columns):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
        return buffer.getvalue()

    train = {"question": ["1?", "2?"], "label": pyarrow.array([1, 0], pyarrow.int64())}
    test = {"question": ["3?"], "label": pyarrow.array([1], pyarrow.int64())}
    Hub.files = {"README.md": CARD, "main/train.parquet": parquet(train), "main/test.parquet": parquet(test)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    server.shutdown()
    server.server_close()


def test_a_data_set_of_the_hub_is_brought_with_its_labels_by_name(data, hub):
    said = ["--category", "math", "--columns", "response=label"]
    registered(data, "hub:me/sums", *said, **hub)
    assert rows(data, "math/sums.json") == [{"prompt": "1?", "response": "odd"}, {"prompt": "2?", "response": "even"}]
    registered(data, "hub:me/sums:main:test", *said, **hub)
    assert rows(data, "math/sums_test.json") == [{"prompt": "3?", "response": "odd"}]
    assert manifest(data).keys() == {"sums", "sums_test"}


def test_what_the_hub_does_not_have_is_named_in_one_line(data, hub):
    assert "Unknown split" in refused(data, "hub:me/sums:main:nope", "--category", "math", **hub)
    assert "'nope' not found" in refused(data, "hub:me/sums:nope", "--category", "math", **hub)
    assert "hub:me/none: cannot be loaded: " in refused(data, "hub:me/none", "--category", "math", **hub)
    assert "say it as hub:<repo>[:<config>[:<split>]]" in refused(data, "hub:../x", "--category", "math")
    assert "say which CATEGORY it is of" in refused(data, "hub:me/sums")


def test_a_hub_dataset_with_pictures_is_refused(monkeypatch):
    """As text alone, its questions could not be answered."""
    import datasets

    from paragen.common.cli import UserError
    from paragen.dataset import convert

    features = datasets.Features({"question": datasets.Value("string"), "image": datasets.Image()})
    table = datasets.Dataset.from_dict({"question": ["what is it?"], "image": [None]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: table)
    with pytest.raises(UserError, match="hub:me/pets: the column 'image' holds pictures"):
        list(convert.read_hub("hub:me/pets"))
