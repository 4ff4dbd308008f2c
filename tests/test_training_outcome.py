"""The outcome of a run: made from the exception that ended it, written by its process, read by the sweep."""

import errno

import pytest
import torch

from paragen.common.cli import UserError
from paragen.training import outcome
from paragen.training.outcome import AlreadyRunning, DistributedFailure, Outcome, OutOfMemory

CHILD = Outcome("out_of_memory", "x.yaml: out of device memory; halve it")
DISK = OSError(errno.ENOSPC, "No space left on device", "saves/x")


MEMORY = "x.yaml: out of device memory; halve it"
ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
RUNNING = "x.yaml at rank 4 is running already"
NO_SPACE = "saves/x: No space left on device; no file is left half-written, run it again when that is mended"


@pytest.mark.parametrize(
    ("error", "kind", "cause"),
    [
        (OutOfMemory(MEMORY), "out_of_memory", MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory", "OutOfMemoryError: CUDA out of memory"),
        (RuntimeError(ALLOCATOR.replace(" to ", " to\n")), "out_of_memory", f"RuntimeError: {ALLOCATOR}"),
        (DistributedFailure(CHILD), "out_of_memory", MEMORY),
        (AlreadyRunning(RUNNING), "running", RUNNING),
        (UserError("x.yaml: out of memory, almost"), "failed", "x.yaml: out of memory, almost"),
        (RuntimeError(RUNNING), "failed", f"RuntimeError: {RUNNING}"),
        (DISK, "storage", NO_SPACE),
        (KeyboardInterrupt(), "stopped", ""),
        (SystemExit(143), "stopped", ""),
    ],
)
def test_an_outcome_follows_from_the_exceptions_type_not_its_text(tmp_path, error, kind, cause):
    def task():
        raise error

    with pytest.raises(type(error)):
        outcome.recorded(task, tmp_path / "outcome.json")
    ended = outcome.read(tmp_path / "outcome.json")
    assert (ended.kind, ended.cause, ended.is_done) == (kind, cause, False)


def test_a_successful_task_is_recorded_as_done(tmp_path):
    outcome.recorded(lambda: None, tmp_path / "outcome.json")
    assert outcome.read(tmp_path / "outcome.json") == outcome.DONE
    assert outcome.read(tmp_path / "nothing.json") is None, "its process was killed"


@pytest.mark.parametrize(
    ("ended", "text"),
    [
        (Outcome("done", seconds=3.0), "collected"),
        (Outcome("stopped"), "stopped"),
        (Outcome("failed", "x.yaml: no", "saves/x.log"), "failed: x.yaml: no (log: saves/x.log)"),
        (Outcome("failed", "x.yaml: no"), "failed: x.yaml: no"),
        (Outcome("killed", "killed by signal 9", "saves/x.log"), "failed: killed by signal 9 (log: saves/x.log)"),
        (Outcome("not_packable", "not for the packed engine: y"), "not for the packed engine: y"),
    ],
)
def test_an_outcome_is_shown_as_tables_and_messages_show_it(ended, text):
    assert ended.text == text


def test_a_collection_that_does_not_verify_fails_with_its_fault(collected, monkeypatch, capsys):
    """As a sweep verifies a collection."""
    from paragen.common import paths
    from paragen.recipes.run import run_of
    from paragen.sweep import cell_worker

    monkeypatch.setattr(paths, "MODELS", collected.top / "models")
    run = run_of(collected.finetune, 4)
    cell_worker.verify_runs([run])
    (run.folder / "checkpoint-9.safetensors").write_bytes(b"?")
    with pytest.raises(UserError, match="^FAULTY .*: checkpoint-9.safetensors has 1 bytes"):
        cell_worker.verify_runs([run])


@pytest.mark.parametrize(("status", "kind"), [(-9, "killed"), (137, "killed"), (1, "failed")])
def test_a_training_on_several_devices_that_was_killed_is_repeated(status, kind):
    """One of its processes, or the one that starts them."""
    from paragen.training import ordinary

    assert ordinary.outcome_of_status(status, 2).kind == kind
