"""Runs of this repository's scripts in processes forked from one that has imported what training needs.

Imported by the sweep and the demo. A fork starts in a second where a process of its own imports for ten; it is
otherwise like one: the fork happens before any tensor or device is touched, so nothing that a run changes
(LLaMA-Factory's templates, patched classes, memory) reaches the next, and it can be killed alone. It ends when the
process that asked for it ends.
"""

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from paragen.common import cli, devices, paths

# LLaMA-Factory itself asks for the devices when it is imported, which would spoil a later fork on a machine with a GPU;
# what takes the time is below it.
BELOW = [
    "torch", "datasets", "matplotlib.pyplot", "omegaconf", "peft", "safetensors.torch", "torchaudio", "av",
    "transformers.trainer", "transformers.trainer_seq2seq", "trl",
]  # fmt: skip
LOST = 255  # exit code, as multiprocessing says it, of a process whose end nobody saw: the one it is forked from died

context = multiprocessing.get_context("forkserver")


def preload() -> None:
    """Start the process that the others are forked from; it imports while this one goes on."""
    above = [] if devices.nvidia_driver() else ["llamafactory.train.tuner"]
    context.set_forkserver_preload([*BELOW, *above])
    multiprocessing.forkserver.ensure_running()


def start(script: str, arguments: list[str], environment: dict[str, str], log: Path | None) -> ForkServerProcess:
    """Start the `main` of a script of utils/ or of a module of paragen, with these arguments.

    Args:
        script: the module's name; its `main` runs as if called from a shell.
        environment: variables to set beside those of the forked process.
        log: where its output is appended; None: it goes where this one's goes.

    Returns the process; its `exitcode` is the script's status, negative for a signal.
    """
    process = context.Process(target=_run, args=(script, arguments, environment, log, os.getcwd()))
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    main.__file__ = main.__spec__ = None  # the child would else import the calling script again
    try:
        process.start()
    finally:
        vars(main).update(kept)
    return process


def _run(script: str, arguments: list[str], environment: dict[str, str], log: Path | None, folder: str) -> None:
    cli.end_with_parent()
    os.setpgid(0, 0)
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method("fork", force=True)  # for data loaders, as in a process of its own on Linux
    sys.path.insert(0, str(paths.UTILS))
    sys.argv = [script, *arguments]
    cli.run(importlib.import_module(script).main)
