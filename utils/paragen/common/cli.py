"""How every script here ends: 0 when all that was asked for happened, else one clear line and a non-zero status.

Imported by the scripts: `cli.run(main)` is the last line of each.
"""

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

# All that a script reads is on disk before it starts; libraries that would look a name up on the hub are told not to.
# The scripts that download say HF_HUB_OFFLINE=0 themselves.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PATIENCE = 20  # seconds that a stopped script has to unwind
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class UserError(Exception):
    """Something the user can put right. Its text is one line: the file, the value and the way out."""


def say(line: str) -> None:
    """Print one line of progress, at once also when the output is a pipe."""
    print(line, flush=True)


def asked(name: str) -> bool:
    """Whether a switch of the environment, such as FORCE, is on: set, and not 0."""
    return os.environ.get(name, "") not in ("", "0")


def end_with_parent() -> None:
    """Have the kernel end this process when the one that started it is killed (Linux). For a child to call first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows under their heads, columns aligned."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def run(main: Callable[[], int | None]) -> None:
    """Run `main` and leave the process with its status.

    A UserError or a storage error (full disk, no permission) ends in one line on stderr and status 1; Ctrl-C, SIGTERM
    and SIGHUP (a lost terminal) unwind through every `finally` and end in 130, 143 and 129. Any other exception is a
    bug and keeps its traceback.
    """
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:  # as in a shell's background
            signal.signal(number, stop)
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except SystemExit:
        if received:  # a library (Ray) made a SystemExit of its own of it
            sys.exit(128 + received[0])
        raise
    except Exception as error:
        if received:  # a library (safetensors) made another exception of it
            sys.exit(128 + received[0])
        fault = str(error) if isinstance(error, UserError) else storage_fault(error)
        if fault is None:
            raise
        fail(fault)


def call(
    command: list, environment: dict[str, str] | None = None, output: IO | None = None, own_group: bool = False
) -> int:
    """Run another script and return its status; when this process is stopped, that one unwinds first.

    Args:
        command: program and arguments; anything that has a text.
        environment: variables to set beside the present ones.
        output: where its stdout and stderr go (default: this process's).
        own_group: start it in a session of its own and stop all that it started.
    """
    child = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **(environment or {})},
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=own_group,
    )
    try:
        return child.wait()
    except BaseException as error:
        if own_group:
            os.killpg(child.pid, signal.SIGTERM)
        elif not isinstance(error, KeyboardInterrupt):  # Ctrl-C reached it, too; a second signal would cut its clean-up
            child.terminate()
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        raise


def environment_for_modules() -> dict[str, str]:
    """The present environment, in which `python -m paragen.<room>.<module>` is found from any folder."""
    known = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, known))}


def storage_fault(error: BaseException) -> str | None:
    """One line on the storage error at the root of an exception, or None when there is none.

    Looks through the exceptions it was raised from, and at the texts of libraries written in Rust ("(os error 28)").
    """
    link: BaseException | None = error
    while link is not None:
        number = link.errno if isinstance(link, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(link)):
            number = int(found[1])
        if number in STORAGE_ERRORS:
            where = getattr(link, "filename", None) or "writing"
            return f"{where}: {os.strerror(number)}; no file is left half-written, run it again when that is mended"
        link = link.__cause__ or link.__context__
    return None


def complain(message: str) -> None:
    """Print `error: message` on stderr and go on."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """Print `error: message` on stderr and leave with status 1."""
    complain(message)
    sys.exit(1)
