"""Joining a Ray cluster: with a token, without one, with a wrong one; Ray that runs for somebody else."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from paragen.common import files, locks, paths
from paragen.common.cli import UserError
from paragen.recipes.run import Cell
from paragen.sweep import jobs, ray_cluster, sweep
from paragen.training.outcome import Outcome

pytestmark = pytest.mark.runs

TOKEN = "0123456789abcdef" * 4
# What a sweep does first, in a process of its own; prints the number of CPUs where it may begin.
JOIN = """
import sys
from paragen.common import cli
from paragen.sweep import ray_cluster
from paragen.sweep.session import Session
def main():
    ray_cluster.check_settings()
    with Session() as session:
        print("joined", ray_cluster.count_slots(session.ray, True))
cli.run(main)
"""


class Heads:
    """Ray clusters of one node on this machine, by whether they want a token."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []

    def start(self, **environment: str) -> str:
        """Start a cluster with these variables; returns its address."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder = self.folder / str(len(self.started))
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=1",
            "--num-gpus=0", "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--block",
            "--disable-usage-stats", f"--temp-dir={folder}",
        ]  # fmt: skip
        log = open(self.folder / f"{port}.log", "w")  # noqa: SIM115
        self.started.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log))
        deadline = time.monotonic() + 120
        while not (folder / "ray_current_cluster").exists():
            assert time.monotonic() < deadline and self.started[-1].poll() is None, Path(log.name).read_text()
            time.sleep(0.2)
        return f"127.0.0.1:{port}"

    def stop(self) -> None:
        for head in self.started:
            head.terminate()
        for head in self.started:
            head.wait(60)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    heads = Heads(tmp_path_factory.mktemp("r"))
    yield heads
    heads.stop()


@pytest.fixture(scope="module")
def closed(heads) -> str:
    return heads.start(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)


@pytest.fixture(scope="module")
def open_to_all(heads) -> str:
    return heads.start(RAY_AUTH_MODE="disabled")


def join(home: Path, **environment: str) -> subprocess.CompletedProcess:
    """Join as a sweep does, as a user whose home is another folder (without a token of its own)."""
    command = [sys.executable, "-c", JOIN]
    given = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT / "utils"), "DEVICES": "cpu", **environment}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=300)


def error_of(done: subprocess.CompletedProcess) -> str:
    """The only line that a refused call printed."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.slow
def test_a_cluster_without_a_token_is_refused_unless_a_setting_allows_it(open_to_all, tmp_path):
    said = f"RAY_ADDRESS={open_to_all}: is a cluster without a token: whoever reaches it runs code as its user; start"
    for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}):
        assert error_of(join(tmp_path, RAY_ADDRESS=open_to_all, **token)).startswith(said)
    done = join(tmp_path, RAY_ADDRESS=open_to_all, ALLOW_OPEN_RAY="1")
    assert done.returncode == 0 and "joined 1" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_cluster_with_a_token_is_joined_with_this_one_alone(closed, tmp_path):
    done = join(tmp_path, RAY_ADDRESS=closed, RAY_AUTH_TOKEN=TOKEN)
    assert done.returncode == 0 and "joined 1" in done.stdout, done.stdout + done.stderr
    for token, said in (
        ({}, "asks for a token, and none is here"),
        ({"RAY_AUTH_MODE": "token"}, "asks for a token, and none is here"),
        ({"RAY_AUTH_TOKEN": "f" * 64}, "refuses the token that is here"),
    ):
        line = error_of(join(tmp_path, RAY_ADDRESS=closed, **token))
        assert line.startswith(f"RAY_ADDRESS={closed}: {said}; set RAY_AUTH_TOKEN, or copy")


@pytest.mark.slow
def test_ray_that_runs_for_somebody_else_is_no_obstacle_to_a_sweep_of_this_machine(closed, open_to_all, tmp_path):
    done = join(tmp_path)
    assert done.returncode == 0 and "joined" in done.stdout, done.stdout + done.stderr


HOLD = """
import sys, time
from pathlib import Path
from paragen.common import paths
from paragen.sweep import ray_cluster
paths.SAVES = Path(sys.argv[1])
with ray_cluster.only_sweep_here():
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A folder for saves/ where another process holds devices as a sweep does; a function of its environment."""
    started = []

    def hold(**environment: str) -> Path:
        given = {**os.environ, "PYTHONPATH": str(ROOT / "utils"), **environment}
        started.append(
            subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=given, stdout=subprocess.PIPE, text=True)
        )
        assert started[-1].stdout.readline() == "holding\n"
        return tmp_path

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_a_second_sweep_on_the_same_cpu_is_refused_in_one_line_and_starts_nothing(held, monkeypatch):
    monkeypatch.setattr(paths, "SAVES", held(DEVICES="cpu"))
    events = []
    with pytest.raises(UserError, match="^another sweep is running on the CPU of this machine; wait for it$"):
        sweep.run([], lambda *event: events.append(event))
    assert not events, "Ray was not started"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with ray_cluster.only_sweep_here():
        pass  # a cluster gives each sweep devices of its own


def test_a_second_sweep_may_use_other_gpus(held, monkeypatch):
    """The driver stands in for GPUs; which there are is told by DEVICES' own check."""
    monkeypatch.setattr(paths, "SAVES", held(CUDA_VISIBLE_DEVICES="0,2", DEVICES="cpu"))
    monkeypatch.setattr(ray_cluster.devices, "nvidia_driver", lambda: "555.1")
    monkeypatch.delenv("DEVICES", raising=False)
    lock = paths.SAVES / f".sweep-on-{socket.gethostname()}-2.lock"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    with (
        locks.lock(lock),
        pytest.raises(UserError, match="^another sweep is running on GPU 2 .*; wait for it, or choose"),
    ):
        ray_cluster.only_sweep_here().__enter__()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    with locks.lock(lock), ray_cluster.only_sweep_here():
        pass


def test_a_cell_that_another_running_sweep_has_claimed_waits(project, monkeypatch):
    monkeypatch.setattr(paths, "SAVES", project.top / "saves")
    cell = Cell("Toy", "tiny", 4, (project.pretrain, project.finetune))
    claim = files.beside(project.run_folder("finetune"), "attempt")
    mine, other = jobs.new_job(cell, None, "aaaa"), jobs.new_job(cell, None, "bbbb")
    with locks.lock(jobs.lock_of("bbbb")):
        assert jobs.claim_runs(other) and claim.read_text() == other.attempt
        assert not jobs.claim_runs(mine) and claim.read_text() == other.attempt
        again = jobs.next_job(other, Outcome("killed"))
        assert again.attempt[:4] == "bbbb" and jobs.claim_runs(again)
    assert jobs.claim_runs(mine) and claim.read_text() == mine.attempt, "that sweep is dead"


def test_the_documented_way_of_starting_ray_sets_a_token_first():
    for file in sorted(ROOT.rglob("*.md")):
        text = file.read_text(encoding="utf-8") if ".venv" not in file.parts else ""
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            if "ray start" in block:
                assert block.index("export RAY_AUTH_MODE=token") < block.index("ray start"), file
        assert "ray start" not in re.sub(r"```bash\n.*?```", "", text, flags=re.DOTALL), f"{file}: without a token"
