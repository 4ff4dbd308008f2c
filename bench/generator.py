"""Prepare the real tasks on which bench/README.md measures the reference generator.

    .venv/bin/python bench/generator.py FOLDER [--rows 4000] [--model smollm2-135m]

FOLDER holds prepared files of data/sources.yaml, at any depth. Writes at most --rows rows of each task to train on and
TEST_ROWS to score on into data/<category>/, registers them with the family of their dataset, and writes recipes with
ARC-c's figures. A task of one file is split by its prompts, and its name says so. Run it in a clone: the tasks become
datasets of that repository. What is there already stays.
"""

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from paragen.common import cli, files, paths
from paragen.common.cli import UserError, say
from paragen.dataset import convert, dataset_info, families, names, registration

TEST_ROWS = 600
SHARE = 5  # every fifth prompt of a task of one file is for scoring
LONGEST = 1500  # characters of a prompt and its response; longer rows are left out
LIKE = "ARC-c"  # the dataset whose figures the recipes have


class Task(NamedTuple):
    """A real task."""

    dataset: str  # the prepared one
    category: str
    train: str  # its file
    test: str | None  # None: rows of the first file


TASKS = (
    Task("ARC-c", "common-sense-reasoning", "ARC-c_train.json", "ARC-c_test.json"),
    Task("ARC-e", "common-sense-reasoning", "ARC-e_train.json", "ARC-e_test.json"),
    Task("BoolQ", "common-sense-reasoning", "BoolQ_train.json", "BoolQ_validation.json"),
    Task("OBQA", "common-sense-reasoning", "OBQA_train.json", "OBQA_test.json"),
    Task("PIQA", "common-sense-reasoning", "PIQA_test.json", None),
    Task("WinoGrande", "common-sense-reasoning", "WinoGrande_validation.json", None),
    Task("GSM8K", "math", "GSM8K.json", None),
    Task("MATH", "math", "MATH.json", None),
    Task("Mu-Math", "math", "Mu-Math.json", None),
    Task("CodeAlpaca-20K", "coding", "CodeAlpaca-20K.json", None),
)


def name_of(task: Task, rows: int) -> str:
    """The dataset that a task is registered as."""
    return f"{task.dataset}-{rows}" + ("" if task.test else "-by-prompt")


def split(task: Task, folder: Path, rows: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a task to train on and to score on; no prompt is in both."""
    known = short_rows(find(folder, task.train))
    held = short_rows(find(folder, task.test)) if task.test else []
    order = random.Random(task.dataset)
    if not task.test:
        prompts = sorted({row["prompt"] for row in known})
        order.shuffle(prompts)
        chosen = set(prompts[: len(prompts) // SHARE])
        known, held = ([row for row in known if (row["prompt"] in chosen) is part] for part in (False, True))
    seen = {row["prompt"] for row in known}
    held = [row for row in held if row["prompt"] not in seen]
    for part in (known, held):
        order.shuffle(part)
    return known[:rows], held[:TEST_ROWS]


def short_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a prepared file that are short enough, with an empty system prompt where they have none."""
    found = ({"system": "", **row} for row in dataset_info.load_rows(file))
    return [
        {key: row[key] for key in ("system", "prompt", "response")}
        for row in found if len(row["prompt"]) + len(row["response"]) < LONGEST
    ]  # fmt: skip


def find(folder: Path, name: str) -> Path:
    """A file below a folder. Raises UserError where it is not there."""
    found = sorted(folder.rglob(name))
    if not found:
        raise UserError(f"{folder}: has no {name}; unpack archives in it first")
    return found[0]


def prepare(task: Task, folder: Path, rows: int, model: str) -> str:
    """Write and register a task, and write its recipes; returns its name."""
    name, family = name_of(task, rows), families.families_of([task.dataset])[task.dataset]
    for dataset, part in zip((name, names.test_split_name(name)), split(task, folder, rows), strict=True):
        file = paths.DATA / task.category / f"{dataset}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(file, convert.as_json(part))
        marks = {dataset_info.FAMILY: family} if dataset == name else {}
        registration.register(file, registration.Request(dataset, marks=marks), paths.DATA)
    if not list((paths.SCRIPTS / task.category / name).glob(f"{model}_{name}_*.yaml")):
        environment = {**os.environ, "DATASET": name, "MODEL": model, "FROM": LIKE}
        subprocess.run([sys.executable, paths.UTILS / "make_recipe.py"], env=environment, check=True)
    return name


def commands(found: Sequence[str], model: str) -> list[str]:
    """The commands that follow."""
    some, shared = " ".join(found), "RANK=8 STEPS=every:2 PER_DEVICE=2"
    return [
        f'make collect-all CATEGORY=all DATASET="{some}" MODEL={model} RANK=8 KEEP=8',
        f"make collect-all CATEGORY=made MODEL={model} RANK=8 KEEP=8",
        'python bench/generator_settings.py "BASE_STEPS=0" "BASE_STEPS=400" "BASE_STEPS=400 WIDTH=1024"',
        "(with the best of these settings, or all of them by bench/generator_tables.py:)",
        f'make benchmark-generator CATEGORY=made {shared} VARIANTS="1 3 6 12" LIMIT=64 SAMPLES=2',
        f"make benchmark-generator CATEGORY=made {shared} LIMIT=64 SAMPLES=2 REPEATS=1 BASELINES=none",
        f'make benchmark-generator DATASET="{some}" {shared} LIMIT=240 LOSS_ONLY=math',
        "make report",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the real tasks of the generator's benchmark.")
    parser.add_argument("folder", type=Path, help="prepared files, at any depth")
    parser.add_argument("--rows", type=int, default=4000, help="rows of a task to train on, at most")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--with-piqa", action="store_true", help="also PIQA, whose published answers are all [A]")
    args = parser.parse_args()
    tasks = [task for task in TASKS if task.dataset != "PIQA" or args.with_piqa]
    found = [prepare(task, args.folder, args.rows, args.model) for task in tasks]
    say(f"{len(found)} tasks in {paths.relative(paths.DATA)}; next:")
    for command in [f"make model MODEL={args.model}", "make made-tasks", *commands(found, args.model)]:
        say(f"  {command}")


if __name__ == "__main__":
    cli.run(main)
