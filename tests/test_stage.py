"""A sweep over machines that share no storage: it makes what a plain one makes, and nothing else reaches saves/."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from test_sweep import CATEGORY, hashes, left_over, sweep

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv" / "bin" / "python"
# A node that sees, at the repository's path, another folder: in a mount namespace of its own, as on another machine.
ELSEWHERE = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']


class Cluster:
    """Ray nodes on loopback: the driver's, without a slot, and others that see a bare copy of the repository."""

    def __init__(self, repository: Path, folder: Path, port: int):
        self.repository, self.folder, self.address = repository, folder, f"127.0.0.1:{port}"
        self.bare = folder / "bare"
        self.bare.mkdir()
        shutil.copytree(repository / "utils", self.bare / "utils")
        (self.bare / ".venv").symlink_to(ROOT / ".venv")
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}", "--num-cpus=0"]
        self.nodes = [self.start([], head, {})]
        deadline = time.monotonic() + 60
        while not self.answers(port):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    @staticmethod
    def answers(port: int) -> bool:
        with socket.socket() as asking:
            return asking.connect_ex(("127.0.0.1", port)) == 0

    def add(self) -> Path:
        """One more node, with one slot; returns its STAGE_DIR."""
        stage = self.folder / f"stage {len(self.nodes)}"
        prefix = [*ELSEWHERE, self.bare, self.repository]
        node = self.start(prefix, [f"--address={self.address}", "--num-cpus=1"], {"STAGE_DIR": str(stage)})
        self.nodes.append(node)
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


def test_cells_of_other_machines_have_the_same_hashes_and_a_killed_one_costs_time_alone(repository, project, cluster):
    cluster.add()
    stage = cluster.add()
    run = sweep(repository, RANKS="2 4", RAY_ADDRESS=cluster.address, STAGE="1")
    saves = repository / "saves" / CATEGORY
    deadline = time.monotonic() + 120
    while not list(saves.glob("*/*_finetune/manifest.json")):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.kill(1)
    output = run.communicate(timeout=180)[0]
    assert run.returncode == 0, output
    together = hashes(repository)
    assert len(together) == 16 and left_over(repository) == []
    assert output.count("collected: ") == 8
    (log,) = saves.glob("Other/Tiny-One_lora-rank_4_finetune.log")
    assert str(cluster.folder) in log.read_text().splitlines()[0] and "whole  saves/" in log.read_text()
    assert not list(stage.glob("*/saves/*/*/*")), "a node keeps no runs"
    (repository / "saves").rename(repository / "swept")
    scripts = repository / "collect_scripts" / CATEGORY
    for phase in ("pretrain", "finetune"):
        done = project.train(scripts / "Other" / f"tiny-one_Other_{phase}.yaml")
        assert done.status == 0, done.output
    alone = hashes(repository)
    assert len(alone) == 2 and alone.items() <= together.items()
