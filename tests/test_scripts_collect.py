"""`make collect` of several ranks at once, and which engine trains them."""

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.runs

CATEGORY = "common-sense-reasoning"
CELL = ("DATASET=To-y", "MODEL=tiny-one")


def make(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", "collect", *CELL, *arguments], cwd=repository, capture_output=True, text=True)


def collections(repository: Path) -> dict[str, dict]:
    """The manifests of the collections, by run folder."""
    found = (repository / "saves" / CATEGORY / "To-y").glob("*_finetune/manifest.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def errors_in(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_ranks_are_trained_together_and_complete_ones_are_skipped(repository):
    done = make(repository, "RANKS=2 4", "SEED=3", "KEEP=2")
    assert done.returncode == 0, done.stdout + done.stderr
    found = collections(repository)
    assert sorted(found) == [f"Tiny-One_lora-rank_{rank}_seed-3_finetune" for rank in (2, 4)]
    for manifest in found.values():
        assert (manifest["engine"], manifest["packed_with"], manifest["seed"]) == ("packed", 2, 3)
        assert [entry["step"] for entry in manifest["checkpoints"]] == [11, 12]
    assert done.stdout.count("whole ") == 2
    again = make(repository, "RANKS=4 2", "SEED=3", "KEEP=2")
    assert again.returncode == 0 and again.stdout.count("complete: ") == 2
    assert "done: " not in again.stdout and "whole " not in again.stdout, "nothing was trained nor read"
    assert collections(repository) == found
    broken = repository / "saves" / CATEGORY / "To-y" / "Tiny-One_lora-rank_2_seed-3_finetune"
    (broken / "checkpoint-11.safetensors").unlink()
    mended = make(repository, "RANKS=4 2", "SEED=3", "KEEP=2")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "checkpoint-11.safetensors is missing; it is made again" in mended.stdout
    assert (mended.stdout.count("whole "), mended.stdout.count("complete: ")) == (1, 2), "the pretrain is complete too"
    found_again = collections(repository)
    assert {name: manifest["checkpoints"] for name, manifest in found_again.items()} == {
        name: manifest["checkpoints"] for name, manifest in found.items()
    }
    found = found_again
    status = subprocess.run(["make", "status"], cwd=repository, capture_output=True, text=True)
    assert "rank 2 seed=3  rank 4 seed=3" in status.stdout, "found although nobody named the seed"
    kept = subprocess.run(["make", "status", "KEEP=2"], cwd=repository, capture_output=True, text=True)
    assert "2 complete" in kept.stdout and "stale" not in kept.stdout, "the found cells have KEEP, too"
    notes = [folder / "notes.txt" for folder in broken.parent.glob("*_seed-3_*[ne]")]
    for path in notes:
        path.write_text(path.parent.name)
    forced = make(repository, "RANKS=4", "SEED=3", "KEEP=2", "FORCE=1")
    assert forced.returncode == 0, forced.stdout + forced.stderr
    assert len(notes) == 4 and all(path.read_text() == path.parent.name for path in notes)
    new = collections(repository)
    same = {name: new[name] == found[name] for name in found}
    assert same == {"Tiny-One_lora-rank_2_seed-3_finetune": True, "Tiny-One_lora-rank_4_seed-3_finetune": False}


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "packed"), [(["RANK=2"], False), (["RANK=2", "ENGINE=packed"], True)])
def test_one_rank_is_trained_the_ordinary_way_unless_engine_packed_is_set(repository, arguments, packed):
    done = make(repository, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = collections(repository)
    assert len(found) == 1
    assert {"engine" in manifest for manifest in found.values()} == {packed}
    assert done.stdout.count("whole ") == len(found)


@pytest.mark.parametrize("engine", ["packed", "stock"])
def test_a_rank_that_cannot_be_collected_does_not_stop_the_others_and_is_named_last(repository, engine):
    """The run folder of rank 2 holds something else."""
    in_the_way = repository / "saves" / CATEGORY / "To-y" / "Tiny-One_lora-rank_2_pretrain"
    in_the_way.mkdir(parents=True)
    (in_the_way / "note.txt").write_text("mine")
    done = make(repository, "RANKS=2 4", f"ENGINE={engine}")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "has no manifest.json" in errors_in(done)[0] and "Tiny-One_lora-rank_2_pretrain" in errors_in(done)[0]
    assert errors_in(done)[-1].startswith("error: To-y tiny-one rank 2: is not collected")
    assert list(collections(repository)) == ["Tiny-One_lora-rank_4_finetune"]
    assert done.stdout.count("whole ") == 1 and (in_the_way / "note.txt").read_text() == "mine"


def test_a_training_that_is_killed_ends_with_one_line_that_says_so(repository):
    """As the kernel kills a process where memory runs out."""
    staging = repository / "saves" / CATEGORY / "To-y"
    collect = subprocess.Popen(
        [os.environ["PY"], repository / "utils" / "collect.py"],
        env={**os.environ, "DATASET": "To-y", "MODEL": "tiny-one", "RANK": "2", "ENGINE": "stock"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not any(staging.glob(".*staging*")):
        assert collect.poll() is None
        time.sleep(0.01)
    script = str(repository / "utils" / "train.py")
    (training,) = [found for found in psutil.process_iter(["cmdline"]) if script in (found.info["cmdline"] or [])]
    training.kill()
    told = collect.communicate()[1]
    assert collect.returncode == 137, told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert (
        "tiny-one_To-y_pretrain.yaml at rank 2: the training was killed by SIGKILL" in line and "run it again" in line
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RANK=2", "RANKS=4 8"], "RANK=2 and RANKS=4 8: they mean the same; give one of them"),
        (["RANKS=4 x"], "rank 'x' is not a positive whole number"),
        (["RANKS=4 8", "ENGINE=nonsense"], "ENGINE=nonsense: is not known; ENGINE is packed or stock"),
        (["RANK=4", "ENGINE=fast"], "ENGINE=fast: is not known; ENGINE is packed or stock"),
        (["RANKS=4 8", "SEED=x"], "seed 'x' is not a whole number"),
    ],
)
def test_an_invalid_setting_is_one_error_line(repository, arguments, message):
    done = make(repository, *arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert len(errors_in(done)) == 1 and message in errors_in(done)[0]
    assert not (repository / "saves").exists()


def test_a_recipe_that_cannot_be_packed_is_refused_when_the_engine_is_forced(repository):
    for recipe in (repository / "collect_scripts" / CATEGORY / "To-y").glob("tiny-one_*.yaml"):
        recipe.write_text(recipe.read_text() + "use_dora: true\n")
    done = make(repository, "RANKS=2", "ENGINE=packed")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "at rank 2: not for the packed engine: use_dora is True; omit ENGINE" in errors_in(done)[0]
    assert collections(repository) == {}


def test_a_cause_that_all_ranks_share_is_printed_once(repository):
    for path in (repository / "models").glob("Tiny-One/*"):
        path.unlink()
    done = make(repository, "RANKS=2 4 8")
    assert done.returncode != 0 and len(errors_in(done)) == 1, done.stderr
    assert os.listdir(repository / "models" / "Tiny-One") == []
