"""A sweep with the packed engine: which cells are trained together, and that each fails or succeeds alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.forked_python import PYTHON
from test_sweep import CATEGORY, left_over, runs_of, sweep, workers_of

from paragen.training import interrupted
from paragen.training.outcome import DONE

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent


def manifests(repository: Path) -> dict[str, dict]:
    """The manifests of all collections, by dataset/run folder."""
    found = {}
    for path in repository.glob(f"saves/{CATEGORY}/*/*_finetune/manifest.json"):
        found[f"{path.parent.parent.name}/{path.parent.name}"] = json.loads(path.read_text())
    return found


def add_to_recipes(repository: Path, dataset: str, model: str, line: str) -> None:
    for recipe in (repository / "collect_scripts" / CATEGORY / dataset).glob(f"{model}_*.yaml"):
        text = recipe.read_text()
        key = line.split(":")[0]
        kept = [old for old in text.splitlines() if not old.startswith(f"{key}:")]
        recipe.write_text("\n".join([*kept, line, ""]))


def outcomes_in(output: str) -> dict[tuple[str, str, str], str]:
    """The table at a sweep's end."""
    lines = output.splitlines()
    start = max(number for number, line in enumerate(lines) if line.split()[:2] == ["dataset", "model"])
    return {tuple(line.split()[:3]): line.split(maxsplit=3)[3] for line in lines[start + 1 :]}


@pytest.mark.slow
def test_a_mixed_sweep_packs_what_it_can_and_a_broken_cell_fails_alone(repository):
    """Two datasets, two base models, two ranks: one pair cannot be packed, one is broken, the others are packed."""
    add_to_recipes(repository, "To-y", "tiny-two", "use_dora: true")
    add_to_recipes(repository, "To-y", "tiny-one", "template: nonsense")
    run = sweep(repository, slots=1, RANKS="2 4")
    output = run.communicate()[0]
    assert run.returncode == 1 and "Traceback" not in output, output
    assert "engine: 6 cells packed, of 2 base models, 2 a cell at a time (use_dora is True)" in output
    for cell, text in outcomes_in(output).items():
        if cell[:2] == ("To-y", "tiny-one"):
            assert text.startswith("failed: ") and "template 'nonsense' is not known" in text and ".log" in text
        else:
            assert text == "collected", text
    found = manifests(repository)
    assert len(found) == 6 and left_over(repository) == []
    engines = {name: manifest.get("engine") for name, manifest in found.items()}
    assert [name for name, used in engines.items() if used is None] == [
        name for name in engines if name.startswith("To-y/Tiny-Two")
    ]
    logs = sorted((repository / "saves" / CATEGORY / "Other").glob("*.log"))
    assert len(logs) == 4 and sum(log.read_text().count("whole ") for log in logs) == 4
    assert all("packed with " in log.read_text() or "whole " in log.read_text() for log in logs)
    assert output.count("started: ") == 8 and re.search(r"devices: 1, had work \d+ % of \d+ s", output)


@pytest.mark.slow
def test_cells_whose_loaded_model_cannot_be_packed_are_trained_the_ordinary_way(repository):
    """GPT-2's layers are not nn.Linear, which only the loaded model shows."""
    shutil.rmtree(repository / "models" / "Tiny-One")
    subprocess.run([PYTHON, ROOT / "tests" / "helpers" / "tiny_models.py", repository / "models", "gpt2"], check=True)
    (repository / "models" / "gpt2").rename(repository / "models" / "Tiny-One")
    for dataset in ("To-y", "Other"):
        for line in ("lora_target: c_attn,c_proj,c_fc", "template: gpt2"):
            add_to_recipes(repository, dataset, "tiny-one", line)
    run = sweep(repository, RANKS="2", MODELS="tiny-one")
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert output.count("alone now: ") == 2 and "not for the packed engine: " in output
    assert len(manifests(repository)) == 2 and not any("engine" in found for found in manifests(repository).values())


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "status", "packed"), [("stock", 0, False), ("packed", 1, True)])
def test_a_sweep_can_be_forced_to_either_engine(repository, engine, status, packed):
    add_to_recipes(repository, "To-y", "tiny-one", "use_dora: true")
    run = sweep(repository, RANKS="2", MODELS="tiny-one", ENGINE=engine)
    output = run.communicate()[0]
    assert run.returncode == status, output
    assert ("use_dora is True; omit ENGINE" in outcomes_in(output)["To-y", "tiny-one", "2"]) == packed
    assert ("engine" in manifests(repository)["Other/Tiny-One_lora-rank_2_finetune"]) == packed


def test_an_unknown_engine_is_one_error_line(repository):
    run = sweep(repository, RANKS="2", ENGINE="nonsense")
    output = run.communicate()[0]
    assert run.returncode == 1 and "error: ENGINE=nonsense: is not known; ENGINE is packed or stock" in output
    assert "Traceback" not in output and not (repository / "saves").exists()


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("victims_of", [runs_of, workers_of])
def test_a_killed_pack_is_repeated(repository, victims_of):
    """In the middle of its finetune: the training itself, or the worker that started it."""
    run = sweep(repository, RANKS="2 4", MODELS="tiny-one")
    saves = repository / "saves" / CATEGORY
    while not (list(saves.glob("*/.*_finetune.staging*")) and (victims := victims_of(run))):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    os.kill(victims[0], signal.SIGKILL)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert "killed by signal 9" in output or "its worker died" in output
    assert 1 <= output.count("will try again: ") <= 4 and set(outcomes_in(output).values()) == {"collected"}
    assert len(manifests(repository)) == 4 and left_over(repository) == []
    assert {found["engine"] for found in manifests(repository).values()} == {"packed"}


@pytest.mark.parametrize(
    ("cells", "slots", "sizes"),
    [(5, 8, [1] * 5), (10, 2, [5, 5]), (64, 1, [64]), (65, 1, [33, 32]), (200, 2, [50] * 4), (7, 0, [7])],
)
def test_equal_cells_of_a_base_model_are_spread_evenly_over_slots(cells, slots, sizes):
    from paragen.sweep import packs

    dealt = packs.deal([1.0] * cells, packs.count_packs(cells, slots))
    assert [len(pack) for pack in dealt] == sizes
    assert sorted(place for pack in dealt for place in pack) == list(range(cells))


def test_packs_have_about_the_same_work_and_never_too_many_cells():
    from paragen.sweep import packs

    steps = [steps for steps in (800, 1087, 1650, 4816) for _ in range(5)]
    dealt = packs.deal(steps, 4)
    loads = [sum(steps[place] for place in pack) for pack in dealt]
    assert loads == sorted(loads, reverse=True) and loads[-1] > 0.75 * loads[0]
    assert all(steps[pack[-1]] == 4816 for pack in dealt), "each device trains cells of the long dataset"
    works = [100.0] + [1.0] * (2 * packs.MOST - 1)
    assert [len(pack) for pack in packs.deal(works, 2)] == [packs.MOST] * 2


def test_the_packs_of_a_thousand_devices_have_the_same_work():
    from paragen.sweep import packs

    works = [1.0 + number * 7919 % 1009 for number in range(20_000)]
    dealt = packs.deal(works, packs.count_packs(len(works), 1000))
    assert len(dealt) == 1000 and sorted(sum(dealt, [])) == list(range(20_000))
    loads = [sum(works[place] for place in pack) for pack in dealt]
    assert loads == sorted(loads, reverse=True) and loads[-1] > 0.98 * loads[0]
    left = sorted(sum(dealt[1:], []))
    again = packs.deal([works[place] for place in left], 999)
    assert [[left[place] for place in pack] for pack in again] == dealt[1:], "a sweep need not deal the others again"


class PretendedDevices:
    """In the place of `Workers`: slots on which every pack takes as long as its work."""

    def __init__(self, slots: int):
        self.slots, self.idle, self.packs = slots, list(range(slots)), []
        self.running: dict = {}

    def start_missing(self, waiting: int) -> bool:
        return False

    def give(self, pack: list, call) -> None:
        self.packs.append([job.cell for job in pack])
        self.idle.pop()


def given(project, monkeypatch, slots: int, lengths: tuple[int, ...], ranks: int) -> list[list]:
    """The packs that a sweep gives to so many devices at once, of datasets of which each has so many steps."""
    from paragen.recipes.run import Cell
    from paragen.sweep import jobs, packs
    from paragen.sweep.sweep import Sweep

    monkeypatch.setattr(jobs, "claim_runs", lambda job: True)
    cells = [
        Cell("Toy", str(steps), rank, (project.pretrain, project.finetune), (f"max_steps={steps}",))
        for steps in lengths
        for rank in range(1, 1 + ranks)
    ]
    workers = PretendedDevices(slots)
    sweep = Sweep(workers, cells, lambda *event: None, "abcd")
    sweep.start_jobs()
    assert sorted(map(str, (cell for pack in workers.packs for cell in pack))) == sorted(map(str, cells))
    assert not sweep.waiting
    shares = packs.expected_shares(sweep.works, slots)
    assert len(shares) == slots and max(shares) == 1
    return workers.packs


def test_a_sweep_spreads_the_cells_of_a_long_dataset_over_all_devices(project, monkeypatch):
    for pack in given(project, monkeypatch, 4, (800, 1087, 1650, 4816), 5):
        assert "4816" in {cell.model for cell in pack}
    assert sorted(map(len, given(project, monkeypatch, 3, (50,), 2))) == [1, 1]


def test_all_cells_of_a_large_sweep_have_an_attempt_of_their_own(project):
    """Packs and the files of other machines tell cells apart by it."""
    from paragen.recipes.run import Cell
    from paragen.sweep import jobs

    cell = Cell("Toy", "tiny", 4, (project.pretrain, project.finetune))
    attempts = {jobs.new_job(cell, None, "abcd").attempt for _ in range(20_000)}
    assert len(attempts) == 20_000 and {attempt[: jobs.SWEEP_DIGITS] for attempt in attempts} == {"abcd"}


def test_a_cell_that_was_busy_is_packed_when_it_is_free(project, monkeypatch):
    """Packs are dealt once; what could not be claimed is in a later one, and other slots mean other packs."""
    from paragen.recipes.run import Cell
    from paragen.sweep import jobs
    from paragen.sweep.sweep import Sweep

    cells = [Cell("Toy", "tiny", rank, (project.pretrain, project.finetune)) for rank in range(1, 13)]
    busy = {cells[0], cells[5]}
    monkeypatch.setattr(jobs, "claim_runs", lambda job: job.cell not in busy)
    workers = PretendedDevices(3)
    sweep = Sweep(workers, cells, lambda *event: None, "abcd")
    workers.idle = [0]
    sweep.start_jobs()
    workers.slots, workers.idle = 4, [1, 2, 3]
    sweep.start_jobs()
    assert sorted(job.cell.rank for job in sweep.waiting.values() if job.cell in busy) == [1, 6]
    busy.clear()
    while sweep.waiting:
        workers.idle = [0, 1, 2, 3]
        sweep.start_jobs()
    given = [cell for pack in workers.packs for cell in pack]
    assert len(given) == len(set(given)) == 12


def test_what_a_sweep_does_for_a_pack_does_not_grow_with_the_cells_that_wait(project, monkeypatch):
    from paragen.recipes.run import Cell
    from paragen.sweep import jobs, packs
    from paragen.sweep.sweep import Sweep

    looked_up = []

    class CountedCell(Cell):
        def __hash__(self) -> int:
            looked_up.append(self)
            return super().__hash__()

    monkeypatch.setattr(jobs, "claim_runs", lambda job: True)
    monkeypatch.setattr(packs, "pack_key", lambda cell: ("a base model",))
    cells = [CountedCell("Toy", "tiny", rank, (project.pretrain, project.finetune)) for rank in range(1, 201)]
    sweep = Sweep(PretendedDevices(100), cells, lambda *event: None, "abcd")
    looked_up.clear()
    sweep.start_jobs()
    assert not sweep.waiting and len(sweep.workers.packs) == 100
    assert len(looked_up) <= 5 * len(cells)


class PretendedNodes(PretendedDevices):
    """Two nodes with two devices each, on which a pack takes no time; the second node dies during its first packs."""

    def __init__(self):
        super().__init__(4)
        self.session = SimpleNamespace(is_dead=lambda: False)
        self.killed: list = []

    def give(self, pack: list, call) -> None:
        device = self.idle[-1]
        super().give(pack, call)
        self.running[device] = device, pack

    def wait(self) -> list:
        from paragen.sweep.workers import Ended

        if not self.killed:
            self.slots, self.killed = 2, [self.running.pop(device) for device in (2, 3)]
            return [Ended(pack, device, OSError("its node died"), "gpu-2") for device, pack in self.killed]
        device, pack = self.running.pop(next(iter(self.running)))
        self.idle.append(device)
        return [Ended(pack, device, [DONE] * len(pack))]

    def is_fault(self, error: Exception) -> bool:
        return False

    def is_stuck(self, waiting: int) -> bool:
        return False


def test_the_cells_of_a_killed_node_are_trained_on_the_devices_of_the_other_one(project, capsys):
    """Each of them once more, in smaller packs. A line for each names the machine."""
    from paragen.recipes.run import Cell
    from paragen.sweep.display import Display
    from paragen.sweep.sweep import Sweep

    cells = [
        Cell("Toy", "tiny", rank, (project.pretrain, project.finetune), (f"seed={seed}",))
        for rank in (2, 4, 8, 16)
        for seed in range(24)
    ]
    workers, events, display = PretendedNodes(), [], Display(len(cells))

    def report(event, job, outcome):
        events.append((event, job and job.attempt))
        display.report(event, job, outcome)

    sweep = Sweep(workers, cells, report, "abcd")
    while sweep.waiting or workers.running:
        sweep.step()
    lost = {job.cell for _, pack in workers.killed for job in pack}
    assert set(sweep.outcomes) == set(cells) and set(sweep.outcomes.values()) == {DONE} and len(lost) == 48
    assert [len(pack) for pack in workers.packs[:4]] == [24] * 4
    assert sum(map(len, workers.packs[4:])) == 48 and max(map(len, workers.packs[4:])) <= 12
    assert {cell for pack in workers.packs[4:] for cell in pack} == lost
    assert capsys.readouterr().out.count("failed: its worker died on gpu-2 (OSError)\n") == 48
    attempts = [attempt for event, attempt in events if event == "started"]
    assert len(set(attempts)) == len(attempts) == 96 + 48
    assert not list(project.saves.rglob("*.attempt")), "all claims are removed"


def test_a_killed_pack_is_halved_whatever_other_packs_had(project, monkeypatch):
    """Packs of equal work have very different sizes."""
    from paragen.recipes.run import Cell
    from paragen.sweep import jobs
    from paragen.sweep.sweep import Sweep
    from paragen.training.outcome import Outcome

    monkeypatch.setattr(jobs, "claim_runs", lambda job: True)
    cells = [
        Cell("Toy", "tiny", 4, (project.pretrain, project.finetune), (f"max_steps={steps}", f"seed={seed}"))
        for steps, count in ((4000, 6), (40, 40))
        for seed in range(count)
    ]
    workers = PretendedNodes()
    sweep = Sweep(workers, cells, lambda *event: None, "abcd")
    sweep.start_jobs()
    given = sorted((pack for _, pack in workers.running.values()), key=len)
    small = given[0]
    assert list(map(len, given)) == [2, 2, 21, 21]
    sweep.end_pack(small, [Outcome("killed", "by the kernel")] * len(small))
    again = sweep.deal_waiting(next(iter(sweep.waiting.values())))
    assert sum(map(len, again)) == len(small) and max(map(len, again)) == -(-len(small) // 2)


def test_the_work_of_a_cell_is_its_steps_times_their_tokens(project, monkeypatch):
    """Of the phases that are left."""
    from paragen.common import paths
    from paragen.recipes.run import Cell
    from paragen.sweep import estimate

    def cell(*overrides: str) -> Cell:
        return Cell("Toy", "tiny", 4, (project.pretrain, project.finetune), overrides)

    plain, longer, broken = cell(), cell("max_steps=80"), cell("dataset=Absent")
    works = estimate.works_of([plain, longer, broken])
    by_rows = {one: sum(map(estimate.rows_of, one.runs)) for one in (plain, longer)}
    assert works[longer] / works[plain] == pytest.approx(by_rows[longer] / by_rows[plain])
    assert works[broken] == (works[plain] + works[longer]) / 2
    cut = cell("cutoff_len=5")
    assert estimate.works_of([cut])[cut] == 5 * by_rows[plain]
    plain.pretrain.folder.mkdir(parents=True)
    (plain.pretrain.folder / paths.MANIFEST).write_text("{}")
    assert estimate.works_of([plain])[plain] < works[plain]
    monkeypatch.setenv("FORCE", "1")
    assert estimate.works_of([plain]) == {plain: works[plain]}


@pytest.mark.parametrize(
    "key",
    ["max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "cutoff_len",
     "max_samples", "save_total_limit", "lora_target"],
)  # fmt: skip
def test_a_recipe_with_a_null_is_estimated_as_without_the_key(project, key):
    """So that a sweep goes on, and its cell fails alone, if at all."""
    from paragen.recipes.run import Cell
    from paragen.sweep import estimate, plan

    def figures(null: str) -> tuple:
        copies = []
        for recipe in (project.pretrain, project.finetune):
            kept = [line for line in recipe.read_text().splitlines() if not line.startswith(f"{key}:")]
            copies.append(recipe.with_name(f"other_{recipe.name}"))
            copies[-1].write_text("\n".join([*kept, null, ""]))
        cell = Cell("Toy", "tiny", 4, tuple(copies))
        found = estimate.works_of([cell])[cell], [estimate.rows_of(run) for run in cell.runs], plan.steps_of(cell)
        return *found, plan.bytes_of(cell)

    assert figures(f"{key}: null") == figures("")


def test_the_share_of_the_time_with_work_is_counted_by_device(monkeypatch):
    """Also where a worker died, with or without its task's end, and another one took its place."""
    from paragen.sweep import workers

    clock = [0.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: clock[0])
    times = workers.WorkTimes()
    assert times.shares() == []
    for second, event, worker in (
        (10, times.begin, "a"),
        (10, times.begin, "b"),
        (14, times.keep, ["a"]),
        (16, times.begin, "c"),
        (18, times.end, "c"),
        (20, times.end, "a"),
    ):
        clock[0] = second
        event(worker)
    assert times.seconds == 10 and times.shares() == [1.0, 0.6]


def test_the_plan_states_how_many_cells_are_packed(repository):
    add_to_recipes(repository, "To-y", "tiny-two", "use_dora: true")
    command = [PYTHON, repository / "utils" / "plan.py"]

    def planned(**environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env={**os.environ, "RANKS": "2 4", **environment}, capture_output=True, text=True
        )

    def engine_line(**environment: str) -> str:
        return next(line for line in planned(**environment).stdout.splitlines() if line.startswith("engine: "))

    assert re.search(r"devices: \d+, expected to have work \d+ % .* of the time", planned().stdout)
    assert engine_line() == "engine: 6 cells packed, of 2 base models, 2 a cell at a time (use_dora is True)"
    assert engine_line(GPUS_PER_CELL="2").startswith("engine: 8 a cell at a time (it trains on one device")
    assert engine_line(ENGINE="stock").startswith("engine: the ordinary way")


def test_status_shows_a_packs_progress_and_ctrl_c_leaves_what_the_next_call_resumes(repository):
    """`make status` reads step and loss of each of its runs from that run's staging folder."""
    add_to_recipes(repository, "Other", "tiny-one", "max_steps: 4000")
    add_to_recipes(repository, "Other", "tiny-one", "logging_steps: 1")
    settings = {**os.environ, "DATASET": "Other", "MODEL": "tiny-one", "RANKS": "2 4"}
    run = subprocess.Popen(["make", "collect"], cwd=repository, env=settings, start_new_session=True)
    saves = repository / "saves" / CATEGORY
    logs: list[Path] = []
    while len(logs) < 2 or any(len(log.read_text().splitlines()) < 3 for log in logs):
        assert run.poll() is None
        time.sleep(0.05)
        logs = list(saves.glob("Other/.*staging*/trainer_log.jsonl"))
    shown = subprocess.run([PYTHON, repository / "utils" / "status.py"], env=settings, capture_output=True, text=True)
    lines = [line for line in shown.stdout.splitlines() if line.startswith("collecting: ")]
    assert len(lines) == 2 and all("pretrain step " in line and " of 4000, loss " in line for line in lines)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(60) != 0
    left = {path.name: path for path in saves.glob("Other/.*")}
    assert left.keys() == set(left_over(repository))
    assert all((path / interrupted.RECORD).is_file() for path in left.values())
