"""What a sweep shows while it runs: what each cell does, and an estimate that does not rise at the end."""

import json
import os
import time

import pytest

from paragen.common import files
from paragen.recipes.run import Cell
from paragen.sweep import estimate
from paragen.sweep.display import Display
from paragen.sweep.jobs import Job
from paragen.training import progress
from paragen.training.outcome import DONE
from paragen.training.progress import Progress


@pytest.fixture
def cell(project) -> Cell:
    return Cell("Toy", "tiny", 4, (project.pretrain, project.finetune))


def log(cell: Cell, phase: str, step: int, total: int) -> None:
    """Write a step into the log of a cell's present run, as LLaMA-Factory does."""
    staging = files.beside(getattr(cell, phase).folder, "staging-x")
    staging.mkdir(parents=True, exist_ok=True)
    line = {"current_steps": step, "total_steps": total, "loss": 0.5, "remaining_time": "0:00:07"}
    (staging / "trainer_log.jsonl").write_text(json.dumps(line) + "\n")


def publish(cell: Cell, phase: str) -> None:
    folder = getattr(cell, phase).folder
    files.beside(folder, "staging-x").rename(folder)
    (folder / "manifest.json").write_text("{}")


def test_a_cell_is_shown_from_its_start_to_its_verification(cell, capsys):
    display = Display(1)
    display.report("ray", None, None)
    display.report("workers", None, None)
    assert capsys.readouterr().out == "starting Ray\nstarting workers\n"
    display.report("started", Job(cell, "x", 1, False), None)
    began = display.running[cell]

    def shown() -> tuple[str, float]:
        text, part = display.state_of(cell, began)
        return text, round(part, 3)

    assert shown() == ("starting: a worker's first cell waits for its imports", 0)
    staging = files.beside(cell.pretrain.folder, "staging-x")
    staging.mkdir(parents=True)
    assert shown() == ("pretrain starting", 0)
    progress.report(staging, "importing LLaMA-Factory")
    assert shown() == ("pretrain importing LLaMA-Factory", 0)
    rows = [estimate.rows_of(run) for run in cell.runs]  # of 8 steps and of 8 more
    whole = sum(rows)
    log(cell, "pretrain", 4, 8)
    assert shown() == ("pretrain step 4 of 8, loss 0.5000, 0:00:07 left", round(0.5 * rows[0] / whole, 3))
    log(cell, "pretrain", 8, 8)
    assert shown() == ("pretrain finishing", round(rows[0] / whole, 3))
    publish(cell, "pretrain")
    assert shown() == ("pretrained, starting the finetune", round(rows[0] / whole, 3))
    log(cell, "finetune", 8, 12)  # it resumes step 4
    assert shown()[1] == round((rows[0] + 0.5 * rows[1]) / whole, 3)
    log(cell, "finetune", 12, 12)
    assert shown() == ("finetune finishing", 1)
    publish(cell, "finetune")
    assert shown() == ("verifying", 1)
    display.report("done", Job(cell, "x", 1, False), DONE)
    assert "[1/1] collected: Toy tiny rank 4 (0 s, 0:00:00 left)" in capsys.readouterr().out


def test_a_pretrain_of_an_earlier_call_does_not_count_as_this_calls_work(cell):
    cell.pretrain.folder.mkdir(parents=True)
    (cell.pretrain.folder / "manifest.json").write_text("{}")
    os.utime(cell.pretrain.folder / "manifest.json", (1, 1))
    display = Display(1)
    assert display.state_of(cell, time.time()) == ("starting: a worker's first cell waits for its imports", 0)
    log(cell, "finetune", 6, 12)
    assert display.state_of(cell, time.time())[1] == 0.25


def test_nothing_runs_has_a_reason_in_the_live_table(monkeypatch):
    from rich.console import Console

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    display = Display(3)
    for event, text in (("ray", "joining the Ray cluster at 10.0.0.1:6379"), ("workers", "starting workers")):
        display.report(event, None, None)
        console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(display.table())
        assert console.export_text().strip() == f"0/3 done, {text}, 0 failed"


def test_the_logs_of_many_running_cells_are_not_read_for_every_cell_that_ends(cell, monkeypatch):
    """An estimate that took long stands for a while, and counts down."""
    from paragen.sweep import display

    clock, read = [1000.0], []

    def state_of(self, one, began):
        clock[0] += 0.01
        read.append(one)
        return "", 0.5

    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Display, "state_of", state_of)
    shown = Display(200)
    shown.running = {Cell("Toy", "tiny", rank, cell.recipes): time.time() - 60 for rank in range(1, 101)}
    first, again = shown.left(), shown.left()
    assert first == again == ", 0:03:00 left" and len(read) == 100, "100 cells wait, for which 100 places come free"
    clock[0] += 30
    assert shown.left() == ", 0:02:30 left" and len(read) == 100
    clock[0] += 1 / display.LEFT_SHARE
    assert shown.left() and len(read) == 200


def test_the_live_table_has_no_more_rows_than_can_be_read(cell):
    from rich.console import Console

    from paragen.sweep import display

    shown = Display(1000)
    shown.running = {Cell("Toy", "tiny", rank, cell.recipes): time.time() for rank in range(1, 1001)}
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(shown.table())
    lines = console.export_text().splitlines()
    assert len(lines) == 2 + display.ROWS and "and 950 more" in lines[-1]


@pytest.mark.parametrize(
    ("running", "waiting", "took", "expected"),
    [
        ([], 3, [], None),
        ([(20, 0)], 3, [], None),
        ([(30, 0.25)], 0, [], 90),
        ([(30, 0.25)], 2, [], 90 + 2 * 120),
        ([(10, 0), (10, 0)], 2, [100, 100], 90 + 100),
        ([(10, 0.5), (90, 0.9)], 1, [100], 10 + 220 / 3),
        ([(300, 0)], 0, [100], 0),
    ],
)
def test_the_time_left_follows_from_what_runs_and_what_ran(running, waiting, took, expected):
    assert estimate.seconds_left(running, waiting, took) == (expected and pytest.approx(expected))


def test_an_estimate_does_not_rise_while_the_last_cells_run():
    """Six cells of 100 s each on two places: at every second the true time is left, up to the last one."""
    left = []
    for now in range(130, 300, 5):
        round_, elapsed = divmod(now, 100)
        running = [(elapsed, elapsed / 100)] * 2
        left.append(estimate.seconds_left(running, 4 - 2 * round_, [100.0] * 2 * round_))
    assert left == pytest.approx([300 - now for now in range(130, 300, 5)])


def test_phases_count_the_same_where_a_recipe_has_no_number_of_steps(cell):
    cell.pretrain.config.pop("max_steps")
    assert estimate.part_done(cell.runs, Progress(cell.finetune, step=8, total=12)) == 0.75
