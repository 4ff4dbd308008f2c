"""Commands that are killed at any moment: what they leave is gone after the next successful call of the same one."""

import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from helpers.forked_python import PYTHON

pytestmark = [pytest.mark.runs, pytest.mark.slow, pytest.mark.alone]

CELL = {"DATASET": "To-y", "MODEL": "tiny-one", "RANK": "2", "DEVICES": "cpu"}
KILLS = 25  # of each command
# By what is tested: a script with its arguments, its settings, and those of the call afterwards that differ.
COMMANDS: dict[str, tuple[list[str], dict[str, str], dict[str, str]]] = {
    "collect": (["collect.py"], {**CELL, "FORCE": "1", "ENGINE": "stock"}, {"FORCE": ""}),
    "collect packed": (["collect.py"], {**CELL, "FORCE": "1", "ENGINE": "packed"}, {"FORCE": ""}),
    "index": (["index.py"], {}, {}),
    "register": (["register_dataset.py"], {"FILE": "data/common-sense-reasoning/Mine.json", "REPLACE": "1"}, {}),
    "export peft": (["export.py"], {"FORMAT": "peft", "FORCE": "1"}, {"FORCE": ""}),
    "export dnd": (["export.py"], {"FORMAT": "dnd", "FORCE": "1"}, {"FORCE": ""}),
    "export canonical": (["export.py"], {"FORMAT": "canonical", "FORCE": "1"}, {"FORCE": ""}),
    "export archive": (["export.py"], {"FORMAT": "archive", "FORCE": "1"}, {"FORCE": ""}),
    "stats": (["stats.py"], {"FORCE": "1", "DEVICES": "cpu"}, {"FORCE": ""}),
    "evaluate": (["evaluate.py"], {**CELL, "SPLIT": "Other", "LIMIT": "4", "FORCE": "1"}, {"FORCE": ""}),
    "report": (["report.py"], {"DEVICES": "cpu"}, {}),
    "verify": (["verify.py"], {}, {}),
    "publish": (["publish.py"], {"REPO": "user/toy", "DRY_RUN": "1", "ALLOW_UNKNOWN_LICENSE": "1"}, {}),
    "import": (["import_archive.py"], {"FILE": "saves/exports/archive", "FORCE": "1"}, {"FORCE": ""}),
}
FIRST = ("collect", "export archive")  # what all others need


class Clone:
    """A copy of the repository with one collection, and a temporary folder of its own."""

    def __init__(self, top: Path, temporary: Path):
        self.top, self.temporary = top, temporary
        temporary.mkdir()
        (top / "data" / "common-sense-reasoning" / "Mine.json").write_text('[{"prompt": "a?", "response": "b"}]')

    def start(self, name: str, **changes: str) -> subprocess.Popen:
        """Start one of COMMANDS."""
        (script, *arguments), settings, _ = COMMANDS[name]
        environment = {**os.environ, "TMPDIR": str(self.temporary), **settings, **changes}
        command = [PYTHON, self.top / "utils" / script, *arguments]
        return subprocess.Popen(
            command, env=environment, cwd=self.top, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, name: str, **changes: str) -> float:
        """Run a command to its successful end; the seconds that it took."""
        began = time.monotonic()
        process = self.start(name, **changes)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        return time.monotonic() - began

    def paths(self) -> set[str]:
        """All files and folders that a command may leave, but those of the code."""
        tops = [self.top / name for name in ("saves", "data", "models", "collect_scripts")]
        found = {path.relative_to(self.top).as_posix() for top in tops for path in top.rglob("*")}
        return found | {path.name for path in self.temporary.glob("paragen-*")}


@pytest.fixture
def clone(repository, tmp_path) -> Clone:
    clone = Clone(repository, tmp_path / "temporary")
    for name in FIRST:
        clone.finish(name)
    return clone


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_left_of_a_killed_command_after_the_next_successful_call(clone, name):
    again = COMMANDS[name][2]
    seconds = clone.finish(name)
    clone.finish(name, **again)
    whole, left, draw = clone.paths(), 0, random.Random(name)
    for _ in range(KILLS):
        if name == "index":
            (clone.top / "saves" / "index.parquet").unlink(missing_ok=True)  # else it is not written again
        process = clone.start(name)
        time.sleep(draw.uniform(0.2, 1) * seconds)
        process.kill()
        process.communicate()
        left += len(clone.paths() - whole)
    time.sleep(1.5)  # the process that the killed one stood for ends, too; its temporary files are old enough
    clone.finish(name, **again)
    assert clone.paths() == whole, f"{left} paths were left by {KILLS} kills"
    print(f"{name}: {KILLS} kills, {left} paths left before the next call, none after it")
