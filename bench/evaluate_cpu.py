"""evaluate.py cpu: checkpoints of SmolLM2-135M scored together, beside one after another, on Demo_test and this CPU.

Three ways in turn, in one process, each with its model loaded: this project's code with all checkpoints at once, the
same with one at a time, and transformers with PEFT. The CPU time is told, too, for a machine that others use.
"""

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scratch

from paragen.collection import index
from paragen.common import cli
from paragen.common.cli import say

DATASET, MODEL = "Demo", "smollm2-135m"
WAYS = ("together", "one at a time", "PEFT")


def run(args: argparse.Namespace, _: Path) -> int:
    """Measure, print a table, write the raw numbers to args.out."""
    os.environ |= {"DEVICES": "cpu", "CUDA_VISIBLE_DEVICES": "", "DATASET": DATASET}
    os.environ |= {"RANK": str(args.rank), "SPLIT": ""}
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    from evaluate_peft import Peft
    from timed import note_spans

    from paragen.scoring import base_model, questions
    from paragen.scoring.collection_scorer import CollectionScorer
    from paragen.scoring.scorer import Scorer

    chosen = next(one for one in index.chosen()[0] if MODEL in one.name.lower())
    entries = chosen.manifest.checkpoints[-args.checkpoints :]
    base = base_model.base_for(chosen.manifest, None)
    scorer = CollectionScorer(chosen, base, questions.split_for(chosen.manifest, ""), "choice")
    peft = Peft(chosen, {})
    peft.choose_size([int(size) for size in args.sizes.split()])
    steps = [entry.step for entry in entries]
    spans: list[tuple] = []
    for name in ("begin", "generate"):
        note_spans(Scorer, name, spans)
    sample = entries[-args.baseline_checkpoints :]
    found: dict[str, Any] = {"steps": steps, "rows": len(scorer.questions), "batch": peft.size, "rounds": []}
    for number in range(args.rounds):
        ways = (lambda: ours(scorer, steps, len(steps), spans), lambda: ours(scorer, steps, 1, spans),
                lambda: measured(lambda: {entry.step: peft.score(entry) for entry in sample}))  # fmt: skip
        found["rounds"].append({})
        for which in range(3) if number % 2 == 0 else reversed(range(3)):
            found["rounds"][-1][WAYS[which]] = one = ways[which]()
            scratch.write_json(args.out, found)
            say(f"round {number + 1}, {WAYS[which]}: {one['seconds']:.2f} s per checkpoint {one.get('parts', '')}")
    show(found)
    if args.profile:
        profiled(scorer, steps, spans)
    return 0


def ours(scorer: Any, steps: list[int], at_once: int, spans: list[tuple]) -> dict[str, Any]:
    """Score steps, so many at once; the time from the end of the comparison with PEFT on, by the parts in spans."""
    from paragen.scoring import collection_scorer, peft_comparison

    collection_scorer.GROUP_SIZE, plain, began = at_once, peft_comparison.check_losses, []
    spans.clear()

    def compare(*arguments):
        plain(*arguments)
        began.append(clock())

    peft_comparison.check_losses = compare
    try:
        scores = {step: one.score for group in scorer.scores(steps) for step, one in group.items()}
    finally:
        peft_comparison.check_losses = plain
    found = timed(began[0], scores)
    for name in ("begin", "generate"):
        took = sum(end - start for other, start, end in spans if other == name and start > began[0][2])
        found.setdefault("parts", {})[name] = round(took / len(scores), 3)
    return found


def measured(work: Callable[[], dict]) -> dict[str, Any]:
    """Its scores, with the time that it took."""
    began = clock()
    return timed(began, work())


def timed(began: tuple[float, ...], scores: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """What a round notes: seconds and CPU seconds since `began` per checkpoint, and their scores."""
    now = clock()
    kept = {step: [one["score"], one["likelihood_score"]] for step, one in scores.items()}
    return {"seconds": (now[0] - began[0]) / len(kept), "CPU": (now[1] - began[1]) / len(kept), "scores": kept}


def clock() -> tuple[float, float, float]:
    """Seconds by the clock, of this process's CPU time, and since 1970."""
    return time.monotonic(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), time.time()


def show(found: dict[str, Any]) -> None:
    """The table, the agreement and the verdict."""
    count, rounds = len(found["steps"]), found["rounds"]
    say(f"\nSmolLM2-135M, {found['rows']} rows, {count} checkpoints, CPU, best of {len(rounds)} rounds")
    best = {way: {key: min(one[way][key] for one in rounds) for key in ("seconds", "CPU")} for way in WAYS}
    cli.print_table(("way", "s per checkpoint", "CPU s per checkpoint", "times together"), [
        (way, f"{one['seconds']:.2f}", f"{one['CPU']:.2f}", f"{one['seconds'] / best['together']['seconds']:.2f}")
        for way, one in best.items()
    ])  # fmt: skip
    sampled = rounds[-1]["PEFT"]["scores"]
    say(
        f"\naccuracies as generated and by likelihood (PEFT: {found['batch']} rows at once, {len(sampled)} checkpoints)"
    )
    cli.print_table(("step", *WAYS), [
        (str(step), *(" ".join(f"{share:.4f}" for share in rounds[-1][way]["scores"][step]) for way in WAYS))
        for step in sampled
    ])  # fmt: skip


def profiled(scorer: Any, steps: list[int], spans: list[tuple]) -> None:
    """Print the operations that the most time goes to when steps are scored together."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ours(scorer, steps, len(steps), spans)
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))
