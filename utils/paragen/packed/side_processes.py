"""Calls of a function in processes forked from this one, while it does other work.

A forked process has all that was imported and loaded, without a copy of it, and starts in milliseconds. The function
must not use the GPU, which CUDA forbids after a fork, nor torch's CPU threads, for which libgomp would wait for ever.
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType

from paragen.common import cli

context = multiprocessing.get_context("fork")
DIGITS = 4  # bytes of a number in the queue
STOPPED, HUNG = "it was killed", "it answered nothing for too long"
PATIENCE = 900  # seconds without a call that ends; a fork can inherit a lock that nobody will release
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)  # the signals that end this process, and what it started


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Have the signals that stop this process wait until the body ends. A mask holds for one thread only."""
    received: list[int] = []
    before = {each: signal.signal(each, lambda number, _frame: received.append(number)) for each in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for signal_number in received:
            os.kill(os.getpid(), signal_number)


class Calls:
    """`function(0)`, `function(1)`, ... in a few processes. A context manager: its end stops those that still run.

    The numbers are taken in ascending order, each by the next process that is free.

    Args:
        function: takes a number. It leaves what it makes in files; an exception is kept as its text.
        count: how many calls, at most 16,000.
        processes: how many run at a time, at most.
    """

    def __init__(self, function: Callable[[int], None], count: int, processes: int):
        self.function, self.count = function, count
        self.width = min(count, processes)
        self.ended: dict[int, str] = {}  # by number: the text of its exception, or an empty one
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []

    def __enter__(self) -> "Calls":
        # A pipe serves as the queue: the kernel gives each number to one reader, and a killed one leaves no lock.
        queue, numbers = os.pipe()
        try:
            os.write(numbers, b"".join(number.to_bytes(DIGITS, "big") for number in range(self.count)))
            os.close(numbers)
            for _ in range(self.width):
                self._start(queue)
        except BaseException:
            self._stop()
            raise
        finally:
            os.close(queue)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def fault_of(self, number: int) -> str | None:
        """Wait until a call has ended; returns None where it succeeded, else why not.

        Where none ends for PATIENCE seconds, all processes are stopped.
        """
        while number not in self.ended and self.pipes:
            ready = connection.wait(self.pipes, PATIENCE)
            if not ready:
                self._stop()
                return HUNG
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    ended, text = pipe.recv()
                except EOFError:  # the process has ended, after its last call or in the midst of one
                    self.pipes.remove(pipe)
                    pipe.close()
                else:
                    self.ended[ended] = text
        return self.ended.get(number, STOPPED) or None

    def _start(self, queue: int) -> None:
        here, there = context.Pipe(duplex=False)
        self.pipes.append(here)
        with _undisturbed():  # else `_stop` might not know the new process
            process = context.Process(target=self._serve, args=(queue, there))
            process.start()
            self.processes.append(process)
        there.close()  # so that the end of the process is the end of the pipe

    def _serve(self, queue: int, out: Connection) -> None:
        for stopping in STOPPING:
            signal.signal(stopping, signal.SIG_DFL)  # else it would unwind as its parent does
        cli.end_with_parent()
        gc.freeze()  # what the parent has is the parent's to free
        while taken := os.read(queue, DIGITS):
            number, text = int.from_bytes(taken, "big"), ""
            try:
                self.function(number)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            out.send((number, text))

    def _stop(self) -> None:
        for process in self.processes:
            process.kill()  # one that has just been forked does not yet end at SIGTERM
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []
