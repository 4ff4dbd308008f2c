"""`make evaluate GENERATED=folder`: adapters that are no collections, of our generators and of other people's."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Project
from helpers import fork_server
from test_scoring_evaluate import choices, evaluate, evaluations, register, scores_of

from paragen.collection import adapter_folders
from paragen.collection.manifest import require_manifest
from paragen.common import files
from paragen.common.cli import UserError
from paragen.scoring import generated

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def written_once(trained_once, tmp_path_factory) -> Project:
    """A scored collection, and two of its checkpoints as another generator's adapters for its dataset. Read only."""
    project = trained_once.copy(tmp_path_factory.mktemp("written") / "my project")
    shutil.copy(ROOT / "models" / "models.yaml", project.top / "models")
    register(project, "Toy_test", choices())
    for sample, step in (("1", 12), ("2", 8)):
        put(project, "Toy", sample, step)
    return project


@pytest.fixture
def written(written_once, tmp_path) -> Project:
    return written_once.copy(tmp_path / "my project")


def put(project: Project, dataset: str, sample: str, step: int) -> Path:
    """Write a checkpoint as a PEFT folder, <dataset>/<sample>/."""
    run, folder = project.run_folder("finetune"), project.top / "of others" / dataset / sample
    folder.mkdir(parents=True)
    shutil.copy(run / f"checkpoint-{step}.safetensors", folder / "adapter_model.safetensors")
    shutil.copy(run / "adapter_config.json", folder)
    return folder


def score(project: Project, **environment: str) -> fork_server.Result:
    return evaluate(project, GENERATED=str(project.top / "of others"), **environment)


def content(project: Project, dataset: str = "Toy") -> dict:
    return json.loads((project.top / "of others" / dataset / "scores.json").read_text())


def record(project: Project, dataset: str, /, **changes) -> Path:
    """Write a generated.json beside a dataset's samples, as our generator does."""
    folder = project.top / "of others" / dataset
    base = require_manifest(project.run_folder("finetune")).base_model
    names = ("adapter_model.safetensors", "adapter_config.json")
    known = {
        "format": adapter_folders.FORMAT, "generator": {"name": "mine", "sha256": "0"}, "rank": 4, "dataset": dataset,
        "base_model": {"name": base.name, "sha256": base.sha256}, "seen": ["Toy"], "is_seen": dataset == "Toy",
        "files": {
            f"{each.name}/{name}": files.sha256_of(each / name)
            for each in sorted(folder.iterdir()) if each.is_dir() for name in names
        },
        **changes,
    }  # fmt: skip
    files.write_json(folder / "generated.json", {**known, "sha256": files.sha256_of_value(known)})
    return folder / "generated.json"


def test_adapters_get_the_scores_that_checkpoints_get(written):
    assert evaluate(written, STEPS="all").status == 0
    result = score(written)
    assert result.status == 0, result.output
    (theirs,), (ours,) = content(written)["evaluations"], evaluations(written)
    assert (theirs["split"], theirs["rows"], theirs["metric"]) == ("Toy_test", 12, "choice")
    assert [one["sample"] for one in theirs["samples"]] == ["1", "2"]
    expected = scores_of(ours)
    for one, step in zip([theirs["base"], *theirs["samples"]], (0, 12, 8), strict=True):
        assert one["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)
        assert one["score"] == expected[step]["score"] and one["interval"] == expected[step]["interval"]
    assert content(written)["training"] == "training tasks unknown" and content(written)["training_tasks"] is None
    assert "training tasks unknown" in result.output

    before = (written.top / "of others" / "Toy" / "scores.json").read_bytes()
    again = score(written, DATASET="toy")
    assert again.status == 0 and "scored already" in again.output
    shutil.copy(written.run_folder("finetune") / "checkpoint-9.safetensors",
                written.top / "of others" / "Toy" / "2" / "adapter_model.safetensors")  # fmt: skip
    stale = score(written)
    assert stale.status and "scores are stale, changed since: the adapters; FORCE=1 scores again" in stale.output
    assert (written.top / "of others" / "Toy" / "scores.json").read_bytes() == before
    assert score(written, FORCE="1").status == 0
    (theirs,) = content(written)["evaluations"]
    assert theirs["samples"][1]["loss"] == pytest.approx(expected[9]["loss"], rel=1e-5)


def test_a_dataset_that_was_never_collected_is_scored_with_what_its_generator_saw(written):
    rows = [{"prompt": f"is {n} odd?", "response": f"[{'BA'[n % 2]}]", "system": "answer"} for n in range(40)]
    register(written, "New", rows, held_out=10)
    put(written, "New", "1", 12)
    record(written, "New")
    result = score(written, DATASET="New", LIMIT="4")
    assert result.status == 0, result.output
    known = content(written, "New")
    (one,) = known["evaluations"]
    assert (one["split"], one["rows"], one["limit"]) == ("New[30:40]", 4, 4)
    assert (known["training"], known["training_tasks"]) == ("unseen", ["Toy"])
    assert known["generator"]["name"] == "mine" and "unseen" in result.output
    assert not (written.top / "of others" / "Toy" / "scores.json").exists(), "DATASET named the other alone"


def tensors_with(project: Project, change) -> None:
    """Rewrite a sample's tensors."""
    from safetensors.torch import load_file, save_file

    path = project.top / "of others" / "Toy" / "2" / "adapter_model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path)


def config_with(project: Project, **changes) -> None:
    path = project.top / "of others" / "Toy" / "2" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: config_with(p, megatron_core="os"), "adapter_config.json: megatron_core is 'os'"),
        (lambda p: config_with(p, r=8), "2/adapter_config.json: r is 8, that of 1 is 4"),
        (lambda p: config_with(p, alpha_pattern={"q_proj": 2}), "alpha_pattern is {'q_proj': 2}, that of 1 is {}"),
        (lambda p: config_with(p, use_dora=True), "2/adapter_config.json: use_dora is True, that of 1 is False"),
        (lambda p: tensors_with(p, lambda found: found.pop(FIRST)), "has only one of lora_A and lora_B"),
        (lambda p: tensors_with(p, lambda found: found.update(x=found[FIRST] + 1)), "x: is no LoRA factor"),
        (lambda p: tensors_with(p, lambda found: found.update({FIRST: found[FIRST][:2].clone()})), "has rank 2"),
        (lambda p: tensors_with(p, lambda found: found.update({FIRST: found[FIRST].int()})), "is no matrix of"),
        (lambda p: tensors_with(p, lambda found: found.update({FIRST: found[FIRST] / 0})), "not finite"),
        (lambda p: record(p, "Toy", files={}), "is of other adapters than those beside it"),
        (lambda p: record(p, "Toy", dataset="Toy_test"), "is of adapters for Toy_test, not Toy; give their folder the"),
        (lambda p: record(p, "Toy", seen=3), "broken (seen is 3, not a list of texts"),
        (lambda p: record(p, "Toy", base_model={"name": "Tiny-Llama", "sha256": "1"}), "no collection here has"),
        (lambda p: record(p, "Toy").write_text("{"), "generated.json: "),
        (lambda p: (p.top / "of others/Toy/2/adapter_model.safetensors").write_bytes(b"x"), "is cut off, or no safe"),
        (lambda p: (p.top / "of others/Toy").rename(p.top / "of others/Unknown"), "'Unknown' is not known"),
    ],
)  # fmt: skip
def test_files_of_strangers_are_checked_before_anything_is_scored(written, monkeypatch, damage, said):
    from paragen.common import paths

    damage(written)
    for name in ("saves", "data", "models"):
        monkeypatch.setattr(paths, name.upper(), written.top / name)
    with pytest.raises(UserError) as error:
        generated.score_all(written.top / "of others")
    assert said in str(error.value) and "\n" not in str(error.value), error.value
    assert not list(written.top.rglob("scores.json"))


def test_a_folder_or_a_setting_that_cannot_be_is_one_line(written, monkeypatch):
    for setting, said in (({"STEPS": "last"}, "STEPS=last: selects collections"), ({"DATASET": "Moon"}, "'Moon'")):
        result = score(written, **setting)
        assert result.status and said in result.output and "Traceback" not in result.output
    result = evaluate(written, GENERATED=str(written.top / "data"))
    assert result.status and "no adapters: <dataset>/<sample>/" in result.output


def test_whether_its_generator_saw_a_dataset_is_what_the_list_says():
    known = {"seen": ["A", "B"], "is_seen": True}
    samples = [adapter_folders.Samples(name, Path(name), ["1"], {}, {}, known) for name in ("A", "C")]
    assert [one.training for one in samples] == ["seen", "unseen"]
    assert samples[0]._replace(record=None).training == "training tasks unknown"
