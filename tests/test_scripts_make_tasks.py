"""`make made-tasks` in a copy of the repository: recipes that pass the checks, and a collection."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from paragen.collection import prompts
from paragen.collection.manifest import require_manifest
from paragen.recipes import render

pytestmark = pytest.mark.runs

TASK = "made-word-third"


def make(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run(["make", *arguments], cwd=repository, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done


def succeeded(repository: Path, *arguments: str) -> str:
    done = make(repository, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def error_of(repository: Path, *arguments: str) -> str:
    done = make(repository, *arguments)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0
    return line


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


@pytest.fixture
def with_tables(repository) -> Path:
    for name in ("collect_scripts/figures.yaml", "data/sources.yaml"):
        shutil.copy(ROOT / name, repository / name)
    return repository


def test_a_task_is_collected_by_its_recipes(with_tables):
    made = ("made-tasks", "ROWS=16", "MODEL=tiny-one", "TEMPLATE=qwen")
    told = succeeded(with_tables, *made)
    assert "288 files written, 0 were there already" in told and "192 recipes written, 0 were there already" in told
    pretrain = with_tables / "collect_scripts" / "made" / TASK / f"tiny-one_{TASK}_pretrain.yaml"
    config = render.load(pretrain)
    assert (config["learning_rate"], config["max_steps"], config["per_device_train_batch_size"]) == (3e-4, 10, 8)
    shown = succeeded(with_tables, "check-recipes", f"FILE={pretrain}")
    assert "2 recipes, no faults" in shown
    first = json.loads((with_tables / "data" / "made" / f"{TASK}_train.json").read_text())[0]
    assert all(line in shown for line in first["prompt"].split("\n")), "the row as the model reads it"

    assert "whole " in succeeded(with_tables, "collect", f"DATASET={TASK}", "RANK=4", "KEEP=3")
    (folder,) = (with_tables / "saves" / "made" / TASK).glob("*_finetune")
    manifest = require_manifest(folder)
    assert (manifest.category, manifest.steps, manifest.trained_rows) == ("made", [108, 109, 110], 16)
    assert manifest.data[0].entry["family"] == "made-word" and manifest.content["data_warnings"] == []
    assert prompts.of_collection(manifest, "test", with_tables / "data")[0]["response"]

    pretrain.write_text(pretrain.read_text().replace("max_steps: 10 ", "max_steps: 12 "))
    edited = files_in(with_tables)
    told = succeeded(with_tables, *made)
    assert "0 files written, 288 were there already" in told and "0 recipes written, 192" in told
    assert files_in(with_tables) == edited, "an edited recipe stays"


@pytest.mark.slow
def test_all_recipes_and_datasets_are_without_faults(with_tables):
    succeeded(with_tables, "made-tasks", "MODEL=tiny-one", "TEMPLATE=qwen")
    assert f"{192 + 8} recipes, no faults" in succeeded(with_tables, "check-recipes")
    told = succeeded(with_tables, "check-data")
    assert f"{192 + 2} datasets, no faults" in told and ": made-" not in told, "no note and no warning"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["SEED=1 2"], "SEED=1 2: the tasks are made from one seed; give one"),
        (["ROWS=6301"], "ROWS=6301: a task has at most 6300 rows to train on"),
        (["ROWS=0"], "ROWS=0: is not a whole number from 1 on"),
        (["MODEL=gtp2"], "model 'gtp2' is not known; did you mean gpt2?"),
        (["MODEL=tiny-one"], "model 'tiny-one' is not in models/models.yaml, so say its prompt template: TEMPLATE=..."),
        (["CATEGORY=math"], "make made-tasks: does not take the setting CATEGORY"),
    ],
)
def test_a_wrong_setting_is_one_line_and_nothing_is_written(with_tables, given, said):
    before = files_in(with_tables)
    assert said in error_of(with_tables, "made-tasks", *given)
    assert files_in(with_tables) == before
