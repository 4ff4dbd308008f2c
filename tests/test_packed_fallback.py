"""Runs that cannot be packed are named and trained the ordinary way; ENGINE=packed refuses them."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import packed_project, tiny_models

pytestmark = pytest.mark.runs

UNSUPPORTED = {
    "use_dora": True, "val_size": 0.1, "packing": True, "report_to": "tensorboard",
    "group_by_length": True, "optim": "adafactor",
}  # fmt: skip
# Of the model table: with a processor, with Conv1D layers, with dropout.
MODELS = {
    "gemma-3-4b": "processor",
    "qwen2.5-vl-3b": "processor",
    "gpt2": "is not a linear layer with plain LoRA",
    "bert": "dropout",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("m")
    packed_project.make_models(folder, "smollm2-135m", *MODELS)
    return folder


@pytest.fixture
def project(tiny, tmp_path) -> packed_project.Packable:
    return packed_project.Packable(tmp_path / "my project", tiny / "smollm2-135m", "smollm2")


def refusal(project: packed_project.Packable, cell: packed_project.Cell, **environment: str) -> str:
    """The one error line with which ENGINE=packed refuses a cell; no file may be left."""
    before = {path for path in project.top.rglob("*") if ".hashes.json" not in path.name}
    result = project.packed(cell, **environment)
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.status == 1 and len(errors) == 1 and "Traceback" not in result.output, result.output
    after = {path for path in project.top.rglob("*") if path.is_file() and ".hashes.json" not in path.name}
    assert after - before <= {project.top / "packed.txt"}
    assert project.left_over() == []
    return errors[0]


@pytest.mark.slow
def test_with_engine_packed_an_unsupported_setting_is_one_error_line_and_leaves_no_files(project):
    for key, value in UNSUPPORTED.items():
        line = refusal(project, project.cell(pretrain={key: value}, finetune={key: value}))
        assert key in line and "not for the packed engine" in line and "omit ENGINE" in line
    line = refusal(project, project.cell(), DEVICES="cpu,cpu")
    assert "one device" in line
    assert "ENGINE is packed or stock" in refusal(project, project.cell(pretrain={"use_dora": True}), ENGINE="fast")


@pytest.mark.slow
def test_an_unsupported_run_is_named_and_trained_as_by_the_ordinary_path(project):
    """In one call with a cell that is packed."""
    odd = {2: {"optim": "adafactor"}, 4: {"use_dora": True}}
    cells = {rank: project.cell(rank=rank, pretrain=keys, finetune=keys) for rank, keys in odd.items()}
    before = {rank: collected_before(project, cell) for rank, cell in cells.items()}
    plain = project.cell(rank=16)
    result = project.packed(plain, *cells.values(), ENGINE="")
    assert result.status == 0, result.output
    for rank, keys in odd.items():
        (line,) = [line for line in result.output.splitlines() if "ordinary way" in line and f"rank {rank}:" in line]
        assert all(key in line for key in keys)
        assert packed_project.hashes(project.folder("finetune", rank=rank)) == before[rank]
        assert "engine" not in packed_project.manifest_of(project.folder("finetune", rank=rank))
    assert packed_project.manifest_of(project.folder("finetune", rank=16))["engine"] == "packed"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_be_packed_is_refused_with_engine_packed(tiny, tmp_path, name):
    project, cell = project_of(tiny, tmp_path, name)
    assert MODELS[name] in refusal(project, cell)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma-3-4b", "gpt2"])
def test_a_model_that_cannot_be_packed_is_trained_the_ordinary_way(tiny, tmp_path, name):
    """Also where only the loaded model shows it."""
    project, cell = project_of(tiny, tmp_path, name)
    before = collected_before(project, cell)
    result = project.packed(cell, ENGINE="")
    assert result.status == 0, result.output
    (line,) = [line for line in result.output.splitlines() if "it is trained the ordinary way" in line]
    assert MODELS[name] in line and packed_project.hashes(project.folder("finetune")) == before
    assert project.left_over() == []


def project_of(tiny: Path, tmp_path: Path, name: str) -> tuple[packed_project.Packable, packed_project.Cell]:
    known = tiny_models.NAMES[name]
    project = packed_project.Packable(tmp_path / "my project", tiny / name, known.template)
    target = {"lora_target": known.lora_target}
    return project, project.cell(pretrain=target, finetune=target)


def collected_before(project: packed_project.Packable, cell: packed_project.Cell) -> dict[int, str]:
    """The hashes of a cell's collection by the ordinary path, which is removed again; the pretrain stays."""
    project.collect_ordinary(cell)
    folder = project.folder("finetune", rank=cell.rank)
    made = packed_project.hashes(folder)
    shutil.rmtree(folder)
    return made


@pytest.mark.slow
def test_layers_that_are_not_linear_are_found_when_the_model_is_loaded(tiny, tmp_path):
    """GPT-2 without dropout has Conv1D layers, which hold transposed weights."""
    model = shutil.copytree(tiny / "gpt2", tmp_path / "gpt2")
    config = json.loads((model / "config.json").read_text())
    quiet = {key: 0.0 for key in config if key.endswith("_pdrop")}
    (model / "config.json").write_text(json.dumps({**config, **quiet, "summary_first_dropout": 0.0}))
    project = packed_project.Packable(tmp_path / "my project", model, "gpt2")
    target = {"lora_target": tiny_models.NAMES["gpt2"].lora_target}
    assert "is not a linear layer" in refusal(project, project.cell(pretrain=target, finetune=target))


@pytest.mark.slow
def test_rows_with_nothing_to_learn_are_left_to_the_ordinary_path(project):
    """Rows that cutoff_len cuts before the response."""
    assert "nothing to learn" in refusal(project, project.cell(pretrain={"cutoff_len": 5}, finetune={"cutoff_len": 5}))


@pytest.mark.slow
def test_an_adapted_output_layer_is_left_to_the_ordinary_path(project):
    """The output layer is applied to the learned tokens only, which packed layers do not support."""
    target = {"lora_target": "q_proj,lm_head"}
    assert "output layer" in refusal(project, project.cell(pretrain=target, finetune=target))


@pytest.mark.slow
def test_a_recipe_with_no_step_left_is_left_to_the_ordinary_path(project):
    """A resumed pretrain whose last step is the one it resumes from."""
    assert project.packed(project.cell()).status == 0
    run = project.folder("pretrain")
    elsewhere = "../../../saves/common-sense-reasoning/Toy/Again_lora-rank_4"
    again = project.cell(
        tag="again",
        pretrain={"resume_from_checkpoint": str(run / "checkpoint-20"), "output_dir": f"{elsewhere}_pretrain"},
        finetune={"output_dir": f"{elsewhere}_finetune"},
    )
    result = project.packed(again)
    assert result.status == 1 and "no step left" in result.output and "Traceback" not in result.output


@pytest.mark.slow
def test_data_loader_settings_do_not_prevent_packing(project):
    """The packed engine has no data loader processes to which they could apply."""
    loader = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4, "dataloader_persistent_workers": True}
    assert project.packed(project.cell(pretrain=loader)).status == 0


@pytest.mark.slow
def test_an_invalid_recipe_is_one_error_line_and_no_fallback(project):
    """A recipe that no engine can train is not trained the ordinary way."""
    for keys, message in (
        ({"template": "smollm9"}, "template 'smollm9' is not known"),
        ({"learning_rate": "fast"}, "fast"),
        ({"lora_target": "nonsense"}, "nonsense"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
    ):
        result = project.packed(project.cell(pretrain=keys, finetune=keys), ENGINE="")
        errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
        assert result.status == 1 and len(errors) == 1 and message in errors[0], result.output
        assert "Traceback" not in result.output and "ordinary way" not in result.output and project.left_over() == []
    wide = project.cell(finetune={"save_total_limit": 11})
    result = project.packed(wide, ENGINE="")
    assert result.status == 1 and "only 10 remain" in result.output and not project.folder("finetune").exists()
    assert project.folder("pretrain").is_dir()
