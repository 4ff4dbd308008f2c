"""How every script here ends: 0 when all that was asked for happened, else one clear line and a non-zero status.

Imported by the scripts: `cli.run(main)` is the last line of each.
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable

# All that a script reads is on disk before it starts; libraries that would look a name up on the hub are told not to.
# The scripts that download say HF_HUB_OFFLINE=0 themselves.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class UserError(Exception):
    """Something the user can put right. Its text is one line: the file, the value and the way out."""


def say(line: str) -> None:
    """Print one line of progress, at once also when the output is a pipe."""
    print(line, flush=True)


def run(main: Callable[[], int | None]) -> None:
    """Run `main` and leave the process with its status.

    A UserError or a storage error (full disk, no permission) ends in one line on stderr and status 1; Ctrl-C and
    SIGTERM unwind through every `finally` and end in 130 and 143. Any other exception is a bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main() or 0)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        fault = storage_fault(error)
        if fault is None:
            raise
        fail(fault)


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


def fail(message: str) -> None:
    """Print `error: message` on stderr and leave with status 1."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(1)
