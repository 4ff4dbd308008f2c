"""A sample of text goes through a model's tokenizer and template and back, as `make model` has it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.clone import copy_folder
from helpers.forked_python import PYTHON

from paragen.recipes import round_trip

ROOT = Path(__file__).resolve().parent.parent


def as_class(model: Path, folder: Path, name: str) -> Path:
    """A copy of a model whose tokenizer_config.json names another class."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": name}))
    return folder


def told_of(folder: Path) -> list[str]:
    """What `warnings_of` says of a model, in a process of its own, as it imports LLaMA-Factory."""
    code = "import json, sys, pathlib; from paragen.recipes import round_trip\n"
    code += "print(json.dumps(round_trip.warnings_of(pathlib.Path(sys.argv[1]))))"
    done = subprocess.run([PYTHON, "-c", code, folder], capture_output=True, text=True, cwd=ROOT / "utils")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_byte_level_vocabulary_that_is_said_to_be_llamas_loses_its_spaces_and_is_told(model_folder, tmp_path):
    """The way in which transformers 5 mis-reads it; the same files under the class that takes them are fine."""
    (line,) = told_of(as_class(model_folder, tmp_path / "Mis-Read", "LlamaTokenizer"))
    assert line.startswith("Mis-Read: its tokenizer or template changes text: 'Is 12 × 3")
    assert "comes back as" in line and "Is12×3" in line and "Mis-Read/tokenizer_config.json" in line
    assert told_of(as_class(model_folder, tmp_path / "Right", "Qwen2Tokenizer")) == []


def test_a_tokenizer_that_is_taken_as_it_is_is_read_without_llamafactory(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(round_trip, "_through_template", lambda folder: pytest.fail("imports LLaMA-Factory"))
    assert round_trip.warnings_of(model_folder) == []
    lossy = shutil.copytree(model_folder, tmp_path / "Lossy")
    content = json.loads((lossy / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (lossy / "tokenizer.json").write_text(json.dumps(content))
    (line,) = round_trip.warnings_of(lossy)
    assert line.startswith("Lossy: its tokenizer or template changes text: ") and "comes back as 'is 12" in line


def test_wordpiece_may_lose_spaces_and_a_broken_file_is_one_line(every_model, model_folder, tmp_path):
    told = told_of(every_model / "bert")
    assert all("[UNK]" in line for line in told), "single characters alone are known to this one"
    broken = as_class(model_folder, tmp_path / "Broken", "LlamaTokenizer")
    (broken / "tokenizer.json").write_text("{")
    (line,) = told_of(broken)
    assert line.startswith("Broken: its tokenizer cannot read a sample of text: ") and "\n" not in line


def test_make_model_prints_the_warning_and_its_status_stays(model_folder, tmp_path):
    top = tmp_path / "a clone"
    copy_folder("utils", top)
    (top / "models").mkdir()
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    as_class(model_folder, top / "models" / "Mis-Read", "LlamaTokenizer")
    done = subprocess.run([PYTHON, top / "utils" / "fetch_model.py", "Mis-Read"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and warned[0].startswith("warning: Mis-Read: its tokenizer or template changes text: ")
