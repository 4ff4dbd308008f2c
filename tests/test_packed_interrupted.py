"""A pack of pretrains that was killed goes on from the last step that all have, to the bytes of an undisturbed one."""

import shutil
import signal
import threading
from pathlib import Path

import pytest
from helpers import copies, packed_project

from paragen.common import devices
from paragen.training import interrupted

pytestmark = pytest.mark.runs

# 5 epochs of 4 steps; saves at steps that are not logged, with dropout, whose masks go on, too.
LONG = {"max_steps": 33, "save_steps": 4, "lora_dropout": 0.1}
CELLS = {  # by rank; one is complete before the others, one saves half as often
    2: {**LONG, "max_steps": 18},
    4: LONG,
    8: {**LONG, "save_steps": 8, "learning_rate": 1e-3},
}
GOES_ON = "resuming checkpoint-{} of an interrupted attempt"
STARTS_OVER = "an interrupted attempt left checkpoint-{}, but it starts over: "


def cells_of(project: packed_project.Packable) -> list[packed_project.Cell]:
    return [project.cell(rank=rank, pretrain=keys) for rank, keys in CELLS.items()]


def train(project: packed_project.Packable, *cells: packed_project.Cell, **environment: str):
    return start(project, *cells, **environment).wait()


def start(project: packed_project.Packable, *cells: packed_project.Cell, **environment: str):
    arguments = [text for cell in cells for text in cell.arguments()] + ["--phases", "pretrain"]
    environment = {"ENGINE": "packed", **environment}
    return packed_project.fork_server.start(
        "paragen.packed.packed_train", arguments, environment, project.top / "packed.txt"
    )


def recorded(project: packed_project.Packable, rank: int) -> list[int]:
    """The steps of the checkpoints that a killed run left recorded."""
    folders = project.saves.glob(f"*/.*lora-rank_{rank}_pretrain.staging-*")
    return [step for folder in folders for step in interrupted.recorded(folder)]


def staging_of(project: packed_project.Packable, rank: int) -> Path:
    (found,) = project.saves.glob(f"*/.*lora-rank_{rank}_pretrain.staging-*")
    return found


def kill(project: packed_project.Packable, step: int, kind: int = signal.SIGKILL) -> None:
    """Train the cells, and end that once all have the checkpoint of a step, or that of their own last one."""
    run = start(project, *cells_of(project))
    assert run.kill_when(
        lambda: all(any(one >= min(step, keys["max_steps"]) for one in recorded(project, rank))
                    for rank, keys in CELLS.items()), kind
    ), run.log.read_text()  # fmt: skip


def new_project(top: Path, model: Path) -> packed_project.Packable:
    project = packed_project.Packable(top / "my project", model)
    cells_of(project)
    return project


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder) -> packed_project.Packable:
    """The pack, trained without a fault. Read only."""
    project = new_project(tmp_path_factory.mktemp("undisturbed"), model_folder)
    result = train(project, *cells_of(project))
    assert result.status == 0, result.output
    return project


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory, model_folder) -> packed_project.Packable:
    """The pack, killed after the third save. Read only."""
    project = new_project(tmp_path_factory.mktemp("killed"), model_folder)
    kill(project, 16)
    return project


@pytest.fixture
def killed(killed_once, tmp_path, model_folder) -> packed_project.Packable:
    project = new_project(tmp_path, model_folder)
    shutil.copytree(killed_once.top / "saves", project.top / "saves")
    return project


def common(project: packed_project.Packable) -> int:
    """The last step at which all have a whole checkpoint, or are complete."""
    steps = {rank: recorded(project, rank) for rank in CELLS}
    return max(
        step
        for step in steps[8]
        if step in steps[4] and (step in steps[2] or (18 in steps[2] and step > 18))
    )  # fmt: skip


def assert_equal(project: packed_project.Packable, undisturbed: packed_project.Packable, *ranks: int) -> None:
    """Each file of each checkpoint has the bytes of an undisturbed pack's, and the logs have the same losses."""
    for rank in ranks or CELLS:
        ours, theirs = (each.folder("pretrain", rank=rank) for each in (project, undisturbed))
        names = {str(path.relative_to(theirs)) for path in theirs.rglob("*") if path.is_file()}
        assert {str(path.relative_to(ours)) for path in ours.rglob("*") if path.is_file()} == names
        for name in sorted(name for name in names if name.startswith("checkpoint-")):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (rank, name)
        assert packed_project.log_of(ours) == packed_project.log_of(theirs)
        manifests = [packed_project.manifest_of(folder) for folder in (ours, theirs)]
        for key in ("checkpoints", "total_steps", "trained_rows"):
            assert manifests[0][key] == manifests[1][key]
    assert project.left_over() == [], "nothing is left behind"


def test_a_killed_pack_goes_on_to_the_bytes_of_an_undisturbed_one(killed, undisturbed):
    step = common(killed)
    assert step >= 16
    result = train(killed, *cells_of(killed))
    assert result.status == 0 and GOES_ON.format(step) in result.output, result.output
    assert f"33 steps, of which {step} are trained" in result.output
    assert_equal(killed, undisturbed)
    assert packed_project.manifest_of(killed.folder("pretrain"))["packed_with"] == len(CELLS)


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 24, 33])
def test_at_whatever_moment_it_was_killed(tmp_path, model_folder, undisturbed, step):
    """Before one of them is complete, after that, and where only files were left to write; twice."""
    project = new_project(tmp_path, model_folder)
    kill(project, step, signal.SIGTERM)
    last = max((one for rank in CELLS for one in recorded(project, rank)), default=0)  # complete runs have no record
    run = start(project, *cells_of(project))
    run.kill_when(lambda: any(one > last for rank in CELLS for one in recorded(project, rank)))
    result = train(project, *cells_of(project))
    assert result.status == 0, result.output
    assert_equal(project, undisturbed)


@pytest.mark.slow
def test_a_broken_checkpoint_of_one_sets_all_back_to_the_one_before(killed, undisturbed):
    step = common(killed)
    copies.flip_a_bit(staging_of(killed, 8) / f"checkpoint-{step}" / "optimizer.pt")
    result = train(killed, *cells_of(killed))
    assert result.status == 0 and result.output.count(GOES_ON.format(step - 8)) >= 2, result.output
    assert_equal(killed, undisturbed)


@pytest.mark.slow
def test_a_cell_that_is_new_starts_anew_beside_those_that_go_on(killed, undisturbed):
    new = killed.cell(rank=16, pretrain=LONG)
    result = train(killed, *cells_of(killed), new)
    assert result.status == 0, result.output
    assert "pretrain of 3 cells, packed, 33 steps, of which" in result.output
    assert "pretrain of 1 cells, packed, 33 steps\n" in result.output
    assert_equal(killed, undisturbed)


@pytest.mark.slow
def test_where_a_recipe_has_changed_that_cell_starts_over_and_says_why(killed):
    last = max(recorded(killed, 8))
    cells = [*cells_of(killed)[:2], killed.cell(rank=8, pretrain={**CELLS[8], "learning_rate": 2e-3})]
    result = train(killed, *cells)
    assert result.status == 0, result.output
    assert STARTS_OVER.format(last) + "learning_rate (0.001 -> 0.002)" in result.output, result.output
    assert "pretrain of 2 cells, packed, 33 steps, of which" in result.output


@pytest.mark.slow
def test_the_ordinary_engine_starts_over_and_says_so(killed):
    last = max(recorded(killed, 2))
    result = killed.ordinary(cells_of(killed)[0], "pretrain")
    assert result.status == 0, result.output
    assert STARTS_OVER.format(last) + "engine (packed -> stock)" in result.output, result.output


@pytest.mark.slow
def test_a_cell_that_diverges_leaves_nothing_to_go_on_from(tmp_path, model_folder):
    project = new_project(tmp_path, model_folder)
    bad = project.cell(rank=16, pretrain={**LONG, "learning_rate": 1e30, "lr_scheduler_type": "constant_with_warmup",
                                          "warmup_steps": 1})  # fmt: skip
    result = train(project, bad)
    assert result.status == 1 and "the training diverged: at step" in result.output, result.output
    assert project.left_over() == []


@pytest.mark.skipif(devices.cpu_cores() < 2, reason="completes one run at a time")
def test_a_complete_run_is_published_while_others_are_not(tmp_path, model_folder):
    """So that a kill costs less."""
    project = packed_project.Packable(tmp_path / "my project", model_folder)
    arguments = [text for rank in (2, 8) for text in project.cell(rank=rank).arguments()] + ["--phases", "pretrain"]
    environment = {"ENGINE": "packed", "LATE_FINISH": str(project.folder("pretrain", rank=8))}
    result = packed_project.fork_server.start(
        "helpers.late_finish", arguments, environment, project.top / "late.txt"
    ).wait()
    assert result.status == 0, result.output
    published = [line.split("rank_")[1][0] for line in result.output.splitlines() if line.startswith("done: ")]
    assert published == ["8", "2"]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([({4, 8}, False), ({4, 8, 12}, False)], 8),
        ([({4, 8}, True), ({4, 8, 12}, False)], 12),
        ([({5}, False), ({4, 8}, False)], None),
        ([({5}, True), ({4, 8}, False)], 8),
        ([({20}, True), ({20}, True)], 20),
        ([({18}, True), ({33}, True)], 33),
        ([], None),
    ],
)
def test_the_last_common_step_is_found(runs, expected):
    from paragen.packed.continuation import _Saved, common_done

    assert common_done([_Saved(*run) for run in runs]) == expected


def test_masks_of_an_earlier_version_are_not_gone_on_with(tmp_path, capsys):
    """Without dropout, and by the ordinary engine, an earlier version's checkpoints are gone on with."""
    identity = {"data": [], "recipe": {}, "base_model": {}, "tokenizer": {}, "pretrain": None}
    for engine, dropped, goes_on in (("packed", 0.1, False), ("packed", 0.0, True), ("stock", 0.1, True)):
        present = interrupted.circumstances(identity, {"lora_dropout": dropped}, ["cpu"], engine)
        checkpoint = tmp_path / "checkpoint-4"
        checkpoint.mkdir(exist_ok=True)
        for name in interrupted.NEEDED:
            (checkpoint / name).write_bytes(b"moments")
        earlier = {key: value for key, value in present.items() if key != "dropout_stream"}
        interrupted.record(tmp_path, earlier, {4: interrupted.hashes_of(checkpoint)})
        assert interrupted.whole_steps(tmp_path, present) == ([4] if goes_on else [])
        said = capsys.readouterr().out
        assert (STARTS_OVER.format(4) + "dropout_stream (None -> 2)" in said) == (not goes_on)


def test_checkpoints_are_recorded_in_order_whichever_is_written_first(tmp_path):
    from paragen.packed.continuation import CheckpointRecorder

    recorder = CheckpointRecorder(tmp_path, {"circumstances": {}, "stamps": {}})
    recorder.begin()
    may_end = threading.Event()
    writes = []
    for step, write in ((4, may_end.wait), (8, lambda: None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        writes.append(threading.Thread(target=recorder.writing(write, step, [])))
    for each in writes:
        each.start()
    writes[1].join(0.2)
    assert not interrupted.recorded(tmp_path)
    may_end.set()
    for each in writes:
        each.join()
    assert list(interrupted.recorded(tmp_path)) == [4, 8]


def test_after_a_failed_write_nothing_is_recorded(tmp_path):
    from paragen.packed.continuation import CheckpointRecorder

    recorder = CheckpointRecorder(tmp_path, {"circumstances": {}, "stamps": {}})
    recorder.begin()
    (tmp_path / "checkpoint-8").mkdir()
    with pytest.raises(FileNotFoundError):
        recorder.writing(lambda: None, 4, [])()
    recorder.writing(lambda: None, 8, [])()
    assert not interrupted.recorded(tmp_path)
