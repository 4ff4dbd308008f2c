"""Make .venv hold what requirements.txt locks, or requirements-dev.txt for development.

    python3 utils/setup_env.py            `make setup`: for running; every other target calls it first
    python3 utils/setup_env.py --dev      `make setup-dev`: also for tests and linting

Changes .venv alone, and prints nothing when there is nothing to do. requirements-dev.txt contains requirements.txt with
equal versions: a .venv made for development also serves for running and stays as it is.
Any Python 3 must be able to parse this file: `paragen` then refuses those that are too old.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from paragen.common import cli, files, locks
from paragen.common.cli import UserError, say

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
# `sha256  name` of each lock installed; written last: without it, .venv is unfinished
STAMP = VENV / "installed.sha256"
RUNNING = ROOT / "requirements.txt"
DEVELOPMENT = ROOT / "requirements-dev.txt"


def main() -> None:
    parser = cli.ArgumentParser(description="Make .venv hold what this repository's locks name.")
    parser.add_argument("--dev", action="store_true", help="also install what tests and linting need")
    lock = DEVELOPMENT if parser.parse_args().dev else RUNNING
    if is_ready(lock):
        return
    with locks.lock(ROOT / ".venv.lock", waiting="another make is setting up .venv; waiting for it ..."):
        if is_ready(lock):
            return  # another make did it meanwhile
        if DEVELOPMENT.name in installed_locks():
            lock = DEVELOPMENT  # a .venv made for development is not reduced
        install(lock)


def install(lock: Path) -> None:
    """Make .venv, unless a finished one is there, and have it hold exactly what a lock names.

    Raises:
        UserError: a step failed. Without a package index nothing in a finished .venv has changed by then.
    """
    if not (STAMP.is_file() and answers()):
        files.remove_folder(VENV)
        say(f"setting up {VENV.name} with Python {'.'.join(map(str, sys.version_info[:3]))} ...")
        base = getattr(sys, "_base_executable", sys.executable)  # this Python may be the venv's own
        run([base, "-m", "venv", str(VENV)])
    uv = shutil.which("uv", path=f"{os.environ.get('PATH', '')}{os.pathsep}{PYTHON.parent}") or install_uv(lock)
    say(f"installing {lock.name} ...")
    sync = [uv, "pip", "sync", "--require-hashes", "--compile-bytecode", "--python", str(PYTHON), str(lock)]
    run([*sync, "--dry-run", "--quiet"])  # fails here when the package index cannot be reached
    STAMP.unlink(missing_ok=True)
    run(sync)
    if missing_packages(lock):
        raise UserError(f".venv: {', '.join(missing_packages(lock))} did not install; run make setup again")
    held = [RUNNING, DEVELOPMENT] if lock == DEVELOPMENT else [RUNNING]
    files.write_atomically(STAMP, "".join(f"{files.sha256_of(path)}  {path.name}\n" for path in held).encode())
    say(f"{VENV.name} is ready")


def is_ready(lock: Path) -> bool:
    """Whether .venv was finished with this version of a lock and still holds what it names."""
    return installed_locks().get(lock.name) == files.sha256_of(lock) and answers() and not missing_packages(lock)


def installed_locks() -> dict[str, str]:
    """The SHA-256 of each lock that .venv was finished with, by the lock's file name."""
    lines = STAMP.read_text().splitlines() if STAMP.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def answers() -> bool:
    """Whether the venv's Python still starts (the interpreter it was made from may be gone)."""
    try:
        return subprocess.run([str(PYTHON), "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def missing_packages(lock: Path) -> list[str]:
    """Packages that a lock wants on every machine and that .venv does not hold."""
    names = re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==\S+ \\$", lock.read_text(), re.MULTILINE)
    held = {normal(path.name.split("-")[0]) for path in VENV.glob("lib/python*/site-packages/*.dist-info")}
    return sorted({name for name in names if normal(name) not in held})


def normal(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def install_uv(lock: Path) -> str:
    """Put the locked uv into the venv, for machines that have none; returns its path."""
    pinned = VENV / "uv.txt"
    pinned.write_text("".join(re.findall(r"^uv==.*\n(?:    --hash.*\n)+", lock.read_text(), re.MULTILINE)))
    options = ["--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps"]
    run([str(PYTHON), "-m", "pip", "install", *options, "-r", str(pinned)])
    return str(VENV / "bin" / "uv")


def run(command: list[str]) -> None:
    """Run a command that reports for itself; raises UserError when it fails."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    }
    if subprocess.run(command, env=environment).returncode:
        raise UserError(
            f"setting up .venv failed at: {' '.join(command)}; correct the cause above and run make setup again"
        )


if __name__ == "__main__":
    cli.run(main)
