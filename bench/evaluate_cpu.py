"""evaluate.py cpu: checkpoints of SmolLM2-135M scored together, beside one after another, on Demo_test and this CPU.

Three ways in turn, in one process, each with its model loaded: this project's code with all checkpoints at once, the
same with one at a time, and transformers with PEFT. The CPU time is told, too, for a machine that others use.
"""

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

import scratch

import cli
import index
from cli import say

DATASET, MODEL = "Demo", "smollm2-135m"
WAYS = ("together", "one at a time", "PEFT")


def run(args: argparse.Namespace, _: Path) -> int:
    """Measure, print a table, write the raw numbers to args.out."""
    os.environ |= {
        "DEVICES": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "DATASET": DATASET,
        "RANK": str(args.rank),
        "SPLIT": "",
    }
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    from evaluate_peft import Peft

    import grades
    import questions
    import scored_base

    chosen = next(one for one in index.chosen() if MODEL in one.name.lower())
    entries = chosen.manifest["checkpoints"][-args.checkpoints :]
    base = scored_base.at(chosen.manifest, None)
    grader = grades.Grader(chosen, base, questions.split_of(chosen.manifest, ""), "choice", "packed")
    peft = Peft(chosen, {})
    peft.choose_size([int(size) for size in args.sizes.split()])
    steps = [entry["step"] for entry in entries]
    ours(grader, steps[:1], 1)  # the model is loaded and tokens are laid out
    found: dict[str, Any] = {"steps": steps, "rows": len(grader.questions), "batch": peft.size, "rounds": []}
    for number in range(args.rounds):
        ways = (lambda: ours(grader, steps, len(steps)), lambda: ours(grader, steps, 1),
                lambda: measured(lambda: {entry["step"]: peft.score(entry) for entry in entries}))  # fmt: skip
        order = range(3) if number % 2 == 0 else reversed(range(3))
        found["rounds"].append({WAYS[which]: ways[which]() for which in order})
        scratch.write_json(args.out, found)
        say(f"round {number + 1}: " + ", ".join(f"{way} {found['rounds'][-1][way]['seconds']:.1f} s" for way in WAYS))
    show(found)
    if args.profile:
        profiled(grader, steps)
    return 0


def ours(grader: Any, steps: list[int], at_once: int) -> dict[str, Any]:
    """Score steps, so many at once; the time from the end of the comparison with PEFT on."""
    import grades
    import scored_base

    grades.AT_ONCE, plain, began = at_once, scored_base.compare, []

    def compare(*arguments):
        plain(*arguments)
        began.append(clock())

    scored_base.compare = compare
    try:
        scores = {step: one.score for group in grader.groups(steps) for step, one in group.items()}
    finally:
        scored_base.compare = plain
    return timed(began[0], scores)


def measured(work: Any) -> dict[str, Any]:
    """Its scores, with the time that it took."""
    began = clock()
    return timed(began, work())


def timed(began: tuple[float, float], scores: dict[int, dict[str, Any]]) -> dict[str, Any]:
    now = clock()
    kept = {step: [one["score"], one["likelihood_score"]] for step, one in scores.items()}
    return {"seconds": now[0] - began[0], "CPU": now[1] - began[1], "scores": kept}


def clock() -> tuple[float, float]:
    """Seconds by the clock and of this process's CPU time."""
    return time.monotonic(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def show(found: dict[str, Any]) -> None:
    """The table, the agreement and the verdict."""
    count, rounds = len(found["steps"]), found["rounds"]
    say(f"\nSmolLM2-135M, {found['rows']} rows, {count} checkpoints, CPU, best of {len(rounds)} rounds")
    best = {way: {key: min(one[way][key] for one in rounds) for key in ("seconds", "CPU")} for way in WAYS}
    cli.print_table(("way", "s", "CPU s", "s per checkpoint", "times together"), [
        (way, f"{one['seconds']:.1f}", f"{one['CPU']:.1f}", f"{one['seconds'] / count:.2f}",
         f"{one['seconds'] / best['together']['seconds']:.2f}") for way, one in best.items()
    ])  # fmt: skip
    say(f"\naccuracies by step, as generated and by likelihood (PEFT: {found['batch']} rows at once)")
    cli.print_table(("step", *WAYS), [
        (str(step), *(" ".join(f"{share:.4f}" for share in rounds[-1][way]["scores"][step]) for way in WAYS))
        for step in found["steps"]
    ])  # fmt: skip


def profiled(grader: Any, steps: list[int]) -> None:
    """Print the operations that the most time goes to when steps are scored together."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ours(grader, steps, len(steps))
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))
