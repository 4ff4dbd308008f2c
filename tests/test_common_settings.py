"""The table of settings: what a user types after `make` is taken, or refused with the near name, and never ignored."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.forked_python import PLAIN

from paragen.common import settings
from paragen.common.cli import UserError

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SCRIPTS = {  # the script of each target, from the Makefile
    target: ROOT / script
    for target, script in re.findall(
        r"^([a-z-]+): [a-z].*## .*\n(?:\t.*\n)*?\t.*?(utils/\w+\.py)", MAKEFILE, re.MULTILINE
    )
}
SELECTING = [target for target, taken in settings.TARGETS.items() if taken.keys() >= {*settings.SELECTION.split()}]


@pytest.fixture
def typed(monkeypatch):
    """Set variables as make does for those on its command line."""

    def set_all(**given: str) -> None:
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MAKE_SETTINGS", " ".join(given))

    return set_all


def test_the_table_has_the_targets_of_the_makefile():
    listed = re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)
    assert sorted(listed) == sorted(settings.TARGETS)
    assert len(SCRIPTS) > 20


def test_the_readme_shows_the_table():
    assert "\n".join(settings.table()) in (ROOT / "utils" / "README.md").read_text(encoding="utf-8")


def test_every_setting_of_the_table_is_known_and_taken_somewhere():
    taken = {name for names in settings.TARGETS.values() for name in names}
    assert taken | {"PY", "PYTHON"} == set(settings.SETTINGS)
    assert set(settings.PLURALS.values()) <= set(settings.SETTINGS)


def module_file(name: str) -> Path | None:
    path = ROOT / "utils" / Path(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported_by(file: Path) -> set[Path]:
    """A file, and all modules of this project that it imports, also inside functions and through others."""
    found, queue = set(), [file]
    while queue:
        current = queue.pop()
        if current in found:
            continue
        found.add(current)
        text = current.read_text(encoding="utf-8")
        for room in re.findall(r'import_module\(f"([\w.]+)\.\{', text):  # one of its modules, by name
            queue += (ROOT / "utils" / Path(*room.split("."))).glob("*.py")
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            queue += [path for name in names if name.startswith("paragen") and (path := module_file(name))]
    return found


def read_in(file: Path) -> set[str]:
    """The settings that a file reads: `settings.text("NAME")` and the like, and variables of the environment."""
    text = file.read_text(encoding="utf-8")
    named = re.findall(r'settings\.(?:switch|text|number|values)\(\s*"([A-Z_]+)"', text)
    named += re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', text)
    named += re.findall(r'\bfor name in \(((?:"[A-Z_]+"(?:, )?)+)\)', text) and re.findall(r'"([A-Z_]{3,})"', text)
    return {*named, *(["CATEGORY"] if "settings.category()" in text else [])} & set(settings.SETTINGS)


@pytest.mark.parametrize("target", SCRIPTS)
def test_a_target_reads_what_it_takes_and_its_script_nothing_else(target):
    taken = set(settings.TARGETS[target])
    reached = set().union(*map(read_in, imported_by(SCRIPTS[target])))
    if target != "demo":  # it hands its settings to the scripts that it calls
        assert not taken - reached, "these would be ignored"
    of_script = read_in(SCRIPTS[target])
    users = [other for other, script in SCRIPTS.items() if script == SCRIPTS[target]]
    assert not of_script - set().union(*(settings.TARGETS[other] for other in users)), "these are not in the table"


def test_only_one_module_reads_settings_from_the_environment():
    allowed = {"DEVICES", "STAGE_DIR"}  # of a node or a process, also where a sweep has set them
    for file in (ROOT / "utils").rglob("*.py"):
        if file.name != "settings.py":
            read = set(re.findall(r'environ\.get\("([A-Z_]+)"', file.read_text(encoding="utf-8")))
            assert not read & {*settings.SETTINGS, *settings.PLURALS} - allowed, file


@pytest.mark.parametrize("target", settings.TARGETS)
def test_a_target_refuses_every_setting_that_it_does_not_take(target, typed):
    for name in {*settings.SETTINGS} - {*settings.TARGETS[target], *settings.EVERYWHERE}:
        typed(**{name: "1"})
        with pytest.raises(UserError, match=f"make {target}: does not take the setting {name}"):
            settings.check([target])


@pytest.mark.parametrize("target", SELECTING)
def test_one_value_or_several_under_either_name(target, typed):
    for given in (
        {"RANK": "2 8"},
        {"RANKS": "2 8"},
        {"MODEL": "a"},
        {"MODELS": "a b"},
        {"DATASET": "a b"},
        {"SEED": "7"},
    ):
        typed(**given)
        settings.check([target])
    typed(RANK="2", RANKS="8")
    with pytest.raises(UserError, match="RANK=2 and RANKS=8: they mean the same"):
        settings.check([target])


@pytest.mark.parametrize(
    ("name", "meant"), [("MODLE", "MODEL"), ("dataset", "DATASET"), ("RANk", "RANK"), ("DEVICE", "DEVICES")]
)
def test_a_misspelled_setting_is_refused_with_the_near_one(name, meant, typed):
    typed(**{name: "x"})
    with pytest.raises(UserError, match=f"there is no setting {name}; did you mean {meant}\\?"):
        settings.check(["collect"])


def test_what_nobody_typed_is_never_refused(monkeypatch, typed):
    monkeypatch.setenv("MODLE", "x")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LIMIT", "no number")
    typed(DATASET="ARC-c", HF_ENDPOINT="http://127.0.0.1:9", OMP_NUM_THREADS="1")
    settings.check(["collect"])


def test_a_launchers_rank_is_not_a_setting(monkeypatch, typed):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settings.values("RANK") == []
    typed(RANKS="2 4 2")
    assert settings.values("RANK") == ["2", "4"]
    monkeypatch.delenv("WORLD_SIZE")
    assert settings.values("RANK") == ["2", "4"], "what was typed goes before the environment"


@pytest.mark.parametrize("value", ["1", "yes", "true", "on", "YES", "On"])
def test_yes(value, monkeypatch):
    monkeypatch.setenv("FORCE", value)
    assert settings.switch("FORCE") is True


@pytest.mark.parametrize("value", ["", "0", "no", "false", "off", "No", "FALSE"])
def test_no(value, monkeypatch):
    monkeypatch.setenv("FORCE", value)
    assert settings.switch("FORCE") is False


def test_kernels_are_deterministic_unless_switched_off(monkeypatch):
    for value, expected in (("", True), (" ", True), ("1", True), ("0", False), ("no", False)):
        monkeypatch.setenv("DETERMINISTIC", value)
        assert settings.switch("DETERMINISTIC") is expected
    monkeypatch.delenv("DETERMINISTIC")
    assert settings.switch("DETERMINISTIC") is True
    assert all(takes["DETERMINISTIC"] == "1" for takes in settings.TARGETS.values() if "DETERMINISTIC" in takes)


@pytest.mark.parametrize("name", ["DETERMINISTIC", "FORCE", "REPLACE", "PRUNE_PRETRAIN", "RAW", "PRIVATE", "DRY_RUN"])
def test_neither_yes_nor_no_is_refused(name, monkeypatch):
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(UserError, match=f"{name}=maybe: is neither yes nor no"):
        settings.switch(name)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "1e3"])
def test_a_number_is_a_whole_one_from_1_on(value, monkeypatch):
    monkeypatch.setenv("KEEP", value)
    with pytest.raises(UserError, match=f"KEEP={re.escape(value)}: is not a whole number"):
        settings.number("KEEP")


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["make", *arguments, f"PY={PLAIN}"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_help_for_a_target_lists_its_settings():
    told = make("help", "FOR=collect").stdout
    assert all(name in told for name in settings.TARGETS["collect"]) and "(default: 8)" in told
    assert "did you mean collect?" in make("help", "FOR=colect").stderr


@pytest.mark.parametrize(
    "arguments", [["recipe", "RANK=3"], ["pretrain", "MODLE=x"], ["lint", "RANK=3"], ["plan", "FORCE=y"]]
)
def test_make_refuses_before_anything_is_done(arguments):
    done = make(*arguments)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and not done.stdout, line


def test_settings_for_one_of_several_targets_are_taken():
    assert "does not take" not in make("-n", "model", "data", "DATASET=ARC-c", "MODEL=gpt2").stderr


def test_a_script_that_make_calls_may_call_make_again(tmp_path):
    """train_with_rank.sh makes .venv by `make setup`, which takes no RANK."""
    done = make("pretrain", "DATASET=Demo", "RANK=8", "SEED=3", "FORCE=no", PARAGEN_TOP=str(tmp_path))
    assert "does not take" not in done.stderr
