"""CATEGORY, DATASET, MODEL, RANK and SEED mean the same to every target that takes them, and so do its refusals."""

import importlib
import re
import sys

import pytest
from conftest import ROOT

from paragen.common import settings
from paragen.common.cli import UserError

# The targets that select what was collected, with what else each needs; the others select recipes, or ask the hub.
COLLECTED = {
    "verify": {}, "clean-checkpoints": {"DRY_RUN": "1"}, "index": {}, "export": {"FORMAT": "peft"}, "evaluate": {},
    "stats": {}, "report": {}, "publish": {"REPO": "user/name", "DRY_RUN": "1"}, "generator": {},
    "benchmark-generator": {},
}  # fmt: skip
OF_RECIPES = {"recipe", "pretrain", "finetune", "collect", "collect-all", "plan", "status"}
ELSEWHERE = {"pull"}  # selects by the same function from a repository's index: tests/test_publishing.py
# What they do with a selection takes a base model or a licence.
SCORED = ("evaluate", "publish", "generator", "benchmark-generator")
SHOWING = {"index", "report"}  # show what there is of the requested ranks and seeds, the report with empty cells


@pytest.fixture
def two(place):
    """Two collected datasets, one with a blank and a dash in its name."""
    place.collect(dataset="ARC-c", rank=4)
    place.collect(dataset="My Set", rank=8, model="Other")
    return place


def call(target: str, monkeypatch, **given: str) -> None:
    """Run a target's script in this process with the settings that a user types."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    script = re.search(rf"^{target}:.*\n(?:\t.*\n)*?\t.*?utils/(\w+)\.py", makefile, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [script[1]])
    needed = {**COLLECTED[target], **given}
    if target == "clean-checkpoints":
        needed.setdefault("DATASET", "arcc myset")  # it wants to be told
    for name, value in needed.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MAKE_SETTINGS", " ".join(needed))
    settings.check([target])
    importlib.import_module(script[1]).main()


def test_every_target_that_selects_is_tested_here():
    selecting = {target for target, taken in settings.TARGETS.items() if "DATASET" in taken and "MODEL" in taken}
    assert selecting == COLLECTED.keys() | OF_RECIPES | ELSEWHERE


@pytest.mark.parametrize("target", [target for target in COLLECTED if target not in SCORED])
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"DATASET": "arcc MySet"}, {"ARC-c", "My Set"}),
        ({"DATASET": "ARC-C"}, {"ARC-c"}),
        ({"RANKS": "8 4"}, {"ARC-c", "My Set"}),
        ({"MODELS": "OTHER", "SEED": "42 042"}, {"My Set"}),
    ],
)
def test_several_names_in_any_spelling_are_taken(two, monkeypatch, capsys, target, given, meant):
    call(target, monkeypatch, **given)
    told = capsys.readouterr().out
    if target == "report":  # its page is compressed; what it shows was measured for it
        told = " ".join(folder.name for folder in (two.saves / "stats").rglob("*_finetune"))
    shown = {"ARC-c": "Tiny_lora-rank_4_finetune", "My Set": "Other_lora-rank_8_finetune"}
    assert {name for name, run in shown.items() if name in told or run in told} == meant, told


REFUSED = {
    "a dataset of two": ({"DATASET": "ARC-c OBQA"}, "collected dataset 'OBQA' is not known; known: ARC-c, My Set"),
    "a near one": ({"DATASET": "ARC-d"}, "collected dataset 'ARC-d' is not known; did you mean ARC-c?"),
    "a model": ({"MODEL": "gpt9"}, "collected model 'gpt9' is not known; known: other, tiny"),
    "a category": ({"CATEGORY": "nope"}, "category 'nope' is not known"),
    "no category of theirs": ({"CATEGORY": "coding"}, "collected category 'coding' is not known"),
    "a rank": ({"RANK": "16"}, "no collection fits "),
    "a seed": ({"SEED": "7"}, "no collection fits "),
    "what is no rank": ({"RANK": "four"}, "rank"),
    "what is no seed": ({"SEED": "x"}, "seed"),
    "both spellings": ({"RANK": "4", "RANKS": "8"}, "RANK=4 and RANKS=8: they mean the same"),
}


@pytest.mark.parametrize("target", COLLECTED)
@pytest.mark.parametrize("what", REFUSED)
def test_what_nothing_fits_is_refused_by_every_target_in_the_same_words(two, monkeypatch, capsys, target, what):
    given, said = REFUSED[what]
    with pytest.raises(UserError) as error:
        call(target, monkeypatch, **given)
    assert said in str(error.value) and "\n" not in str(error.value)
    if said.startswith("no collection fits"):
        assert str(error.value).endswith("; make index lists those there are")


@pytest.mark.parametrize("target", sorted(COLLECTED.keys() - SHOWING))
@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"RANK": "4 16 8 2"}, "RANK='16 2'"),
        ({"DATASET": "arcc", "RANK": "4 8"}, "RANK=8"),
        ({"RANK": "4", "SEED": "42 7"}, "RANK=4 SEED=7"),
    ],
)
def test_a_rank_or_a_seed_that_nothing_has_is_refused_beside_those_there_are(two, monkeypatch, target, given, missing):
    before = sorted(two.saves.rglob("*"))
    with pytest.raises(UserError) as error:
        call(target, monkeypatch, **given)
    said = str(error.value)
    assert "no collection fits " in said and said.endswith(f" {missing}; make index lists those there are")
    assert set(two.saves.rglob("*")) - set(before) <= {two.saves / "index.parquet"}


@pytest.mark.parametrize("target", sorted(SHOWING))
def test_what_shows_collections_shows_those_there_are(two, monkeypatch, capsys, target):
    call(target, monkeypatch, RANK="8 9")
    assert "FAULTY" not in capsys.readouterr().err
