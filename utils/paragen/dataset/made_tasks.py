"""Writes the made tasks (made_rules.py) from a seed: rows for LLaMA-Factory, task files, and their registration.

    data/made/<task>_train.json, <task>_test.json     rows: one instruction, a line of words, and the answer
    data/made/tasks/<task>.json                       the same in the task format of Natural Instructions

A task file is one object with its instances in it. LLaMA-Factory reads a list of rows, so the rows lie beside the task
files, and only they are registered.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paragen.common import files
from paragen.common.cli import UserError
from paragen.common.paths import MADE, relative
from paragen.dataset import convert, descriptions, names, registration
from paragen.dataset.dataset_info import EXACT, FAMILY, METRIC, read_info
from paragen.dataset.made_rules import Task, all_tasks, draw, draw_line

TEST_ROWS = 200
POSITIVE_EXAMPLES = 3
MOST_INSTANCES = 6500  # in a task file, as Natural Instructions has it
SOURCE = "utils/make_tasks.py"
COLUMNS = {"prompt": "prompt", "response": "response", "system": "system"}
LANGUAGES = ("Input_language", "Output_language", "Instruction_language")


class Written(NamedTuple):
    """What came of `write`."""

    tasks: list[Task]
    written: int  # files that were not there, or had other content
    unchanged: int  # files that were there with this content


class Lines(NamedTuple):
    """The lines of a task, as lists of words. No line is there twice."""

    examples: list[list[str]]
    train: list[list[str]]
    test: list[list[str]]


def write(seed: int, rows: int, force: bool, data_dir: Path, tasks: Sequence[Task] | None = None) -> Written:
    """Write and register made tasks. The same seed and number of rows give the same bytes on every machine.

    Args:
        seed: of the lines and of the choice of instructions.
        rows: how many rows each task has to train on; TEST_ROWS more are for scoring.
        force: whether files with other content are replaced, and names that stand for other files are taken.
        data_dir: the folder of dataset_info.json.
        tasks: which (default: all).

    Raises UserError for too many rows, and where a file or a name is taken and not `force`; then nothing is written.
    """
    if rows + TEST_ROWS > MOST_INSTANCES:
        raise UserError(f"ROWS={rows}: a task has at most {MOST_INSTANCES - TEST_ROWS} rows to train on")
    tasks = list(tasks or all_tasks())
    contents = {data_dir / name: content for task in tasks for name, content in contents_of(task, seed, rows).items()}
    changed = [path for path, content in contents.items() if not path.is_file() or path.read_bytes() != content]
    taken = [path for path in changed if path.exists()]
    if taken and not force:
        raise UserError(
            f"{relative(taken[0])}: is there with other content (another SEED or ROWS?), and {len(taken) - 1} more; "
            "FORCE=1 replaces them, and makes what was trained on them stale"
        )
    entries = {name: entry for task in tasks for name, entry in entries_of(task).items()}
    info, place = read_info(data_dir), data_dir / "dataset_info.json"
    for name, entry in entries.items():
        registration.require_free(name, entry["file_name"], force, info, place)
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, contents[path], durable=False)
    for path in [*changed, *{path.parent for path in changed}]:  # at the end, which is faster than one by one
        files.sync(path)
    registration.store_all(entries, force, data_dir)
    return Written(tasks, len(changed), len(contents) - len(changed))


def contents_of(task: Task, seed: int, rows: int) -> dict[str, bytes]:
    """The three files of a task by their path relative to data/."""
    order = random.Random(f"{seed} {task.name}")
    lines = draw_lines(task, rows, order)
    train, test = (rows_of(task, part, order) for part in (lines.train, lines.test))
    text = json.dumps(task_file(task, seed, lines), indent=1, ensure_ascii=False) + "\n"
    return {
        train_file(task): convert.as_json(train),
        test_file(task): convert.as_json(test),
        f"{MADE}/tasks/{task.name}.json": text.encode(),
    }


def train_file(task: Task) -> str:
    """The file with the rows that are trained on, relative to data/."""
    return f"{MADE}/{task.name}_train.json"


def test_file(task: Task) -> str:
    """The file with the rows to score on, relative to data/."""
    return f"{MADE}/{names.test_split_name(task.name)}.json"


def draw_lines(task: Task, rows: int, order: random.Random) -> Lines:
    """Lines for a task: examples, `rows` to train on and TEST_ROWS to score on, all different."""
    drawn: dict[tuple[str, ...], None] = {}
    while len(drawn) < POSITIVE_EXAMPLES + rows + TEST_ROWS:
        drawn[tuple(draw_line(task, order))] = None
    lines = [list(line) for line in drawn]
    first_test = POSITIVE_EXAMPLES + rows
    return Lines(lines[:POSITIVE_EXAMPLES], lines[POSITIVE_EXAMPLES:first_test], lines[first_test:])


def rows_of(task: Task, lines: Sequence[list[str]], order: random.Random) -> list[dict[str, str]]:
    """A row per line, below one of the task's instructions."""
    return [
        {
            "prompt": f"{draw(task.instructions, 1, order)[0]}\n{' '.join(line)}",
            "response": task.answer(line),
            "system": "",
        }
        for line in lines
    ]


def entries_of(task: Task) -> dict[str, dict[str, Any]]:
    """The entries of a task's two splits in dataset_info.json, by dataset name."""
    both = {"columns": COLUMNS, METRIC: EXACT, "license": "apache-2.0", "language": "en", "source": SOURCE}
    known = {FAMILY: task.family, descriptions.KEY: {SOURCE: list(task.descriptions)}}
    return {
        task.name: {"file_name": train_file(task), **both, **known},
        names.test_split_name(task.name): {"file_name": test_file(task), **both},
    }


def task_file(task: Task, seed: int, lines: Lines) -> dict[str, Any]:
    """A task in the format of Natural Instructions. An instance's id states its split."""
    parts = {"train": lines.train, "test": lines.test}
    return {
        "Contributors": ["ParaGen-Dataset"],
        "Source": [f"synthetic: {SOURCE}, seed {seed}"],
        "URL": [],
        "Categories": ["Program Execution"],
        "Reasoning": ["Reasoning on Strings"],
        "Definition": list(task.descriptions),
        **{key: ["English"] for key in LANGUAGES},
        "Domains": [],
        "Positive Examples": [_example(task, line) for line in lines.examples],
        "Negative Examples": [_negative_example(task, lines.examples[0])],
        "Instances": [
            {"id": f"{task.name}-{part}-{number}", "input": " ".join(line), "output": [task.answer(line)]}
            for part, of_part in parts.items()
            for number, line in enumerate(of_part, 1)
        ],
        "Instance License": ["Apache 2.0"],
    }


def _example(task: Task, line: list[str]) -> dict[str, str]:
    answer = task.answer(line)
    return {"input": " ".join(line), "output": answer, "explanation": f"{task.descriptions[0]} Here: {answer}"}


def _negative_example(task: Task, line: list[str]) -> dict[str, str]:
    """A line with the answer of another variant of the same rule."""
    siblings = [other for other in all_tasks() if other.rule == task.rule and other.variant != task.variant]
    unfit = ("", " ".join(line), task.answer(line))
    wrong = next(other for other in siblings if other.answer(line) not in unfit)
    text = f"This is the answer of another task: {wrong.descriptions[0]}"
    return {"input": " ".join(line), "output": wrong.answer(line), "explanation": text}
