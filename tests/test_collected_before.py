"""What was collected, scored, exported and published before still loads: a stored project, read by today's scripts.

tests/collected_before holds two collections of three checkpoints (rank 2 by LLaMA-Factory's trainer, rank 1 by the
packed engine) with their base model, data, recipes, scores, index, exports and published trees. They are not made again
when the code changes: what users have was made by the code of then, too.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet
import pytest
import torch
from helpers.forked_python import PYTHON
from helpers.hub_server import Hub, Repository
from safetensors.torch import load_file

from pairs import Pairs
from paragen.collection import index
from paragen.common import files

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
STORED = Path(__file__).resolve().parent / "collected_before"
TOY = "saves/common-sense-reasoning/Toy"
RANKS = (1, 2)
STEPS = [94, 95, 96]


@pytest.fixture
def top(tmp_path) -> Path:
    """A copy of the stored project, with a space in its path."""
    top = tmp_path / "my project"
    shutil.copytree(STORED, top)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    return top


@pytest.fixture
def empty(tmp_path) -> Path:
    """A project with nothing in it."""
    top = tmp_path / "another project"
    for name in ("data", "saves", "models"):
        (top / name).mkdir(parents=True)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    return top


def script(top: Path, name: str, *arguments, **settings: str) -> str:
    """The output of one of today's scripts on a project; it must succeed."""
    clean = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|.*proxy", name, re.I)}
    command = [PYTHON, ROOT / "utils" / f"{name}.py", *arguments]
    done = subprocess.run(
        [str(part) for part in command], env={**clean, "PARAGEN_TOP": str(top), **settings}, cwd="/",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_name(rank: int) -> str:
    return f"Tiny-Llama_lora-rank_{rank}_finetune"


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder with their content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(top: Path) -> list[dict]:
    """The rows of a project's index."""
    return pyarrow.parquet.read_table(top / "saves" / "index.parquet").to_pylist()


def without_later(rows: list[dict]) -> list[dict]:
    """Rows of an index without the columns that the stored one lacks."""
    return [{name: value for name, value in row.items() if name not in index.LATER} for row in rows]


def figures_in(evaluation: dict) -> dict[str, float]:
    """All figures of an evaluation's scores, by step and name."""
    found = {}
    for score in [{"step": 0, **evaluation["base"]}, *evaluation["checkpoints"]]:
        for name, value in score.items():
            for number, figure in enumerate(value if isinstance(value, list) else [value]):
                found[f"{score['step']} {name} {number}"] = figure
    return found


def test_both_collections_are_whole_and_would_not_be_trained_again(top):
    told = script(top, "verify") + script(top, "status", RANKS="1 2")
    for rank in RANKS:
        assert f"whole  {TOY}/{run_name(rank)}: 3 checkpoints, steps 94-96" in told
    assert "FAULTY" not in told
    assert re.search(r"^Toy +\S+ +complete +complete$", told, re.MULTILINE), told


@pytest.mark.parametrize("is_there", [True, False])
def test_the_index_has_the_same_rows_when_it_is_made_again(top, is_there):
    stored, path = rows_of(top), top / "saves" / "index.parquet"
    schema = pyarrow.parquet.read_schema(path)
    assert [(row["rank"], row["step"]) for row in stored] == [(rank, step) for rank in RANKS for step in STEPS]
    if not is_there:
        path.unlink()
    script(top, "index")
    assert without_later(rows_of(top)) == stored
    assert [field for field in pyarrow.parquet.read_schema(path) if field.name not in index.LATER] == list(schema)
    assert {tuple(row[name] for name in index.MARKS) for row in rows_of(top)} == {(True, None, 12)}
    written = path.stat().st_mtime_ns
    script(top, "index")
    assert path.stat().st_mtime_ns == written, "what did not change is not indexed again"


def test_pairs_read_the_stored_index_as_it_is(top, capsys):
    pairs = Pairs(prompts=12, split="test", saves=top / "saves", data_dir=top / "data")
    asked = {row["prompt"] for row in json.loads((top / "data/common-sense-reasoning/Toy_test.json").read_bytes())}
    assert len(pairs) == len(RANKS) * len(STEPS)
    for number in range(len(pairs)):
        prompts, checkpoint, row = pairs[number]
        assert {prompt["prompt"] for prompt in prompts} == asked
        stored = load_file(STORED / "saves" / row["file"])
        assert checkpoint.keys() == stored.keys()
        assert all(torch.equal(checkpoint[key], stored[key]) for key in stored)
    is_better = pc.field("score") > pc.field("base_score")
    better = Pairs(prompts=4, where=is_better, saves=top / "saves", data_dir=top / "data")
    assert [(row["rank"], row["step"]) for row in map(better.row, range(len(better)))] == [(2, step) for step in STEPS]
    assert capsys.readouterr().err == ""


def test_archives_bring_the_same_bytes_back(empty):
    script(empty, "import_archive", STORED / "saves" / "exports" / "archive")
    assert tree(empty / TOY) == tree(STORED / TOY)


def test_published_trees_can_be_pulled(empty):
    published = {name: STORED / "saves" / "publish" / name.replace("/", "--") for name in ("user/toy", "user/toy-raw")}
    with Hub({name: Repository(tree(folder)) for name, folder in published.items()}) as hub:
        server = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(empty / "no login")}
        told = "".join(script(empty, "pull", REPO=name, **server) for name in (*published, "user/toy"))
    for rank in RANKS:
        assert f"downloaded: {TOY}/{run_name(rank)}" in told
    assert f"there already: {TOY}/{run_name(2)}" in told
    assert tree(empty / TOY) == tree(STORED / TOY)
    assert tree(empty / "data" / "common-sense-reasoning") == tree(STORED / "data" / "common-sense-reasoning")
    info = "data/dataset_info.json"
    assert json.loads((empty / info).read_bytes()) == json.loads((STORED / info).read_bytes())
    assert without_later(rows_of(empty)) == rows_of(STORED)


def test_exports_are_known_again_and_come_out_the_same(top):
    asked = {"archive": {}, "peft": {"RANK": "2", "STEPS": "every:2"}, "canonical": {"RANK": "2"}, "dnd": {"RANK": "2"}}
    calls = [("export", {"FORMAT": name, **settings}) for name, settings in asked.items()]
    elsewhere = [(name, {**settings, "OUT": str(top / settings["FORMAT"])}) for name, settings in calls]
    told = "".join(script(top, name, **settings) for name, settings in [*calls, *elsewhere])
    exports = STORED / "saves" / "exports"
    assert tree(top / "saves" / "exports") == tree(exports)
    assert told.count("there already: saves/exports/") == 6 and "exported: saves/exports/" not in told
    assert told.count("exported: ") == 6
    assert told.count("was not checked again") == 6, "they were recorded without hashes"
    for name in ("peft", "dnd", "canonical"):
        record = top / name / "export.json"
        parts = json.loads(record.read_bytes())
        assert all(part.pop("sha256") for part in parts.values())
        files.write_json(record, parts)
    for name in ("peft", "dnd"):
        assert tree(top / name) == tree(exports / name)
    today, stored = tree(top / "canonical"), tree(exports / "canonical")
    assert today.keys() == stored.keys()
    for path in (path for path in stored if path.endswith(".safetensors")):
        values, expected = load_file(top / "canonical" / path), load_file(exports / "canonical" / path)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
    for path in (path for path in stored if path.endswith(".json")):
        assert today[path] == stored[path]


def test_scoring_again_gives_the_same_scores(top):
    for rank in RANKS:  # one after the other: both together would have a sweep's workers
        told = script(top, "evaluate", FORCE="1", RANK=str(rank))
        assert "12 rows, 4 of 4 models" in told
        name = f"{TOY}/{run_name(rank)}/evaluation.json"
        stored, today = (json.loads((place / name).read_bytes()) for place in (STORED, top))
        (stored,), (today,) = stored["evaluations"], today["evaluations"]
        assert [score["step"] for score in today["checkpoints"]] == STEPS
        assert figures_in(today) == pytest.approx(figures_in(stored), rel=1e-4)
        untold = {"base", "checkpoints", "versions"}
        assert {**stored, **dict.fromkeys(untold)} == {**today, **dict.fromkeys(untold)}
