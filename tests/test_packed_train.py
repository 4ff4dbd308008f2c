"""The packed engine makes the adapters, losses and rates that LLaMA-Factory's own loop makes, on tiny models."""

import json
import shutil

import pytest
import torch
from helpers import fork_server, packed_project, tiny_models

WARM = {"warmup_steps": 4, "weight_decay": 0.01}
# By architecture: keys of both recipes, of the pretrain, of the finetune. Together they cover every kind of setting.
RECIPES = {
    "smollm2-135m": ({}, WARM, {}),
    "llama-7b": (
        {"lora_alpha": 3, "lr_scheduler_type": "linear", "adam_beta2": 0.95, "adam_epsilon": 1e-6},
        {"warmup_ratio": 0.2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ),
    "qwen2.5-0.5b": (
        {"lora_alpha": 16, "use_rslora": True, "lora_target": "q_proj,v_proj,down_proj", "data_seed": 7},
        {"max_steps": None, "num_train_epochs": 5, "logging_first_step": True},
        {},
    ),
    "mistral-7b": ({"max_grad_norm": 0.5, "seed": 3, "train_on_prompt": True}, WARM, {"max_grad_norm": 0.2}),
    "gemma-3-text": (
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}, "max_samples": 11},
        {**WARM, "max_grad_norm": 0},
        {"per_device_train_batch_size": 4, "disable_gradient_checkpointing": True},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The tiny models of RECIPES, by name."""
    folder = tmp_path_factory.mktemp("m")
    packed_project.make_models(folder, *RECIPES)
    return folder


def new_project(tiny, tmp_path, name: str) -> packed_project.Packable:
    known = tiny_models.NAMES.get(name) or tiny_models.KIN[name]
    return packed_project.Packable(tmp_path / "my project", tiny / name, known.template)


@pytest.fixture
def project(tiny, tmp_path) -> packed_project.Packable:
    return new_project(tiny, tmp_path, "smollm2-135m")


def assert_same_records(
    project: packed_project.Packable, ours, cell: packed_project.Cell, dataset: str = "Toy", seed: str = ""
) -> None:
    """Log and manifest of both phases agree between the packed run below `ours` and the ordinary one."""
    for phase in ("pretrain", "finetune"):
        theirs = project.folder(phase, dataset, cell.rank, seed)
        mine = ours / theirs.relative_to(project.saves)
        for line, other in zip(packed_project.log_of(mine), packed_project.log_of(theirs), strict=True):
            assert line == pytest.approx(other, rel=packed_project.BOUND, abs=1e-9)
        manifest, other = packed_project.manifest_of(mine), packed_project.manifest_of(theirs)
        assert manifest.pop("engine") == "packed" and manifest.pop("packed_with") >= 1
        for entry, known in zip(manifest.pop("checkpoints"), other.pop("checkpoints"), strict=True):
            logged, expected = (
                {key: value for key, value in each.items() if key not in ("bytes", "sha256") and value is not None}
                for each in (entry, known)
            )
            assert logged == pytest.approx(expected, rel=packed_project.BOUND, abs=1e-9)
        if phase == "finetune":
            assert manifest["pretrain"].pop("sha256") != other["pretrain"].pop("sha256")
        hashes, known = manifest.pop("files_sha256"), other.pop("files_sha256")
        assert hashes.keys() == known.keys()
        assert all(hashes[name] == known[name] for name in hashes if name.endswith(".json"))
        for unlike in ("attempt", "sha256"):
            manifest.pop(unlike), other.pop(unlike)
        assert manifest == other


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_architecture_gets_the_ordinary_paths_adapters(tiny, tmp_path, name):
    """20 pretrain steps and 10 collected ones, with a short last step in an epoch, resumed within another epoch."""
    project = new_project(tiny, tmp_path, name)
    both, pretrain, finetune = RECIPES[name]
    cell = project.cell(pretrain=both | pretrain, finetune=both | finetune)
    project.collect(cell)
    ours = project.set_aside("ours")
    project.collect_ordinary(cell)
    packed_project.assert_same_adapters(ours, project.saves)
    assert_same_records(project, ours, cell)
    steps = list(packed_project.hashes(project.folder("finetune")))
    assert steps == list(range(19, 29))
    if limit := both.get("max_grad_norm"):
        state = project.folder("pretrain") / "checkpoint-18" / "trainer_state.json"
        logged = json.loads(state.read_text())["log_history"]
        assert min(line["grad_norm"] for line in logged) > limit, "gradients are clipped"


@pytest.mark.slow
def test_a_packed_pretrain_checkpoint_equals_the_stock_trainers(project):
    """Optimizer, schedule and trainer state, beside the adapter."""
    cell = project.cell(pretrain=WARM)
    project.collect(cell)
    ours = project.set_aside("ours")
    project.collect_ordinary(cell)
    place = project.folder("pretrain").relative_to(project.saves) / "checkpoint-18"
    mine, theirs = ours / place, project.saves / place
    assert {path.name for path in mine.iterdir()} == {path.name for path in theirs.iterdir()}
    assert (mine / "adapter_config.json").read_bytes() == (theirs / "adapter_config.json").read_bytes()
    one, other = (torch.load(each / "optimizer.pt") for each in (mine, theirs))
    assert one["param_groups"] == other["param_groups"]
    for number, state in other["state"].items():
        assert one["state"][number]["step"] == state["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            assert (one["state"][number][key] - state[key]).norm() <= 3 * packed_project.BOUND * state[key].norm(), (
                number,
                key,
            )
    assert (mine / "optimizer.pt").stat().st_size <= 1.1 * (theirs / "optimizer.pt").stat().st_size
    assert torch.load(mine / "scheduler.pt") == torch.load(theirs / "scheduler.pt")
    one, other = (json.loads((each / "trainer_state.json").read_text()) for each in (mine, theirs))
    for key in ("global_step", "epoch", "max_steps", "num_train_epochs", "train_batch_size", "save_steps"):
        assert one[key] == other[key], key


SIX = {
    ("Toy", 2, ""): ({"learning_rate": 1e-3}, {}),
    ("Toy", 4, ""): ({}, {}),
    ("Toy", 8, "_seed-7"): ({"max_steps": 18}, {"max_steps": 31}),
    ("Longer", 16, ""): ({"learning_rate": 8e-3, "lr_scheduler_type": "linear"}, {}),
    ("Longer", 32, "_seed-7"): ({"max_steps": 27}, {"save_total_limit": 4}),
    ("Longer", 64, ""): ({"weight_decay": 0.1, "max_grad_norm": 0.3}, {"per_device_train_batch_size": 1}),
}


@pytest.mark.slow
def test_six_cells_in_a_pack_get_the_adapters_that_each_gets_alone(project):
    """Their ranks, datasets, seeds, learning rates and lengths differ."""
    project.data("Longer", 22)
    cells = {}
    for (dataset, rank, seed), (pretrain, finetune) in SIX.items():
        overrides = [f"seed={seed[6:]}"] if seed else []
        cells[dataset, rank, seed] = project.cell(dataset, rank, *overrides, pretrain=pretrain, finetune=finetune)
    project.collect(*cells.values())
    ours = project.set_aside("six")
    for (dataset, rank, seed), cell in cells.items():
        for phase in ("pretrain", "finetune"):
            folder = ours / project.folder(phase, dataset, rank, seed).relative_to(project.saves)
            assert packed_project.manifest_of(folder)["packed_with"] == 6
        project.collect(cell)
    packed_project.assert_same_adapters(ours, project.set_aside("alone"))
    project.collect_ordinary(*cells.values())
    packed_project.assert_same_adapters(ours, project.saves)
    for (dataset, _, seed), cell in cells.items():
        assert_same_records(project, ours, cell, dataset, seed)


@pytest.mark.slow
def test_a_pretrain_of_either_engine_is_resumed_by_the_other(project):
    cell = project.cell(pretrain=WARM)
    project.collect_ordinary(cell)
    theirs = project.set_aside("theirs")
    project.collect(cell)
    packed_folder = project.folder("finetune")
    packed_folder.rename(project.top / "kept")
    assert project.ordinary(cell, "finetune").status == 0
    assert "engine" not in packed_project.manifest_of(packed_folder)
    packed_project.assert_same_adapters(project.saves, theirs)
    project.set_aside("mixed")
    (project.top / "theirs").rename(project.top / "saves")
    ordinary = project.folder("finetune")
    ordinary.rename(project.top / "ordinary")
    before = packed_project.hashes(project.folder("pretrain"))
    project.collect(cell)
    assert packed_project.hashes(project.folder("pretrain")) == before, "a complete pretrain is skipped"
    assert packed_project.manifest_of(ordinary)["engine"] == "packed"
    packed_project.assert_same_adapters(ordinary, project.top / "ordinary")


@pytest.mark.slow
def test_packed_collections_verify_and_are_indexed_and_complete_ones_are_skipped(project):
    cells = [project.cell(rank=rank) for rank in (2, 4)]
    project.collect(*cells)
    for cell in cells:
        arguments = ["--recipe", str(cell.finetune), str(cell.rank)]
        checked = fork_server.start("verify", arguments, {}, project.top / "verify.txt").wait()
        assert checked.status == 0 and "whole" in checked.output, checked.output
    environment = {"SAVES_FOLDER": str(project.top / "saves")}
    listed = fork_server.start("index", [], environment, project.top / "index.txt").wait()
    assert listed.status == 0 and listed.output.count("Toy") >= 2, listed.output
    before = {path: path.stat().st_mtime_ns for path in project.saves.rglob("*") if path.is_file()}
    again = project.packed(*cells)
    assert again.status == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in project.saves.rglob("*") if path.is_file()} == before
    forced = {phase: packed_project.hashes(project.folder(phase)) for phase in ("pretrain", "finetune")}
    assert project.packed(*cells, FORCE="1").status == 0
    assert forced == {phase: packed_project.hashes(project.folder(phase)) for phase in forced}
    assert {path for path in project.saves.rglob("*") if path.is_file()} == before.keys()


@pytest.mark.slow
def test_a_collection_keeps_fewer_steps_on_request_and_needs_no_pretrain_folder(project):
    cell = project.cell()
    few = cell._replace(overrides=("save_total_limit=3",))
    project.collect(few)
    assert list(packed_project.hashes(project.folder("finetune"))) == [26, 27, 28]
    assert len(packed_project.hashes(project.folder("pretrain"))) == 3, "the override does not apply to the pretrain"
    shutil.rmtree(project.folder("pretrain"))
    before = packed_project.hashes(project.folder("finetune"))
    project.collect(few)
    assert packed_project.hashes(project.folder("finetune")) == before and not project.folder("pretrain").exists()
