"""Which settings of a generator are best for made tasks that the benchmark's table of variants never holds out.

    .venv/bin/python bench/generator_settings.py "BASE_STEPS=0" "BASE_STEPS=400" "BASE_STEPS=400 WIDTH=1024" ...

In a clone in which the made tasks are collected (bench/generator.py prints the commands). Of each rule, the tasks that
`make benchmark-generator VARIANTS=..` holds out are left aside; of the others, --hold are held out here, and a
generator is trained on --variants of the rest. One setting at a time runs on each device. --also has what all of them
share. Ends in a table; saves/benchmarks/settings/ keeps what was measured, and the next call uses it again.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from paragen.analysis import benchmark_page
from paragen.benchmark import plan
from paragen.collection import index
from paragen.common import cli, files, paths
from paragen.common.cli import UserError
from paragen.dataset import families
from paragen.sweep import ray_cluster

FOLDER = paths.SAVES / benchmark_page.FOLDER / "settings"
HEADS = ("settings", "loss", "closed", "accuracy", "closed", "of the mean", "of the nearest", "of other prompts")


def tuning_tasks(known: dict[str, str], hold: int) -> list[str]:
    """The datasets that no table of variants holds out.

    Args:
        known: the family of each dataset.
        hold: how many of each family a table holds out.
    """
    (fold,) = plan.folds_of(plan.Wanted(variants=(1,), hold=hold, repeats=1), known)
    return sorted(known.keys() - set(fold.held))


def parsed(settings: str) -> dict[str, str]:
    """Settings as make takes them, by name. Raises UserError for a word that is none."""
    words = settings.split()
    if wrong := [word for word in words if not re.fullmatch("[A-Z_]+=.*", word)]:
        raise UserError(f"{settings!r}: {wrong[0]!r} is no setting such as BASE_STEPS=400")
    return dict(word.split("=", 1) for word in words)


def folder_of(settings: str, names: Sequence[str], args: argparse.Namespace) -> Path:
    """The folder of what is measured with some settings: all that decides it is in the hash of its name."""
    shared = [args.also, args.rank, args.hold, args.variants, args.limit, os.environ.get("MODEL", "")]
    return FOLDER / files.sha256_of_value([settings, *shared, list(names)])[:12]


def measure(settings: str, names: Sequence[str], args: argparse.Namespace, device: str) -> dict[str, Any] | None:
    """The benchmark's totals with some settings; None where it failed, which its log explains."""
    out = folder_of(settings, names, args)
    out.mkdir(parents=True, exist_ok=True)
    given = parsed(f"{args.also} {settings}")
    environment = {
        **os.environ, "CATEGORY": paths.MADE, "DATASET": " ".join(names), "RANK": args.rank, "OUT": str(out),
        "HOLD": str(args.hold), "VARIANTS": str(args.variants), "REPEATS": "1", "SAMPLES": "1", "BASELINES": "none",
        "LIMIT": args.limit, "DEVICES": device, **given,
    }  # fmt: skip
    with open(out.with_suffix(".log"), "wb") as log:
        command = [sys.executable, paths.UTILS / "benchmark_generator.py"]
        failed = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    if failed:
        cli.complain(f"{settings}: failed, see {paths.relative(out.with_suffix('.log'))}")
        return None
    (group,) = json.loads((out / benchmark_page.FILE).read_text())["groups"]
    return group["totals"]["all"]


def row_of(settings: str, totals: dict[str, Any] | None) -> list[str]:
    """A line of the table."""
    if totals is None:
        return [settings, *["failed"] * (len(HEADS) - 1)]
    accuracies = totals["mean_accuracy"]
    closed = [totals[key]["generated-mean"]["value"] for key in ("closed", "closed_accuracy")]
    shares = ["" if value is None else f"{value:.0%}" for value in closed]
    others = [f"{accuracies[name]:.3f}" for name in ("mean", "nearest", "swapped-mean")]
    loss, accuracy = (totals[key]["generated-mean"] for key in ("mean_loss", "mean_accuracy"))
    return [settings, f"{loss:.3f}", shares[0], f"{accuracy:.3f}", shares[1], *others]


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="+", help="those of make generator, such as 'BASE_STEPS=400 WIDTH=1024'")
    parser.add_argument("--also", default="STEPS=every:2", help="settings of all (default: %(default)s)")
    parser.add_argument("--rank", default="8")
    parser.add_argument("--hold", type=int, default=4, help="tasks of a rule that are held out, here and in the tables")
    parser.add_argument("--variants", type=int, default=8, help="tasks of a rule to train on (default: %(default)s)")
    parser.add_argument("--limit", default="48", help="rows to score on (default: %(default)s)")
    parser.add_argument("--per-device", type=int, default=1, help="how many share a device at a time")
    args = parser.parse_args()
    for settings in args.settings:
        parsed(f"{args.also} {settings}")
    os.environ.update(CATEGORY=paths.MADE, RANK=args.rank)
    known = families.families_of({one.manifest.dataset for one in index.chosen()[0]}, paths.DATA)
    names = tuning_tasks(known, args.hold)
    if not names:
        raise UserError(f"saves/{paths.MADE}: has no collections at rank {args.rank}; bench/generator.py says how")
    own = ["cpu"] if ray_cluster.trains_on_cpu() else ray_cluster.gpus_here()
    free = own * args.per_device

    def one(settings: str) -> dict[str, Any] | None:
        device = free.pop()
        try:
            return measure(settings, names, args, device)
        finally:
            free.append(device)

    with concurrent.futures.ThreadPoolExecutor(len(free)) as executor:
        found = list(executor.map(one, args.settings))
    cli.print_table(HEADS, [row_of(settings, totals) for settings, totals in zip(args.settings, found, strict=True)])
    if failed := found.count(None):
        raise UserError(f"{failed} of {len(found)} settings could not be measured (see above); the next call goes on")


if __name__ == "__main__":
    cli.run(main)
