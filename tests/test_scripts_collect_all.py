"""collect_all.py on a category of two tiny models and two datasets at two ranks."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.forked_python import PLAIN

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
CATEGORY = "common-sense-reasoning"


def collect_all(repository: Path, *datasets: str, slots: int = 0, **environment: str) -> subprocess.Popen:
    """Start the script of a category; with `slots` on as many cores, so that as many workers import LLaMA-Factory."""
    cores = ["taskset", "--cpu-list", ",".join(map(str, sorted(os.sched_getaffinity(0))[:slots]))] if slots else []
    environment = {**os.environ, "DEVICES": "cpu", "PY": PLAIN, **environment}
    return subprocess.Popen(
        [*cores, "bash", "collect_all_dataset.sh", *datasets],
        cwd=repository / "collect_scripts" / CATEGORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def collections(repository: Path) -> list[str]:
    return sorted(path.parent.name for path in repository.glob(f"saves/{CATEGORY}/*/*_finetune/manifest.json"))


def status(repository: Path, **environment: str) -> str:
    environment = {**os.environ, "RANKS": "2 4", **environment}
    done = subprocess.run(["make", "status"], cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.alone
@pytest.mark.slow
def test_a_category_that_was_killed_twice_is_completed_by_the_third_call(repository):
    """All its processes are killed, as when a machine goes down."""
    for delay in (random.uniform(8, 30), random.uniform(8, 30)):
        run = collect_all(repository, RANKS="2 4")
        time.sleep(delay)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        subprocess.run(["pkill", "-KILL", "-f", f"{repository}/utils/"])
    last = collect_all(repository, RANKS="2 4")
    output = last.communicate()[0]
    assert last.returncode == 0, output
    assert len(collections(repository)) == 8
    assert "8 cells: 8 complete" in status(repository)
    again = collect_all(repository, RANKS="2 4")
    output = again.communicate()[0]
    assert again.returncode == 0 and "8 complete" in output and "to do" not in output
    left = [path.name for path in repository.glob(f"saves/{CATEGORY}/*/.*")]
    assert left == [], "no staging folder or lock of a killed attempt is left"


def test_a_failed_cell_does_not_stop_the_others_and_the_exit_status_is_1(repository):
    """Also: short names select, and PRUNE_PRETRAIN=1 removes the pretrain."""
    broken = repository / "collect_scripts" / CATEGORY / "To-y" / "tiny-one_To-y_finetune.yaml"
    broken.write_text(broken.read_text() + "lora_rang: 3\n")
    settings = {"RANKS": "4", "MODELS": "tinyone tiny-two", "PRUNE_PRETRAIN": "1"}
    run = collect_all(repository, "toy", slots=1, **settings)
    output = run.communicate()[0]
    assert run.returncode == 1 and "Traceback" not in output, output
    table = output.splitlines()[-3:]
    assert table[0].split() == ["dataset", "model", "rank", "outcome"]
    assert "failed: " in table[1] and "lora_rang" in table[1] and ".log" in table[1]
    assert table[2].split()[-1] == "collected"
    assert [path.name for path in repository.glob(f"saves/{CATEGORY}/*/Tiny-Two_*")] == [
        "Tiny-Two_lora-rank_4_finetune",
        "Tiny-Two_lora-rank_4_finetune.log",
    ]
    table = [line.split() for line in status(repository, DATASET="To-y").splitlines()]
    assert table[:3] == [
        ["dataset", "model", "rank", "4"],
        ["To-y", "tiny-one", "pretrained"],
        ["To-y", "tiny-two", "complete"],
    ]


@pytest.mark.slow
def test_ctrl_c_stops_all_processes(repository):
    run = collect_all(repository, RANKS="4")
    saves = repository / "saves" / CATEGORY
    while not list(saves.glob("*/.*staging*")):
        assert run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(30) == 130
    assert not list(saves.glob("*/.*staging*"))
    assert "collecting" not in status(repository)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["Nothing"], {}, "dataset 'Nothing' is not known; known: Other, To-y"),
        ([], {"MODELS": "gpt9"}, "model 'gpt9' is not known; known: tiny-one, tiny-two"),
        ([], {"RANKS": "4 x"}, "rank 'x' is not a positive whole number"),
    ],
)
def test_an_unknown_name_lists_the_known_ones_and_starts_nothing(repository, arguments, environment, message):
    run = collect_all(repository, *arguments, **environment)
    output = run.communicate()[0]
    assert run.returncode == 1 and message in output and "Traceback" not in output
    assert not (repository / "saves").exists()


@pytest.mark.parametrize(("arguments", "chosen"), [([], "ARC-c"), (["OBQA", "My set"], "OBQA Myset")])
def test_a_categorys_script_takes_datasets_from_its_arguments_else_from_the_environment(monkeypatch, arguments, chosen):
    import collect_all as script

    class Chosen(Exception):
        pass

    def chosen_cells():
        raise Chosen(os.environ["CATEGORY"], os.environ["DATASET"])

    monkeypatch.setattr(script.lookup, "chosen_cells", chosen_cells)
    monkeypatch.setattr(script.sys, "argv", ["collect_all.py", CATEGORY, *arguments])
    monkeypatch.setenv("CATEGORY", "")
    monkeypatch.setenv("DATASET", "ARC-c")
    with pytest.raises(Chosen) as found:
        script.main()
    assert found.value.args == (CATEGORY, chosen)
