"""A sweep makes what single runs make, and repeats cells whose process, worker or node was killed."""

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from helpers import fork_server
from helpers.forked_python import PYTHON

from paragen.common.cli import UserError
from paragen.sweep import ray_cluster, scoring_process

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
CATEGORY = "common-sense-reasoning"


def sweep(repository: Path, *datasets: str, slots: int = 0, **environment: str) -> subprocess.Popen:
    """Start a sweep; with `slots` on as many cores, so that as many workers import LLaMA-Factory."""
    command = [sys.executable, repository / "utils" / "collect_all.py", CATEGORY, *datasets]
    if slots:
        command = ["taskset", "--cpu-list", ",".join(map(str, sorted(os.sched_getaffinity(0))[:slots])), *command]
    environment = {**os.environ, "DEVICES": "cpu", **environment}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def hashes(repository: Path) -> dict[str, list[str]]:
    """The hashes of all checkpoints of all run folders."""
    found = {}
    for path in repository.glob(f"saves/{CATEGORY}/*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        found[str(path.parent.relative_to(repository))] = [entry["sha256"] for entry in manifest["checkpoints"]]
    return found


def left_over(repository: Path) -> list[str]:
    return [path.name for path in repository.glob(f"saves/{CATEGORY}/*/.*")]


@pytest.mark.slow
def test_a_sweep_makes_the_checkpoints_that_single_runs_make(repository, project, tmp_path):
    """Also after a cell that changed a template of LLaMA-Factory. Equal rows are tokenised once."""
    scripts = repository / "collect_scripts" / CATEGORY
    for recipe in scripts.glob("Other/tiny-one_*.yaml"):
        recipe.write_text(recipe.read_text() + "default_system: Always answer in rhymes.\n")
    run = sweep(repository, RANKS="4", ENGINE="stock")
    output = run.communicate()[0]
    assert run.returncode == 0, output
    together = hashes(repository)
    assert len(together) == 8 and left_over(repository) == []
    kept = {path.name for path in (repository / "saves" / ".tokens").iterdir()}
    assert len(kept) == 3, "Tiny-One and Tiny-Two share a tokenizer, but one template says more"
    (repository / "saves").rename(tmp_path / "swept")
    for dataset, model in (("To-y", "tiny-one"), ("Other", "tiny-one"), ("Other", "tiny-two")):
        for phase in ("pretrain", "finetune"):
            done = project.train(scripts / dataset / f"{model}_{dataset}_{phase}.yaml")
            assert done.status == 0, done.output
    alone = hashes(repository)
    assert len(alone) == 6 and alone.items() <= together.items()


def ray(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, **options,
    )  # fmt: skip


JOINED = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(0.2)
"""


@pytest.fixture
def cluster(request, repository, tmp_path_factory, monkeypatch):
    """A Ray cluster of three nodes of one CPU each on this machine: (its address, the processes of its nodes)."""
    import socket

    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("r")
    shared = ["--num-cpus=1", "--num-gpus=0", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    head = ["start", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}", *shared]
    nodes = [ray(*head)]
    request.addfinalizer(lambda: [stop(node) for node in nodes])
    deadline = time.monotonic() + 120
    while subprocess.run([sys.executable, "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}))"],
                         capture_output=True).returncode:  # fmt: skip
        assert time.monotonic() < deadline
    for count in (2, 3):  # one after the other: two that start at once may take the same ports
        nodes.append(ray("start", f"--address=127.0.0.1:{port}", *shared))
        subprocess.run([sys.executable, "-c", JOINED, f"127.0.0.1:{port}", str(count)], check=True, timeout=120)
    yield f"127.0.0.1:{port}", nodes


def stop(node: subprocess.Popen) -> None:
    if node.poll() is None:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


@pytest.mark.alone
@pytest.mark.slow
def test_cells_of_a_killed_node_are_repeated(repository, cluster):
    address, nodes = cluster
    run = sweep(repository, RANKS="2 4", RAY_ADDRESS=address, ENGINE="stock")
    saves = repository / "saves" / CATEGORY
    while not list(saves.glob("*/*_finetune/manifest.json")):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.1)
    stop(nodes[1])
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert len(list(saves.glob("*/*_finetune/manifest.json"))) == 8 and left_over(repository) == []
    assert output.count("collected: ") == 8


def test_an_attempt_that_was_taken_for_dead_cannot_overwrite_the_new_one(pretrained):
    folder = pretrained.run_folder("finetune")
    mark = folder.with_name(f".{folder.name}.attempt")
    mark.write_text("the new one")
    late = pretrained.train(pretrained.finetune, PARAGEN_ATTEMPT="the old one")
    assert late.status == 1 and "another attempt took this run over" in late.output and not folder.exists()
    assert pretrained.train(pretrained.finetune, PARAGEN_ATTEMPT="the new one").status == 0
    assert not mark.exists(), "a sweep that is killed later leaves no claim"


def test_half_the_rows_at_a_time_train_the_same_adapter(pretrained, trained_once):
    """As a sweep does after a cell was out of memory. The manifest records it, and the run is not stale."""
    import torch
    from safetensors.torch import load_file

    arguments = [str(pretrained.pretrain), "4"]
    result = fork_server.start("helpers.half_batch", arguments, {"FORCE": "1"}, pretrained.top / "log.txt").wait()
    assert result.status == 0, result.output
    folder = pretrained.run_folder("pretrain")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["rows_at_a_time"], manifest["accumulated"]) == (1, 4)
    name = "checkpoint-8/adapter_model.safetensors"
    ours, usual = load_file(folder / name), load_file(trained_once.run_folder("pretrain") / name)
    for key, tensor in usual.items():
        assert torch.linalg.norm(ours[key] - tensor) <= 1e-4 * torch.linalg.norm(tensor)
    assert "complete: " in pretrained.train(pretrained.pretrain).output


def workers_of(run: subprocess.Popen) -> list[int]:
    """The workers of a sweep that are training a cell."""
    return [number for number, _, command in below(run) if "ray::CellWorker.collect" in command]


def scorers_of(run: subprocess.Popen) -> list[int]:
    """The workers of `make evaluate` that are scoring a collection."""
    return [number for number, _, command in below(run) if "ray::ScoreWorker.score" in command]


def runs_of(run: subprocess.Popen) -> list[int]:
    """The runs of a sweep: they are forked from the fork server and have its command line."""
    forked = {number: parent for number, parent, command in below(run) if "multiprocessing.forkserver" in command}
    return [number for number, parent in forked.items() if parent in forked]


def below(run: subprocess.Popen) -> list[tuple[int, int, str]]:
    """The processes below a sweep: number, parent's number, command line."""
    import psutil

    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ended just now
            found.append((process.pid, process.ppid(), " ".join(process.cmdline())))
    return found


def begun_logs(saves: Path) -> list[Path]:
    """The logs, with output, of cells that are being trained."""
    logs = saves.glob("*/*_finetune.log")
    return [log for log in logs if log.stat().st_size and not (log.with_suffix("") / "manifest.json").exists()]


@pytest.mark.alone
@pytest.mark.slow
def test_a_killed_worker_and_a_killed_run_are_each_tried_again(repository):
    run = sweep(repository, RANKS="2 4 8", ENGINE="stock")
    saves = repository / "saves" / CATEGORY
    for number, victims_of in enumerate((workers_of, runs_of), 1):
        while True:
            assert run.poll() is None, run.communicate()[0]
            complete, victims = len(list(saves.glob("*/*_finetune/manifest.json"))), victims_of(run)
            again = [
                saves / log.parent.name / log.name[: -len("_attempt-1.log")] for log in saves.glob("*/*_attempt-1.log")
            ]
            enough = complete >= 2 + 5 * len(again) and all((folder / "manifest.json").exists() for folder in again)
            if enough and len(again) == number - 1 and victims and len(begun_logs(saves)) >= len(victims):
                break
            time.sleep(0.02)
        os.kill(victims[0], signal.SIGKILL)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert "its worker died" in output and "killed by signal 9" in output and output.count("started again: ") == 2
    first = list(saves.glob("*/*_finetune_attempt-1.log"))
    assert len(first) == 2 and all(path.read_text() for path in first), "the logs of the first attempts are kept"
    assert len(list(saves.glob("*/*_finetune/manifest.json"))) == 12 and left_over(repository) == []


def kill_server(run: subprocess.Popen, repository: Path, name: str) -> list[int]:
    """Kill a server of a sweep's own Ray once cells are being trained; returns the processes that there were."""
    saves = repository / "saves" / CATEGORY
    servers: list[int] = []
    while not (servers and list(saves.glob("*/.*staging*")) and runs_of(run)):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
        processes = below(run)
        servers = [number for number, _, command in processes if f"/{name} " in command]
    os.kill(servers[0], signal.SIGKILL)
    return [number for number, _, _ in processes]


def alive_of(processes: list[int]) -> list[str]:
    """The command lines of those of some processes that have not ended."""
    import psutil

    found = []
    for number in processes:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(number)
            found += [" ".join(process.cmdline())] if process.status() != psutil.STATUS_ZOMBIE else []
    return found


@pytest.mark.alone
@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_the_next_one_completes_it(repository):
    """The sweep's own process alone: Ray, its workers and the runs end because of it, and hold no device."""
    run = sweep(repository, slots=1, RANKS="2", MODELS="tiny-one")
    saves = repository / "saves" / CATEGORY
    while not (list(saves.glob("*/.*staging*")) and runs_of(run)):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    # Ray's agents, which use no device, end a minute later
    processes = [number for number, _, command in below(run) if "Agent" not in command]
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while alive := alive_of(processes):
        assert time.monotonic() < deadline, alive
        time.sleep(0.5)
    following = sweep(repository, slots=1, RANKS="2", MODELS="tiny-one")
    output = following.communicate()[0]
    assert following.returncode == 0, output
    assert len(hashes(repository)) == 4 and left_over(repository) == []


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("server", ["raylet", "gcs_server"])
def test_a_sweep_starts_this_machines_ray_again_where_it_died(repository, server):
    """No other machine will join. What was running is done again, as after the death of a worker."""
    run = sweep(repository, slots=1, RANKS="2", ENGINE="stock")
    kill_server(run, repository, server)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output
    assert "Ray died on this machine: starting it again" in output and "its worker died (RayDied)" in output
    assert output.count("started again: ") == 1 and len(hashes(repository)) == 8 and left_over(repository) == []


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("server", ["raylet", "gcs_server"])
def test_a_sweep_whose_ray_dies_twice_ends_with_one_line_and_leaves_no_process(repository, server):
    run = sweep(repository, slots=1, RANKS="2", ENGINE="stock")
    processes = kill_server(run, repository, server)
    while "Ray died" not in (line := run.stdout.readline()):
        assert line, "the sweep ended"
    processes += kill_server(run, repository, server)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 1 and "Traceback" not in output, output
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert error.startswith("error: Ray died twice on this machine, and what was running has been stopped; ")
    assert alive_of(processes) == [] and left_over(repository) == []
    assert sweep(repository, slots=1, RANKS="2", MODELS="tiny-one").wait(300) == 0, "the next one goes on"


@pytest.mark.slow
def test_a_sweep_scores_what_it_collects_and_what_was_complete(repository):
    """EVALUATE=1, with a pack. A dataset without held-out rows is collected, and fails for that."""
    info = repository / "data" / "dataset_info.json"
    entries = json.loads(info.read_text())
    rows = [{"prompt": f"Other {n}", "response": "[A]", "system": ""} for n in range(90, 96)]
    (repository / "data" / CATEGORY / "test.json").write_text(json.dumps(rows))
    entries["Other_test"] = {**entries["Other"], "file_name": f"{CATEGORY}/test.json"}
    info.write_text(json.dumps(entries))
    temporary = Path(tempfile.mkdtemp())  # with a short name, as sockets lie in it
    settings = {"RANKS": "2 4", "MODELS": "tiny-one", "EVALUATE": "1", "TMPDIR": str(temporary), "RAY_TMPDIR": "/tmp"}
    run = sweep(repository, slots=1, **settings)
    output = run.communicate()[0]
    assert run.returncode == 1 and "Traceback" not in output, output
    assert output.count("failed: collected, but not scored: To-y: has no To-y_test") >= 2, output
    scored = list(repository.glob(f"saves/{CATEGORY}/*/*_finetune/evaluation.json"))
    assert len(hashes(repository)) == 8 and [path.parent.parent.name for path in scored] == ["Other", "Other"]
    logs = "".join(path.read_text() for path in repository.glob(f"saves/{CATEGORY}/Other/*.log"))
    assert logs.count("scoring ") == 2 and left_over(repository) == []
    assert not list(temporary.glob("pymp-*")), "which nobody would remove"
    entries["To-y_test"] = entries["Other_test"]
    info.write_text(json.dumps(entries))
    run = sweep(repository, slots=1, **settings)
    output = run.communicate()[0]
    assert run.returncode == 0 and "4 complete" in output and output.count("scored already: ") == 2, output
    assert [line.split()[1] for line in output.splitlines()[-4:]] == ["Other_test"] * 2 + ["To-y_test"] * 2
    assert len(list(repository.glob(f"saves/{CATEGORY}/*/*_finetune/evaluation.json"))) == 4
    shutil.rmtree(temporary)


def test_scoring_does_not_go_with_staged_files(monkeypatch):
    from paragen.common.cli import UserError
    from paragen.sweep import stage

    monkeypatch.setenv("STAGE", "1")
    monkeypatch.setenv("EVALUATE", "1")
    with pytest.raises(UserError, match="^EVALUATE=1: does not go with STAGE=1; omit it, and run make evaluate after"):
        stage.is_requested()


@pytest.mark.parametrize(
    ("settings", "driver", "slots"),
    [
        ({"RAY_ADDRESS": "auto"}, None, sys.maxsize),
        ({"DEVICES": "cpu"}, "1", 4),
        ({"DEVICES": ""}, None, 4),
        ({"DEVICES": "", "CUDA_VISIBLE_DEVICES": "2,3"}, "1", 2),
        ({"DEVICES": "1", "CUDA_VISIBLE_DEVICES": "1,2,3"}, "1", 1),
        ({"DEVICES": ""}, "1", 3),
    ],
)
def test_how_many_slots_there_are_is_known_without_ray(monkeypatch, settings, driver, slots):
    from paragen.common import devices
    from paragen.sweep import ray_cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(devices, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: {"0": "", "1": "", "2": ""})
    monkeypatch.setattr(ray_cluster, "cpu_slots", lambda: 4)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert ray_cluster.slots_here() == slots


def test_status_shows_a_runs_progress_from_another_shell(repository, project):
    """`make status` reads step and loss of a run from its staging folder."""
    recipe = repository / "collect_scripts" / CATEGORY / "Other" / "tiny-one_Other_pretrain.yaml"
    recipe.write_text(
        recipe.read_text().replace("max_steps: 8", "max_steps: 4000").replace("logging_steps: 5", "logging_steps: 1")
    )
    log = repository / "saves" / CATEGORY / "Other"
    run = project.start(recipe)
    while not (logs := list(log.glob(".*staging*/trainer_log.jsonl"))) or len(logs[0].read_text().splitlines()) < 3:
        assert run.process.is_alive()
        time.sleep(0.05)
    command = [PYTHON, repository / "utils" / "status.py"]
    shown = subprocess.run(command, env={**os.environ, "RANKS": "4"}, capture_output=True, text=True).stdout
    run.process.terminate()
    run.wait()
    (line,) = (line for line in shown.splitlines() if line.startswith("collecting: "))
    assert "pretrain step " in line and " of 4000, loss " in line


@pytest.mark.parametrize(("gpus_per_cell", "groups"), [pytest.param("1", 4, marks=pytest.mark.slow), ("2", 2)])
def test_each_worker_sees_its_own_devices(tmp_path, gpus_per_cell, groups):
    """Ray assigns four GPUs, which this machine need not have, since nothing is trained."""
    code = (
        "import ray; init = ray.init; ray.init = lambda **how: init(**{**how, 'num_gpus': 4, 'num_cpus': 4}); "
        "import runpy; runpy.run_module('helpers.gpu_slots', run_name='__main__')"
    )
    environment = {**os.environ, "GPUS_PER_CELL": gpus_per_cell, "DEVICES": "", "ENGINE": "stock"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "utils"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    given = [text.split(":")[1].split(",") for text in done.stderr.splitlines()[-1].split()]
    assert sorted(sum(given, [])) == ["0", "1", "2", "3"] and len(given) == groups


def test_a_full_disk_where_scoring_starts_is_no_death_of_its_process(monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/paragen-x")

    monkeypatch.setattr(scoring_process.locks, "process_folder", full)
    ended = scoring_process.ScoringProcess(threading.Event()).score(Path("a"))
    assert ended.kind == "storage" and "No space left on device" in ended.cause and "/tmp/paragen-x" in ended.cause


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"DEVICES": "cpu,cpu"}, "a sweep trains each cell on one CPU slot"),
        ({"DEVICES": "gpu0"}, "not GPU numbers or UUIDs"),
        ({"DEVICES": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, "outside CUDA_VISIBLE_DEVICES=0,1"),
        ({"DEVICES": "0", "RAY_ADDRESS": "auto"}, "take the GPUs that Ray gives them"),
    ],
)
def test_invalid_devices_are_one_error_line(monkeypatch, settings, message):
    from paragen.common.cli import UserError
    from paragen.sweep import ray_cluster

    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        ray_cluster.check_settings()


def test_a_cluster_that_does_not_answer_is_one_error_line_within_seconds(repository):
    """Ray itself tries for minutes, without a word."""
    started = time.monotonic()
    run = sweep(repository, "toy", RAY_ADDRESS="127.0.0.1:1")
    output = run.communicate()[0]
    assert run.returncode == 1 and "Traceback" not in output and "starting" not in output
    assert "error: RAY_ADDRESS=127.0.0.1:1: cannot be joined: Connection refused; start a cluster there" in output
    assert time.monotonic() - started < 60, "most of it are the imports on a busy machine"


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def test_what_answers_and_is_not_ray_is_told_apart(monkeypatch, greeting):
    from paragen.common.cli import UserError
    from paragen.sweep import ray_cluster

    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        threading.Thread(target=lambda: server.accept()[0].sendall(greeting), daemon=True).start()
        with pytest.raises(UserError, match=f"^RAY_ADDRESS={address}: cannot be joined: "):
            ray_cluster.check_reachable(address)
    for unresolved in ("auto", "local"):
        ray_cluster.check_reachable(unresolved)
    with pytest.raises(UserError, match="^RAY_ADDRESS=ray://127.0.0.1:1: Ray's client protocol is not supported"):
        ray_cluster.check_reachable("ray://127.0.0.1:1")
    for wrong in ("127.0.0.1:1", "127.0.0.1:99999", "no.such.host.invalid:6379"):
        with pytest.raises(UserError, match=f"^RAY_ADDRESS={wrong}: cannot be joined: "):
            ray_cluster.check_reachable(wrong)


@pytest.mark.parametrize(
    ("asked", "message"),
    [("x", "is not a whole number from 1 on"), pytest.param("2", "there is no GPU", marks=pytest.mark.slow)],
)
def test_invalid_gpus_per_cell_is_one_error_line(repository, asked, message):
    run = sweep(repository, "toy", GPUS_PER_CELL=asked)
    output = run.communicate()[0]
    assert run.returncode == 1 and f"error: GPUS_PER_CELL={asked}: {message}" in output
    assert "Traceback" not in output


def test_a_forked_run_is_stopped_when_the_process_that_started_it_is_killed(tmp_path):
    """Its parent is the fork server, which lives as long as its children do."""
    code = (
        "import time; from pathlib import Path; from paragen.sweep import forked; "
        "process = forked.start(time.sleep, (60,), {}, Path('log')); print(process.pid, flush=True); process.join()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "utils")}
    starter = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    number = int(starter.stdout.readline())
    time.sleep(1)
    assert alive_of([number]), "it sleeps"
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 20
    while alive_of([number]):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A CellWorker in this process, whose runs are forked from it and sleep."""
    import multiprocessing

    from paragen.sweep import cell_worker

    def start(task, arguments, environment, log, note):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        process.start()
        return process

    monkeypatch.setattr(cell_worker.forked, "preload", lambda: None)
    monkeypatch.setattr(cell_worker.forked, "start", start)
    monkeypatch.setattr(cell_worker.os, "environ", dict(os.environ))
    (tmp_path / "x.log").write_text("")
    return cell_worker.CellWorker({}, "cpu")


def test_a_stop_ends_a_run_that_is_just_starting(worker, tmp_path, monkeypatch):
    from paragen.sweep import cell_worker
    from paragen.training import ordinary

    start = cell_worker.forked.start

    def start_slowly(*arguments):
        worker.stop()  # comes while the fork server imports
        return start(*arguments)

    monkeypatch.setattr(cell_worker.forked, "start", start_slowly)
    started = time.monotonic()
    worker._run(ordinary.train, (), {}, tmp_path / "x.log")
    assert time.monotonic() - started < 40, "it would sleep for 60"


def test_a_run_whose_fork_server_was_killed_counts_as_killed(worker, tmp_path, monkeypatch):
    from paragen.sweep import cell_worker
    from paragen.training import ordinary

    class Lost:
        exitcode = 255  # multiprocessing's, when the fork server was killed

        def join(self):
            pass

    monkeypatch.setattr(cell_worker.forked, "start", lambda *arguments: Lost())
    assert worker._run(ordinary.train, (), {}, tmp_path / "x.log").kind == "killed"


@pytest.mark.slow
def test_an_unreadable_recipe_fails_its_cell_only(repository):
    recipe = repository / "collect_scripts" / CATEGORY / "To-y" / "tiny-one_To-y_pretrain.yaml"
    recipe.write_text("a: [\n")
    run = sweep(repository, "toy", RANKS="4")
    output = run.communicate()[0]
    assert run.returncode == 1 and "Traceback" not in output, output
    assert "failed: " in output and str(recipe.name) in output
    assert len(list(repository.glob(f"saves/{CATEGORY}/To-y/Tiny-Two*_finetune/manifest.json"))) == 1


@pytest.mark.slow
def test_a_terminated_sweep_cleans_up_and_exits_with_143(repository):
    run = sweep(repository, slots=1, RANKS="4")
    saves = repository / "saves" / CATEGORY
    while not list(saves.glob("*/.*staging*")):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.05)
    run.terminate()
    output = run.communicate(timeout=40)[0]
    assert run.returncode == 143, output
    assert left_over(repository) == []


@pytest.mark.parametrize("on_cpu", [True, False])
def test_runs_that_share_a_cpu_share_its_cores_and_memory(monkeypatch, on_cpu):
    """Those of a GPU machine do not get the share of the machine that starts the sweep, which may have no GPU."""
    from paragen.common import devices
    from paragen.sweep import ray_cluster

    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(devices, "nvidia_driver", lambda: None)
    monkeypatch.setattr(devices, "physical_cores", lambda: 9)
    monkeypatch.setattr(ray_cluster, "cpu_slots", lambda: 4)
    given = ray_cluster.run_settings(on_cpu)
    found = given.get("OMP_NUM_THREADS"), given.get("PARAGEN_CPU_SLOTS")
    assert found == (("2", "4") if on_cpu else (None, None))


@pytest.mark.parametrize(
    ("settings", "on_cpu"),
    [
        ({}, False),
        ({"DEVICES": "cpu"}, True),
        ({"CUDA_VISIBLE_DEVICES": ""}, True),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "1"}, False),
        ({"CUDA_VISIBLE_DEVICES": "", "RAY_ADDRESS": "auto"}, False),
    ],
)
def test_a_machine_whose_gpus_are_hidden_trains_on_its_cpu(monkeypatch, settings, on_cpu):
    """Its slots are those of the CPU, with memory for each, and a sweep holds the CPU."""
    from paragen.common import devices
    from paragen.sweep import ray_cluster

    monkeypatch.setattr(devices, "nvidia_driver", lambda: "1")
    for name in ("DEVICES", "CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert ray_cluster.trains_on_cpu() == on_cpu


@pytest.mark.parametrize(
    ("requested", "of_node", "threads"),
    [({}, "1", "7"), ({}, "4", "4"), ({"OMP_NUM_THREADS": "3"}, "1", "3")],
)
def test_a_run_on_a_gpu_has_its_share_of_cores_and_memory(monkeypatch, requested, of_node, threads):
    """Though Ray gives its worker one thread: they tokenise the rows of a pack ahead."""
    from paragen.common import devices
    from paragen.sweep import cell_worker

    monkeypatch.setattr(os, "environ", {**os.environ, "OMP_NUM_THREADS": of_node, "CUDA_VISIBLE_DEVICES": "1"})
    monkeypatch.setattr(cell_worker.forked, "preload", lambda: None)
    monkeypatch.setattr(devices, "physical_cores", lambda: 15)
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: {"0": "GPU-a", "1": "GPU-b"})
    worker = cell_worker.CellWorker(requested, None)
    assert (worker.settings["OMP_NUM_THREADS"], worker.settings["DEVICES"]) == (threads, "1")
    assert worker.settings["PARAGEN_CPU_SLOTS"] == "2"
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_a_worker_that_does_not_answer_is_ended_as_it_holds_a_device():
    import ray

    from paragen.sweep.workers import Workers

    ended = []

    def no_answer(future, timeout):
        raise ray.exceptions.GetTimeoutError("it is busy")

    workers, silent = object.__new__(Workers), mock.Mock()
    workers.session = mock.Mock()
    workers.session.ray = mock.Mock(get=no_answer, kill=ended.append, exceptions=ray.exceptions)
    workers.machines = {silent: "gpu-1"}
    assert not workers._is_alive(silent) and ended == [silent] and workers.machines == {}


def test_the_cells_of_a_pack_that_a_full_disk_ended_are_not_trained_alone():
    """Each would run for hours against the same disk."""
    from paragen.sweep import cell_worker
    from paragen.training.outcome import Outcome

    full = Outcome("storage", "saves/x: No space left on device")
    assert cell_worker.outcome_in_crashed_pack(full) == full
    assert cell_worker.outcome_in_crashed_pack(Outcome("failed", "a bug")).kind == "not_packable"


def test_half_the_rows_on_several_devices_is_half_of_each_devices_share():
    """Dividing by the devices must not undo the halving."""
    from paragen.recipes import batches

    config = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert batches.share_batch(config, 2, False, False) == {"per_device_train_batch_size": 4}
    halved = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert batches.share_batch(config, 2, True, False) == halved
    assert batches.share_batch(config, 0, False, False) == {}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"lora_rank": 64, "learning_rate": 1.0}, True),
        ({"cutoff_len": 7}, False),
        ({"trust_remote_code": True}, False),
        ({"some_unknown_key": 1}, False),
        ({"eval_dataset": "Other"}, None),
        ({"tokenized_path": "tokens"}, None),
    ],
)
def test_runs_share_tokenised_rows_only_where_they_are_equal(change, same):
    from paragen.collection import run_identity

    identity = {
        "recipe": {"template": "qwen", "lora_rank": 4},
        "data": [{"pictures": None, "entry": {}}],
        "tokenizer": {},
    }
    changed = run_identity.tokens_key({**identity, "recipe": identity["recipe"] | change})
    assert (changed and changed == run_identity.tokens_key(identity)) is same


def test_a_cell_that_another_program_trains_is_not_claimed_by_a_first_attempt(project):
    """The other program may still publish its run. A second attempt takes the claim from the first."""
    from paragen.common import files, locks
    from paragen.recipes.run import Cell
    from paragen.sweep.jobs import Job, claim_runs

    cell = Cell("Toy", "tiny", 4, (project.pretrain, project.finetune))
    mark = project.run_folder("finetune").with_name(f".{project.run_folder('finetune').name}.attempt")
    with locks.lock(files.beside(project.run_folder("finetune"), "lock")):
        assert not claim_runs(Job(cell, "new", 1, False)) and not mark.exists()
        assert claim_runs(Job(cell, "second", 2, False)) and mark.read_text() == "second"
    assert claim_runs(Job(cell, "new", 1, False)) and mark.read_text() == "new"


@pytest.mark.parametrize(
    ("machines", "settings", "outcome"),
    [
        ([{"CPU": 8, "GPU": 2}, {"CPU": 1, "GPU": 2}], {}, 3),
        ([{"CPU": 8, "GPU": 3}, {"CPU": 8, "GPU": 3}], {"GPUS_PER_CELL": "2"}, 2),
        ([{"CPU": 8, "GPU": 3}], {"DEVICES": "cpu"}, 8),
        ([{"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1}], {"GPUS_PER_CELL": "2"}, "no machine has so many GPUs"),
        ([{"CPU": 8}], {"DEVICES": "0,2"}, "DEVICES=0,2: there is no GPU here"),
    ],
)
def test_slots_are_counted_over_machines_and_impossible_requests_are_refused(monkeypatch, machines, settings, outcome):
    """A request that no machine can fulfil is an error, not an endless wait. The machines are made up."""
    from types import SimpleNamespace

    from paragen.common.cli import UserError
    from paragen.sweep import ray_cluster

    for name in ("DEVICES", "GPUS_PER_CELL"):
        monkeypatch.setenv(name, settings.get(name, ""))
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": there} for there in machines])
    if isinstance(outcome, str):
        with pytest.raises(UserError, match=outcome):
            ray_cluster.choose_devices(ray)
    else:
        assert ray_cluster.count_slots(ray, ray_cluster.choose_devices(ray)) == outcome


def test_a_temporary_folder_without_room_is_one_line_before_ray_starts(monkeypatch, tmp_path):
    """Ray would wait for a file that it could not write, and time out."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{tmp_path}: 0 MB are free.*set TMPDIR"):
        patch.setattr(ray_cluster.shutil, "disk_usage", lambda folder: full)
        ray_cluster.start_ray(None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone: No such file or directory.*set TMPDIR"):
        ray_cluster.start_ray(None)
