"""Scores collections; where there are several and several devices, on all of them, with workers as a sweep has them.

A collection whose worker died is scored a second time, which goes on from the scores that were written.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from paragen.collection import index
from paragen.collection.index import Chosen
from paragen.common import cli, devices
from paragen.common.cli import UserError, say
from paragen.scoring import evaluate
from paragen.sweep import ray_cluster
from paragen.sweep.cell_worker import CellWorker
from paragen.sweep.session import STOP_SECONDS, Session
from paragen.sweep.workers import RayDied, Workers
from paragen.training.outcome import Outcome


class ScoreWorker(CellWorker):
    """A slot that scores; see CellWorker for its arguments."""

    def score(self, folder: Any, show: int) -> Outcome:
        """Score a collection; arguments and result as for ScoringProcess.score."""
        return self.scoring.score(folder, show)

    def output(self) -> list[str]:
        """The lines that its process wrote since the last call."""
        return self.scoring.output()


class Task(NamedTuple):
    """One attempt at a collection."""

    chosen: Chosen
    number: int = 1  # or 2


class Sharing:
    """The scheduler: collections that wait, and the names of those that were scored.

    Args:
        workers: what scores them.
        chosen: the collections, those of one base model one after the other.
        show: the number of questions whose answers are printed.
    """

    def __init__(self, workers: Workers, chosen: list[Chosen], show: int):
        self.workers, self.show = workers, show
        self.waiting = [Task(one) for one in chosen]
        self.bases: dict[Any, str | None] = {}  # the base model that each worker loaded last
        self.scored: set[str] = set()

    def step(self) -> None:
        """Give each idle worker a collection, and wait up to a second for one to end."""
        if self.workers.session.is_dead():
            say("Ray died on this machine: starting it again")
            for task in self.workers.restart():
                self.end(task, RayDied())
        if self.waiting:
            self.workers.start_missing(len(self.waiting))
        for worker in list(self.workers.idle) if self.waiting else []:
            self.give(worker)
        at_work = list(self.workers.running.values())
        ended = self.workers.wait()
        for worker, task in at_work:
            self.show_output(worker, task)
        for one in ended:
            self.end(one.task, one.result)
        if self.workers.is_stuck(len(self.waiting)):
            say("nothing can start: no device is free")

    def give(self, worker: Any) -> None:
        """Have an idle worker score the next collection, of the base model that it has loaded where one waits."""
        if not self.waiting:
            return
        fitting = (task for task in self.waiting if task.chosen.manifest.base_name == self.bases.get(worker))
        task = next(fitting, self.waiting[0])
        self.waiting.remove(task)
        self.bases[worker] = task.chosen.manifest.base_name
        self.workers.give(task, lambda worker: worker.score.remote(task.chosen.folder, self.show), worker)

    def show_output(self, worker: Any, task: Task) -> None:
        """Print what a worker wrote; its indented lines do not name the collection."""
        try:
            lines = self.workers.session.ray.get(worker.output.remote(), timeout=STOP_SECONDS)
        except self.workers.session.ray.exceptions.RayError:  # it died, which ends its task
            return
        for line in lines:
            say(f"  {task.chosen.name}: {line.strip()}" if line.startswith(" ") and not self.show else line)

    def end(self, task: Task, result: Outcome | Exception) -> None:
        """Record how the scoring of a collection ended; queue another attempt where its worker or process died."""
        if isinstance(result, Exception):
            is_fault = self.workers.is_fault(result)
            result = Outcome("failed" if is_fault else "killed", f"its worker: {' '.join(str(result).split())[-300:]}")
        if result.is_done:
            self.scored.add(task.chosen.name)
        elif result.kind == "killed" and task.number == 1:
            say(f"  {task.chosen.name}: will try again: {result.cause}")
            self.waiting.insert(0, task._replace(number=2))
        else:
            complain(task.chosen, result.cause)


def score_all(chosen: list[Chosen], show: int = 0, scored: Collection[str] = ()) -> int:
    """Score what the collections' evaluations lack, update the index, and print a table.

    Args:
        chosen: the collections.
        show: the number of questions whose answers are printed.
        scored: the names of those that were scored just now.

    Returns a script's status: 1 where one could not be scored, for which a line was printed; the others are scored.
    Raises UserError where the only one cannot be scored, and for devices that cannot be used.
    """
    chosen = sorted(chosen, key=lambda one: one.manifest.base_name or "")
    unscored = [one for one in chosen if one.name not in scored and is_unscored(one)]
    given, failed = {*scored}, set()
    if len(unscored) > 1 and ray_cluster.slots_here() > 1:
        given |= share_out(unscored, show)
        failed = {one.name for one in unscored} - given
    else:
        devices.pin(devices.choose()[:1])
    base, done = None, []
    for one in chosen:
        try:
            plan = evaluate.plan_for(one)
            if one.name not in given | failed:
                base = evaluate.score(plan, base, show)
            done += [plan] if one.name not in failed else []
        except UserError as error:
            if len(chosen) == 1:
                raise
            complain(one, str(error))
    if done:
        index.update()  # so that pairs can be chosen by the new scores
    evaluate.show_scores(done)
    return 0 if len(done) == len(chosen) else 1


def is_unscored(chosen: Chosen) -> bool:
    """Whether a collection can be scored and lacks a requested score; `score_all` reports the fault of others."""
    try:
        return evaluate.has_missing_scores(evaluate.plan_for(chosen))
    except UserError:
        return False


def share_out(chosen: list[Chosen], show: int) -> set[str]:
    """Score collections on all devices; returns the names of those that were scored.

    For the others a line was printed.
    """
    ray_cluster.check_settings()
    say(f"scoring {len(chosen)} collections on several devices: starting Ray")
    with Session() as session:
        sharing = Sharing(Workers(session, ScoreWorker, gpus=1), chosen, show)
        sharing.workers.run(sharing)
    return sharing.scored


def complain(chosen: Chosen, cause: str) -> None:
    """Print why a collection could not be scored."""
    cli.complain(cause if chosen.name in cause else f"{chosen.name}: {cause}")
