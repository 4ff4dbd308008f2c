"""A pretrain that was killed or stopped goes on from its last whole checkpoint, to the bytes of an undisturbed one."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers import copies

from paragen.collection import run_files
from paragen.training import interrupted

pytestmark = pytest.mark.runs

# 3 epochs of 12 steps; saves at steps that are not logged (7, 14, ...), before and after the end of an epoch.
LONG = ("max_steps=32", "save_steps=7", "lora_dropout=0.1", "disable_gradient_checkpointing=true")
GOES_ON = "resuming checkpoint-{} of an interrupted attempt"
STARTS_OVER = "an interrupted attempt left checkpoint-{}, but it starts over: "


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder):
    """A project in which such a pretrain is complete. Read only."""
    from conftest import Project

    project = Project(tmp_path_factory.mktemp("undisturbed") / "my project", model_folder)
    result = project.train(project.pretrain, *LONG)
    assert result.status == 0, result.output
    return project


def staging_of(project) -> Path:
    """The staging folder of the killed run; there is exactly one."""
    (found,) = project.saves.glob(".*staging-*")
    return found


def recorded(project) -> list[int]:
    """The steps of the checkpoints that the present run has recorded."""
    return [step for path in project.saves.glob(".*staging-*") for step in interrupted.recorded(path)]


def kill(project, step: int, number: int = signal.SIGKILL, *arguments: str) -> None:
    """Start the pretrain and end it once the checkpoint of a step is recorded."""
    run = project.start(project.pretrain, *(arguments or LONG))
    assert run.kill_when(lambda: step in recorded(project), number), run.log.read_text()


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory, model_folder):
    """A project whose pretrain was killed after its checkpoint of step 14. Read only."""
    from conftest import Project

    project = Project(tmp_path_factory.mktemp("killed") / "my project", model_folder)
    kill(project, 14)
    return project


@pytest.fixture
def killed(killed_once, tmp_path):
    return killed_once.copy(tmp_path / "my project")


def assert_equal(project, undisturbed) -> None:
    """Each file of each checkpoint has the bytes of an undisturbed run, and the log has the same losses."""
    ours, theirs = project.run_folder("pretrain"), undisturbed.run_folder("pretrain")
    names = {str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file()}
    assert {str(path.relative_to(ours)) for path in ours.rglob("*") if path.is_file()} == names
    for name in sorted(name for name in names if name.startswith("checkpoint-")):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    timeless = [
        [{key: value for key, value in json.loads(line).items() if not key.endswith("_time")} for line in log]
        for log in ((folder / run_files.LOG).read_text().splitlines() for folder in (ours, theirs))
    ]
    assert timeless[0] == timeless[1]
    entries = [json.loads((folder / "manifest.json").read_bytes())["checkpoints"] for folder in (ours, theirs)]
    assert entries[0] == entries[1]
    assert [path.name for path in project.saves.iterdir()] == [ours.name], "nothing is left behind"


def last_recorded(project) -> int:
    return max(recorded(project))


def test_a_killed_pretrain_goes_on_to_the_bytes_of_an_undisturbed_one(killed, undisturbed):
    last = last_recorded(killed)
    result = killed.train(killed.pretrain, *LONG)
    assert result.status == 0 and GOES_ON.format(last) in result.output, result.output
    assert_equal(killed, undisturbed)


def test_descriptions_added_meanwhile_change_nothing(killed):
    path = killed.top / "data" / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({name: {**entry, "descriptions": ["Say it."]} for name, entry in info.items()}))
    last = last_recorded(killed)
    result = killed.train(killed.pretrain, *LONG)
    assert result.status == 0 and GOES_ON.format(last) in result.output, result.output


def test_a_checkpoint_that_was_deleted_before_the_next_was_recorded_costs_nothing(killed):
    last = last_recorded(killed)
    shutil.rmtree(staging_of(killed) / "checkpoint-7")
    result = killed.train(killed.pretrain, *LONG)
    assert result.status == 0 and GOES_ON.format(last) in result.output, result.output


@pytest.mark.slow
def test_a_stopped_one_goes_on_too_also_after_a_failure_in_between(project, undisturbed):
    kill(project, 7, signal.SIGTERM)
    first = last_recorded(project)
    failed = project.train(project.pretrain, *LONG, DEVICES="cpu,cpu,cpu")
    assert failed.status == 1 and "cannot share a batch" in failed.output, failed.output
    kill(project, first + 7)
    last = last_recorded(project)
    assert last > first
    result = project.train(project.pretrain, *LONG)
    assert result.status == 0 and GOES_ON.format(last) in result.output, result.output
    assert_equal(project, undisturbed)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_that_is_not_as_it_was_recorded_is_trained_again(killed, undisturbed, name):
    staging, last = staging_of(killed), last_recorded(killed)
    cut(staging / f"checkpoint-{last}" / name)
    (staging / f"checkpoint-{last + 7}").mkdir()
    shutil.copy(staging / "checkpoint-7" / "adapter_model.safetensors", staging / f"checkpoint-{last + 7}")
    result = killed.train(killed.pretrain, *LONG)
    assert result.status == 0 and GOES_ON.format(last - 7) in result.output, result.output
    assert_equal(killed, undisturbed)


@pytest.mark.slow
def test_where_the_first_one_rotted_it_starts_over_and_says_so(killed, undisturbed):
    copies.flip_a_bit(staging_of(killed) / "checkpoint-7" / "adapter_model.safetensors")
    said = STARTS_OVER.format(last_recorded(killed)) + "no checkpoint before the last step is as it was recorded"
    result = killed.train(killed.pretrain, *LONG)
    assert result.status == 0 and said in result.output, result.output
    assert_equal(killed, undisturbed)


def change_base(project) -> None:
    with (project.top / "models" / "Tiny-Llama" / "config.json").open("a") as file:
        file.write(" ")


def change_tokenizer(project) -> None:
    with (project.top / "models" / "Tiny-Llama" / "tokenizer_config.json").open("a") as file:
        file.write(" ")


def change_rows(project) -> None:
    project.data.write_text(project.data.read_text().replace("is 3 even", "is 3 odd"))


def change_recipe(project) -> None:
    project.pretrain.write_text(project.pretrain.read_text().replace("5e-3", "4e-3"))


def change_log_interval(project) -> None:
    project.pretrain.write_text(project.pretrain.read_text().replace("logging_steps: 5", "logging_steps: 4"))


def break_record(project) -> None:
    path = staging_of(project) / interrupted.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), "circumstances": []}))


CHANGES = {
    "recipe": (change_recipe, {}, "learning_rate (0.005 -> 0.004)"),
    "rows": (change_rows, {}, "the rows of common-sense-reasoning/Toy.json"),
    "base": (change_base, {}, "the base model's files"),
    "tokenizer": (change_tokenizer, {}, "the tokenizer's files"),
    "log": (change_log_interval, {}, "logging_steps (5 -> 4)"),
    "record": (break_record, {}, "whole_checkpoints.json is broken"),
    "threads": (lambda project: None, {"OMP_NUM_THREADS": "2"}, "threads (1 -> 2)"),
    "devices": (lambda project: None, {"DEVICES": "cpu,cpu"}, "gradient_accumulation_steps (2 -> 1); devices"),
    "force": (lambda project: None, {"FORCE": "1"}, "FORCE=1"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_where_something_changed_nothing_is_used_and_the_reason_is_said(killed, monkeypatch, capsys, what):
    """`continuation` decides this before the training; the training from nothing is like any other."""
    from paragen.collection import run_identity
    from paragen.common import devices
    from paragen.recipes import batches
    from paragen.recipes.run import run_of
    from paragen.training import attempts, ordinary

    change, environment, reason = CHANGES[what]
    last = last_recorded(killed)
    change(killed)
    for name, value in {"DEVICES": "cpu", **environment}.items():
        monkeypatch.setenv(name, value)
    run = run_of(killed.pretrain, 4, LONG)
    with attempts.begin(run, run_identity.snapshot_of(run)) as attempt:
        assert attempt.staging == staging_of(killed)
        wanted = devices.choose()
        config = run.config | batches.share_batch(run.config, len(wanted), False, False)
        assert ordinary.continuation(attempt, config, wanted)["continued"] is None
        assert not list(attempt.staging.iterdir())
    assert STARTS_OVER.format(last) + reason in capsys.readouterr().out
    assert not list(killed.saves.iterdir())


@pytest.mark.slow
def test_the_packed_engine_starts_over_and_says_so(killed):
    """Its sums are taken in another order, and its dropout is another."""
    from helpers import fork_server

    last = last_recorded(killed)
    arguments = ["--cell", str(killed.pretrain), str(killed.finetune), "4", *LONG, "--phases", "pretrain"]
    result = fork_server.start("paragen.packed.packed_train", arguments, {}, killed.top / "log.txt").wait()
    assert STARTS_OVER.format(last) + "engine (stock -> packed)" in result.output, result.output


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_save_goes_on_from_the_one_before(project, undisturbed):
    kill(project, 32)
    assert not project.run_folder("pretrain").exists()
    result = project.train(project.pretrain, *LONG)
    assert result.status == 0, result.output
    assert_equal(project, undisturbed)


@pytest.mark.slow
def test_nothing_is_recorded_where_the_rows_may_have_changed_while_they_were_read(project):
    """Else the checkpoints of other rows would be gone on from once the file is put back."""
    run = project.start(project.pretrain, "max_steps=400", "save_steps=20")
    touched = []

    def touch_then_wait() -> bool:
        if not touched and list(project.saves.glob(".*staging-*")):
            touched.append(project.data.write_text(project.data.read_text() + " "))
        return any(project.saves.glob(".*staging-*/checkpoint-60/trainer_state.json"))

    assert run.kill_when(touch_then_wait), run.log.read_text()
    assert touched and not recorded(project)


@pytest.mark.slow
def test_deleted_checkpoints_of_save_total_limit_are_not_missed(project):
    limited = ("max_steps=32", "save_steps=4", "save_total_limit=2")
    kill(project, 16, signal.SIGKILL, *limited)
    last = last_recorded(project)
    result = project.train(project.pretrain, *limited)
    assert result.status == 0 and GOES_ON.format(last) in result.output, result.output
    manifest = json.loads((project.run_folder("pretrain") / "manifest.json").read_bytes())
    assert [entry["step"] for entry in manifest["checkpoints"]] == [28, 32]


@pytest.mark.slow
def test_two_processes_go_on_as_one(project, undisturbed, tmp_path):
    """Each has its own random numbers and its own part of the loss."""
    other = project.copy(tmp_path / "another project")
    assert other.train(other.pretrain, *LONG, DEVICES="cpu,cpu").status == 0
    run = project.start(project.pretrain, *LONG, DEVICES="cpu,cpu")
    assert run.kill_when(lambda: 14 in recorded(project)), run.log.read_text()
    last = last_recorded(project)
    result = project.train(project.pretrain, *LONG, DEVICES="cpu,cpu")
    assert result.status == 0 and GOES_ON.format(last) in result.output, result.output
    assert_equal(project, other)


@pytest.mark.parametrize("missing", sorted(interrupted.NEEDED))
def test_a_checkpoint_that_was_recorded_while_its_folder_was_removed_is_not_gone_on_from(tmp_path, missing):
    """A second signal can end the wait for the threads that write, before the folder is removed."""
    checkpoint, present = tmp_path / "checkpoint-4", interrupted.circumstances({"data": []}, {}, ["cpu"])
    checkpoint.mkdir()
    for name in interrupted.NEEDED:
        (checkpoint / name).write_text("whole")
    interrupted.add(tmp_path, present, 4)
    assert interrupted.whole_steps(tmp_path, present) == [4]
    (checkpoint / missing).unlink()
    interrupted.add(tmp_path, present, 4)
    assert interrupted.whole_steps(tmp_path, present) == []
