"""The Slurm script on a real Ray cluster of two nodes on this machine; only srun and scontrol are replaced."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from helpers.forked_python import PLAIN

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
CATEGORY = "common-sense-reasoning"


@pytest.fixture
def allocation(repository, tmp_path) -> dict[str, str]:
    """The environment of a job of two nodes, both this machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text('#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
    (programs / "scontrol").write_text("#!/usr/bin/env bash\necho 127.0.0.1\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    job = {"SLURM_JOB_ID": str(port % 20000), "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "2"}
    return {
        **os.environ,
        **job,
        "PATH": path,
        "SLURM_SUBMIT_DIR": str(repository),
        "DEVICES": "cpu",
        "RANKS": "4",
        "PY": PLAIN,
    }


@pytest.mark.slow
def test_the_slurm_script_starts_ray_runs_the_sweep_and_exits_with_its_status(repository, allocation):
    script = repository / "utils" / "slurm_sweep.sh"
    done = subprocess.run(
        ["bash", script, CATEGORY, "toy"], env=allocation, capture_output=True, text=True, timeout=200
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(repository.glob(f"saves/{CATEGORY}/To-y/*_finetune/manifest.json"))) == 2
    wrong = subprocess.run(["bash", script], env=allocation, capture_output=True, text=True)
    assert wrong.returncode == 1 and "usage: sbatch" in wrong.stderr
