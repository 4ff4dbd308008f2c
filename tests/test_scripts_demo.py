"""The demo teaches a skill: its adapter answers questions about words that it was not trained on."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import demo_rows

from paragen.common import paths
from paragen.model import base_models
from paragen.scoring import answers

ROOT = Path(__file__).resolve().parent.parent
CHANCE = 0.5
QUESTION = re.compile(r"A: (\w+)\nB: (\w+)\nWhich is an animal\?")


def rows_of(part: str) -> list[dict[str, str]]:
    return json.loads((demo_rows.DATA / f"Demo_{part}.json").read_bytes())


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_rows_are_those_that_the_script_makes(part):
    assert (demo_rows.DATA / f"Demo_{part}.json").read_text() == demo_rows.text_of(demo_rows.rows()[part])


def test_the_right_choice_is_as_often_a_as_b_and_no_question_stands_twice():
    for part, count in (("train", 320), ("test", 200)):
        rows = rows_of(part)
        assert Counter(row["response"] for row in rows) == {"[A]": count // 2, "[B]": count // 2}
        assert len({row["prompt"] for row in rows}) == count
        assert answers.metric_of(rows) == "choice"


def test_no_word_that_is_trained_on_is_asked_about():
    asked = [QUESTION.fullmatch(row["prompt"]).groups() for row in rows_of("test")]
    trained = [QUESTION.fullmatch(row["prompt"]).groups() for row in rows_of("train")]
    assert not {word for pair in asked for word in pair} & {word for pair in trained for word in pair}


@pytest.mark.slow
@pytest.mark.runs
def test_the_demo_ends_far_above_chance_and_above_the_base(tmp_path):
    """By generation and by likelihood. Without the model this fails: `make test-all` downloads it."""
    top, entry = tmp_path / "a clone", base_models.table()["smollm2-135m"]
    for name in ("data", "collect_scripts"):
        shutil.copytree(ROOT / name / "common-sense-reasoning", top / name / "common-sense-reasoning")
    shutil.copy(ROOT / "data" / "dataset_info.json", top / "data")
    (top / "models").mkdir()
    shutil.copy(paths.MODELS / "models.yaml", top / "models")
    folder = base_models.local_folder(paths.MODELS / entry["folder"])
    (top / "models" / entry["folder"]).symlink_to(folder.resolve())
    environment = {**os.environ, "PARAGEN_TOP": str(top), "DEVICES": "cpu"}
    done = subprocess.run([sys.executable, ROOT / "utils" / "demo.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = top.glob("saves/*/Demo/*_finetune/evaluation.json")
    (scored,) = json.loads(found.read_text())["evaluations"]
    base, last = scored["base"], scored["checkpoints"][-1]
    assert scored["rows"] >= 200 and scored["limit"] is None
    for kind in ("", "likelihood_"):
        low = last[f"{kind}interval"][0]
        assert low > CHANCE and low > base[f"{kind}interval"][1]
        assert f"{last[f'{kind}score']:.3f} ({low:.3f} to " in done.stdout
    assert len(list(found.parent.glob("checkpoint-*.safetensors"))) == 16
