"""Make .venv hold exactly what requirements.txt locks. Run by `make setup`, and by itself before every other target.

    python3 utils/setup_env.py            nothing outside .venv is touched; says nothing when there is nothing to do

Runs under any Python 3 up to the version check, so nothing newer than that check may stand above it.
"""

import os
import sys

if sys.version_info < (3, 11):
    version = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        "error: Python 3.11 or newer is needed, %s is %s; say: make PYTHON=/path/to/python3.12"
        % (sys.executable, version)
    )

import hashlib
import re
import shutil
import subprocess
from importlib.metadata import distributions
from pathlib import Path

from paragen.common import cli, files
from paragen.common.cli import UserError, say

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.sha256"  # written last: a venv without it was interrupted
REQUIREMENTS = ROOT / "requirements.txt"


def main() -> None:
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if is_ready(wanted):
        return
    with files.lock(ROOT / ".venv.lock", waiting="another make is setting up .venv; waiting for it ..."):
        if is_ready(wanted):
            return  # another make did it meanwhile
        if not (STAMP.is_file() and answers()):
            files.remove_folder(VENV)
            say(f"setting up {VENV.name} with Python {'.'.join(map(str, sys.version_info[:3]))} ...")
            run([sys._base_executable, "-m", "venv", str(VENV)])  # this Python may be the venv's own
        STAMP.unlink(missing_ok=True)
        uv = shutil.which("uv") or install_uv()
        say("installing requirements.txt ...")
        options = ["--require-hashes", "--compile-bytecode", "--python", str(PYTHON)]
        run([uv, "pip", "sync", *options, str(REQUIREMENTS)])
        if missing_packages():
            raise UserError(f".venv: {', '.join(missing_packages())} did not install; run make setup again")
        files.write_atomically(STAMP, wanted.encode())
        say(f"{VENV.name} is ready")


def is_ready(wanted: str) -> bool:
    """Whether the venv was finished for these requirements and still holds what they name."""
    return STAMP.is_file() and STAMP.read_text() == wanted and answers() and not missing_packages()


def answers() -> bool:
    """Whether the venv's Python still starts (the interpreter it was made from may be gone)."""
    try:
        return subprocess.run([str(PYTHON), "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def missing_packages() -> list[str]:
    """Packages that the lock wants on every machine and that the venv does not hold."""
    names = re.findall(r"^([A-Za-z0-9_.-]+)==\S+ \\$", REQUIREMENTS.read_text(), re.MULTILINE)
    folders = [str(path) for path in VENV.glob("lib/python*/site-packages")]
    there = {normal(found.metadata["Name"]) for found in distributions(path=folders) if found.metadata["Name"]}
    return sorted({name for name in names if normal(name) not in there})


def normal(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def install_uv() -> str:
    """Put the locked uv into the venv, for machines that have none; returns its path."""
    pinned = VENV / "uv.txt"
    pinned.write_text(re.search(r"^uv==.*\n(    --hash.*\n)+", REQUIREMENTS.read_text(), re.MULTILINE)[0])
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
            f"setting up .venv failed at: {' '.join(command)}; put right what stands above and run make setup again"
        )


if __name__ == "__main__":
    cli.run(main)
