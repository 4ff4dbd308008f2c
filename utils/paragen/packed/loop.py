"""Trains runs in packs: logs and saves for each of them, and completes it."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from paragen.collection import finishing
from paragen.common import cli, devices
from paragen.common.cli import UserError, say
from paragen.packed import checkpoint_writer, dropout, memory, stock_checkpoint
from paragen.packed.batches import Row, Step
from paragen.packed.engine import Engine
from paragen.packed.frozen_base import FrozenBase, PackedRun
from paragen.packed.layers import NotPackable
from paragen.training import attempts, collector, completion, progress
from paragen.training.attempts import Attempt

PROGRESS_SECONDS = 10  # between two lines of progress


def train_all(base: FrozenBase, ready: list[tuple[Any, Any, PackedRun]]) -> Iterator[tuple[Any, Any, Any]]:
    """Train runs in as few packs as memory allows.

    Args:
        base: their base model.
        ready: (cell, run, member), where `member` is the run as `base` prepared it; cell and run are yielded unchanged.

    Yields (cell, run, result) for each. The result is None for a complete run, else the UserError or NotPackable.
    """
    waiting = list(ready)
    limit = len(waiting)
    while waiting:
        assert base.model is not None  # the first run that was admitted has loaded it
        step_batches = [list(member.schedule.step_batches()) for _, _, member in waiting]
        members = [member for _, _, member in waiting[:limit]]
        if base.model.device.type == "cpu":  # too little memory kills the process there, without an exception
            limit = count_fitting(base, members, step_batches)
        else:
            limit = memory.count_within_host_memory([member.adapter for member in members])
        pack = make_pack(base, members[:limit], step_batches[:limit])
        devices.free_memory()
        if isinstance(pack, NotPackable):
            yield from ((cell, run, pack) for cell, run, _ in waiting)
            return
        if pack is None and limit == 1:
            yield *waiting.pop(0)[:2], NotPackable("a single step of it does not fit into memory")
            limit = len(waiting)
            continue
        if pack is None:
            limit = min(limit - 1, count_fitting(base, members, step_batches))
            continue
        count = len(pack.members)
        with pack:
            pack.train()
            for index, ended in pack.complete_all():
                yield *waiting[index][:2], ended
        del pack
        devices.free_memory()
        waiting = waiting[count:]
        limit = min(limit, len(waiting))


def make_pack(
    base: FrozenBase, members: list[PackedRun], step_batches: list[list[list[Row]]]
) -> "Pack | NotPackable | None":
    """A pack that is ready to train; a NotPackable; or None where it does not fit into memory."""
    try:
        return Pack(base, members, step_batches)
    except NotPackable as error:
        return error
    except torch.OutOfMemoryError:
        return None  # the error holds the memory until this handler ends


def count_fitting(base: FrozenBase, members: list[PackedRun], step_batches: list[list[list[Row]]]) -> int:
    """How many members, counted from the first one, fit into memory together."""
    if len(members) == 1:
        return 1
    assert base.model is not None  # see train_all
    steps = [steps_of([member], [each]) for member, each in zip(members, step_batches, strict=False)]
    try:
        return memory.count_that_fit(base.model, base.dtype, [member.adapter for member in members], steps)
    except torch.OutOfMemoryError:
        return 1
    finally:
        devices.free_memory()


def steps_of(members: list[PackedRun], step_batches: list[list[list[Row]]]) -> list[Step]:
    """The steps of a pack.

    Args:
        members: the runs.
        step_batches: for each member, for each of its steps, the rows.
    """
    steps = [Step([rows or [] for rows in each]) for each in zip_longest(*step_batches)]
    if any(member.adapter.dropout for member in members):
        starts = [(member.schedule.args.seed, member.schedule.begins) for member in members]
        found = [dropout.streams(seed, range(first, first + len(steps))) for seed, first in starts]
        for step, streams in zip(steps, zip(*found, strict=True), strict=True):
            step.streams = list(streams)
    return steps


class Pack:
    """Runs that are trained together. A context manager: its end unloads the adapters from the base model.

    Args:
        base: the base model.
        members: the runs; all have the same steps done.
        step_batches: for each member, for each of its steps, the rows.

    Raises torch.OutOfMemoryError where they do not fit into memory.
    """

    def __init__(self, base: FrozenBase, members: list[PackedRun], step_batches: list[list[list[Row]]]):
        assert base.model is not None  # see train_all
        self.members = members
        self.steps = steps_of(members, step_batches)
        loads = [sum(len(row.tokens) for rows in each for row in rows) / len(self.steps) for each in step_batches]
        self.engine = Engine(base.model, [member.adapter for member in members], base.dtype, loads)
        self.threads: ThreadPoolExecutor = checkpoint_writer.threads()
        self.logged: list[dict[int, dict[str, float]]] = [{} for _ in members]
        self.saving: list[list[Future]] = [[] for _ in members]
        self.unsaved: dict[tuple[int, int], tuple[Tensor, dict[str, Tensor]]] = {}
        try:
            self.writers = [self._writer(*pair) for pair in zip(members, self.engine.vectors, strict=True)]
            self.engine.prepare(self.steps)
        except BaseException:
            self.engine.close()
            self.threads.shutdown()
            raise

    def _writer(self, member: PackedRun, vector: Tensor) -> checkpoint_writer.Writer | None:
        if not member.schedule.collects:
            return None
        staging = member.schedule.attempt.staging
        collector.save_config(member.config, staging)
        return checkpoint_writer.Writer(staging, member.adapter, vector, self.threads)

    def __enter__(self) -> "Pack":
        return self

    def __exit__(self, *error: Any) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)
        for member in self.members:
            member.log.end()
        self.engine.close()

    def train(self) -> None:
        """Train all steps, and write or queue what is saved. A member that diverges is left out from there on."""
        began = printed = time.monotonic()
        self.threads.submit(finishing.prepare_drawing)
        for member in self.members:
            member.log.begin()
            member.recorder.begin()
            progress.report(member.schedule.attempt.staging, "training")
        phase, done = self.members[0].schedule.attempt.run.phase, self.members[0].done
        begun = f", of which {done} are trained" if done else ""
        say(f"{phase} of {len(self.members)} cells, packed, {len(self.steps)} steps{begun}")
        for number, losses in self.engine.train(self.steps, self._save_step, done):
            cli.check_stopped()
            for index, member in enumerate(self.members):
                self._log_loss(index, member, number, losses[index])
            if time.monotonic() - printed > PROGRESS_SECONDS:
                printed = time.monotonic()
                rate = 1000 * (printed - began) / (number + 1 - done)
                say(f"  step {number + 1} of {len(self.steps)}, {rate:.0f} ms each, mean loss {mean_of(losses):.4f}")

    def _save_step(self, number: int) -> None:
        """Queue what is saved of each adapter after a step."""
        for index, (member, writer) in enumerate(zip(self.members, self.writers, strict=True)):
            if index in self.engine.diverged:
                continue
            step = member.schedule.begins + number
            if member.schedule.is_collected(step):
                assert writer is not None  # every run that collects has one
                writer.take(step)
            if step in member.schedule.saved:
                moments = {name: value.detach().cpu().clone() for name, value in self.engine.moments_of(index).items()}
                self.unsaved[index, step] = self.engine.vectors[index].detach().cpu().clone(), moments

    def _log_loss(self, index: int, member: PackedRun, number: int, loss: float) -> None:
        """Log the loss of a member's step, and save the checkpoint that waits for it."""
        schedule = member.schedule
        step = schedule.begins + number
        if index in self.engine.diverged:
            self.unsaved.pop((index, step), None)
        if step > schedule.last or index in self.engine.diverged:
            return
        if logged := member.log.add(loss):
            self.logged[index][step] = logged
        if (index, step) in self.unsaved:
            write = stock_checkpoint.prepare_save(
                schedule, member.adapter, *self.unsaved.pop((index, step)), member.config
            )
            write = member.recorder.writing(write, step, member.log.unlogged)
            wait(self.saving[index][-1:])  # each that waits is a copy in memory
            self.saving[index].append(self.threads.submit(write))

    def complete_all(self) -> Iterator[tuple[int, UserError | None]]:
        """Complete the members' runs and publish each as soon as it is complete.

        Files are written, read back and hashed for several members at a time, all in their staging folders. Only this
        thread publishes, so that no run appears while its staging folder is being removed.

        Yields (member, None, or the error where that fails) for each.
        """
        threads = ThreadPoolExecutor(min(checkpoint_writer.THREADS, devices.cpu_cores()), "completion")
        try:
            finishing = {threads.submit(self._finish, index): index for index in range(len(self.members))}
            for counted in as_completed(finishing):
                index = finishing[counted]
                yield index, self._publish(self.members[index].schedule.attempt, counted)
        finally:
            threads.shutdown(cancel_futures=True)

    def _finish(self, index: int) -> int:
        """Complete the staging folder of a member; returns the number of its checkpoints."""
        member, writer = self.members[index], self.writers[index]
        attempt = member.schedule.attempt
        for saving in self.saving[index]:
            saving.result()
        if index in self.engine.diverged:
            step = member.schedule.begins + self.engine.diverged[index]
            member.recorder.forget()
            raise UserError(
                f"{attempt.run}: the training diverged: at step {step} its loss or its gradient is not finite; lower "
                "learning_rate"
            )
        member.log.finish()
        if writer is not None:
            written = writer.written()
            records = {step: self.logged[index][step] | record for step, record in written.items()}
            collector.write_collected(attempt.staging, records)
        facts = {
            "device": devices.describe(),
            **member.schedule.facts(),
            "engine": "packed",
            "packed_with": len(self.members),
            **({"dropout_stream": "packed"} if member.adapter.dropout else {}),
        }
        return completion.finish(attempt, facts)

    def _publish(self, attempt: Attempt, finished: Future) -> UserError | None:
        """Publish a run once its staging folder is complete; returns the error where one of both fails."""
        try:
            completion.publish(attempt, finished.result())
            attempts.drop_claim(attempt.run.folder)
        except UserError as error:
            return error
        except (OSError, RuntimeError) as error:
            if cli.storage_fault(error) is not None:
                raise
            told = f"{attempt.run}: cannot be completed: {type(error).__name__}: {error}"
            return attempts.full_disk(attempt.run.folder) or UserError(told)
        return None


def mean_of(losses: list[float]) -> float:
    """The mean loss of the members that are still training."""
    present = [loss for loss in losses if loss]
    return sum(present) / max(1, len(present))
