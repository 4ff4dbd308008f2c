"""A sweep over machines that share no storage makes what other sweeps make, and writes nothing else to saves/."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ray_nodes
from helpers.forked_python import PYTHON
from test_sweep import CATEGORY, alive_of, hashes, left_over, sweep

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.recipes.run import Cell
from paragen.sweep import file_client, file_server

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cluster(repository, tmp_path_factory, monkeypatch):
    if not ray_nodes.are_allowed(repository):
        pytest.skip("mount namespaces are not allowed here")
    for name, value in ray_nodes.TOKEN.items():
        monkeypatch.setenv(name, value)
    started = ray_nodes.Cluster(repository, tmp_path_factory.mktemp("c"))
    yield started
    started.end()


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


@pytest.mark.alone
@pytest.mark.slow
def test_a_killed_node_of_two_slots_costs_nothing(repository, cluster):
    """Two nodes of two slots each. What the killed one trained runs on the other, from the pretrain that came back."""
    lost, kept = cluster.add(slots=2), cluster.add(slots=2)
    cells = {"RANKS": "2 4 8", "MODELS": "tiny-one", "ENGINE": "stock"}
    run = sweep(repository, RAY_ADDRESS=cluster.address, STAGE="1", STAGE_DIR="", **cells)
    try:
        while not is_at_work(lost, slots=2):
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.02)
        processes = cluster.below(1)
        cluster.kill(1)
        output = run.communicate(timeout=400)[0]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            print(run.communicate()[0])
    assert run.returncode == 0 and output.count("collected: ") == 6, output
    again = [line for line in output.splitlines() if line.startswith("will try again: ")]
    assert again and all(f"its worker died on {os.uname().nodename} (" in line for line in again), output
    firsts = list(repository.glob(f"saves/{CATEGORY}/*/*_attempt-1.log"))
    seconds = [path.with_name(path.name.replace("_attempt-1", "")) for path in firsts]
    assert len(firsts) == len(again) == output.count("started again: ") <= 2, output
    for stage, logs in ((lost, firsts), (kept, seconds)):
        assert all(str(stage) in log.read_text().splitlines()[0] for log in logs)
    assert list(kept.glob(f"*/.staged/saves/{CATEGORY}/*/*_pretrain/manifest.json")), "not trained a second time"
    together = hashes(repository)
    assert len(together) == 12 and left_over(repository) == []
    assert not list(cluster.folder.glob(f"stage */*/saves/{CATEGORY}/*/.*staging*"))
    assert not list(kept.glob(f"*/saves/{CATEGORY}/*/*")), "a node keeps no runs"
    deadline = time.monotonic() + 60
    while left := alive_of(processes) + [each for each in alive_of(cluster.below(2)) if "forkserver" in each]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    done = subprocess.run([PYTHON, repository / "utils" / "verify.py"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("whole ") == 6, done.stdout + done.stderr
    (repository / "saves").rename(repository / "swept")
    undisturbed = sweep(repository, **cells)
    output = undisturbed.communicate(timeout=400)[0]
    assert undisturbed.returncode == 0, output
    assert hashes(repository) == together


def is_at_work(stage: Path, slots: int) -> bool:
    """Whether a node has a cell on each slot, and the training of a finetune has begun."""
    logs = list(stage.glob(f"*/saves/{CATEGORY}/*/*_finetune.log"))
    return len(logs) == slots and any(stage.glob(f"*/saves/{CATEGORY}/*/.*_finetune.staging*"))


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
