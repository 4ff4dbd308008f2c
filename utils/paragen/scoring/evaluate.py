"""Score the base model and each checkpoint of collections on prompts that they were not trained on.

    DATASET=ARC-c [MODEL=..] [RANK=..] [SPLIT=..] [STEPS=all|last|every:10] [LIMIT=n] [FORCE=1]
        python utils/evaluate.py [--show N]                                                      (make evaluate)

Reads collections, data/ and models/; writes evaluation.json into each collection after every few checkpoints, so that a
run that was stopped goes on where it was. SPLIT names another registered dataset than the one paired with the
collection's; LIMIT takes its first rows. --show prints the answers of the base and of the last checkpoint.
"""

import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.collection import evaluation, prompts, run_identity
from paragen.collection.index import Chosen
from paragen.collection.manifest import read_manifest
from paragen.common import cli, devices, files
from paragen.common.cli import UserError, say
from paragen.exports import peft
from paragen.scoring import answers, questions
from paragen.scoring.questions import Question, Split

if TYPE_CHECKING:
    from paragen.scoring.checkpoint_scores import Graded
    from paragen.scoring.scored_base import Base

ENGINE = "packed"  # as evaluation.json names what computed it
BASE = evaluation.BASE
PACKAGES = ("llamafactory", "transformers", "torch", "math-verify")


class Plan(NamedTuple):
    """What is to be scored of a collection."""

    chosen: Chosen
    split: Split
    metric: str
    limit: int | None
    steps: list[int]  # BASE, and the checkpoints asked for

    def __str__(self) -> str:
        return f"{self.chosen.name} on {self.split.name}"


def check_asked() -> None:
    """Raise UserError for settings of the environment that no collection can be scored with."""
    asked_limit()
    peft.selected([], asked_steps())
    if split := os.environ.get("SPLIT"):
        prompts.registered(split)


def asked_steps() -> str:
    """Which checkpoints STEPS asks for."""
    return os.environ.get("STEPS") or "all"


def asked_limit() -> int | None:
    """LIMIT as a number. Raises UserError for what is none."""
    value = os.environ.get("LIMIT") or None
    if value is not None and (not value.isdecimal() or int(value) == 0):
        raise UserError(f"LIMIT={value}: is not a number of rows from 1 up")
    return value and int(value)


def plan_of(chosen: Chosen) -> Plan:
    """What SPLIT, LIMIT and STEPS ask for of a collection. Raises UserError where that cannot be scored."""
    manifest = chosen.manifest
    if manifest.recipe is None:
        raise UserError(
            f"{chosen.name}: its manifest does not know its recipe (it was made from a stock run), so not how it reads "
            "text; collect it here to have it scored"
        )
    split, limit = questions.split_of(manifest, os.environ.get("SPLIT", "")), asked_limit()
    metric = answers.metric_of(split.texts)
    if limit is not None and limit >= len(split.rows):
        limit = None
    entries = peft.selected(manifest.checkpoints, asked_steps())
    steps = [BASE, *(entry.step for entry in entries)]
    return Plan(chosen, questions.limited(split, limit), metric, limit, steps)


def score(plan: Plan, base: "Base | None", show: int) -> "Base | None":
    """Bring a collection's evaluation.json up to what is planned.

    Args:
        base: the base model that was loaded last, which is used again where it is the same.
        show: to how many questions the answers are printed.

    Returns the base model loaded now. Raises UserError when another process is at it, when the scores there are of
    other rows or settings, or when it cannot be scored.
    """
    folder, manifest = plan.chosen.folder, plan.chosen.manifest
    try:
        with files.lock(files.beside(folder, "evaluation.lock")):
            entry = entry_for(plan, evaluation.read(folder, manifest))
            wanted = missing(plan, entry)
            if not wanted:
                more = "; FORCE=1 scores again, and shows answers" if show else ""
                say(f"scored already: {plan}, {len(plan.steps) - 1} checkpoints{more}")
                return base
            say(f"scoring {plan}: {entry['rows']} rows, {len(wanted)} of {len(plan.steps)} models")
            os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
            from paragen.scoring import (
                checkpoint_scores,  # imports torch and LLaMA-Factory: after the device is pinned
                scored_base,
            )

            base = scored_base.at(manifest, base)
            entry |= computed_by(plan, base, entry)
            started, ends = time.monotonic(), {}
            grader = checkpoint_scores.Grader(plan.chosen, base, plan.split, plan.metric)
            for graded in unless_replaced(plan, grader.groups(wanted)):
                keep(entry, graded)
                save(plan, entry)
                left = len(missing(plan, entry))
                say(f"  {len(plan.steps) - left} of {len(plan.steps)} scored, {time.monotonic() - started:.0f} s")
                ends |= {step: one for step, one in graded.items() if step in (BASE, plan.steps[-1])}
            show_answers(grader.questions[:show], ends)
            return base
    except files.Busy:
        raise UserError(f"{plan}: another process is scoring it; wait for it") from None


def entry_for(plan: Plan, there: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation to go on with: the one there is, or a new one. Raises UserError for one of other rows or settings.

    FORCE=1 begins anew.
    """
    most = evaluation.MOST.get(plan.metric)
    settings = {"max_new_tokens": most} if most else {}
    new = {
        "split": plan.split.name, "paired": plan.split.paired, "limit": plan.limit, "metric": plan.metric,
        "rows": len(plan.split.rows), "prompts_sha256": files.sha256_of_value(plan.split.texts), "settings": settings,
        "engine": ENGINE, "dtype": None, "device": None, "versions": {}, "base": None, "checkpoints": [],
    }  # fmt: skip
    old = next((one for one in there if rows_of(one) == rows_of(new)), None)
    if old is None or run_identity.force_asked():
        return new
    if changed := changes(old, new):
        raise UserError(f"{plan}: its scores are stale, changed since: {', '.join(changed)}; FORCE=1 scores again")
    return old


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What makes the scores of one evaluation useless for another, a phrase each."""
    rows = ["the rows"] if old["prompts_sha256"] != new["prompts_sha256"] else []
    decisive = ("metric", "rows", "settings", "engine")
    return rows + [f"{key} ({old[key]}, now {new[key]})" for key in decisive if old[key] != new[key]]


def missing(plan: Plan, entry: dict[str, Any]) -> list[int]:
    """The steps asked for that have no score yet."""
    there = {one["step"] for one in entry["checkpoints"]} | ({BASE} if entry["base"] else set())
    return [step for step in plan.steps if step not in there]


def computed_by(plan: Plan, base: "Base", entry: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says of the machine. Raises UserError where the scores there were made in another dtype."""
    dtype = str(base.dtype).removeprefix("torch.")
    if entry["dtype"] not in (None, dtype):
        raise UserError(
            f"{plan}: {len(missing(plan, entry))} models are to be scored in {dtype}, the others were in "
            f"{entry['dtype']} ({entry['device']}); go on there, or score all again with FORCE=1"
        )
    versions = {name: version(name) for name in PACKAGES}
    return {"dtype": dtype, "device": devices.describe(), "versions": versions}


def keep(entry: dict[str, Any], graded: "dict[int, Graded]") -> None:
    """Put new scores into an evaluation."""
    scores = {one["step"]: one for one in entry["checkpoints"]}
    for step, one in graded.items():
        if step == BASE:
            entry["base"] = one.score
        else:
            scores[step] = {"step": step, **one.score}
    entry["checkpoints"] = [scores[step] for step in sorted(scores)]


def save(plan: Plan, entry: dict[str, Any]) -> None:
    """Put an evaluation into its collection's evaluation.json, beside those of other rows; raises as `check_same`."""
    folder = plan.chosen.folder
    with files.lock(files.beside(folder, "lock"), waiting=f"waiting for what is at work on {plan.chosen.name}"):
        check_same(plan)
        files.remove_unfinished(folder / evaluation.FILE)
        others = [one for one in evaluation.read(folder, plan.chosen.manifest) if rows_of(one) != rows_of(entry)]
        evaluation.write(folder, plan.chosen.manifest, [*others, entry])


def unless_replaced(plan: Plan, groups: Iterator[Any]) -> Iterator[Any]:
    """The groups; where they end with an error because the collection was replaced, that is what is said."""
    try:
        yield from groups
    except UserError:
        check_same(plan)
        raise


def check_same(plan: Plan) -> None:
    """Raise UserError when the collection is no more the one that is being scored."""
    manifest = read_manifest(plan.chosen.folder)
    if manifest is None or manifest.sha256 != plan.chosen.manifest.sha256:
        raise UserError(f"{plan}: the collection was replaced while it was scored; score it again")


def rows_of(entry: dict[str, Any]) -> tuple:
    """Which rows an evaluation is of."""
    return entry["split"], entry["limit"]


def show_answers(asked: list[Question], graded: "dict[int, Graded]") -> None:
    """Print the answers of the base and of the last checkpoint to the first questions."""
    for number, question in enumerate(asked):
        print(f"\n{question.prompt}\n  right:      {question.response}")
        for step, one in sorted(graded.items()):
            name = "base" if step == BASE else f"step {step}"
            print(f"  {name + ':':11} {' '.join(one.answers[number].split())}")


def show_scores(plans: list[Plan]) -> None:
    """Print a line per collection: its base, its best and its last checkpoint."""
    rows = []
    for plan in plans:
        found = evaluation.read(plan.chosen.folder, plan.chosen.manifest)
        entry = next(one for one in found if rows_of(one) == (plan.split.name, plan.limit))
        last, best = entry["checkpoints"][-1], evaluation.best_of(entry)
        texts = [evaluation.text_of(entry, one) for one in (entry["base"], best, last)]
        if best is not None:
            texts[1] += f" at step {best['step']}"
        rows.append((plan.chosen.name, entry["split"], str(entry["rows"]), entry["metric"], *texts))
    if rows:
        cli.print_table(("collection", "on", "rows", "metric", "base", "best", "last"), rows)
