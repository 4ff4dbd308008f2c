"""Faults in a pack: a broken cell, a killed process, a full disk, too little memory."""

import shutil

import pytest
from helpers import fork_server, packed_project

from paragen.common import files, locks

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path, model_folder) -> packed_project.Packable:
    return packed_project.Packable(tmp_path / "my project", model_folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder) -> packed_project.Packable:
    """Two cells that were packed without a fault. Read only."""
    project = packed_project.Packable(tmp_path_factory.mktemp("u") / "my project", model_folder)
    project.collect(*two(project))
    return project


def two(project: packed_project.Packable) -> list[packed_project.Cell]:
    return [project.cell(rank=2), project.cell(rank=8, pretrain={"learning_rate": 1e-3})]


def all_hashes(project: packed_project.Packable) -> dict[str, dict[int, str]]:
    """The hashes of all runs, by run folder."""
    return {path.parent.name: packed_project.hashes(path.parent) for path in project.saves.glob("*/*/manifest.json")}


def errors_of(result: fork_server.Result) -> list[str]:
    assert "Traceback" not in result.output, result.output
    return [line for line in result.output.splitlines() if line.startswith("error: ")]


def break_data(project: packed_project.Packable) -> None:
    (project.top / "data" / "Bad.json").write_text('[{"prompt": ')


def lose_data(project: packed_project.Packable) -> None:
    (project.top / "data" / "Bad.json").unlink()


def lose_model(project: packed_project.Packable) -> None:
    for recipe in project.top.glob("collect_scripts/*/Bad/*.yaml"):
        recipe.write_text(recipe.read_text().replace("models/Tiny", "models/Absent"))


def break_recipe(project: packed_project.Packable) -> None:
    for recipe in project.top.glob("collect_scripts/*/Bad/*.yaml"):
        recipe.write_text(recipe.read_text().replace("learning_rate: 0.004", "learning_rate: fast"))


def diverge(project: packed_project.Packable) -> None:
    for recipe in project.top.glob("collect_scripts/*/Bad/*.yaml"):
        recipe.write_text(recipe.read_text().replace("0.004", "1.0e+30").replace("cosine", "constant"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_data, "Bad.json"),
        (lose_data, "Bad.json"),
        (lose_model, "Absent"),
        (break_recipe, "fast"),
        (diverge, "tiny_Bad_rank-4_pretrain.yaml at rank 4: the training diverged: at step 2 its loss"),
    ],
)
def test_a_broken_cell_fails_alone(project, undisturbed, damage, message):
    cells = two(project)
    bad = project.cell("Bad")
    damage(project)
    result = project.packed(cells[0], bad, cells[1])
    (line,) = errors_of(result)
    assert result.status == 1 and message in line
    packed_project.assert_same_adapters(project.saves, undisturbed.saves)
    assert not project.folder("pretrain", "Bad").exists() and project.left_over() == []


POINTS = {
    "the pretrain begins": "*/.Tiny_lora-rank_8_pretrain.staging*",
    "a pretrain saves": "*/.*pretrain.staging*/checkpoint-9/optimizer.pt",
    "the pretrains are complete": "*/*_lora-rank_8_pretrain/manifest.json",
    "the collection begins": "*/.Tiny_lora-rank_8_finetune.staging*",
    "a checkpoint is written": "*/.*finetune.staging*/checkpoint-19.safetensors",
    "the last checkpoint": "*/.*finetune.staging*/checkpoint-28.safetensors",
    "the collected are listed": "*/.*finetune.staging*/collected.json",
    "one collection is whole": "*/Tiny_lora-rank_2_finetune/manifest.json",
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_moment_the_next_start_ends_with_the_same_collections(project, undisturbed, point):
    cells = two(project)
    run = project.start(*cells)
    assert run.kill_when(lambda: any(project.saves.glob(POINTS[point]))), run.log.read_text()
    expected = all_hashes(undisturbed)
    for manifest in project.saves.glob("*/[!.]*/manifest.json"):
        assert packed_project.hashes(manifest.parent) == expected[manifest.parent.name], "published, so complete"
    project.collect(*cells)
    assert all_hashes(project) == expected and project.left_over() == []


def test_a_stopped_pack_leaves_no_files(project):
    run = project.start(project.cell(pretrain={"max_steps": 3000, "save_steps": 3000}))
    assert run.kill_when(lambda: any(project.saves.glob("*/.*staging*/trainer_log.jsonl")), 15)
    assert run.process.exitcode == 143 and "Traceback" not in run.log.read_text(), run.log.read_text()
    assert not any(project.saves.glob("*/*")) and project.left_over() == []


def test_a_run_that_another_process_trains_is_named_and_the_others_are_completed(project):
    cells = two(project)
    folder = project.folder("pretrain", rank=2)
    with locks.lock(files.beside(folder, "lock")):
        result = project.packed(*cells)
    (line,) = errors_of(result)
    assert result.status == 1 and "rank 2 is running already" in line
    assert project.folder("finetune", rank=8).is_dir() and not folder.exists()


def test_a_cell_fails_alone_when_its_data_changes_during_the_training(project):
    long = {"max_steps": 400, "save_steps": 400}
    resumed = {"max_steps": 403, "save_total_limit": 3}
    cells = [project.cell(name, pretrain=long, finetune=resumed, resumed=400) for name in ("Toy", "Other")]
    run = project.start(*cells)
    while not list(project.saves.glob("*/.*staging*/trainer_log.jsonl")):
        assert run.process.is_alive(), run.log.read_text()
    data = project.top / "data" / "Other.json"
    data.write_text(data.read_text().replace("yes", "no"))
    (line,) = errors_of(run.wait())
    assert "changed while it was trained on" in line
    assert project.folder("finetune").is_dir() and not project.folder("pretrain", "Other").exists()


def test_a_full_disk_is_one_error_line_and_leaves_no_run(project):
    """A file-size limit stands in for the disk, below an adapter of rank 64."""
    cell = project.cell(rank=64)
    result = project.packed(cell, FILE_SIZE_LIMIT="200000")
    assert result.status == 1 and "File too large" in errors_of(result)[0], result.output
    assert project.ordinary(cell, "pretrain").status == 0
    result = project.packed(cell, FILE_SIZE_LIMIT="200000")
    assert result.status == 1 and "File too large" in errors_of(result)[0], result.output
    assert not project.folder("finetune", rank=64).exists() and project.left_over() == []


def with_low_memory(
    project: packed_project.Packable, cells: list[packed_project.Cell], how: str, **environment: str
) -> fork_server.Result:
    arguments = [text for cell in cells for text in cell.arguments()]
    environment = {"ENGINE": "packed", "LOW_MEMORY": how, **environment}
    return fork_server.start("helpers.low_memory", arguments, environment, project.top / "low_memory.txt").wait()


@pytest.mark.parametrize("how", ["room:2", "prepare:1"])
def test_packs_are_smaller_where_memory_is_low(project, how):
    """Found by the measurement before, or by the device when a pack is prepared."""
    cells = [project.cell(rank=rank) for rank in (2, 4, 8)]
    project.collect(*cells)
    together = project.set_aside("together")
    result = with_low_memory(project, cells, how)
    assert result.status == 0, result.output
    sizes = [packed_project.manifest_of(project.folder("finetune", rank=rank))["packed_with"] for rank in (2, 4, 8)]
    assert max(sizes) <= int(how[-1]) and sizes[:2] == [int(how[-1])] * 2, sizes
    packed_project.assert_same_adapters(project.saves, together)
    assert project.left_over() == []


def test_a_cell_that_does_not_fit_even_alone_is_trained_the_ordinary_way(project):
    cell = project.cell()
    result = with_low_memory(project, [cell], "prepare:0")
    assert result.status == 1 and "does not fit into memory" in errors_of(result)[0], result.output
    assert not any(project.saves.glob("*/[!.]*")) and project.left_over() == []
    project.collect_ordinary(cell)
    shutil.rmtree(project.folder("finetune"))
    result = with_low_memory(project, [cell], "prepare:0", ENGINE="")
    assert result.status == 0 and result.output.count("does not fit into memory") == 1, result.output
    assert "engine" not in packed_project.manifest_of(project.folder("finetune"))
