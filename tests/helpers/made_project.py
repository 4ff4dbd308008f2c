"""A project with collections of a few small made tasks, and of a mixture of two of them: trained for real, packed."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from helpers import fork_server
from helpers.packed_project import MODEL, ROOT, Packable
from paragen.dataset import descriptions, made_rules, made_tasks

TASKS = ("made-separator-slash", "made-order-swap-1-2", "made-letter-e", "made-word-first")
MIXTURE = "mixture"  # every other row is the first task's, the others are the second one's
ROWS, TEST_ROWS, KEPT = 48, 24, 6
SHARED = {"learning_rate": 2e-2, "cutoff_len": 160, "per_device_train_batch_size": 4}


def task_of(name: str) -> made_rules.Task:
    """The made task of this name."""
    (task,) = (one for one in made_rules.all_tasks() if one.name == name)
    return task


def rows_of(name: str) -> tuple[list[dict], list[dict]]:
    """Rows of a made task to train on and to score on."""
    task = task_of(name)
    files = made_tasks.contents_of(task, 0, ROWS)
    train, test = (json.loads(files[name]) for name in (made_tasks.train_file(task), made_tasks.test_file(task)))
    return train, test[:TEST_ROWS]


def make(top: Path, model: Path, names: Sequence[str] = (*TASKS, MIXTURE), steps: int = 100, rank: int = 4) -> Packable:
    """The project, in a new folder, with a collection of KEPT checkpoints after `steps` steps for each name."""
    project = Packable(top, model)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    splits = {name: rows_of(name) for name in TASKS}
    first, second = (splits[name] for name in TASKS[:2])
    splits[MIXTURE] = mixed(first[0], second[0]), mixed(first[1], second[1])
    for name, (train, test) in splits.items():
        project.data(name, rows=train)
        project.data(f"{name}_test", rows=test)
    info = json.loads(project.info.read_text())
    for name in TASKS:
        info[name][descriptions.KEY] = {made_tasks.SOURCE: list(task_of(name).descriptions)}
    project.info.write_text(json.dumps(info))
    pretrain = {**SHARED, "max_steps": steps, "save_steps": steps}
    finetune = {**SHARED, "max_steps": steps + KEPT, "save_total_limit": KEPT}
    project.collect(*(project.cell(name, rank, pretrain=pretrain, finetune=finetune, resumed=steps) for name in names))
    return project


def mixed(one: list[dict], other: list[dict]) -> list[dict]:
    """Every other row of two datasets."""
    return [(one, other)[number % 2][number] for number in range(len(one))]


def start(project: Packable, script: str, **settings: object) -> fork_server.Run:
    """Start a script of utils/, or a module of helpers, in the project."""
    given = {name: str(value) for name, value in settings.items()}
    return fork_server.start(script, [], {"PARAGEN_TOP": str(project.top), **given}, project.top / f"{script}.txt")


def run(project: Packable, script: str, **settings: object) -> str:
    """What a script prints, which must succeed."""
    result = start(project, script, **settings).wait()
    assert result.status == 0, result.output
    return result.output


def refused(project: Packable, script: str, **settings: object) -> str:
    """The one line with which a script is refused."""
    result = start(project, script, **settings).wait()
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.status == 1 and "Traceback" not in result.output, result.output
    return line


def generator(project: Packable, name: str = f"{MODEL}_rank-4") -> Path:
    """The folder of a generator."""
    return project.top / "saves" / "generators" / name
