"""`make setup` makes .venv once, again when its locks change, and completes an interrupted one."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
COMMON = ROOT / "utils" / "paragen" / "common"  # all that setting up needs
RUNNING, DEVELOPMENT = "requirements.txt", "requirements-dev.txt"


def make_repository(top: Path) -> Path:
    """A repository whose locks are empty, so that setting it up needs no network."""
    scripts = [ROOT / "utils" / name for name in ("setup_env.py", "settings.py")]
    for path in [*scripts, *(ROOT / "utils" / "paragen").glob("*.py"), *COMMON.glob("*.py")]:
        copy = top / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    shutil.copy(ROOT / "Makefile", top)
    for name in (RUNNING, DEVELOPMENT):
        (top / name).write_text(f"# nothing in {name}\n")
    return top


@pytest.fixture
def repository(tmp_path) -> Path:
    return make_repository(tmp_path / "a b")


@pytest.fixture(scope="session")
def ready_once(tmp_path_factory) -> Path:
    """A repository after `make setup`, without pip in .venv: what is set up is uv's work, and pip is most of .venv."""
    repository = make_repository(tmp_path_factory.mktemp("ready") / "a b")
    done = setup(repository)
    assert done.returncode == 0, done.stderr
    for folder in repository.glob(".venv/lib/python*/site-packages/pip*"):
        shutil.rmtree(folder)
    return repository


@pytest.fixture
def ready(ready_once, tmp_path) -> Path:
    """A repository after `make setup`: a copy, which is faster than making .venv again."""
    shutil.copytree(ready_once, tmp_path / "a b", symlinks=True)
    return tmp_path / "a b"


def environment(**more: str) -> dict[str, str]:
    """This process's environment, in which uv is found and no Python is named."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {name: value for name, value in os.environ.items() if name != "PY"} | {"PATH": path, **more}


def setup(repository: Path, target: str = "setup", **more: str) -> subprocess.CompletedProcess:
    command = ["make", "--no-print-directory", target, f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=repository, env=environment(**more), capture_output=True, text=True)


def installed(repository: Path) -> list[str]:
    """The names of the locks that .venv was finished with."""
    return [line.split()[1] for line in (repository / ".venv" / "installed.sha256").read_text().splitlines()]


def locked_versions(name: str) -> dict[str, str]:
    """Each package of one of this repository's locks and its version."""
    return dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", (ROOT / name).read_text(), re.MULTILINE))


def hashes(name: str) -> dict[str, list[str]]:
    """Each package of one of this repository's locks and the hashes of its files."""
    parts = re.split(r"^(?=[\w.-]+(?:\[.*\])?==)", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]
    return {re.match(r"[\w.-]+", part)[0]: re.findall(r"--hash=(\S+)", part) for part in parts}


def test_a_second_setup_does_and_prints_nothing(ready):
    assert (ready / ".venv" / "bin" / "python").exists()
    stamp = (ready / ".venv" / "installed.sha256").stat().st_mtime_ns
    second = setup(ready)
    assert (second.returncode, second.stdout) == (0, "")
    assert (ready / ".venv" / "installed.sha256").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("damage", "made_anew"),
    [
        pytest.param(lambda venv: (venv / "installed.sha256").unlink(), True, marks=pytest.mark.slow),  # interrupted
        (lambda venv: (venv / "bin" / "python").unlink(), True),  # its interpreter is gone
        (lambda venv: (venv.parent / "requirements.txt").write_text("# another lock\n"), False),
    ],
)
def test_an_interrupted_broken_or_changed_environment_is_set_up_again(ready, damage, made_anew):
    marker = ready / ".venv" / "marker"
    marker.touch()
    damage(ready / ".venv")
    again = setup(ready)
    assert again.returncode == 0 and "is ready" in again.stdout, again.stderr
    assert marker.exists() != made_anew
    assert setup(ready).stdout == ""


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_a_lock_has_every_direct_requirement_with_hashes_and_no_index(name):
    direct = re.findall(r"^[a-zA-Z0-9][\w.-]*", (ROOT / f"{name}.in").read_text(), re.MULTILINE)
    missing = {package.replace("_", "-").lower() for package in direct} - set(locked_versions(f"{name}.txt"))
    assert not missing, "make lock"
    assert all(hashes(f"{name}.txt").values())
    assert "://" not in (ROOT / f"{name}.txt").read_text(), "an address of a package index"


def test_the_development_lock_contains_the_other_with_equal_versions_and_hashes():
    assert locked_versions(RUNNING).items() < locked_versions(DEVELOPMENT).items(), "make lock"
    assert {name: hashes(DEVELOPMENT)[name] for name in hashes(RUNNING)} == hashes(RUNNING)


def test_what_running_imports_is_locked_for_running():
    """pytest, ruff, mypy, selenium and lm-eval are for tests and linting; only their lock names them."""
    only = {"pytest", "mypy", "selenium", "lm-eval"}
    assert only <= set(locked_versions(DEVELOPMENT)) - set(locked_versions(RUNNING))


def test_running_installs_its_lock_alone_and_development_adds_to_it(ready):
    assert installed(ready) == [RUNNING]
    (ready / ".venv" / "marker").touch()
    done = setup(ready, "setup-dev")
    assert done.returncode == 0 and DEVELOPMENT in done.stdout, done.stderr
    assert installed(ready) == [RUNNING, DEVELOPMENT]
    assert (ready / ".venv" / "marker").exists(), "the .venv is the same one"
    assert setup(ready, "setup-dev").stdout == setup(ready).stdout == ""
    assert installed(ready) == [RUNNING, DEVELOPMENT]


def test_setup_keeps_an_environment_for_development(ready):
    """It stays as it is while its own lock is unchanged, and is otherwise renewed as a whole."""
    assert setup(ready, "setup-dev").returncode == 0
    (ready / DEVELOPMENT).write_text("# another lock\n")
    assert setup(ready).stdout == ""
    assert DEVELOPMENT in setup(ready, "setup-dev").stdout
    (ready / RUNNING).write_text("# another lock\n")
    done = setup(ready)
    assert done.returncode == 0 and f"installing {DEVELOPMENT}" in done.stdout
    assert installed(ready) == [RUNNING, DEVELOPMENT]
    assert setup(ready).stdout == setup(ready, "setup-dev").stdout == ""


def test_an_unreachable_package_index_does_not_damage_a_finished_environment(ready):
    stamp = (ready / ".venv" / "installed.sha256").read_bytes()
    with open(ready / DEVELOPMENT, "a") as file:
        file.write(f"pytest==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    done = setup(ready, "setup-dev", UV_INDEX_URL="http://127.0.0.1:9", UV_NO_CACHE="1", UV_HTTP_RETRIES="0")
    assert done.returncode != 0 and "setting up .venv failed" in done.stderr, done.stdout
    assert (ready / ".venv" / "installed.sha256").read_bytes() == stamp
    assert setup(ready).stdout == "" and "Traceback" not in done.stderr


def test_two_setups_at_the_same_time_install_once(repository):
    command = ["make", "--no-print-directory", "PYTHON=" + sys.executable]
    both = [
        subprocess.Popen([*command, target], cwd=repository, env=environment(), stdout=subprocess.PIPE, text=True)
        for target in ("setup", "setup-dev")
    ]
    outputs = [make.communicate()[0] for make in both]
    assert [make.returncode for make in both] == [0, 0]
    assert "".join(outputs).count("setting up .venv with") == 1
    assert installed(repository) == [RUNNING, DEVELOPMENT]


def test_the_next_setup_completes_one_that_was_killed_at_any_moment(repository):
    command = [sys.executable, repository / "utils" / "setup_env.py", "--dev"]
    for delay in (0.2, 0.7):  # making .venv takes longer
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
    (repository / ".venv").mkdir(exist_ok=True)
    (repository / ".venv" / "marker").touch()
    healed = setup(repository)
    assert healed.returncode == 0 and "is ready" in healed.stdout, healed.stderr
    assert not (repository / ".venv" / "marker").exists(), "it is made anew"
    assert not (repository / ".venv.lock").exists() and setup(repository).stdout == ""


def test_the_next_setup_completes_a_development_setup_that_was_killed(ready):
    for delay in (0.05, 0.2, 0.4):
        command = [sys.executable, ready / "utils" / "setup_env.py", "--dev"]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
        healed = setup(ready)
        assert healed.returncode == 0, healed.stderr
    assert setup(ready, "setup-dev").returncode == 0
    assert installed(ready) == [RUNNING, DEVELOPMENT]


def test_an_old_python_prints_the_command_to_use(repository):
    fake = repository / "python3.9"
    code = (
        "import os, sys; sys.version_info = (3, 9, 1, 'final', 0); sys.argv = sys.argv[1:]; "
        "sys.path.insert(0, os.path.dirname(sys.argv[0])); exec(open(sys.argv[0]).read())"
    )
    fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    fake.chmod(0o755)
    done = subprocess.run([fake, repository / "utils" / "setup_env.py"], capture_output=True, text=True)
    assert done.returncode == 1 and "Python 3.11 or newer is needed" in done.stderr and "PYTHON=" in done.stderr
    assert not (repository / ".venv").exists()
