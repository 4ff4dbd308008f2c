"""Which devices a run gets, and how many CPU threads: never by what else the machine does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paragen.common import devices
from paragen.common.cli import UserError

UTILS = Path(__file__).resolve().parent.parent / "utils"
UUIDS = ("GPU-8888d744-78e6-8169-4e98-f3bbf6809743", "GPU-11111111-2222-3333-4444-555555555555")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that gives this machine some GPUs, as far as nvidia-smi says."""

    def make(count: int) -> None:
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin" / "nvidia-smi"
        lines = "\n".join(f"{number}, {uuid}" for number, uuid in enumerate(UUIDS[:count]))
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


@pytest.mark.parametrize(
    ("count", "requested", "message"),
    [
        (2, "7", "DEVICES=7: this machine has GPUs 0, 1; name some of them, or set DEVICES=cpu"),
        (1, "0,1", "DEVICES=0,1: this machine has a single GPU, 0; name it"),
        (2, "GPU-9999", "this machine has GPUs 0, 1"),
        (2, "1,0", ""),
        (2, "GPU-8888d744,GPU-11111111-2222-3333-4444-555555555555", ""),
        (1, "MIG-4e98-f3bb", ""),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(machine, monkeypatch, count, requested, message):
    machine(count)
    monkeypatch.setenv("DEVICES", requested)
    if not message:
        assert devices.choose() == requested.split(",")
        return
    with pytest.raises(UserError) as error:
        devices.choose()
    assert message in str(error.value)


def test_of_the_free_memory_a_process_gets_its_share_and_what_torch_holds_unused_is_its_own(monkeypatch):
    import torch

    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    for name, value in {"mem_get_info": (90, 140), "memory_reserved": 30, "memory_allocated": 10}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(devices, "available_memory", lambda: 80)
    monkeypatch.delenv("PARAGEN_CPU_SLOTS", raising=False)
    assert (devices.free_bytes(gpu), devices.free_bytes(cpu)) == (110, 80)
    monkeypatch.setenv("PARAGEN_GPU_SLOTS", "3")
    monkeypatch.setenv("PARAGEN_CPU_SLOTS", "4")
    assert (devices.free_bytes(gpu), devices.free_bytes(cpu)) == (50, 20)


@pytest.mark.skipif(bool(devices.nvidia_driver()) or Path("/dev/kfd").exists(), reason="this machine has a GPU")
@pytest.mark.parametrize("requested", ["0,1", "7"])
def test_gpus_on_a_machine_without_one_are_refused(monkeypatch, requested):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("DEVICES", requested)
    with pytest.raises(UserError, match=f"^DEVICES={requested}: there is no NVIDIA GPU here; omit DEVICES"):
        devices.choose()


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, 1, 1), (2, 1, 1), (8, 1, 7), (8, 2, 3), (8, 8, 1), (4, 16, 1)]
)
def test_a_run_gets_all_cores_but_one_and_processes_share_them(monkeypatch, cores, processes, expected):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(devices, "physical_cores", lambda: cores)
    assert devices.threads(processes) == expected


@pytest.mark.parametrize(
    ("groups", "limit", "free"),
    [
        ({"": {}}, None, None),
        ({"job/step": {"max": "max", "current": "5"}, "job": {"max": "1000", "current": "400"}}, 1000, 600),
        ({"job/step": {"max": "1000", "current": "900", "stat": "anon 1\ninactive_file 300\n"}}, 1000, 400),
        ({"job/step": {"max": "800", "current": "900"}, "job": {"max": "1000", "current": "900"}}, 800, 0),
    ],
)
def test_memory_is_what_slurm_or_a_container_leaves_to_a_process(tmp_path, monkeypatch, groups, limit, free):
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    for name, values in groups.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        for key, value in {"stat": "", **values}.items():
            (tmp_path / name / f"memory.{key}").write_text(value)
    monkeypatch.setattr(devices, "CGROUP", tmp_path / "absent")
    whole = devices.total_memory()
    assert devices.available_memory() <= whole
    monkeypatch.setattr(devices, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(devices, "CGROUPS", tmp_path)
    assert devices.total_memory() == (limit or whole)
    assert devices.available_memory() == free if limit else devices.available_memory() > 0


def test_the_number_of_threads_that_openmp_reads_is_taken(monkeypatch):
    for value, count in (("3", 3), ("4,2", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert devices.threads(8) == count
    for value in ("0", "many", "-1"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        with pytest.raises(UserError, match=f"^OMP_NUM_THREADS={value}: is not a number of threads"):
            devices.threads()


def test_physical_cores_are_among_those_that_the_process_may_use():
    assert 1 <= devices.physical_cores() <= devices.cpu_cores()
    if hasattr(os, "sched_setaffinity"):
        code = "from paragen.common import devices; print(devices.physical_cores())"
        only = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))]
        shown = subprocess.run([*only, sys.executable, "-c", code], cwd=UTILS, capture_output=True, text=True)
        assert shown.stdout == "1\n", shown.stderr


def test_waiting_threads_sleep_and_torch_takes_the_number(monkeypatch):
    import torch

    before = torch.get_num_threads()
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    try:
        devices.pin(["cpu"])
        assert torch.get_num_threads() == 3, "although torch was imported before"
        assert (os.environ["OMP_WAIT_POLICY"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("PASSIVE", "")
    finally:
        torch.set_num_threads(before)
