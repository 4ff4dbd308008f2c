"""The reference generator: from collections to adapters for a dataset that it has not seen, in a real small project."""

import importlib
import json
import shutil
import types
import unittest.mock
from pathlib import Path

import numpy
import pytest
import torch
from helpers import made_project
from helpers.made_project import MIXTURE, TASKS, generator, refused, run, start
from helpers.packed_project import MODEL, Packable
from safetensors.torch import load_file

import train_generator
from paragen.collection import discovery, index
from paragen.common import files, paths, settings
from paragen.common.cli import UserError
from paragen.generator import checkpoint_data, hashed_tensors, network, options, saved, second_stage, sources, train
from paragen.generator.factor_layout import FactorLayout
from paragen.packed.batches import Row

pytestmark = pytest.mark.runs

SEEN = TASKS[:2]
FEW = {"TRAIN_STEPS": 30, "BASE_STEPS": 5, "WIDTH": 16, "PROMPTS": 4}


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory) -> Packable:
    """Two collections of a few steps, and a generator of them. Read only."""
    project = made_project.make(tmp_path_factory.mktemp("generator") / "my project", model_folder, SEEN, steps=6)
    assert "35 of 35, loss" in run(project, "train_generator", **FEW)
    return project


def copied(project: Packable, top: Path) -> Packable:
    """The same project at another place."""
    shutil.copytree(project.top, top, symlinks=True)
    other = object.__new__(Packable)
    vars(other).update(vars(project), top=top, saves=top / project.saves.relative_to(project.top))
    return other


def test_a_generator_records_what_it_was_trained_on(trained):
    folder = generator(trained)
    held = {"config.json", "generator.safetensors", "manifest.json", "trainer_log.jsonl", "training_loss.png"}
    assert {path.name for path in folder.iterdir()} == held
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["datasets"] == sorted(SEEN) and manifest["families"] == sorted(SEEN)
    for pair in manifest["pairs"]:
        known = json.loads((trained.top / "saves" / pair["collection"] / "manifest.json").read_text())
        assert pair["manifest"] == known["sha256"] and pair["steps"] == [7, 8, 9, 10, 11, 12]


def saved_step(top: Path) -> int:
    """The step after which a training in a folder saved its state last; 0 before it has."""
    for path in top.glob(".*.staging-*/state.hashed"):
        tensors, about = hashed_tensors.read(path)
        return about["step"]
    return 0


def test_a_saved_state_with_a_flipped_bit_or_cut_short_is_not_used(tmp_path):
    path, tensors = tmp_path / "state", {"a": torch.arange(6.0)}
    hashed_tensors.write(path, tensors, {"step": 3})
    found, about = hashed_tensors.read(path)
    assert about == {"step": 3} and torch.equal(found["a"], tensors["a"])
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert hashed_tensors.read(path) is None
        path.write_bytes(content[:place])
        assert hashed_tensors.read(path) is None
    path.unlink()
    assert hashed_tensors.read(path) is None


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), FEW["TRAIN_STEPS"]])
def test_killed_in_either_stage_it_goes_on_and_ends_the_same_wherever_checkpoints_are_kept(trained, tmp_path, stage):
    project = copied(trained, tmp_path / "my project")
    folder, top = generator(project), generator(project).parent
    shutil.rmtree(folder)
    settings = {**FEW, "PLACE": "disk"}
    begun = start(project, "helpers.saving_generator", **settings)
    assert begun.kill_when(lambda: saved_step(top) > stage)
    assert not folder.exists()
    assert "continued after step" in run(project, "train_generator", **settings)
    assert files.hashes_below(folder) == files.hashes_below(generator(trained))
    assert list(top.iterdir()) == [folder]


@pytest.fixture
def call(monkeypatch):
    """Runs a script in this process, in a project: for calls that need no base model."""

    def call(project: Packable, script: str, **settings: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(paths, "SAVES", project.top / "saves")
            patch.setattr(paths, "DATA", project.top / "data")
            for name, value in {"DEVICES": "cpu", **settings}.items():
                patch.setenv(name, str(value))
            importlib.import_module(script).main()

    return call


def test_what_is_there_is_not_trained_again_and_not_replaced_for_its_name(trained, call, capsys):
    call(trained, "train_generator", **FEW)
    assert capsys.readouterr().out.strip().endswith("/Tiny_rank-4") and generator(trained).is_dir()
    with pytest.raises(UserError) as error:
        call(trained, "train_generator", **{**FEW, "TRAIN_STEPS": 20})
    line = "was trained with TRAIN_STEPS=30, not 20; take another NAME, or FORCE=1 replaces it"
    assert str(error.value).endswith(line)
    with pytest.raises(UserError, match="was trained with STEPS=all, not last; take another NAME"):
        call(trained, "train_generator", **FEW, STEPS="last", NAME=generator(trained).name)


def test_the_rate_of_a_second_stage_that_there_is_not_replaces_no_generator(trained):
    """An older generator records one; the default has changed since."""
    folder, manifest = generator(trained), json.loads((generator(trained) / "manifest.json").read_text())
    without = {**manifest["settings"], "base_steps": 0}

    def identity(given: dict) -> dict:
        return {**manifest, "settings": options.deciding(given)}

    with unittest.mock.patch.object(saved, "manifest_of", lambda _: {**manifest, "settings": without}):
        assert saved.is_there(folder, identity({**without, "base_learning_rate": 0.5}))
        with pytest.raises(UserError, match=r"was trained with WIDTH=16, not 8; take another OUT, or FORCE=1"):
            saved.is_there(folder, identity({**without, "width": 8}), "OUT")
    with pytest.raises(UserError, match="was trained with another base_learning_rate; take another NAME"):
        saved.is_there(folder, identity({**manifest["settings"], "base_learning_rate": 0.5}))


def test_it_writes_adapters_that_peft_loads_for_a_dataset_without_a_collection(trained, tmp_path, call, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    project = copied(trained, tmp_path / "my project")
    asked = {"GENERATOR": "tiny rank 4".replace(" ", "-"), "DATASET": MIXTURE, "SAMPLES": 2}
    run(project, "generate", **asked)
    folder = project.top / "saves" / "generated" / generator(project).name / MIXTURE
    assert {path.name for path in folder.iterdir()} == {"1", "2", "generated.json"}
    base = AutoModelForCausalLM.from_pretrained(project.top / "models" / MODEL)
    model = PeftModel.from_pretrained(base, folder / "1")
    weights = load_file(folder / "1" / "adapter_model.safetensors")
    held = {key.replace(".default", ""): value for key, value in model.state_dict().items() if "lora_" in key}
    assert held.keys() == weights.keys() and all(held[key].equal(value) for key, value in weights.items())
    record = json.loads((folder / "generated.json").read_text())
    known = json.loads((generator(project) / "manifest.json").read_text())
    assert record["generator"] == {"name": generator(project).name, "sha256": known["sha256"]}
    assert record["seen"] == sorted(SEEN) and not record["is_seen"]
    assert [len(rows) for rows in record["prompts"]["samples"]] == [4, 4]
    assert record["files"] == {
        f"{sample}/{name}": files.sha256_of(folder / sample / name)
        for sample in "12"
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert_derived(project)
    call(project, "generate", **asked)
    assert "there already: " in capsys.readouterr().out
    with pytest.raises(UserError, match="was generated with other prompts, seed; FORCE=1 replaces it"):
        call(project, "generate", **asked, SEED=1)


def test_prompts_are_rows_that_were_trained_on_where_a_collection_says_which(trained, tmp_path):
    project = copied(trained, tmp_path / "my project")
    run(project, "index")
    data = project.top / "data" / f"{SEEN[0]}.json"
    rows = json.loads(data.read_text())
    data.write_text(json.dumps(rows + rows))  # the others are for scoring
    run(project, "generate", GENERATOR="tiny-rank-4", DATASET=SEEN[0], SAMPLES=1, PROMPTS=1000, OUT=tmp_path / "my out")
    record = json.loads((tmp_path / "my out" / SEEN[0] / "generated.json").read_text())
    assert record["prompts"]["samples"] == [[*range(len(rows))]] and record["is_seen"]
    assert record["description"].startswith("You are given")


def assert_derived(project: Packable) -> None:
    """Generators and what they write are no collections, whoever looks for some."""
    saves = project.top / "saves"
    assert {path.parent.name for path in discovery.find_collections([saves])} == set(SEEN)
    assert {path.name for path in discovery.dataset_folders(saves)} == set(SEEN)
    assert set(index.update(saves)[0]["dataset"].to_pylist()) == set(SEEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "SAVES", saves)
        assert {"generators", "generated"} <= {*paths.DERIVED}
        assert [one.manifest.dataset for one in index.chosen()[0]] == sorted(SEEN)


def test_all_settings_together(trained, tmp_path):
    """Canonical factors, mixtures, answers, the base model's own loss, a dataset that is left out by name."""
    project = copied(trained, tmp_path / "my project")
    settings = {**FEW, "TRAIN_STEPS": 10, "BASE_STEPS": 3, "FORM": "canonical", "MIX": 1, "ANSWERS": 1, "STEPS": "last"}
    settings["PLACE"] = "pinned"
    run(project, "train_generator", **settings, NAME="all of them", WITHOUT=MIXTURE)
    folder = generator(project, "all of them")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [pair["steps"] for pair in manifest["pairs"]] == [[12], [12]]
    assert manifest["losses"].keys() == {"stage 1", "stage 2"}


class Reading:
    """A reader of random embeddings, whose base model can do nothing."""

    def __init__(self):
        config = types.SimpleNamespace(_attn_implementation="eager")
        self.model = types.SimpleNamespace(
            device=torch.device("cpu"), config=config, set_attn_implementation=lambda name: None
        )

    def of_task(self, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(8, 4), torch.zeros(0, 4)


def test_the_second_stage_has_the_memory_that_checkpoints_took_in_the_first(place, tmp_path, monkeypatch):
    for dataset in "AB":
        place.collect(dataset=dataset)
    wanted = options.Options(steps=2, base_steps=1, width=8, batch=2, prompts=2)
    training = train.Training(index.chosen()[0], tmp_path, wanted, "pinned", True, Reading())
    assert training.data.store is not None
    kept = []

    class Loss:
        tasks = ((0, 1),)

        def __init__(self, *_: object):
            kept.append(training.data.store)

        def loss(self, vectors: torch.Tensor, step: int) -> torch.Tensor:
            return vectors.square().mean()

        def close(self) -> None:
            pass

    monkeypatch.setattr(train, "BaseLoss", Loss)
    training.run()
    assert kept == [None] and training.data.mean.any() and "pinned" in training.speed()


def test_a_second_stage_without_memory_says_who_may_have_it(place, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    place.collect(dataset="A")
    chosen = index.chosen()[0]
    monkeypatch.setattr(second_stage.BaseLoss, "_prepare", full)
    monkeypatch.setattr(second_stage.BaseLoss, "_rows_of", lambda *_: [Row(*numpy.zeros((2, 3), numpy.int64))])
    with pytest.raises(
        UserError, match="does not fit into what other processes leave of the device's memory; set BASE"
    ):
        second_stage.BaseLoss(chosen, Reading(), FactorLayout(sources.layout_of(chosen[0])), 1, 0)


def test_the_second_stage_has_pefts_loss_and_gradient(trained):
    output = run(trained, "helpers.second_stage_gradient", GENERATOR=generator(trained).name)
    (line,) = [line for line in output.splitlines() if line.startswith("off: ")]
    off = json.loads(line.removeprefix("off: "))
    assert off["loss"] < 1e-5 and off["gradient"] < 1e-3, off
    assert "the model changes its logits (logits_scaling); set BASE_STEPS=0" in off["refused"]


def test_long_rows_are_fewer_in_a_step_of_the_second_stage():
    def lengths(*given: int) -> list[int]:
        rows = [Row(numpy.zeros(length, numpy.int64), numpy.zeros(length, numpy.int64)) for length in given]
        return [len(row.tokens) for row in second_stage.fitting(rows)]

    assert lengths(*[60] * 8) == [60] * 8
    assert lengths(300, 300, 300) == [300, 300] and lengths(2000, 1) == [2000]


@pytest.fixture(scope="module")
def learnt(model_folder, tmp_path_factory) -> Packable:
    """Four made tasks and a mixture of two, learnt for 100 steps, and a generator that has seen all but the mixture."""
    project = made_project.make(tmp_path_factory.mktemp("learnt") / "my project", model_folder)
    assert "has no statistics for IMPORTANCE=1; run make stats" in refused(
        project, "train_generator", WITHOUT=MIXTURE, IMPORTANCE=1
    )
    run(project, "stats")
    run(project, "train_generator", WITHOUT=MIXTURE, WIDTH=64, TRAIN_STEPS=400, BASE_STEPS=20, MIX=1, IMPORTANCE=1)
    return project


def scores_of(project: Packable, dataset: str, other: str) -> dict[str, float]:
    """The losses that helpers/generator_scores.py prints."""
    name = generator(project).name + f"_without-{MIXTURE}"
    output = run(project, "helpers.generator_scores", GENERATOR=name, DATASET=dataset, OTHER=other)
    (line,) = [line for line in output.splitlines() if line.startswith("scores: ")]
    return json.loads(line.removeprefix("scores: "))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_that_is_generated_for_a_seen_task_is_as_good_as_its_own(learnt, task):
    scores = scores_of(learnt, task, next(other for other in TASKS if other != task))
    assert scores["generated"] <= 1.1 * scores["own"]
    learnt_share = (scores["base"] - scores["generated"]) / (scores["base"] - scores["own"])
    assert learnt_share > 0.9 and scores["generated"] < scores["others"], scores


@pytest.mark.slow
def test_for_an_unseen_mixture_it_is_nearer_to_its_own_than_the_mean_and_needs_its_prompts(learnt):
    scores = scores_of(learnt, MIXTURE, TASKS[-1])
    assert abs(scores["generated"] - scores["own"]) < abs(scores["others"] - scores["own"]), scores
    assert scores["of another"] > scores["generated"], scores


def test_test_splits_and_unknown_names_are_refused(trained, call):
    with pytest.raises(UserError, match="holds rows to score on; name the dataset"):
        call(trained, "generate", GENERATOR="tiny-rank-4", DATASET=f"{MIXTURE}_test")
    with pytest.raises(UserError, match="generator 'no' is not known; known: Tiny_rank-4"):
        call(trained, "generate", GENERATOR="no", DATASET="x")


def test_an_edited_generator_is_refused(trained, tmp_path, call):
    project = copied(trained, tmp_path / "my project")
    config = generator(project) / "config.json"
    config.write_text(config.read_text().replace("smollm", "qwen") + " ")
    with pytest.raises(UserError, match="config.json: is gone, or not as manifest.json records it; train it again"):
        call(project, "generate", GENERATOR="tiny-rank-4", DATASET=MIXTURE)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"rank": 8}, "the rank: 4 and 8"),
        ({"seed": 7}, "the seed of the initial factors: 42 and 7"),
        ({"model": "Other"}, "the base model: Tiny"),
        ({"modules": ["model.layers.0.mlp.down_proj"]}, "the layers"),
        ({"config": {"lora_alpha": 4}}, "the start of the factors: lora_alpha=8 and lora_alpha=4"),
        ({"dtype": "bfloat16"}, "the dtype: F32 and BF16"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_collections_that_are_not_alike_are_refused_in_one_line(place, other, named):
    place.collect(dataset="A")
    place.collect(dataset="B", **other)
    with pytest.raises(UserError, match="a generator is trained on collections that are alike") as error:
        sources.check_alike(index.chosen()[0])
    assert named in str(error.value) and "\n" not in str(error.value)


def test_datasets_are_left_out_by_name_and_two_are_needed(place, monkeypatch):
    for dataset in ("A-1", "B", "C"):
        place.collect(dataset=dataset)
    left = sources.chosen(["a1"])
    assert [one.manifest.dataset for one in left] == ["B", "C"]
    named = {"a1": "Tiny_rank-4_without-A-1", "a1 b c": "Tiny_rank-4_without-A-1-B-C"}
    for typed, name in named.items():
        assert train_generator.name_of(left, typed.split(), options.Options()) == name
    assert train_generator.name_of(left, [], options.Options(seed=3)) == "Tiny_rank-4_seed-3"
    monkeypatch.setenv("NAME", "../up")
    with pytest.raises(UserError, match="NAME=../up: cannot be a folder's name"):
        train_generator.name_of(left, [], options.Options())
    with pytest.raises(UserError, match="at least 2 collections; selected: .*/C/"):
        sources.chosen(["A-1", "B"])
    with pytest.raises(UserError, match="dataset 'D' is not known"):
        sources.chosen(["D"])


def test_a_layout_keeps_every_value_and_an_untrained_network_gives_the_mean():
    import torch

    shapes = {
        f"m.layers.{n}.q.lora_{half}.weight": shape for n in (0, 1) for half, shape in (("A", (2, 3)), ("B", (5, 2)))
    }
    layout = FactorLayout(shapes)
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    back = layout.tensors_of(layout.vector_of(tensors))
    assert list(back) == list(tensors) and all(back[key].equal(value) for key, value in tensors.items())
    assert [len(kind.keys) for kind in layout.kinds] == [2, 2]
    outputs = network.Network(7, 8, layout.kinds)(torch.randn(3, 7))
    assert layout.join(outputs).shape == (3, layout.size) and not layout.join(outputs).any()


def test_what_is_pinned_has_room_also_where_pytorch_rounds_it_up():
    """17 GB are pinned as 32 GiB."""
    free = 40 * 10**9
    assert checkpoint_data.first_place(10 * 10**9, free, free) == "device"
    assert checkpoint_data.first_place(2**34, 0, free) == "pinned", "a power of two is pinned as it is"
    assert checkpoint_data.first_place(2**34 + 1, 0, free) == "disk"
    assert checkpoint_data.first_place(1, 0, 0) == "disk"


def test_a_value_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setenv("PROMPTS", "1000")
    with pytest.raises(UserError, match="PROMPTS=1000: a condition is the mean over at most 256"):
        options.Options.of_settings()


def test_no_second_stage_may_be_said_as_the_default_is_documented(monkeypatch):
    monkeypatch.setenv("BASE_STEPS", "0")
    monkeypatch.setenv("MAKE_SETTINGS", "BASE_STEPS")
    settings.check(["generator"])
    assert options.Options.of_settings() == options.Options()
