"""Runs scripts in processes forked from one that has imported LLaMA-Factory: one second each instead of ten.

The fork happens before any tensor is made, so a run behaves as in a new process, and can be killed like one.
"""

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["helpers.preloaded"])


class Result(NamedTuple):
    status: int  # as a shell shows it; negative: killed by that signal
    output: str


class Run:
    def __init__(self, process: multiprocessing.Process, log: Path):
        self.process, self.log = process, log

    def wait(self) -> Result:
        self.process.join(300)
        assert self.process.exitcode is not None, "the run hangs"
        return Result(self.process.exitcode, self.log.read_text())

    def kill_when(self, condition: Callable[[], bool], kind: int = signal.SIGKILL) -> bool:
        """Send a signal as soon as the condition holds; False when the run ended before."""
        while self.process.is_alive():
            if condition():
                os.kill(self.process.pid, kind)
                self.process.join()
                return True
            time.sleep(0.001)
        return False


def ready() -> None:
    """Start the process that others are forked from, unless it is there; it finds helpers.preloaded by PYTHONPATH."""
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        multiprocessing.forkserver.ensure_running()


def start(script: str, arguments: list[str], environment: dict[str, str], log: Path) -> Run:
    """Start utils/<script>.py (or `stock`: LLaMA-Factory's own entry on a JSON config) with these arguments."""
    ready()
    process = context.Process(target=_run, args=(script, arguments, environment, str(log), os.getcwd()))
    process.start()
    return Run(process, log)


def _run(script: str, arguments: list[str], environment: dict[str, str], log: str, folder: str) -> None:
    assert "helpers.preloaded" in sys.modules, "multiprocessing does not say when an import fails"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update({"DEVICES": "cpu", "HF_HUB_OFFLINE": "1", **environment})
    os.chdir(folder)
    if cores := int(environment.get("CORES", 0)):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # as many slots
    multiprocessing.set_start_method("fork", force=True)  # for data loaders, as in a process of its own on Linux
    if limit := int(environment.get("FILE_SIZE_LIMIT", 0)):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is then an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.path[:0] = [str(ROOT / "utils"), str(ROOT / "tests")]
    sys.argv = [script, *arguments]
    sys.executable = os.environ["PY"]  # what it starts is forked, too: see forked_python
    if script == "stock":
        import json

        from llamafactory.train.tuner import run_exp

        os.chdir(arguments[1])
        run_exp(json.loads(Path(arguments[0]).read_text()))
        return
    from paragen.common import cli, paths

    paths.SAVES = Path(environment.get("SAVES_FOLDER", paths.SAVES))
    cli.run(importlib.import_module(script).main)
