"""Tasks in processes forked from one that has imported what training needs.

A fork starts in a second where a process of its own imports for ten; it is otherwise like one: the fork happens before
any tensor or device is touched, so nothing that a run changes (LLaMA-Factory's templates, patched classes, memory)
reaches the next, and it can be killed alone. It ends when the process that started it ends.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from paragen.common import cli, devices, paths
from paragen.training import outcome

# LLaMA-Factory itself asks for the devices when it is imported, which would spoil a later fork on a machine with a GPU;
# what takes the time is below it.
BELOW = [
    "torch", "datasets", "matplotlib.pyplot", "omegaconf", "peft", "safetensors.torch", "torchaudio", "av",
    "transformers.trainer", "transformers.trainer_seq2seq", "trl",
]  # fmt: skip
LOST = 255  # exit code, as multiprocessing gives it, of a process whose end nobody saw: the one it is forked from died

context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Start the process that the others are forked from; it imports while this one goes on."""
    above = [] if devices.nvidia_driver() else ["llamafactory.train.tuner"]
    context.set_forkserver_preload([*BELOW, *above])
    multiprocessing.forkserver.ensure_running()


def start(
    task: Callable[..., Any], arguments: tuple, environment: dict[str, str], log: Path | None, note: Path | None = None
) -> ForkServerProcess:
    """Start a task in a forked process.

    Args:
        task: a function at the top of a module.
        environment: variables to set beside those of the forked process.
        log: where its output is appended; None: it goes where this one's goes.
        note: the file that gets its Outcome.

    Returns the process; its `exitcode` is the status as a script would have it, negative for a signal.
    """
    process = context.Process(target=_run, args=(task, arguments, environment, log, note, os.getcwd()))
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    main.__file__ = main.__spec__ = None  # the child would else import the calling script again
    try:
        process.start()
    finally:
        vars(main).update(kept)
    return process


def run_script(name: str, arguments: list[str]) -> int | None:
    """The `main` of utils/<name>.py as if called from a shell; a task."""
    sys.path.insert(0, str(paths.UTILS))
    sys.argv = [f"{name}.py", *arguments]
    return __import__(name).main()


def _run(
    task: Callable[..., Any], arguments: tuple, environment: dict[str, str], log: Path | None, note: Path | None,
    folder: str,
) -> None:  # fmt: skip
    cli.end_with_parent()
    os.setpgid(0, 0)
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # for data loaders, as in a process of its own on Linux
    cli.run(lambda: outcome.noted(lambda: task(*arguments), note) if note else task(*arguments))
