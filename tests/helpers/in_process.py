"""Scripts run in the tests' own process, to see what a command prints and how it ends without starting a Python for it.

For what a new process shows alone (signals, limits, locks, what is imported), use `forked_python`.
"""

import contextlib
import importlib
import io
import signal
import sys
from typing import NamedTuple
from unittest import mock

from paragen.common import cli

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def stream(errors: str) -> io.TextIOWrapper:
    """What stands in for stdout or stderr: text becomes the same bytes as there."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)


def call(script: str, *arguments: object, **environment: str) -> Ended:
    """Run utils/<script>.py as a command would: with these arguments, and these settings beside the present ones.

    What is no UserError or storage error is raised here, where the command would end in a traceback.
    """
    main = importlib.import_module(script).main
    handlers = [signal.getsignal(number) for number in SIGNALS]
    out, err = stream("strict"), stream("backslashreplace")
    try:
        with contextlib.ExitStack() as stack:
            for context in (
                mock.patch.object(sys, "argv", [f"{script}.py", *map(str, arguments)]),
                mock.patch.dict("os.environ", environment),
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
            ):
                stack.enter_context(context)
            cli.run(main)
    except SystemExit as end:
        return Ended(end.code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode())
    finally:
        for number, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(number, handler)
