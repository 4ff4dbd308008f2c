"""packed.py whole: collected checkpoints per GPU-hour of stock LLaMA-Factory, our ordinary path and the packed engine.

The packed engine's cells are run whole, from the start of the process to its exit. Of stock and of the ordinary path,
the median step and the start-up and end of each phase's process are measured, and extrapolated to a whole cell.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import scratch
import shapes

from paragen.common import cli
from paragen.common.cli import UserError, say

DATASET = "ARC-c"
LIKE = "qwen2.5-0.5b"  # the model whose recipes are taken
WARM_UP = 4  # steps at the start that no median counts
LAGGING = (
    9  # steps at the end whose losses become known all at once (MAX_STEPS_AHEAD in packed/engine.py, and the last)
)
COMMON = {"per_device_train_batch_size": 1, "disable_gradient_checkpointing": False, "save_only_model": False}


def run(args: argparse.Namespace, top: Path) -> int:
    """Measure, print, and write the raw numbers to args.out and the loss curves beside it."""
    if not args.data.is_file():
        raise UserError(f"{args.data}: no such file; --data names ARC-c's training rows")
    ranks = [int(rank) for rank in args.ranks.split()]
    model = f"{args.model_shape}-random"
    scratch.make(top, DATASET, args.data.absolute())
    recipes = scratch.write_recipes(top, LIKE, DATASET, model, args.steps, args.keep)
    scratch.in_process(
        shapes.write_random, args.model_shape, str(top / "models" / model), str(shapes.tokenizer_source())
    )
    bench = Bench(top, recipes, args, 8 if 8 in ranks else ranks[0])
    results: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(args).items()}}
    for name, measure in (
        ("packed", lambda: bench.packed(ranks)),
        ("ordinary", bench.ordinary),
        ("stock", bench.stock),
    ):
        results[name] = measure()
    results["summary"] = summary(args, ranks, bench.rank, results)
    scratch.write_json(args.out, results)
    if args.out:
        draw(results, bench.rank, args.out.with_suffix(".png"))
    return 0


class Bench:
    """The three ways through the same recipes.

    Args:
        top: the temporary repository.
        recipes: pretrain and finetune.
        rank: of the one cell that stock and the ordinary path train.
    """

    def __init__(self, top: Path, recipes: tuple[Path, Path], args: argparse.Namespace, rank: int):
        self.top, self.recipes, self.args, self.rank = top, recipes, args, rank
        self.noted: dict[str, Any] = {}

    def process(self, name: str, *arguments: Any) -> dict[str, Any]:
        """Run timed.py; what it noted, with when it `started` and `exited`. Leaves with its log when it fails."""
        engine = "packed" if "packed" in arguments else "stock"
        noted = scratch.timed(self.top, name, "timed.py", *arguments, ENGINE=engine)
        self.noted[name] = noted
        scratch.write_json(self.args.out, self.noted)  # what is measured stays, should the rest be cut off
        return noted

    def folder(self, rank: int, phase: str, saves: str = "saves") -> Path:
        name = f"{self.args.model_shape}-random_lora-rank_{rank}_{phase}"
        return self.top / saves / scratch.CATEGORY / DATASET / name

    def packed(self, ranks: list[int]) -> dict[str, Any]:
        """All ranks, both phases, whole."""
        cells = [word for rank in ranks for word in ("--cell", *self.recipes, rank)]
        noted = self.process("packed", "packed", *cells)
        whole = [len(list(self.folder(rank, "finetune").glob("checkpoint-*.safetensors"))) for rank in ranks]
        if whole != [self.args.keep] * len(ranks):
            raise UserError(f"packed: collected {whole} checkpoints, not {self.args.keep} each")
        noted["losses"] = {phase: logged(self.folder(self.rank, phase)) for phase in ("pretrain", "finetune")}
        (self.top / "saves").rename(self.top / "packed saves")
        return noted

    def pretrained(self) -> Path:
        """The packed engine's pretrain of the one cell, which the others' collections go on from."""
        return self.folder(self.rank, "pretrain", "packed saves")

    def ordinary(self) -> dict[str, Any]:
        """The pretrain's first steps, and the whole collection after the packed engine's pretrain."""
        stop = self.args.ordinary_steps if self.args.ordinary_steps < self.args.steps else 0
        pretrain = self.process("ordinary pretrain", "train", stop, self.recipes[0], self.rank)
        shutil.rmtree(self.folder(self.rank, "pretrain"))
        shutil.copytree(self.pretrained(), self.folder(self.rank, "pretrain"))
        collect = self.process("ordinary collect", "train", 0, self.recipes[1], self.rank)
        return {"pretrain": pretrain, "finetune": collect}

    def stock(self) -> dict[str, Any]:
        """The first steps of both phases with the documented protocol."""
        from paragen.recipes import render

        measured, found = [int(count) for count in self.args.stock_steps.split()], {}
        for recipe, phase, count in zip(self.recipes, ("pretrain", "finetune"), measured, strict=True):
            config = render.render(recipe, self.rank)
            for key in ("model_name_or_path", "dataset_dir"):
                config[key] = str(render.resolve(recipe, config[key]))
            accumulated = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"]
            config |= {
                **COMMON,
                "gradient_accumulation_steps": accumulated,
                "output_dir": str(self.top / f"stock {phase}"),
            }
            stop = count
            if phase == "finetune":
                config["resume_from_checkpoint"] = str(self.resumed_by_hand())
                stop = self.args.steps + count
            file = self.top / f"stock {phase} config.json"
            file.write_text(json.dumps(config))
            found[phase] = self.process(f"stock {phase}", "stock", file, stop)
        return found

    def resumed_by_hand(self) -> Path:
        """The pretrain's checkpoint, its state edited so that stock saves every step after resuming, as people do."""
        copy = self.top / "by hand" / f"checkpoint-{self.args.steps}"
        shutil.copytree(self.pretrained() / copy.name, copy)
        state = json.loads((copy / "trainer_state.json").read_text())
        state |= {"save_steps": 1, "logging_steps": 1}
        # Stock looks this up when it saves after resuming.
        control = {f"should_{what}": False for what in ("training_stop", "epoch_stop", "save", "evaluate", "log")}
        state["stateful_callbacks"].setdefault("TrainerControl", {"args": control, "attributes": {}})
        (copy / "trainer_state.json").write_text(json.dumps(state))
        return copy


def logged(folder: Path) -> dict[str, float]:
    """The losses of a run folder's log, by step."""
    lines = map(json.loads, (folder / "trainer_log.jsonl").read_text().splitlines())
    return {str(line["current_steps"]): line["loss"] for line in lines if "loss" in line}


def phase_of_trainer(noted: dict[str, Any], steps: int) -> dict[str, float]:
    """A phase of stock or of the ordinary path: ms per step, start-up and end in seconds, seconds of `steps` steps."""
    marks = [*noted["begins"], noted["end"]]
    times = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    step = statistics.median(times[min(WARM_UP, len(times) - 1) :])
    start, end = marks[0] - noted["started"], noted["exited"] - noted["end"]
    seconds = start + steps * step + end if len(times) < steps else noted["exited"] - noted["started"]
    return {"ms": 1000 * step, "start": start, "end": end, "measured": len(times), "whole": seconds,
            "peak_GB": noted["peak_GB"]}  # fmt: skip


def phase_of_packs(noted: dict[str, Any], phase: str, args: argparse.Namespace) -> dict[str, Any]:
    """A phase of the packed engine, over its packs (one, if all fit): ms per step, its seconds, its MFU."""
    packs = [pack for pack in noted["packs"] if pack["phase"] == phase]
    seconds = sum(pack["ended"] - pack["began"] for pack in packs)
    useful = tokens = 0
    times = []
    for pack in packs:
        known = pack["known"][:-LAGGING]
        apart = [after - before for before, after in zip(known, known[1:], strict=False)][1:]
        times += apart if len(apart) > LAGGING else [(pack["ended"] - pack["began"]) / len(pack["known"])]
        for rank, work in zip(pack["ranks"], pack["work"], strict=True):
            useful += shapes.flops(args.model_shape, rank, shapes.Work(*work))
            tokens += work[0]
    return {
        "ms": 1000 * statistics.median(times), "seconds": seconds, "packs": len(packs),
        "tokens_per_s": tokens / seconds,
        "TFLOP": useful / 1e12, "MFU": useful / seconds / args.peak / 1e12,
        "peak_GB": max(pack["peak_GB"] for pack in packs),
    }  # fmt: skip


def summary(args: argparse.Namespace, ranks: list[int], rank: int, results: dict[str, Any]) -> dict[str, Any]:
    """Print the tables; the numbers in them."""
    packed = results["packed"]
    seconds = packed["exited"] - packed["started"]
    rates = {"packed": len(ranks) * args.keep / seconds * 3600}
    phases = {"packed": {phase: phase_of_packs(packed, phase, args) for phase in ("pretrain", "finetune")}}
    say(f"\n{args.model_shape}, random weights, {args.data.name}, {args.steps} pretrain + {args.keep} collected steps")
    say(f"packed: ranks {args.ranks}; the others: rank {rank}; packed is run whole; what is EXTRAPOLATED says so\n")
    rows = []
    for name in ("stock", "ordinary"):
        counts = {"pretrain": args.steps, "finetune": args.keep}
        phases[name] = {phase: phase_of_trainer(results[name][phase], counts[phase]) for phase in counts}
        whole = sum(one["whole"] for one in phases[name].values())
        rates[name] = args.keep / whole * 3600
        for phase, one in phases[name].items():
            numbers = [f"{one[key]:.1f}" for key in ("ms", "ms", "start", "end")]
            whole = f"{one['whole']:.0f}"
            if one["measured"] < counts[phase]:
                whole += f" EXTRAPOLATED from {one['measured']} steps"
            rows.append((name, phase, *numbers, whole, f"{one['peak_GB']:.2f}"))
    parts = packed_parts(packed)
    for phase, one in phases["packed"].items():
        numbers = (one["ms"], one["ms"] / len(ranks), parts[phase]["before"], parts[phase]["after"])
        took = f"{one['seconds']:.1f} of steps"
        rows.append(("packed", phase, *(f"{number:.1f}" for number in numbers), took, f"{one['peak_GB']:.2f}"))
    cli.print_table(("way", "phase", "ms/step", "per adapter", "start s", "end s", "whole s", "peak GB"), rows)
    say("\npacked, seconds: " + ", ".join(f"{name} {took:.1f}" for name, took in parts["spans"].items()))
    for phase, one in phases["packed"].items():
        say(f"packed {phase}: {one['tokens_per_s']:.0f} tokens/s, MFU {100 * one['MFU']:.1f} % of {args.peak:g} TFLOPS")
    rows = [(name, f"{rate:.1f}", f"{rate / rates['stock']:.1f}", "whole" if name == "packed" else "EXTRAPOLATED")
            for name, rate in sorted(rates.items(), key=lambda item: item[1])]  # fmt: skip
    say(f"\nA packed run of {len(ranks)} cells: {seconds:.1f} s from start to exit.\n")
    cli.print_table(("way", "checkpoints per GPU-hour", "times stock", ""), rows)
    apart = {phase: difference(results, phase) for phase in ("pretrain", "finetune")}
    for phase, one in apart.items():
        say(f"loss of rank {rank}, packed and ordinary, {phase}: {one['points']} points, "
            f"apart by {one['most']:.1e} at most, {one['mean']:.1e} on average")  # fmt: skip
    return {"rates": rates, "phases": phases, "seconds": seconds, "parts": parts, "losses_apart": apart}


SPANS = {"_load": "loading (within admit)", "__init__": "graphs", "_finish": "completing"}  # what they are printed as


def packed_parts(noted: dict[str, Any]) -> dict[str, Any]:
    """Where the packed process's time went beside its steps, in seconds.

    By phase, what came `before` its first step (for the pretrain: since the process started) and `after` its last one;
    under `spans`, the parts by name: `_load` is within `admit`, `fitting` sees how many fit, `graphs` are captured.
    """
    first, last = ([pack for pack in noted["packs"] if pack["phase"] == phase] for phase in ("pretrain", "finetune"))
    spans = {"imports": noted["imported"] - noted["started"]}
    for name in dict.fromkeys(name for name, *_ in noted["spans"]):
        spans[name] = covered([(began, ended) for other, began, ended in noted["spans"] if other == name])
    between = last[0]["began"] - first[-1]["ended"]
    return {
        "pretrain": {"before": first[0]["began"] - noted["started"], "after": 0.0},
        "finetune": {"before": between, "after": noted["exited"] - last[-1]["ended"]},
        "spans": {SPANS.get(name, name): took for name, took in spans.items()},
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """For how long at least one of some spans, each its begin and end, lasts."""
    total, last = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, last))
        last = max(last, ended)
    return total


def difference(results: dict[str, Any], phase: str) -> dict[str, float]:
    """How far the packed engine's logged losses are from the ordinary path's at the same steps."""
    mine, theirs = results["packed"]["losses"][phase], results["ordinary"][phase]["losses"]
    last = max(map(int, theirs))
    # the step at which the measurement ends logs a mean over fewer steps than the whole run's
    shared = [step for step in theirs if step in mine and (int(step) < last or phase == "finetune")]
    apart = [abs(mine[step] - theirs[step]) for step in shared]
    return {"points": len(apart), "most": max(apart, default=0.0), "mean": statistics.fmean(apart) if apart else 0.0}


def draw(results: dict[str, Any], rank: int, path: Path) -> None:
    """The loss curves of both, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, phase in zip(axes, ("pretrain", "finetune"), strict=True):
        ways = (
            ("packed", results["packed"]["losses"][phase], "-"),
            ("ordinary", results["ordinary"][phase]["losses"], "--"),
        )
        for name, losses, line in ways:
            steps = sorted(map(int, losses))
            axis.plot(steps, [losses[str(step)] for step in steps], line, label=name)
        axis.set(title=f"{phase}, rank {rank}", xlabel="step", ylabel="logged loss")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    say(f"loss curves: {path}")
