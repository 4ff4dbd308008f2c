"""A sweep over machines that share no storage makes what other sweeps make, and writes nothing else to saves/."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_sweep import CATEGORY, hashes, left_over, sweep

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.recipes.run import Cell
from paragen.sweep import file_client, file_server

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
# Runs a node that has another folder at the repository's path, as on another machine: in its own mount namespace.
ELSEWHERE = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']


class Cluster:
    """Ray nodes on loopback: the driver's, without a slot, and others with a copy of the repository's scripts only."""

    def __init__(self, repository: Path, folder: Path, port: int):
        self.repository, self.folder, self.address = repository, folder, f"127.0.0.1:{port}"
        self.bare = folder / "bare"
        self.bare.mkdir()
        shutil.copytree(repository / "utils", self.bare / "utils")
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}", "--num-cpus=0"]
        self.nodes = [self.start([], head, {})]
        deadline = time.monotonic() + 60
        while not self.answers(port):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    @staticmethod
    def answers(port: int) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", port)) == 0

    def add(self) -> Path:
        """One more node, with one slot; returns its STAGE_DIR."""
        stage = self.folder / f"stage {len(self.nodes)}"
        prefix = [*ELSEWHERE, self.bare, self.repository]
        node = self.start(prefix, [f"--address={self.address}", "--num-cpus=1"], {"STAGE_DIR": str(stage)})
        self.nodes.append(node)
        deadline = time.monotonic() + 60
        while (self.folder / "nodes.log").read_text().count("Ray runtime started") < len(self.nodes):
            assert node.poll() is None and time.monotonic() < deadline, (self.folder / "nodes.log").read_text()
            time.sleep(0.2)
        return stage

    def start(self, prefix: list, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
        shared = ["--num-gpus=0", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        command = [*prefix, PYTHON, "-m", "ray.scripts.scripts", "start", *arguments, *shared]
        with open(self.folder / "nodes.log", "ab") as log:
            return subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, number: int) -> None:
        node = self.nodes[number]
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


@pytest.fixture
def cluster(repository, tmp_path_factory, monkeypatch):
    if subprocess.run([*ELSEWHERE, repository, repository, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = Cluster(repository, tmp_path_factory.mktemp("c"), port)
    yield started
    for number in range(len(started.nodes)):
        started.kill(number)


@pytest.mark.alone
@pytest.mark.slow
def test_packs_of_other_machines_come_back_and_those_of_a_killed_one_are_repeated(repository, cluster):
    """It is killed during its pack's finetunes, which are repeated on another machine."""
    cluster.add()
    kept = cluster.add()
    run = sweep(repository, RANKS="2 4", RAY_ADDRESS=cluster.address, STAGE="1", STAGE_DIR="")
    saves = repository / "saves" / CATEGORY
    while not list(kept.glob(f"*/saves/{CATEGORY}/*/.*_finetune.staging*")):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    cluster.kill(1)
    output = run.communicate(timeout=200)[0]
    assert run.returncode == 0, output
    assert output.count("collected: ") == 8 and left_over(repository) == []
    found = [json.loads(path.read_text()) for path in saves.glob("*/*_finetune/manifest.json")]
    assert len(found) == 8 and {manifest["engine"] for manifest in found} == {"packed"}
    assert len(list(saves.glob("*/*_pretrain/manifest.json"))) == 8
    assert not list(kept.glob(f"*/saves/{CATEGORY}/*/*")), "a node keeps no runs"


@pytest.mark.alone
@pytest.mark.slow
def test_cells_of_other_machines_have_the_same_hashes_also_after_one_was_killed(repository, project, cluster):
    cluster.add()
    kept = cluster.add()
    settings = {"STAGE": "1", "STAGE_DIR": "", "ENGINE": "stock"}  # empty, as make exports it
    run = sweep(repository, RANKS="2 4", RAY_ADDRESS=cluster.address, **settings)
    saves = repository / "saves" / CATEGORY
    deadline = time.monotonic() + 120
    while not list(saves.glob("*/*_finetune/manifest.json")):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.kill(1)
    try:
        output = run.communicate(timeout=120)[0]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            print(run.communicate()[0])
    assert run.returncode == 0, output
    together = hashes(repository)
    assert len(together) == 16 and left_over(repository) == []
    assert output.count("collected: ") == 8
    (log,) = saves.glob("Other/Tiny-One_lora-rank_4_finetune.log")
    assert str(cluster.folder) in log.read_text().splitlines()[0] and "whole  saves/" in log.read_text()
    assert not list(kept.glob(f"*/saves/{CATEGORY}/*/*")), "a node keeps no runs"
    (repository / "saves").rename(repository / "swept")
    scripts = repository / "collect_scripts" / CATEGORY
    for phase in ("pretrain", "finetune"):
        done = project.train(scripts / "Other" / f"tiny-one_Other_{phase}.yaml")
        assert done.status == 0, done.output
    alone = hashes(repository)
    assert len(alone) == 2 and alone.items() <= together.items()


class LocalServer:
    """A file server's handle without a cluster: calls run at once, and chunks of some files are damaged on the way."""

    def __init__(self, server, is_damaged):
        self.server, self.is_damaged = server, is_damaged

    def __getattr__(self, name):
        def remote(*arguments):
            if name == "write" and self.is_damaged(arguments[2]):
                arguments = (*arguments[:-1], flipped(arguments[-1]))
            answer = getattr(self.server, name)(*arguments)
            return flipped(answer) if name == "read" and self.is_damaged(arguments[0]) else answer

        return SimpleNamespace(remote=remote)


class LocalClient(file_client.FileClient):
    def result_of(self, future):
        return future


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


class Place:
    """The driver's side and a node's side of one cell, whose runs are complete on the node."""

    def __init__(self, project, tmp_path, monkeypatch, attempt="now"):
        monkeypatch.setattr(paths, "ROOT", project.top)
        shutil.copy(ROOT / "models" / "models.yaml", project.top / "models")
        monkeypatch.setattr(base_models, "TABLE", project.top / "models" / "models.yaml")
        self.project, self.attempt = project, attempt
        self.cell = Cell("Toy", "tiny-llama", 4, (project.pretrain, project.finetune))
        self.back = tmp_path / "runs of the node"
        project.saves.rename(self.back)
        project.saves.mkdir()
        self.server = file_server.FileServer("this node")
        self.damaged = ""
        self.client = LocalClient(LocalServer(self.server, self.is_damaged))
        self.top = tmp_path / "stage"
        self.top.mkdir()
        self.downloads = file_client.Downloads(self.client, self.top, self.server.facts()["sweep"], threading.Event())
        self.claim(attempt)
        self.needed = self.server.open_cell(self.cell, attempt)

    def is_damaged(self, name: str) -> bool:
        return bool(self.damaged) and name.endswith(self.damaged)

    def claim(self, attempt: str) -> None:
        for run in self.cell.runs:
            run.folder.with_name(f".{run.folder.name}.attempt").write_text(attempt)

    def send(self, phase: str) -> None:
        file_client.send_run(self.client, self.back / self.project.run_folder(phase).name, self.attempt, phase)


@pytest.fixture
def there(collected, tmp_path, monkeypatch) -> Place:
    return Place(collected, tmp_path, monkeypatch)


def test_a_node_has_the_drivers_files_or_an_error(there):
    """A file that was damaged in transfer or on the node's disk is downloaded again, or refused."""
    names = {item.name for item in there.needed.files}
    assert {"data/dataset_info.json", "models/models.yaml", "models/Tiny-Llama/model.safetensors"} <= names
    there.damaged = "model.safetensors"
    with pytest.raises(UserError, match="other bytes than the driver has"):
        there.downloads.fetch(there.needed.files, 0)
    model = there.top / "models" / "Tiny-Llama" / "model.safetensors"
    assert not model.exists()
    there.damaged = ""
    there.downloads.fetch(there.needed.files, 0)
    whole, stamp = model.read_bytes(), model.stat()
    model.write_bytes(flipped(whole))
    os.utime(model, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    there.downloads.fetch(there.needed.files, 0)
    assert model.read_bytes() == whole
    with pytest.raises(UserError, match="GB are needed, .* free; free some space, or .* with STAGE_DIR"):
        there.downloads.fetch(there.needed.files, 10**15)


def test_a_received_run_is_published_only_when_complete_and_of_the_latest_attempt(there):
    folder = there.project.run_folder("finetune")
    there.send("pretrain")
    there.damaged = "checkpoint-12.safetensors"
    with pytest.raises(UserError, match=r"checkpoint-12.safetensors: came back with other bytes"):
        there.send("finetune")
    assert not folder.exists()
    there.damaged = ""
    there.claim("a later one")
    with pytest.raises(UserError, match="another attempt took this run over"):
        there.send("finetune")
    assert not folder.exists()
    there.claim("now")
    folder.mkdir()
    (folder / "notes.txt").write_text("of others")
    there.send("finetune")
    there.server.close_cell("now")
    assert (folder / "manifest.json").is_file() and (folder / "notes.txt").read_text() == "of others"
    assert [path.name for path in there.project.saves.glob(".*") if not path.name.endswith(".attempt")] == []


def test_a_received_run_that_was_trained_on_other_data_is_refused(there):
    data = next((there.project.top / "data" / CATEGORY).glob("*.json"))
    data.write_text(data.read_text().replace("even", "odd"))
    with pytest.raises(UserError, match="changed while it was trained on"):
        there.send("pretrain")
    assert not there.project.run_folder("pretrain").exists()


def test_a_node_with_another_room_is_not_the_drivers_version(tmp_path, monkeypatch):
    """Nodes compare one hash over scripts and rooms before they train for a driver."""
    room = tmp_path / "paragen" / "training" / "collector.py"
    room.parent.mkdir(parents=True)
    room.write_text("one = 1\n")
    monkeypatch.setattr(file_server, "UTILS", tmp_path)
    before = file_server.code_hash()
    room.write_text("one = 2\n")
    assert file_server.code_hash() != before
