"""Commands that are killed (-9) at any moment: the next successful call leaves what an undisturbed one leaves, no more.

The moments of a command are spread evenly over the time that an undisturbed call takes. KILLS=20 makes it 20 a command.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import CATEGORY
from helpers.forked_python import PYTHON

pytestmark = [pytest.mark.runs, pytest.mark.slow]

WATCHED = ("saves", "data", "models", "collect_scripts", "tmp")
CACHES = (".row_hashes", ".hashes.json")  # of what was read, which a second call may fill
BUSY = re.compile(r"is running already|another process|is being")  # a child of the killed process is still unwinding
UNWIND_SECONDS = 60
MOST_CALLS = 20  # of a command, until one is killed before it ends


class Command(NamedTuple):
    """A command that is killed.

    Attributes:
        script: in utils/.
        settings: as a user types them after `make`.
        arguments: of the script.
        kills: how often it is killed.
        prepare: changes the project before each call.
        then: settings of the next call, where it is not the same command again.
    """

    script: str
    settings: dict[str, str]
    arguments: tuple[str, ...] = ()
    kills: int = 15
    prepare: Callable[[Path], None] = lambda top: None
    then: dict[str, str] | None = None


CELL = {"DATASET": "To-y", "MODEL": "tiny-one", "RANK": "4"}


def without_runs(top: Path) -> None:
    shutil.rmtree(top / "saves")


def with_notes(top: Path) -> None:
    """A user's files in the run folders, which are replaced."""
    for run in (top / "saves").glob(f"{CATEGORY}/*/*_*[en]"):
        if run.is_dir():
            (run / "my plots").mkdir()
            (run / "my plots" / "loss.png").write_text("mine")
            (run / "notes.txt").write_text("mine")


def with_archive(top: Path) -> None:
    """The collection as an archive, and not in saves/ any more."""
    done = call(top, Command("export.py", {"FORMAT": "archive", "OUT": "archives"})).communicate()
    assert (top / "archives").is_dir(), done
    shutil.rmtree(top / "saves" / CATEGORY)


def with_stock_run(top: Path) -> None:
    """The collection as stock LLaMA-Factory leaves it: a folder per checkpoint, and no manifest."""
    (run,) = (top / "saves").glob(f"{CATEGORY}/*/*_finetune")
    for path in run.glob("checkpoint-*.safetensors"):
        folder = run / path.stem
        folder.mkdir()
        path.rename(folder / "adapter_model.safetensors")
        shutil.copy(run / "adapter_config.json", folder)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": int(path.stem.split("-")[1])}))
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 12, "max_steps": 12, "log_history": []}))
    for name in ("manifest.json", "adapter_config.json"):
        (run / name).unlink()


def with_rows(top: Path) -> None:
    lines = [f"{n} + {n}?,{2 * n}" for n in range(3000)]
    (top / "New.csv").write_text("\n".join(["question,answer", *lines]))


COMMANDS = {
    "pretrain": Command("collect.py", CELL, ("pretrain",), 20, without_runs),
    "collect": Command("collect.py", CELL, (), 30, without_runs),
    "collect, packed": Command("collect.py", {**CELL, "RANK": "2 4"}, (), 30, without_runs),
    "collect again": Command("collect.py", {**CELL, "FORCE": "1"}, (), 30, with_notes, CELL),
    "finetune again": Command("collect.py", {**CELL, "FORCE": "1"}, ("finetune",), 15, with_notes),
    "verify": Command("verify.py", {}, kills=5),
    "status": Command("status.py", {}, kills=5),
    "plan": Command("plan.py", {}, kills=5),
    "index": Command("index.py", {}),
    "stats": Command("stats.py", {}),
    "report": Command("report.py", {}),
    "export peft": Command("export.py", {"FORMAT": "peft"}),
    "export dnd": Command("export.py", {"FORMAT": "dnd"}),
    "export canonical": Command("export.py", {"FORMAT": "canonical"}),
    "export archive": Command("export.py", {"FORMAT": "archive"}),
    "import": Command("import_archive.py", {"FILE": "archives"}, prepare=with_archive),
    "clean-checkpoints": Command("clean_dataset_dir.py", {"DATASET": "To-y"}, prepare=with_stock_run),
    "register": Command(
        "register_dataset.py",
        {"FILE": "New.csv", "CATEGORY": "math", "MAP": "prompt=question response=answer", "HELD_OUT": "5"},
        kills=20,
        prepare=with_rows,
    ),
    "evaluate": Command("evaluate.py", {"STEPS": "last", "SPLIT": "Other", "LIMIT": "4"}),
    "publish": Command("publish.py", {"REPO": "user/name", "DRY_RUN": "1", "ALLOW_UNKNOWN_LICENSE": "1"}),
    "disk": Command("disk.py", {}, kills=3),
    "clean-up": Command("clean_up.py", {}, kills=5),
}


def test_every_command_that_writes_is_killed_and_at_least_300_kills_are_made():
    assert sum(command.kills for command in COMMANDS.values()) >= 300


def call(top: Path, command: Command, settings: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a command in a clone."""
    (top / "tmp").mkdir(exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PARAGEN_")}
    given = {**clean, "DEVICES": "cpu", "TMPDIR": str(top / "tmp"), "PY": PYTHON, **(settings or command.settings)}
    return subprocess.Popen(
        [PYTHON, top / "utils" / command.script, *command.arguments],
        env=given, cwd=top, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(top: Path, command: Command, settings: dict[str, str] | None = None) -> str:
    """Call a command, again while what a killed one started is still ending; returns what it printed."""
    deadline = time.monotonic() + UNWIND_SECONDS
    while True:
        process = call(top, command, settings)
        told, _ = process.communicate(timeout=300)
        if process.returncode == 0:
            return told
        assert "Traceback" not in told, told
        assert BUSY.search(told) and time.monotonic() < deadline, told
        time.sleep(0.5)


def there(top: Path) -> set[str]:
    """Every file and folder below what commands write to, but for caches."""
    found = (path for name in WATCHED for path in (top / name).rglob("*"))
    return {str(path.relative_to(top)) for path in found if not set(path.parts) & set(CACHES)}


def checkpoints(top: Path) -> dict[str, str]:
    """The hash of each collected checkpoint and each adapter of a pretrain."""
    found = [path for path in (top / "saves" / CATEGORY).rglob("*.safetensors")]
    return {str(path.relative_to(top)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_folder):
    """A clone with a collected cell, whose test split is registered. Read only."""
    top = tmp_path_factory.mktemp("made") / "a clone"
    from conftest import repository as fixture

    fixture.__wrapped__(top.parent, model_folder)
    finish(top, Command("collect.py", CELL))
    return top


def copied(top: Path, folder: Path, command: Command) -> Path:
    """A copy of a clone, prepared for a command."""
    shutil.copytree(top, folder)
    command.prepare(folder)
    return folder


def killed(made: Path, top: Path, command: Command, seconds: float, share: float) -> tuple[int, float]:
    """Kill a command in a copy of the clone `made` at `top` after a share of its time; sooner where it ended before.

    Args:
        made, top, command: see `copied`.
        seconds: that an undisturbed call took.
        share: of this time.

    Returns how many calls that took, and `seconds` as it is known by then: a later call can be faster than the first.
    """
    for calls in range(1, MOST_CALLS + 1):
        copied(made, top, command)
        begun = time.monotonic()
        process = call(top, command)
        try:
            told, _ = process.communicate(timeout=seconds * share)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return calls, seconds
        assert process.returncode == 0, told
        seconds = 0.9 * min(seconds, time.monotonic() - begun)
        shutil.rmtree(top)
    raise AssertionError(f"{command.script} ended {MOST_CALLS} times before it was killed")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_next_call_leaves_what_an_undisturbed_one_leaves(made, tmp_path, name):
    command = COMMANDS[name]
    undisturbed = copied(made, tmp_path / "undisturbed", command)
    begun = time.monotonic()
    finish(undisturbed, command)
    seconds = time.monotonic() - begun
    if command.then is not None:
        finish(undisturbed, command, command.then)
    expected, hashes = there(undisturbed), checkpoints(undisturbed)
    left: dict[str, int] = {}
    gone: dict[str, int] = {}
    kills = int(os.environ.get("KILLS") or command.kills)
    called = 0
    for number in range(kills):
        top = tmp_path / "killed"
        calls, seconds = killed(made, top, command, seconds, (number + 0.5) / kills)
        called += calls
        finish(top, command, command.then)
        found = there(top)
        for path in found - expected:
            what = re.sub(r"\d{3,}|[0-9a-f]{8,}", "*", path)
            left[what] = left.get(what, 0) + 1
        for path in expected - found:
            gone[path] = gone.get(path, 0) + 1
        assert checkpoints(top) == hashes, f"kill {number}: other checkpoints"
        shutil.rmtree(top)
    print(f"{name}: {kills} of {called} calls were killed; left behind: {left or 'nothing'}")
    assert not left and not gone, f"{kills} kills; left behind: {left}; missing: {gone}"
