"""Trains ready members in packs, keeps their books, and completes their runs.

Imported by packed_train.py.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from paragen.common import cli, devices, files
from paragen.common.cli import UserError, say
from paragen.packed import checkpoint_writer, memory, stock_checkpoint
from paragen.packed.batches import Row, Step
from paragen.packed.engine import Engine
from paragen.packed.frozen_base import FrozenBase, PackedRun
from paragen.packed.layers import NotPackable
from paragen.training import attempts, collector, completion

EVERY = 10  # seconds between lines of progress


def train_all(base: FrozenBase, ready: list[tuple[Any, Any, PackedRun]]) -> Iterator[tuple[Any, Any, Any]]:
    """Train members in as few packs as memory allows.

    Args:
        base: their model.
        ready: (cell, run, member); the first two are handed back.

    Yields (cell, run, outcome) for each: None when its run is complete, a UserError, or why it is NotPackable.
    """
    waiting = list(ready)
    limit = len(waiting)
    assert base.model is not None  # the first run that was admitted has loaded it
    while waiting:
        step_batches = [list(member.schedule.step_batches()) for _, _, member in waiting]
        members = [member for _, _, member in waiting[:limit]]
        if base.model.device.type == "cpu":  # which says nothing when there is too little, but kills
            limit = fitting(base, members, step_batches)
        else:
            limit = memory.count_within_host_memory([member.adapter for member in members])
        pack = ready_pack(base, members[:limit], step_batches[:limit])
        devices.free_memory()
        if isinstance(pack, NotPackable):
            yield from ((cell, run, pack) for cell, run, _ in waiting)
            return
        if pack is None and limit == 1:
            yield *waiting.pop(0)[:2], NotPackable("a single step of it does not fit into memory")
            limit = len(waiting)
            continue
        if pack is None:
            limit = min(limit - 1, fitting(base, members, step_batches))
            continue
        count = len(pack.members)
        with pack:
            if whole := pack.train():
                for number, (cell, run, _) in enumerate(waiting[:count]):
                    yield cell, run, pack.complete(number)
        del pack
        devices.free_memory()
        tried, waiting = waiting[:count], waiting[count:]
        limit = min(limit, len(waiting))
        if not whole:
            say("  a cell diverged, which may have spoilt the others: they are trained again in smaller packs")
            again, failed = begun_again(base, tried)
            yield from failed
            waiting, limit = again + waiting, -(-count // 2)


def ready_pack(
    base: FrozenBase, members: list[PackedRun], step_batches: list[list[list[Row]]]
) -> "Pack | NotPackable | None":
    """A pack ready to train; why it cannot be; or None where it does not fit into memory."""
    try:
        return Pack(base, members, step_batches)
    except NotPackable as why:
        return why
    except torch.OutOfMemoryError:
        return None  # what it took is free only now, as the error holds it


def begun_again(base: FrozenBase, tried: list[tuple[Any, Any, PackedRun]]) -> tuple[list, list]:
    """Members, with cell and run, as they were before training; and (cell, run, error) where that fails."""
    again, failed = [], []
    for cell, run, member in tried:
        attempt = member.schedule.attempt
        files.remove_folder(attempt.staging)
        attempt.staging.mkdir()
        try:
            again.append((cell, run, base.admit(attempt)))
        except (UserError, NotPackable) as error:
            failed.append((cell, run, error))
    return again, failed


def fitting(base: FrozenBase, members: list[PackedRun], step_batches: list[list[list[Row]]]) -> int:
    """How many of the members, from the first on, fit into memory together."""
    if len(members) == 1:
        return 1
    assert base.model is not None  # see train_all
    steps = [[Step([rows]) for rows in each] for each in step_batches[: len(members)]]
    try:
        return memory.count_that_fit(base.model, base.dtype, [member.adapter for member in members], steps)
    except torch.OutOfMemoryError:
        return 1
    finally:
        devices.free_memory()


class Pack:
    """Members that are trained together.

    Args:
        step_batches: the rows of each of a member's steps.

    Raises torch.OutOfMemoryError where they do not fit. Use it as a context, which gives the model back.
    """

    def __init__(self, base: FrozenBase, members: list[PackedRun], step_batches: list[list[list[Row]]]):
        assert base.model is not None  # see train_all
        self.members = members
        self.steps = [Step([rows or [] for rows in each]) for each in zip_longest(*step_batches)]
        loads = [sum(len(row.tokens) for rows in each for row in rows) / len(self.steps) for each in step_batches]
        self.engine = Engine(base.model, [member.adapter for member in members], base.dtype, loads)
        self.threads: ThreadPoolExecutor = checkpoint_writer.threads()
        self.shown: list[dict[int, dict[str, float]]] = [{} for _ in members]
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

    def train(self) -> bool:
        """Train all steps; what is to be kept is on disk or on its way there afterwards.

        Returns False, at once, where values are not finite in a pack of several: the products that leave other
        adapters out multiply them by zero, which a value that is not finite survives. Alone, an adapter may diverge.
        """
        began = said = time.monotonic()
        for member in self.members:
            member.log.begin()
        phase = self.members[0].schedule.attempt.run.phase
        say(f"{phase} of {len(self.members)} cells, packed, {len(self.steps)} steps")
        for number, losses in self.engine.train(self.steps, self._keep):
            if len(self.members) > 1 and not all(map(math.isfinite, losses)):
                return False
            for who, member in enumerate(self.members):
                self._note(who, member, number, losses[who])
            if time.monotonic() - said > EVERY:
                said = time.monotonic()
                rate = 1000 * (said - began) / (number + 1)
                say(f"  step {number + 1} of {len(self.steps)}, {rate:.0f} ms each, mean loss {mean_of(losses):.4f}")
        return len(self.members) == 1 or all(bool(vector.isfinite().all()) for vector in self.engine.vectors)

    def _keep(self, number: int) -> None:
        """Queue what is kept of the adapters after a step."""
        for who, (member, writer) in enumerate(zip(self.members, self.writers, strict=True)):
            step = member.schedule.first + number
            if member.schedule.is_collected(step):
                assert writer is not None  # every run that collects has one
                writer.take(step)
            if step in member.schedule.saved:
                moments = {name: value.detach().cpu().clone() for name, value in self.engine.moments_of(who).items()}
                self.unsaved[who, step] = self.engine.vectors[who].detach().cpu().clone(), moments

    def _note(self, who: int, member: PackedRun, number: int, loss: float) -> None:
        """Take the loss of a member's step, and save the checkpoint that waited for it."""
        schedule = member.schedule
        step = schedule.first + number
        if step > schedule.last:
            return
        if shown := member.log.add(loss):
            self.shown[who][step] = shown
        if (who, step) in self.unsaved:
            write = stock_checkpoint.prepare_save(
                schedule, member.adapter, *self.unsaved.pop((who, step)), member.config
            )
            self.saving[who].append(self.threads.submit(write))

    def complete(self, who: int) -> UserError | None:
        """Make a member's run whole and give it its name; what is wrong with it, if anything."""
        member, writer = self.members[who], self.writers[who]
        attempt = member.schedule.attempt
        member.log.finish()
        try:
            for saving in self.saving[who]:
                saving.result()
            if writer is not None:
                written = writer.written()
                records = {step: self.shown[who][step] | record for step, record in written.items()}
                collector.write_collected(attempt.staging, records)
            facts = {
                "device": devices.describe(),
                **member.schedule.facts(),
                "engine": "packed",
                "packed_with": len(self.members),
            }
            completion.complete(attempt, facts)
            attempts.drop_claim(attempt.run.folder)
        except UserError as error:
            return error
        except (OSError, RuntimeError) as error:
            if cli.storage_fault(error) is not None:
                raise
            return UserError(f"{attempt.run}: cannot be completed: {type(error).__name__}: {error}")
        return None


def mean_of(losses: list[float]) -> float:
    """The mean of the losses of those that still train."""
    present = [loss for loss in losses if loss]
    return sum(present) / max(1, len(present))
