"""How scripts print and end: status 0 when everything requested happened, otherwise one clear line and another status.

The last line of each script is `cli.run(main)`.
"""

import argparse
import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

# All that a script reads is on disk before it starts, so libraries must not look names up on the hub. The scripts that
# download set HF_HUB_OFFLINE=0 themselves.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STOP_SECONDS = 20  # that a stopped script has to clean up
STORAGE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG,
    errno.EIO, errno.ESTALE, errno.ELOOP,
}  # fmt: skip


_received: list[int] = []  # signals to stop that this process got, see `run`
_finishing: list[int] = []  # how many there were when each `unstoppable` that is at work began


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose complaints are one line like all others."""

    def __init__(self, description: str | None = None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` says what it takes")


class UserError(Exception):
    """Something the user can correct. Its text is one line: the file, the value and the way out."""


def say(line: str) -> None:
    """Print one line of progress without delay, also when the output is a pipe."""
    print(line, flush=True)


@contextlib.contextmanager
def messages_on_stderr(wanted: bool) -> Iterator[None]:
    """While the body runs, print on stderr what goes to stdout, if `wanted`: stdout is for a JSON document alone."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """Print a JSON document."""
    say(json.dumps(value, indent=2, ensure_ascii=False))


def end_with_parent() -> None:
    """Let the kernel end this process when its parent is killed (Linux). A child process calls this first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def adopt_orphans() -> None:
    """Let processes below this one become its children when their parents die, so that it finds them (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table: the column heads, then the rows, in aligned columns."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
AT_END: list[Callable[[], None]] = []  # what a command does when its `main` has ended: rooms above add to it


def run(main: Callable[[], int | None]) -> None:
    """Run `main`, then, however it ended, what is in AT_END; exit with the status that `main` returned (None: 0).

    A UserError or a storage error (full or failing disk, no permission, a link to itself) ends in one line on stderr
    and status 1. Ctrl-C, SIGTERM and SIGHUP (a lost terminal) run every `finally` and end in status 130, 143 and 129.
    Any other exception is a bug and keeps its traceback.
    """
    received = _received
    received.clear()

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if not _finishing:
            _stop(number)

    for number in STOPPING:
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background jobs
            signal.signal(number, stop)
    try:
        try:
            status = main() or 0
        finally:
            for task in AT_END:
                with contextlib.suppress(OSError, UserError):  # how `main` ended matters more
                    task()
        sys.exit(status)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except SystemExit:
        if received:  # a library (Ray) replaced our exception by its own SystemExit
            sys.exit(128 + received[0])
        raise
    except Exception as error:
        if received:  # a library (safetensors) replaced our exception by another
            sys.exit(128 + received[0])
        fault = str(error) if isinstance(error, UserError) else storage_fault(error)
        if fault is None:
            raise
        fail(fault)


@contextlib.contextmanager
def unstoppable() -> Iterator[None]:
    """While the body runs, signals that stop a command wait: a second one must not cut short what the first began."""
    _finishing.append(len(_received))
    try:
        yield
    finally:
        if len(_received) > _finishing.pop():
            check_stopped()


def _stop(number: int) -> NoReturn:
    """Unwind as the signal `number` demands."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def check_stopped() -> None:
    """Unwind if a signal to stop has come; for long loops, to call between two steps.

    The exception that a signal raises is lost where it happens to arrive in a finalizer or a library's own handler.
    """
    if _received:
        _stop(_received[0])


def call(
    command: Sequence[object],
    environment: dict[str, str] | None = None,
    output: IO[Any] | None = None,
    own_group: bool = False,
) -> int:
    """Run another program and return its status; when this process is stopped, that one cleans up first.

    Args:
        command: program and arguments; numbers and paths become text.
        environment: variables to set in addition to the present ones.
        output: a file for its stdout and stderr (default: this process's).
        own_group: start it in a session of its own, and stop all processes of that session.
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
        elif not isinstance(error, KeyboardInterrupt):  # Ctrl-C reached it, too; a second would cut its clean-up
            child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        raise


def killed_text(status: int) -> str:
    """How a program ended that has the negative status of `call`: by which signal, and what that may mean."""
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    cause = ", as the kernel does where memory runs out (see dmesg)" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{cause}"


def environment_for_modules() -> dict[str, str]:
    """The present environment, with which `python -m paragen.<room>.<module>` works from any folder."""
    known = (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, known))}


def storage_fault(error: BaseException) -> str | None:
    """One line on the storage error that caused an exception, or None when there is none.

    Follows the exceptions that it was raised from. Libraries written in Rust (safetensors) give the number of the error
    in their text only: "(os error 28)".
    """
    link, number = _storage_error(error)
    if link is None:
        return None
    where = getattr(link, "filename", None) or "writing"
    return f"{where}: {os.strerror(number)}; no file is left half-written, run it again when that is mended"


@contextlib.contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Name `place`, a file or a folder, in a storage error of the body that names no file.

    Those of writing to an open file do not, nor do those of libraries written in Rust.
    """
    try:
        yield
    except Exception as error:
        link, _ = _storage_error(error)
        if link is not None and not getattr(link, "filename", None):
            setattr(link, "filename", str(place))  # noqa: B010 (only an OSError declares it)
        raise


def _storage_error(error: BaseException) -> tuple[BaseException | None, int]:
    """The storage error that caused an exception, and its number; (None, 0) when there is none."""
    link: BaseException | None = error
    while link is not None:
        number = link.errno if isinstance(link, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(link)):
            number = int(found[1])
        if number in STORAGE_ERRORS:
            return link, number
        link = link.__cause__ or link.__context__
    return None, 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means too little memory. PyTorch's CPU allocator states it in its text only."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def complain(message: str) -> None:
    """Print `error: message` on stderr and continue."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Print `error: message` on stderr and exit with status 1."""
    complain(message)
    sys.exit(1)
