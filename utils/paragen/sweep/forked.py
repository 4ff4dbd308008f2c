"""Runs tasks in processes forked from one that has imported what training needs.

A forked process starts in one second instead of the ten that the imports take. Otherwise it is like a new process: the
fork happens before any tensor is made or device used, so nothing that one run changes (LLaMA-Factory's templates,
patched classes, memory) reaches the next. It can be killed alone, and is stopped when the process that started it ends,
however that ends.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from paragen.common import cli, devices, locks, paths
from paragen.training import outcome
from paragen.training.outcome import Outcome

# LLaMA-Factory queries the devices when it is imported, which would break later forks on a machine with a GPU. The
# libraries below it take most of the time.
PRELOADED = [
    "torch", "datasets", "matplotlib.pyplot", "omegaconf", "peft", "safetensors.torch", "torchaudio", "av",
    "transformers.trainer", "transformers.trainer_seq2seq", "trl",
]  # fmt: skip
LOST_EXIT_CODE = 255  # multiprocessing's, for a process whose fork server died, so that its real code is not known

context = multiprocessing.get_context("forkserver")
# For each process that was started here the end of a pipe that closes when this one ends. Its parent, the fork server,
# lives on as long as any of its children.
_lifelines: "weakref.WeakKeyDictionary[ForkServerProcess, Connection]" = weakref.WeakKeyDictionary()


def preload() -> None:
    """Start the process that others are forked from. It imports in the background.

    Its socket lies in a process folder: where this process is killed, as Ray's workers are at the end of a sweep, the
    folder is removed as those of all killed processes are.
    """
    devices.let_threads_sleep()
    config: dict[str, Any] = vars(multiprocessing.process.current_process())["_config"]
    if "tempdir" not in config:  # in which multiprocessing makes its sockets
        kept = contextlib.ExitStack()
        config["tempdir"] = str(kept.enter_context(locks.process_folder()))
        atexit.register(kept.close)
    also = [] if devices.nvidia_driver() else ["llamafactory.train.tuner"]
    context.set_forkserver_preload([*PRELOADED, *also])
    multiprocessing.forkserver.ensure_running()


def start(
    task: Callable[..., Any],
    arguments: tuple,
    environment: dict[str, str],
    log: Path | None,
    outcome_file: Path | None = None,
) -> ForkServerProcess:
    """Start a task in a forked process.

    Args:
        task: a function at the top of a module.
        environment: variables to set in addition to those of the process that is forked.
        log: the file to which its output is appended; None: this process's output.
        outcome_file: the file to which its Outcome is written; None: it is not written.

    Returns the process. Its `exitcode` is a script's status, or negative for a signal.
    """
    there, here = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(there, task, arguments, environment, log, outcome_file, os.getcwd()))
    _lifelines[process] = here
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    main.__file__ = main.__spec__ = None  # otherwise the child imports the calling script again
    try:
        process.start()
    finally:
        vars(main).update(kept)
        there.close()
    return process


def outcome_of_signal(code: int | None) -> Outcome | None:
    """The outcome of a process that a signal ended, from its exit code; None where it ended otherwise."""
    if code == LOST_EXIT_CODE:
        return Outcome("killed", "the process that it was forked from died")
    return Outcome("killed", f"killed by signal {-code}") if code is not None and code < 0 else None


def run_script(name: str, arguments: list[str]) -> int | None:
    """A task: run the `main` of utils/<name>.py with command line arguments."""
    sys.path.insert(0, str(paths.UTILS))
    sys.argv = [f"{name}.py", *arguments]
    return __import__(name).main()


def _run(
    lifeline: Connection, task: Callable[..., Any], arguments: tuple, environment: dict[str, str], log: Path | None,
    outcome_file: Path | None, folder: str,
) -> None:  # fmt: skip
    cli.end_with_parent()
    threading.Thread(target=_end_with, args=(lifeline,), name="lifeline", daemon=True).start()
    os.setpgid(0, 0)
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # for data loaders, as in a process of its own on Linux
    cli.run(lambda: outcome.recorded(lambda: task(*arguments), outcome_file) if outcome_file else task(*arguments))


def _end_with(lifeline: Connection) -> None:
    """Stop this process when the one that started it ends."""
    try:
        lifeline.recv()
    except EOFError:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # also wakes it where it waits
