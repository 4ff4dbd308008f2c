"""Processes that are killed at a chosen moment, so that they leave behind what killed runs do."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator

context = multiprocessing.get_context("fork")
Pause = Callable[..., None]


@contextlib.contextmanager
def running(action: Callable[[Pause], None]) -> Iterator[int]:
    """A process that does `action(pause)` and stands still where that calls `pause()`; killed (-9) when the body ends.

    Yields its process number.
    """
    here, there = context.Pipe(duplex=False)

    def pause(*_args, **_settings) -> None:
        there.send("now")
        time.sleep(600)

    process = context.Process(target=action, args=(pause,))
    process.start()
    try:
        assert here.poll(60), "the process did not come to that moment"
        assert process.pid is not None
        yield process.pid
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def killed(action: Callable[[Pause], None]) -> None:
    """Do `action(pause)` in a process that is killed (-9) where it calls `pause()`."""
    with running(action):
        pass
