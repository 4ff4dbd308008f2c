"""`make model`: from a server that speaks the hub's protocol, and folders that were put there by hand."""

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import in_process
from helpers.forked_python import PYTHON
from helpers.hub_server import COMMIT, Hub, Repository

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.model import base_models, model_files

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
QWEN = "Qwen/Qwen2.5-0.5B-Instruct"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
MB = 1 << 20


@pytest.fixture(scope="module")
def tiny(model_folder) -> dict[str, bytes]:
    """The files of a random two-layer Llama, as a repository on the hub has them."""
    return {path.name: path.read_bytes() for path in sorted(model_folder.iterdir()) if path.is_file()}


@pytest.fixture
def top(tmp_path) -> Path:
    """A project without models, with a space in its path."""
    top = tmp_path / "my project"
    (top / "models").mkdir(parents=True)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    return top


NOWHERE = "http://127.0.0.1:9"  # nothing listens there


def start(top: Path, model: str, hub: Hub, python=(PYTHON,), **environment: str):
    """`fetch_model.py` as a process whose hub is `hub`, and that is not logged in."""
    clean = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|.*proxy", name, re.I)}
    clean |= {"HF_HOME": str(top / "no login"), "HF_ENDPOINT": hub.url, "PARAGEN_TOP": str(top)}
    command = [*python, ROOT / "utils" / "fetch_model.py", model]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**clean, **environment}, **pipes)


def fetch(top: Path, model: str, hub: Hub | None = None, **options) -> tuple[int, str, str]:
    """Status, stdout and stderr of `fetch_model.py`; of its `main` in this process where no hub is to be asked."""
    if hub is None:
        from huggingface_hub import constants

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", NOWHERE)
            patch.setattr(constants, "HF_HUB_OFFLINE", False)
            patch.setattr(paths, "ROOT", top)
            patch.setattr(paths, "MODELS", top / "models")
            return in_process.call("fetch_model", model)
    process = start(top, model, hub, **options)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def error_of(outcome) -> str:
    """The one error line of a call that failed."""
    status, _, stderr = outcome
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(errors) == 1 and "Traceback" not in stderr, stderr
    return errors[0]


def left_in(top: Path) -> list[str]:
    return sorted(path.name for path in (top / "models").iterdir() if path.name not in ("models.yaml", ".hashes.json"))


def weights_of(size: int) -> bytes:
    """A safetensors file with one tensor of random bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + os.urandom(size)


def sharded(tiny: dict, size: int = 100) -> dict[str, bytes]:
    """The repository with its weights in two files and an index."""
    files = {name: data for name, data in tiny.items() if name != "model.safetensors"}
    files |= {name: weights_of(size) for name in SHARDS}
    index = {"metadata": {}, "weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


# ------------------------------------------------------------------------------------------------------ the download


def test_a_known_model_comes_under_its_folder_with_its_origin_noted_and_a_second_call_downloads_nothing(top, tiny):
    with Hub({QWEN: Repository(tiny)}) as hub:
        status, stdout, stderr = fetch(top, "qwen2.5-0.5b", hub)
        assert status == 0, stderr
        folder = top / "models" / "Qwen2.5-0.5B-Instruct"
        source = json.loads((folder / "source.json").read_bytes())
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "source.json"} == tiny
        assert (source["hub_id"], source["revision"], source["license"]) == (QWEN, COMMIT, "mit")
        assert source["sha256"] == base_models.identity_of(folder)["sha256"]
        assert base_models.identity_of(folder)["revision"] == COMMIT
        assert left_in(top) == [folder.name]
        requests = len(hub.requests)
        status, stdout, _ = fetch(top, "qwen2.5-0.5b", hub)
        assert status == 0 and "is there and whole" in stdout and len(hub.requests) == requests


def test_only_safetensors_and_what_reads_them_are_downloaded_and_no_weights_twice(top, tiny):
    unwanted = [
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.safetensors",
        "modeling_x.py",
        "original/a.safetensors",
    ]
    unwanted += ["tf_model.h5", "flax_model.msgpack", "onnx/model.onnx", ".gitattributes", "model.fp16.safetensors"]
    repository = Repository({**sharded(tiny), **dict.fromkeys(unwanted, b"no"), "LICENSE": b"terms"})
    with Hub({"org/My.Model-1": repository}) as hub:
        assert fetch(top, "org/My.Model-1", hub)[0] == 0
        folder = top / "models" / "My.Model-1"
        assert {path.name for path in folder.iterdir()} == {*sharded(tiny), "LICENSE", "source.json"}
        assert {path.name for path in model_files.weight_files(folder)} == set(SHARDS)
        assert not any(hub.of(name) for name in unwanted)


def test_a_model_outside_the_table_is_known_by_its_folder_afterwards(top, tiny, monkeypatch):
    with Hub({"org/My.Model-1": Repository(tiny)}) as hub:
        assert fetch(top, "org/My.Model-1", hub)[0] == 0
    assert "is there and whole" in fetch(top, "my.model-1")[1]
    monkeypatch.setattr(base_models.paths, "MODELS", top / "models")
    short, entry = base_models.find_entry("mymodel1")
    assert short == "my.model-1" and entry["folder"] == "My.Model-1" and entry["hub_id"] == "org/My.Model-1"
    assert base_models.find_entry("qwen2.505b") == ("qwen2.5-0.5b", base_models.table()["qwen2.5-0.5b"])
    assert base_models.find_entry("Qwen2.5-0.5B-Instruct")[0] == "qwen2.5-0.5b"


@pytest.mark.parametrize(
    ("stated", "noted"), [(["mit", "apache-2.0"], "mit-and-apache-2.0"), ([], None), ({"name": "mit"}, None)]
)
def test_a_licence_is_noted_as_a_text_however_the_card_states_it(top, tiny, stated, noted):
    with Hub({"org/tiny": Repository(tiny, license=stated)}) as hub:
        assert fetch(top, "org/tiny", hub)[0] == 0
    assert base_models.source_of(top / "models" / "tiny")["license"] == noted


def test_a_killed_download_goes_on_in_the_middle_of_the_file(top, tiny):
    files = {**sharded(tiny), SHARDS[0]: weights_of(3 * MB), SHARDS[1]: weights_of(40 * MB)}
    with Hub({QWEN: Repository(files)}) as hub:
        hub.hold[SHARDS[1]] = 25 * MB
        process = start(top, QWEN, hub)
        assert hub.held.wait(30)
        (part,) = wait_for(lambda: [p for p in (top / "models").glob("*/.*.part") if p.stat().st_size >= 20 * MB])
        arrived = part.stat().st_size
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert [name for name in left_in(top) if not name.startswith(".")] == []
        hub.released.set()
        hub.requests.clear()
        status, _, stderr = fetch(top, QWEN, hub)
        assert status == 0, stderr
        assert hub.sent(SHARDS[0]) == 0
        assert [request.range for request in hub.of(SHARDS[1])] == [f"bytes={arrived}-"]
        assert hub.sent(SHARDS[1]) == len(files[SHARDS[1]]) - arrived
        assert (top / "models" / "Qwen2.5-0.5B-Instruct" / SHARDS[1]).read_bytes() == files[SHARDS[1]]
        assert left_in(top) == ["Qwen2.5-0.5B-Instruct"]


def wait_for(condition):
    for _ in range(3000):
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it never came")


def test_a_dropped_connection_is_taken_up_within_the_call(top, tiny):
    files = {**tiny, "model.safetensors": weights_of(24 * MB)}
    with Hub({QWEN: Repository(files)}) as hub:
        hub.drop["model.safetensors"] = 15 * MB
        status, _, stderr = fetch(top, QWEN, hub)
        assert status == 0, stderr
        assert [request.range for request in hub.of("model.safetensors")] == [None, f"bytes={10 * MB}-"]
    assert (top / "models" / "Qwen2.5-0.5B-Instruct" / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_a_stopped_download_ends_at_once_and_is_kept(top, tiny):
    with Hub({QWEN: Repository({**tiny, "model.safetensors": weights_of(24 * MB)})}) as hub:
        hub.hold["model.safetensors"] = 15 * MB
        process = start(top, QWEN, hub)
        assert hub.held.wait(30)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.communicate()[1]
        assert left_in(top) == [".Qwen2.5-0.5B-Instruct.download"]


def test_what_came_of_an_older_commit_is_not_used(top, tiny):
    staging = top / "models" / ".Qwen2.5-0.5B-Instruct.download"
    staging.mkdir()
    (staging / ".model.safetensors.0123456789abcdef.part").write_bytes(b"old")
    (staging / "model-00001-of-00009.safetensors").write_bytes(b"old")
    (staging / "model.safetensors").write_bytes(bytes(len(tiny["model.safetensors"])))
    with Hub({QWEN: Repository(tiny)}) as hub:
        assert fetch(top, QWEN, hub)[0] == 0
    folder = top / "models" / "Qwen2.5-0.5B-Instruct"
    assert {path.name for path in folder.iterdir()} == {*tiny, "source.json"}
    assert (folder / "model.safetensors").read_bytes() == tiny["model.safetensors"]


def test_two_calls_at_once_download_once(top, tiny):
    with Hub({QWEN: Repository(tiny)}) as hub:
        hub.hold["model.safetensors"] = 0
        first = start(top, QWEN, hub)
        assert hub.held.wait(30)
        second = start(top, "qwen2.5-0.5b", hub)
        assert "waiting for it" in second.stdout.readline()
        hub.released.set()
        first.communicate(timeout=60)
        said, _ = second.communicate(timeout=60)
        assert (first.returncode, second.returncode) == (0, 0) and "is there and whole" in said
        assert len(hub.of("model.safetensors")) == 1


def test_the_token_goes_to_the_hub_and_not_to_its_storage(top, tiny):
    with Hub({"google/gemma-3-4b-it": Repository(tiny, gated=True, license="gemma")}) as hub:
        status, _, stderr = fetch(top, "gemma-3-4b", hub, HF_TOKEN="hf_granted")
        assert status == 0, stderr
        about_it = [request for request in hub.requests if "gemma-3-4b-it" in request.path]
        assert {request.token for request in about_it if request.host.startswith("127.")} == {"hf_granted"}
        assert {request.token for request in about_it if request.host.startswith("localhost")} == {None}
    assert not any(b"hf_granted" in path.read_bytes() for path in (top / "models").rglob("*") if path.is_file())


def test_the_hubs_own_login_is_used(top, tiny):
    (top / "no login").mkdir()
    (top / "no login" / "token").write_text("hf_granted\n")
    with Hub({"org/closed": Repository(tiny, gated=True)}) as hub:
        assert fetch(top, "org/closed", hub)[0] == 0


# ------------------------------------------------------------------------------------------------ what can go wrong


@pytest.mark.parametrize(
    ("model", "environment", "said"),
    [
        ("gemma-3-4b", {}, "no token was sent; ask for access at https://huggingface.co/google/gemma-3-4b-it"),
        ("gemma-3-4b", {"HF_TOKEN": "hf_other"}, "no access yet; ask for access at https://huggingface.co/google/gem"),
        ("gemma-3-4b", {"HF_TOKEN": "hf_wrong"}, "the token is not valid"),
        ("gemma-3-4b", {"HF_TOKEN": "\u201chf_granted\u201d"}, "no token has, such as a curly quote; copy it again"),
        ("gemma-3-4b", {"HF_TOKEN": "hf_granted\x0b1"}, "no token has, such as a curly quote; copy it again"),
        ("org/nowhere", {}, "org/nowhere: no such repository at http://127.0.0.1"),
        ("org/nowhere", {"HF_TOKEN": "hf_granted"}, "org/nowhere: no such repository"),
        ("org/tiny@v9", {}, "org/tiny: has no revision 'v9'"),
        ("org/pickles", {}, "has no model.safetensors nor model.safetensors.index.json, only pytorch_model.bin"),
        ("org/adapter", {}, "org/adapter: has no config.json"),
        ("org/huge", {}, "of disk are free"),
        ("org/tiny", {"HF_ENDPOINT": "hf-mirror.com"}, "HF_ENDPOINT=hf-mirror.com: is no address"),
        ("org/tiny", {"HF_ENDPOINT": "{hub}/elsewhere"}, "knows no such address; is HF_ENDPOINT a hub"),
        ("org/tiny", {"HF_ENDPOINT": "{hub}/a%20page"}, "does not answer as a hub does"),
        ("org/tiny", {"HF_ENDPOINT": "{hub}/an%20error"}, "does not answer as a hub does"),
        ("org/tiny", {"HF_ENDPOINT": "http://127.0.0.1:{closed}"}, "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_the_way_out(top, tiny, model, environment, said):
    repositories = {
        "google/gemma-3-4b-it": Repository(tiny, gated=True),
        "org/tiny": Repository(tiny),
        "org/huge": Repository(tiny, told_sizes={"model.safetensors": 10**16}),
        "org/pickles": Repository({"config.json": b"{}", "pytorch_model.bin": b"", "tokenizer.json": b"{}"}),
        "org/adapter": Repository({"model.safetensors": b""}),
    }
    with Hub(repositories) as hub, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        values = {"hub": hub.url, "closed": closed.getsockname()[1]}
        outcome = fetch(top, model, hub, **{name: value.format(**values) for name, value in environment.items()})
        assert said in error_of(outcome) and "hf_granted" not in outcome[2]
        assert not hub.of("model.safetensors") and not hub.of("pytorch_model.bin")
    assert [name for name in left_in(top) if not name.startswith(".")] == []


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("org/..", "is not a hub repository's name"),
        ("org/tiny.git", "is not a hub repository's name (user/name, each of at most 96 letters"),
        ("org/tiny.", "is not a hub repository's name"),
        ("org/gpt2", "models/gpt2 would be taken for gpt2 (openai-community/gpt2)"),
        ("org/BERT", "would be taken for bert"),
        ("org/name/more", "is not a hub repository's name"),
        ("llama-9b", "is not known; did you mean llama-7b?; known: bert, gemma-3-4b"),
        ("smollm2-135m@main", "is not from the hub"),
        ("", "say which model: make model MODEL=...; known: smollm2-135m, qwen2.5-0.5b"),
    ],
)
def test_a_name_for_which_no_hub_is_asked_is_refused_in_one_line_with_the_way_out(top, model, said):
    assert said in error_of(fetch(top, model))
    assert [name for name in left_in(top) if not name.startswith(".")] == []


def test_a_file_that_does_not_have_the_told_hash_is_fetched_again_next_time(top, tiny):
    repository = Repository(tiny, told_hashes={"tokenizer.json": "0" * 40})
    with Hub({QWEN: repository}) as hub:
        assert "tokenizer.json does not have the hash" in error_of(fetch(top, QWEN, hub))
        repository.told_hashes = {"model.safetensors": "0" * 64}
        assert "model.safetensors does not have the hash" in error_of(fetch(top, QWEN, hub))
        repository.told_hashes = {}
        status, _, stderr = fetch(top, QWEN, hub)
        assert status == 0, stderr


def test_a_disk_that_fills_up_is_one_line_and_what_came_is_kept(top, tiny):
    with Hub({QWEN: Repository({**tiny, "model.safetensors": weights_of(24 * MB)})}) as hub:
        limited = ["bash", "-c", f'ulimit -f {15 * MB // 1024}; exec "$@"', "limited", sys.executable]
        assert "File too large; no file is left half-written" in error_of(fetch(top, QWEN, hub, python=limited))
        status, _, stderr = fetch(top, QWEN, hub)
        assert status == 0, stderr
        assert [request.range for request in hub.of("model.safetensors")] == [None, f"bytes={15 * MB}-"]


def test_another_model_of_the_same_name_and_a_changed_one_are_not_taken_for_the_one_asked_for(top, tiny):
    with Hub({"org/tiny": Repository(tiny), "other/tiny": Repository(tiny)}) as hub:
        assert fetch(top, "org/tiny", hub)[0] == 0
        assert "holds org/tiny, not other/tiny" in error_of(fetch(top, "other/tiny", hub))
        config = top / "models" / "tiny" / "config.json"
        config.write_text(config.read_text().replace("{", '{"x": 1,', 1))
        assert "config.json changed since it was made" in error_of(fetch(top, "org/tiny", hub))


def test_a_folder_at_another_commit_than_the_requested_one_is_an_error_that_names_both(top, tiny):
    repository = Repository(tiny, tags=("v1", "bbbb"))
    with Hub({"org/tiny": repository}) as hub:
        assert fetch(top, "org/tiny@main", hub)[0] == 0
        for same in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}", f"org/tiny@{COMMIT[:4]}", "models/tiny"):
            requests = len(hub.requests)
            status, stdout, stderr = fetch(top, same, hub)
            assert status == 0 and "is there and whole" in stdout and len(hub.requests) == requests, stderr
        line = error_of(fetch(top, "org/tiny@fedcba987654", hub))
        assert f"is at commit {COMMIT}, not fedcba987654; omit @fedcba987654, or move the folder away" in line
        assert fetch(top, "org/tiny@v1", hub)[0] == 0, "the hub says that it is the same commit"
        repository.commit = COMMIT[::-1]
        line = error_of(fetch(top, "org/tiny@bbbb", hub))
        assert f"is at commit {COMMIT}, but bbbb is {COMMIT[::-1]}; omit @bbbb" in line
        assert "is not known: org/tiny: has no revision 'v2'" in error_of(fetch(top, "org/tiny@v2", hub))
    assert f"is at commit {COMMIT}, and which one bbbb is is not known" in error_of(fetch(top, "org/tiny@bbbb"))


# ------------------------------------------------------------------------------------------------------------- BERT


def bert(tiny: dict) -> dict[str, bytes]:
    config = {**json.loads(tiny["config.json"]), "model_type": "bert"}
    return {**tiny, "config.json": json.dumps(config).encode()}


def test_bert_is_made_a_decoder_by_the_download(top, tiny):
    with Hub({"google-bert/bert-base-multilingual-cased": Repository(bert(tiny))}) as hub:
        status, _, stderr = fetch(top, "bert", hub)
        assert status == 0, stderr
        folder = top / "models" / "bert-base-multilingual-cased"
        assert json.loads((folder / "config.json").read_bytes())["is_decoder"] is True
        assert json.loads((folder / "source.json").read_bytes())["config_changed"] == {"is_decoder": True}
        assert fetch(top, "bert", hub)[0] == 0


def test_a_bert_put_there_by_hand_is_refused_until_make_model_has_made_it_a_decoder(top, tiny):
    folder = put(top, "bert-base-multilingual-cased", bert(tiny))
    with pytest.raises(UserError, match="would see the tokens that it is to predict; .* make model MODEL=bert"):
        base_models.local_folder(folder)
    status, stdout, stderr = fetch(top, "bert")
    assert status == 0 and "is_decoder is true now" in stdout, stderr
    assert base_models.local_folder(folder) == folder
    assert (folder / "config.json").read_bytes() != bert(tiny)["config.json"]


# ---------------------------------------------------------------------------------------------------------- by hand


def put(top: Path, name: str, files: dict[str, bytes]) -> Path:
    """A model folder that a user filled."""
    folder = top / "models" / name
    folder.mkdir()
    for member, data in files.items():
        (folder / member).write_bytes(data)
    return folder


def test_a_model_put_there_by_hand_needs_no_hub(top, tiny):
    put(top, "Qwen2.5-0.5B-Instruct", tiny)
    status, stdout, stderr = fetch(top, "qwen2.5-0.5b")
    assert status == 0 and "is there and whole (put there by hand)" in stdout, stderr
    line = error_of(fetch(top, "qwen2.5-0.5b@main"))
    assert "was put there by hand, so which revision it is is not known; omit @main" in line
    note = top / "models" / "Qwen2.5-0.5B-Instruct" / ".cache/huggingface/download/config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{COMMIT}\netag\n0\n")  # as `hf download --local-dir` leaves it
    assert fetch(top, f"qwen2.5-0.5b@{COMMIT}")[0] == 0
    assert f"is at commit {COMMIT}, not fedcba9" in error_of(fetch(top, "qwen2.5-0.5b@fedcba9"))


@pytest.mark.parametrize("typed", ["my-model", "My-Model", "models/My-Model", "models/My-Model/", "./models/My-Model"])
def test_a_folder_may_be_named_as_the_shell_completes_it(top, tiny, typed):
    put(top, "My-Model", tiny)
    status, stdout, stderr = fetch(top, typed)
    assert status == 0 and "models/My-Model is there and whole" in stdout, stderr
    status, stdout, stderr = fetch(top, str(top / "models" / "My-Model"))
    assert status == 0, stderr
    assert "model 'Absent' is not known" in error_of(fetch(top, "models/Absent"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: f.pop("config.json"), "has no config.json; download it with: make model MODEL=qwen2.5-0.5b"),
        (lambda f: f.update({"config.json": b"<html>"}), "config.json: not valid JSON"),
        (lambda f: f.pop(SHARDS[1]), f"lacks {SHARDS[1]}, which model.safetensors.index.json names"),
        (lambda f: [f.pop(name) for name in SHARDS], f"lacks {SHARDS[0]}, {SHARDS[1]}, which"),
        (lambda f: f.pop("model.safetensors.index.json"), "has no model.safetensors nor"),
        (lambda f: f.update({"model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'}), "no weight files"),
        (lambda f: f.update({SHARDS[1]: f[SHARDS[1]][:-1]}), f"{SHARDS[1]}: has"),
        (lambda f: f.update({SHARDS[1]: f[SHARDS[1]][:20]}), f"{SHARDS[1]}: has only 20 bytes: it is cut off"),
        (lambda f: f.update({SHARDS[0]: b"version https://git-lfs.github.com/spec/v1\n"}), "is a Git LFS pointer"),
        (lambda f: f.update({SHARDS[0]: b""}), "has only 0 bytes"),
        (lambda f: f.update({SHARDS[0]: b"\2" + bytes(7) + b"[]"}), "is not a safetensors file"),
        (lambda f: f.pop("tokenizer.json"), "has no tokenizer files"),
    ],
)
def test_what_is_missing_in_a_folder_put_there_by_hand_is_named(top, tiny, damage, said):
    files = sharded(tiny)
    damage(files)
    folder = put(top, "Qwen2.5-0.5B-Instruct", files)
    with pytest.raises(UserError) as raised:
        base_models.local_folder(folder)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_an_incomplete_folder_fails_make_model_and_is_left_as_it_is(top, tiny):
    folder = put(top, "Qwen2.5-0.5B-Instruct", {"config.json": tiny["config.json"]})
    assert "has no model.safetensors" in error_of(fetch(top, "qwen2.5-0.5b"))
    assert [path.name for path in folder.iterdir()] == ["config.json"]


# -------------------------------------------------------------------------------------------------------- the table


def test_the_table_says_the_same_things_of_every_model():
    keys = {"hub_id", "revision", "folder", "template", "lora_target", "parameters", "gated", "license", "processor"}
    for short, values in base_models.table().items():
        assert set(values) == keys, short
        assert values["parameters"] > 10**8 and isinstance(values["processor"], bool), short
        assert short == "smollm2-135m" or re.fullmatch(r"[\w.-]+/[\w.-]+", values["hub_id"]), short
    folders = [values["folder"] for values in base_models.table().values()]
    assert len(folders) == len(set(folders)) == 10
