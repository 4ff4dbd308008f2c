"""`make setup`: the environment is made once, again when it must be, and heals after an interruption."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMON = ROOT / "utils" / "paragen" / "common"  # all that setting up needs


@pytest.fixture
def repository(tmp_path) -> Path:
    """A repository whose locked set is empty, so that setting it up needs no network."""
    (tmp_path / "a b" / "utils").mkdir(parents=True)
    for path in [ROOT / "utils" / "setup_env.py", *(ROOT / "utils" / "paragen").glob("*.py"), *COMMON.glob("*.py")]:
        copy = tmp_path / "a b" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    shutil.copy(ROOT / "Makefile", tmp_path / "a b")
    for name in ("requirements.in", "requirements.txt"):
        (tmp_path / "a b" / name).write_text("# nothing\n")
    return tmp_path / "a b"


def setup(repository: Path, **environment: str) -> subprocess.CompletedProcess:
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"  # finds uv
    command = ["make", "--no-print-directory", "setup", f"PYTHON={sys.executable}"]
    environment = {**os.environ, "PATH": path, **environment}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)


def test_it_is_made_once_and_says_nothing_the_second_time(repository):
    first = setup(repository)
    assert first.returncode == 0, first.stderr
    assert (repository / ".venv" / "bin" / "python").exists()
    stamp = (repository / ".venv" / "installed.sha256").stat().st_mtime_ns
    second = setup(repository)
    assert (second.returncode, second.stdout) == (0, "")
    assert (repository / ".venv" / "installed.sha256").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("damage", "made_anew"),
    [
        (lambda venv: (venv / "installed.sha256").unlink(), True),  # interrupted
        (lambda venv: (venv / "bin" / "python").unlink(), True),  # its interpreter is gone
        (lambda venv: (venv.parent / "requirements.txt").write_text("# another lock\n"), False),
    ],
)
def test_it_runs_again_when_interrupted_broken_or_changed(repository, damage, made_anew):
    assert setup(repository).returncode == 0
    marker = repository / ".venv" / "marker"
    marker.touch()
    damage(repository / ".venv")
    again = setup(repository)
    assert again.returncode == 0 and "is ready" in again.stdout, again.stderr
    assert marker.exists() != made_anew
    assert setup(repository).stdout == ""


def test_the_lock_has_every_direct_requirement():
    direct = re.findall(r"^[\w.-]+", (ROOT / "requirements.in").read_text(), re.MULTILINE)
    locked = re.findall(r"^[\w.-]+(?===)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    missing = {name.replace("_", "-") for name in direct} - set(locked)
    assert not missing, "make lock"


def test_killed_at_any_moment_it_heals_itself(repository):
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    command = [sys.executable, repository / "utils" / "setup_env.py"]
    for delay in (0.3, 1.0):
        process = subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
    healed = setup(repository)
    assert healed.returncode == 0, healed.stderr
    assert not (repository / ".venv.lock").exists()


def test_an_old_python_is_told_what_to_do(repository):
    fake = repository / "python3.9"
    code = (
        "import sys; sys.version_info = (3, 9, 1, 'final', 0); sys.argv = sys.argv[1:]; exec(open(sys.argv[0]).read())"
    )
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run([fake, repository / "utils" / "setup_env.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "Python 3.11 or newer is needed" in done.stderr and "PYTHON=" in done.stderr
    assert not (repository / ".venv").exists()
