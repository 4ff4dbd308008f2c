"""What a user relies on when bringing prepared datasets, from real servers on this machine that behave in many ways."""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from helpers import in_process
from helpers.forked_python import PYTHON

from paragen.common.cli import UserError
from paragen.dataset import sources
from paragen.dataset.dataset_info import HELD_OUT

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "utils" / "fetch_data.py"
MATH = "math"
PAUSE_S = 0.08  # of a slow server, after 20 kB


def rows(count, **more):
    return [{"prompt": f"{n} + {n}? {more.get('pad', '')}", "response": str(2 * n)} for n in range(count)]


def blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Upstream:
    """A repository's files, and the table that a user's data folder has of them."""

    def __init__(self, data):
        self.data, self.content, self.files = data, {}, {}
        data.mkdir()

    def add(self, name, content, kind="train", category=MATH, dataset=None, **more):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        path = f"prepare/data/{name}"
        self.content[path] = content
        dataset = dataset or name.removesuffix(".json").removesuffix("_train")
        self.files[name] = {"dataset": dataset, "category": category, "kind": kind, "path": path, "blob": blob(content)}
        self.files[name] |= {"bytes": len(content)} | more
        table = {"repository": "someone/something", "commit": "0" * 40, "files": self.files}
        (self.data / "sources.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
        return self.data / category / name

    def whole(self, name):
        """Whether a file is in its place with upstream's content, and nothing is left lying beside it."""
        target = self.data / self.files[name]["category"] / name
        left = [path.name for path in target.parent.iterdir() if path.name.startswith(f".{name}")]
        return target.read_bytes() == self.content[self.files[name]["path"]] and not left

    def parts(self):
        return sorted(self.data.glob("*/.*.part"))

    def manifest(self):
        path = self.data / "dataset_info.json"
        return json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    """The servers are on this machine."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def upstream(tmp_path):
    """Sums: a training set and its test split, some 200 kB each."""
    upstream = Upstream(tmp_path / "data")
    upstream.add("Sums_train.json", rows(2000, pad="x" * 60))
    upstream.add("Sums_test.json", rows(1500, pad="y" * 90), kind="test")
    return upstream


class Site(ThreadingHTTPServer):
    """A server of `content` below /mirror/, unless `manner(handler, path, body)` answers and returns true."""

    daemon_threads = True

    def __init__(self, content, manner=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.manner, self.asked = content, manner, []
        self.at_once, self.most_at_once, self.lock = 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/mirror"

    @contextlib.contextmanager
    def sending(self):
        """Count the answers that are sent at the same time, while the body runs."""
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self.lock:
                self.at_once -= 1

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are sent apart, and each would wait for the other's receipt

    def do_GET(self):
        path = self.path.removeprefix("/mirror/")
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        self.server.asked.append((path, start))
        body = self.server.content.get(path)
        if body is None:
            self.send_error(404)
        elif not (self.server.manner and self.server.manner(self, path, body)):
            self.send(body, start)

    def send(self, body, start=0, upto=None, pause=0.0, length=True):
        """Send body[start:upto], with the headers of the whole of body[start:]."""
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if length:
            self.send_header("Content-Length", str(len(body) - start))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        piece = 20_000
        with contextlib.suppress(OSError), self.server.sending():
            for at in range(start, upto or len(body), piece):
                self.wfile.write(body[at : min(at + piece, upto or len(body))])
                self.wfile.flush()
                time.sleep(pause)
        if upto or not length:
            self.close_connection = True
            self.connection.close() if upto else None

    def log_message(self, *arguments):
        pass


@pytest.fixture
def serve(upstream):
    """Start a server of upstream's files that behaves in some manner."""
    running = []

    def start(manner=None, content=None):
        running.append(Site(upstream.content if content is None else content, manner))
        return running[-1]

    yield start
    for site in running:
        site.shutdown()
        site.server_close()


def once(manner):
    """Behave in this manner at the first request for each file only."""
    seen = set()

    def first(handler, path, body):
        if path in seen:
            return False
        seen.add(path)
        return manner(handler, path, body)

    return first


def drops(at=100_000):
    def manner(handler, path, body):
        handler.send(body, upto=at)
        return True

    return manner


def slowly(handler, path, body):
    start = int((re.match(r"bytes=(\d+)-", handler.headers.get("Range", "")) or [0, 0])[1])
    handler.send(body, start, pause=PAUSE_S)
    return True


def command(upstream, *arguments):
    return list(map(str, [PYTHON, SCRIPT, *arguments, "--data-dir", upstream.data]))


def environment(source):
    return {"PARAGEN_DATA_SOURCE": str(source)} if source else {}


def fetch(upstream, source, *arguments, limit=None, **more):
    """Run the script's `main`, or the script where files are limited to `limit` bytes; none ends in a traceback."""
    arguments = arguments or ["Sums"]
    if not limit:
        return in_process.call("fetch_data", *arguments, "--data-dir", upstream.data, **environment(source), **more)
    done = subprocess.run(
        command(upstream, *arguments), env=os.environ | environment(source) | more, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def brought(upstream, source, *arguments, **more):
    done = fetch(upstream, source, *arguments, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def failed(upstream, source, *arguments, **more):
    """Run it, expecting a failure; the lines of stderr, all of them errors."""
    done = fetch(upstream, source, *arguments, **more)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), done.stderr
    return lines


# What is brought, and what is registered


def test_a_dataset_comes_with_its_test_split_and_is_registered(upstream, serve):
    site = serve()
    printed = brought(upstream, site.address, "sums")
    assert upstream.whole("Sums_train.json") and upstream.whole("Sums_test.json")
    columns = {"prompt": "prompt", "response": "response"}
    info = upstream.manifest()
    assert info["Sums_test"] == {"file_name": "math/Sums_test.json", "columns": columns}
    assert info["Sums"] == {"file_name": "math/Sums_train.json", "columns": columns, HELD_OUT: 100}
    assert "note: held out: rows 1901 to 2000, which no recipe trains on" in printed
    assert "Sums_train.json: fetched, 0.2 MB" in printed and "2 of 2 files are there and registered" in printed


def test_what_is_there_is_not_fetched_again(upstream, serve):
    site = serve()
    brought(upstream, site.address)
    before = (upstream.data / "dataset_info.json").read_bytes()
    assert "(0 fetched" in brought(upstream, site.address)
    assert len(site.asked) == 2
    assert (upstream.data / "dataset_info.json").read_bytes() == before


def test_a_category_or_all_can_be_asked_for_but_nothing_is_no_question(upstream, serve):
    upstream.add("Code.json", rows(40), category="coding")
    site = serve()
    brought(upstream, site.address, "--category", "coding")
    assert upstream.manifest().keys() == {"Code"}
    brought(upstream, site.address, "--all")
    assert upstream.manifest().keys() == {"Code", "Sums", "Sums_test"}
    assert "name a dataset: make data DATASET=ARC-c" in failed(upstream, site.address, "--tries", "1")[0]
    assert "known: Code, Sums" in failed(upstream, site.address, "Sum")[0]
    assert "holds none of Code" in failed(upstream, site.address, "Code", "--category", "math")[0]


def test_prompts_are_registered_as_such_and_so_is_a_test_split_that_turns_out_to_be_prompts(upstream, serve):
    prompts = [{"prompt": f"{n}?"} for n in range(9)]
    upstream.add("Vista.json", prompts, kind="prompts", category="multimodal")
    upstream.add("Quiz_test.json", prompts, kind="test")
    brought(upstream, serve().address, "Vista", "Quiz")
    info = upstream.manifest()
    assert info["Vista"]["prompts_only"] and info["Quiz_test"]["prompts_only"]
    assert "response" not in info["Vista"]["columns"]


def test_the_table_says_how_many_rows_are_held_out_and_a_large_set_holds_out_what_no_recipe_reaches(upstream, serve):
    upstream.add("Told.json", rows(40), held_out=8)
    upstream.add("Tested.json", rows(41), held_out=0)
    upstream.add("Large.json", rows(6000))
    brought(upstream, serve().address, "Told", "Tested", "Large")
    info = upstream.manifest()
    assert info["Told"][HELD_OUT] == 8 and HELD_OUT not in info["Tested"] and info["Large"][HELD_OUT] == 1000


def test_gaps_in_upstreams_files_are_accepted_by_number_and_said(upstream, serve):
    with_gap = rows(20)
    with_gap[7]["response"] = ""
    file = upstream.add("Gap.json", with_gap)
    printed = brought(upstream, serve().address, "Gap")
    assert "note: row 8: empty response (column 'response'); upstream's file has it so, accepted" in printed
    assert upstream.manifest()["Gap"]["accepted_rows"] == [8]
    register = ("register_dataset", "--data-dir", upstream.data)
    assert in_process.call(*register, "--check").returncode == 0
    assert in_process.call(*register, file).returncode == 0  # the same file: what stands, stands
    with_gap[7]["response"], with_gap[8]["response"] = "14", ""
    file.write_text(json.dumps(with_gap))
    check = in_process.call(*register, "--check").stderr
    assert "row 8: stands among the accepted_rows, but nothing is wrong with it" in check
    assert "row 9: empty response" in check


def test_missing_pictures_are_named_with_where_to_get_them(upstream, serve):
    talk = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a line"}]
    shapes = [{"conversations": talk, "image": f"shapes/{n}.png"} for n in range(4)]
    upstream.add("Shapes.json", shapes, category="multimodal", pictures="https://example.org/shapes.zip")
    printed = brought(upstream, serve().address, "Shapes")
    assert "4 of 4 pictures are not in data/; the first: 'shapes/0.png'" in printed
    assert "get them from https://example.org/shapes.zip and put them below" in printed


def test_a_users_own_choice_of_columns_outlives_another_call(upstream, serve):
    table = [{"prompt": f"{n}?", "response": "a", "system": "s"} for n in range(40)]
    upstream.add("Own.json", table)
    site = serve()
    brought(upstream, site.address, "Own")
    info = upstream.manifest()
    del info["Own"]["columns"]["system"]
    (upstream.data / "dataset_info.json").write_text(json.dumps(info))
    brought(upstream, site.address, "Own")
    assert upstream.manifest()["Own"]["columns"] == {"prompt": "prompt", "response": "response"}


def test_a_name_that_stands_for_another_file_is_kept_unless_force_is_said(upstream, serve):
    mine = {"Sums": {"file_name": "math/Mine.json", "columns": {"prompt": "p", "response": "r"}}}
    (upstream.data / "dataset_info.json").write_text(json.dumps(mine))
    site = serve()
    assert "but 'Sums' is registered for 'math/Mine.json'; FORCE=1 registers" in "".join(failed(upstream, site.address))
    assert upstream.manifest()["Sums"] == mine["Sums"] and "Sums_test" in upstream.manifest()
    brought(upstream, site.address, FORCE="1")
    assert upstream.manifest()["Sums"]["file_name"] == "math/Sums_train.json"


# Servers and folders


@pytest.mark.parametrize("place", ["prepare/data/{}", "math/{}", "{}"])
def test_a_mirror_and_a_folder_hold_the_files_at_their_upstream_path_by_category_or_by_bare_name(
    upstream, serve, tmp_path, place
):
    names = {place.format(name): upstream.content[entry["path"]] for name, entry in upstream.files.items()}
    brought(upstream, serve(content=names).address + "/")
    assert upstream.whole("Sums_train.json")
    shutil.rmtree(upstream.data / MATH)
    for path, content in names.items():
        (tmp_path / "my files" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my files" / path).write_bytes(content)
    brought(upstream, tmp_path / "my files")
    assert upstream.whole("Sums_train.json") and upstream.whole("Sums_test.json")


def test_a_source_that_is_nothing_is_named(upstream, tmp_path):
    assert "neither an http(s) address nor a folder" in failed(upstream, tmp_path / "nowhere")[0]
    assert "neither an http(s) address nor a folder" in failed(upstream, "ftp://127.0.0.1/x")[0]
    assert "cannot be reached" in failed(upstream, "http://127.0.0.1:9", "Sums_test", "--tries", "1")[0]
    assert "does not hold it; looked for prepare/data/Sums_train.json" in "".join(failed(upstream, tmp_path))


def test_a_server_that_never_answers_is_not_waited_for_file_by_file(upstream):
    for number in range(20):
        upstream.add(f"More{number}.json", rows(1))
    start = time.monotonic()
    errors = failed(upstream, "http://127.0.0.1:9", "--all", "--tries", "3")
    assert len(errors) == 23
    assert time.monotonic() - start < 23 * 1.5, "one after the other they take 69 seconds"


@pytest.mark.parametrize(
    ("manner", "ranges"),
    [
        (drops(), {0, 100_000}),
        (lambda handler, path, body: bool(handler.send_error(503) or True), {0}),
        (lambda handler, path, body: bool(handler.send(body, upto=100_000, length=False) or True), {0, 100_000}),
    ],
    ids=["drops the connection", "has no time", "ends early without a length"],
)
def test_a_transfer_that_ends_early_is_gone_on_with(upstream, serve, manner, ranges):
    site = serve(once(manner))
    brought(upstream, site.address)
    assert upstream.whole("Sums_train.json") and upstream.whole("Sums_test.json")
    assert {start for _, start in site.asked} == ranges and len(site.asked) == 4


def test_a_server_that_ignores_ranges_sends_all_again_and_spoils_nothing(upstream, serve):
    first = once(drops())
    site = serve(lambda handler, path, body: first(handler, path, body) or bool(handler.send(body) or True))
    brought(upstream, site.address)
    assert upstream.whole("Sums_train.json") and upstream.whole("Sums_test.json")


def test_a_server_that_answers_another_range_spoils_nothing(upstream, serve):
    def manner(handler, path, body):
        if len(handler.server.asked) == 1:
            return drops()(handler, path, body)
        if len(handler.server.asked) == 2:
            handler.send(body, start=50_000)
            return True
        return False

    site = serve(manner)
    brought(upstream, site.address, "Sums_test")
    assert upstream.whole("Sums_test.json") and [start for _, start in site.asked] == [0, 100_000, 0]


def test_a_server_without_lengths_and_one_that_redirects_will_do(upstream, serve):
    plain = serve(lambda handler, path, body: bool(handler.send(body, length=False) or True))

    def elsewhere(handler, path, body):
        handler.send_response(302)
        handler.send_header("Location", f"{plain.address}/{path}")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    brought(upstream, serve(elsewhere).address)
    assert upstream.whole("Sums_train.json")


def test_a_server_whose_certificate_is_not_trusted_is_refused(upstream, tmp_path, serve):
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "1"]
    subprocess.run([*made, "-keyout", tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)
    site = serve()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    site.socket = context.wrap_socket(site.socket, server_side=True)
    error = failed(upstream, site.address.replace("http:", "https:"), "Sums_test")[0]
    assert "its certificate is not trusted" in error and not site.asked


# What goes wrong: one line each, nothing half-written, the rest goes on


def test_a_missing_file_and_a_wrong_one_are_named_and_the_rest_goes_on(upstream, serve):
    upstream.add("Gone.json", rows(30))
    upstream.add("Wrong.json", rows(31))
    content = dict(upstream.content)
    del content["prepare/data/Gone.json"]
    content["prepare/data/Wrong.json"] = b"[1]"
    errors = sorted(failed(upstream, serve(content=content).address, "--all"))
    assert len(errors) == 3
    assert "2 files failed: " in errors[0]
    assert errors[1].startswith("error: Gone.json: http://127.0.0.1:") and "not found (HTTP 404)" in errors[1]
    assert re.match(r"error: Wrong.json: .* holds another file: 3 bytes with blob id \w{40}, not \w{40}", errors[2])
    assert upstream.manifest().keys() == {"Sums", "Sums_test"}
    assert upstream.whole("Sums_train.json") and upstream.whole("Sums_test.json")
    assert sorted(path.name for path in (upstream.data / MATH).iterdir()) == ["Sums_test.json", "Sums_train.json"]


def test_a_server_that_never_gets_to_the_end_keeps_what_came_for_the_next_call(upstream, serve):
    errors = failed(upstream, serve(drops(60_000)).address, "Sums_test", "--tries", "2")
    assert "dropped the connection" in errors[0] and "2 times without progress; 60000 bytes are kept" in errors[0]
    assert [path.stat().st_size for path in upstream.parts()] == [60_000]
    site = serve()
    brought(upstream, site.address, "Sums_test")
    assert upstream.whole("Sums_test.json") and [start for _, start in site.asked] == [60_000]


def test_half_a_file_of_another_server_is_thrown_away_and_brought_anew(upstream, serve):
    content = {path: bytes(len(body)) for path, body in upstream.content.items()}
    failed(upstream, serve(drops(60_000), content=content).address, "Sums_test", "--tries", "1")
    site = serve()
    brought(upstream, site.address, "Sums_test")
    assert upstream.whole("Sums_test.json") and [start for _, start in site.asked] == [60_000, 0]


def test_a_full_disk_is_one_line_and_leaves_nothing(upstream, serve):
    upstream.add("Small.json", rows(30))
    errors = failed(upstream, serve().address, "--all", limit=100_000)
    assert sum("File too large; no file is left half-written" in line for line in errors) == 2
    assert upstream.manifest().keys() == {"Small"} and upstream.whole("Small.json") and not upstream.parts()


def test_a_file_with_other_content_stays_unless_force_is_said(upstream, serve):
    (upstream.data / MATH).mkdir()
    mine = upstream.data / MATH / "Sums_test.json"
    mine.write_text("[]")
    site = serve()
    assert "has other content than upstream's" in failed(upstream, site.address)[0]
    assert mine.read_text() == "[]" and upstream.whole("Sums_train.json")
    failed(upstream, site.address, FORCE="0")
    brought(upstream, site.address, FORCE="1")
    assert upstream.whole("Sums_test.json")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_middle_the_next_call_goes_on(upstream, serve, ending):
    slow = serve(slowly)
    run = subprocess.Popen(
        command(upstream, "Sums_test"), env=os.environ | environment(slow.address), stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in upstream.parts()):
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)
    run.send_signal(ending)
    assert run.wait(timeout=60) and b"Traceback" not in run.stderr.read()
    assert not (upstream.data / MATH / "Sums_test.json").exists()
    came = upstream.parts()[0].stat().st_size
    site = serve()
    brought(upstream, site.address, "Sums_test")
    assert upstream.whole("Sums_test.json") and site.asked == [("prepare/data/Sums_test.json", came)] and came > 0


def test_two_calls_at_once_bring_each_file_once(upstream, serve):
    site = serve(slowly)
    calls = [
        subprocess.Popen(command(upstream, "Sums"), env=os.environ | environment(site.address), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [call.wait(timeout=120) for call in calls] == [0, 0]
    assert upstream.whole("Sums_train.json") and upstream.whole("Sums_test.json") and len(site.asked) == 2
    assert upstream.manifest().keys() == {"Sums", "Sums_test"}


def test_several_files_come_at_once(upstream, serve):
    for name in "ABCD":
        upstream.add(f"{name}.json", rows(2000, pad=name * 60))
    site = serve(slowly)
    brought(upstream, site.address, *"ABCD")
    assert site.most_at_once > 1


def test_every_file_of_the_shipped_table_is_registered_in_a_clean_clone(tmp_path):
    """The names, kinds and places of the shipped table; of the contents, only which files are equal."""
    shipped = sources.table(ROOT / "data" / "sources.yaml")["files"]
    clone, there = Upstream(tmp_path / "data"), {}
    for name, entry in shipped.items():
        content = there.setdefault(entry["blob"], rows(12, pad=name))
        content = [{"prompt": row["prompt"]} for row in content] if entry["kind"] == "prompts" else content
        clone.add(
            name, content, entry["kind"], entry["category"], entry["dataset"], held_out=entry.get("held_out") and 1
        )
    folder = tmp_path / "mirror"
    for path, content in clone.content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    brought(clone, str(folder), "GSM8K")
    assert {name: clone.manifest()[name]["file_name"] for name in clone.manifest()} == {
        "GSM8K": "math/GSM8K_train.json",
        "GSM8K_test": "math/GSM8K.json",
    }
    brought(clone, str(folder), "--all")
    assert clone.manifest().keys() == {entry["dataset"] for entry in shipped.values()}
    brought(clone, str(folder), "--all")
    checked = in_process.call("register_dataset", "--check", "--data-dir", clone.data)
    assert checked.returncode == 0 and "39 datasets, no faults" in checked.stdout, checked.stderr


# The table


def test_the_shipped_table_is_sound_and_every_training_set_can_be_scored_on_unseen_rows():
    files = sources.table(ROOT / "data" / "sources.yaml")["files"]
    names = [entry["dataset"] for entry in files.values()]
    assert len(files) == 39 and len(set(names)) == 39
    kinds = {entry["dataset"]: entry["kind"] for entry in files.values()}
    for entry in files.values():
        if entry["kind"] != "train":
            assert "held_out" not in entry
        elif kinds.get(f"{entry['dataset']}_test") == "test":
            assert entry["held_out"] == 0
        elif entry["rows"]:
            assert entry["rows"] // 20 <= entry["held_out"] and entry["rows"] - entry["held_out"] <= 5000
        else:
            assert entry["held_out"] is None
    for known in ("ARC-c", "HellaSwag", "WinoGrande", "GSM8K"):
        assert kinds[known] == "train" and kinds[f"{known}_test"] == "test"


def test_names_are_found_without_case_and_punctuation_and_a_split_or_a_file_alone():
    files = sources.table(ROOT / "data" / "sources.yaml")["files"]
    assert sources.selected(files, ["arcc"], None) == ["ARC-c_train.json", "ARC-c_test.json"]
    assert sources.selected(files, ["mathiio68kmini"], None) == ["Math-IIO-68K-Mini.json"]
    assert sources.selected(files, ["GSM8K"], None) == ["GSM8K_train.json", "GSM8K.json"]
    assert sources.selected(files, ["winogrande"], None) == [
        "WinoGrande_train.json",
        "WinoGrande_validation.json",
        "WinoGrande_test.json",
    ]
    assert sources.selected(files, ["WinoGrande_validation.json"], None) == ["WinoGrande_validation.json"]
    assert len(sources.selected(files, [], "math")) == 9
    with pytest.raises(UserError, match="dataset 'ARC' is not known; .*known: ARC-c, ARC-e, BoolQ"):
        sources.selected(files, ["ARC"], None)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"category": "maths"}, "category 'maths' is none of coding"),
        ({"kind": None}, "kind None is none of train, test, prompts"),
        ({"blob": "abc"}, "blob 'abc' is not 40 hexadecimal digits"),
        ({"rows": "many"}, "rows 'many' is not a number"),
        ({"path": None}, "path None is not a text"),
    ],
)
def test_a_slip_in_the_table_is_named(upstream, change, cause):
    upstream.add("A.json", rows(3))
    upstream.add("A.json", rows(3), **change) if "path" not in change and "blob" not in change else None
    table = yaml.safe_load((upstream.data / "sources.yaml").read_text())
    table["files"]["A.json"] |= change
    (upstream.data / "sources.yaml").write_text(yaml.safe_dump(table))
    assert failed(upstream, None)[0].endswith(f"sources.yaml: A.json: {cause}" + (", common-sense-reasoning, math, "
        "multimodal, made" if "category" in change else ""))  # fmt: skip
