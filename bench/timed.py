"""Run one training, or one evaluation, in this process, and note when what of it happened.

    python bench/timed.py RESULT.json stock CONFIG.json STOP                stock LLaMA-Factory on a config
    python bench/timed.py RESULT.json train STOP RECIPE RANK [key=value ..] our ordinary path
    python bench/timed.py RESULT.json packed --cell ..                      our packed engine
    python bench/timed.py RESULT.json evaluate                              evaluate.py, on what the environment asks

STOP is the step after which the run ends early, 0 for none. packed.py and evaluate.py start this; times are seconds
since 1970.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from shapes import Seen, Work

from paragen.common import cli, devices


def main() -> None:
    result, what, *arguments = sys.argv[1:]
    devices.pin(devices.choose())
    noted: dict[str, Any] = {}
    try:
        {"stock": stock, "train": trained, "packed": packed, "evaluate": evaluated}[what](noted, arguments)
    finally:
        noted["peak_GB"] = max(noted.get("peak_GB", 0.0), peak_gb())
        Path(result).write_text(json.dumps(noted))


def stock(noted: dict[str, Any], arguments: list[str]) -> None:
    """LLaMA-Factory as its own command line runs it on one device, with a callback that reads the clock."""
    from llamafactory.train.tuner import run_exp

    config = json.loads(Path(arguments[0]).read_text())
    run_exp(config | devices.settings(devices.choose()), [steps_clock(noted, int(arguments[1]), saves=False)])


def trained(noted: dict[str, Any], arguments: list[str]) -> None:
    """train.py, with the same callback beside its own."""
    from llamafactory.train import tuner

    import train

    plain, clock = tuner.run_exp, steps_clock(noted, int(arguments[0]), saves=True)
    tuner.run_exp = lambda config, callbacks: plain(config, [*callbacks, clock])
    sys.argv = ["train.py", *arguments[1:]]
    train.main()


def steps_clock(noted: dict[str, Any], stop: int, saves: bool) -> Any:
    """A trainer callback that notes `begins` (of each step), `end` and `losses` by step.

    Args:
        stop: the step after which training ends early; 0: none.
        saves: let that step save a checkpoint.
    """
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.time()

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            noted.setdefault("begins", []).append(now())

        def on_step_end(self, args, state, control, **kwargs):
            if stop and state.global_step >= stop:
                control.should_training_stop = control.should_log = True
                control.should_save = control.should_save or saves
            return control

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                noted.setdefault("losses", {})[state.global_step] = logs["loss"]

        def on_train_end(self, args, state, control, **kwargs):
            noted["end"] = now()

    return Clock()


def packed(noted: dict[str, Any], arguments: list[str]) -> None:
    """packed_train.py; notes the spans of its parts and, of each pack, when the losses of its steps were known."""
    from paragen.packed import frozen_base, loop, packed_train
    from paragen.packed.engine import Engine

    noted |= {"imported": time.time(), "spans": [], "packs": []}
    for owner, name in ((frozen_base.FrozenBase, "_load"), (frozen_base.FrozenBase, "admit"), (loop, "count_fitting"),
                        (loop.Pack, "__init__"), (loop.Pack, "_finish")):  # fmt: skip
        note_spans(owner, name, noted["spans"])
    known: list[float] = []
    plain_steps, plain_train = Engine.train, loop.Pack.train

    def steps(engine, *given):
        for item in plain_steps(engine, *given):
            known.append(time.time())
            yield item

    def train(pack):
        known.clear()
        began = time.time()
        whole = plain_train(pack)
        noted["packs"].append({
            "phase": pack.members[0].schedule.attempt.run.phase, "began": began, "ended": time.time(),
            "known": [*known],
            "ranks": [member.adapter.rank for member in pack.members], "peak_GB": peak_gb(),
            "work": [work_of(step.rows[who] for step in pack.steps) for who in range(len(pack.members))],
        })  # fmt: skip
        return whole

    Engine.train, loop.Pack.train = steps, train
    sys.argv = ["packed_train.py", *arguments]
    status = packed_train.main()
    noted["peak_GB"] = max((pack["peak_GB"] for pack in noted["packs"]), default=0.0)
    sys.exit(status)


def evaluated(noted: dict[str, Any], arguments: list[str]) -> None:
    """evaluate.py; notes the spans of its parts, what went through the model and how many answers were generated."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    import evaluate
    from paragen.collection import evaluation
    from paragen.scoring import base_model, collection_scorer, peft_comparison
    from paragen.scoring.collection_scorer import CollectionScorer
    from paragen.scoring.factor_reader import FactorReader
    from paragen.scoring.scorer import Scorer

    noted |= {"imported": time.time(), "device": devices.describe(), "spans": [], "generated": 0, "passes": []}
    for owner, name in ((base_model, "load_model"), (CollectionScorer, "__init__"), (peft_comparison, "peft_losses"),
                        (CollectionScorer, "_check"), (FactorReader, "stack"), (Scorer, "begin"), (Scorer, "finish"),
                        (Scorer, "generate"), (collection_scorer, "score_checkpoint"),
                        (evaluation, "write")):  # fmt: skip
        note_spans(owner, name, noted["spans"])
    plain, launch = Scorer.generate, Scorer.begin
    ticks: list[Any] = []

    def generate(scorer, factors, numbers, most):
        noted["budget"] = scorer.passes.token_limit
        noted["generated"] += sum(map(len, numbers))
        return plain(scorer, factors, numbers, most)

    def begin(scorer, factors):
        lengths = {"work": 0, "computed": len(scorer.passes.prefix)}
        noted.update({name: seen_by(scorer.questions, scorer.passes.trees, prefix) for name, prefix in lengths.items()})
        noted["rows"] = len(scorer.questions)
        ticks.append(tick())
        try:
            return launch(scorer, factors)
        finally:
            ticks.append(tick())

    Scorer.generate, Scorer.begin = generate, begin
    sys.argv = ["evaluate.py", *arguments]
    status = evaluate.main()
    noted["passes"] = [between(*pair) for pair in zip(ticks[::2], ticks[1::2], strict=True)]
    if status:
        sys.exit(status)


def tick() -> Any:
    """Now, as the device sees it."""
    import torch

    if not torch.cuda.is_available():
        return time.time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(one: Any, other: Any) -> float:
    """Seconds of the device between two ticks."""
    return other - one if isinstance(one, float) else one.elapsed_time(other) / 1000


def seen_by(questions, trees, prefix: int) -> Seen:
    """What one adapter needs: each row's prompt and the tree of its responses, without padding; of the prompts' first
    tokens, `prefix`, those of one row."""
    tokens, keys, picks = prefix, prefix * (prefix + 1) // 2, 0
    for question, tree in zip(questions, trees, strict=True):
        size = len(question.tokens)
        tokens += size - prefix + len(tree.tokens)
        keys += size * (size + 1) // 2 - prefix * (prefix + 1) // 2 + sum(size + depth + 1 for depth in tree.depths)
        picks += len({node for node, _ in tree.edges})
    return Seen(tokens, keys, picks)


def note_spans(owner: Any, name: str, spans: list[tuple[str, float, float]]) -> None:
    """From now on, note when each call of a function or method began and ended."""
    plain = getattr(owner, name)

    def call(*args, **kwargs):
        began = time.time()
        try:
            return plain(*args, **kwargs)
        finally:
            spans.append((name, began, time.time()))

    setattr(owner, name, call)


def work_of(steps) -> Work:
    """What an adapter sees in all: `steps` gives its rows of each step."""
    rows = [row for rows in steps for row in rows]
    lengths = [len(row.tokens) for row in rows]
    learned = sum(int((row.labels[1:] != -100).sum()) for row in rows)
    return Work(sum(lengths), sum(length**2 for length in lengths), learned)


def peak_gb() -> float:
    """GB that torch had allocated on the GPU at most; on the CPU, what the process had."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


if __name__ == "__main__":
    cli.run(main)
