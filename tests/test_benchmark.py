"""`make benchmark-generator` in a real small project: parts, the table, what is reused, what is refused."""

import json
from pathlib import Path

import pytest
from conftest import CATEGORY
from helpers import made_project
from helpers.made_project import TASKS, refused, run, start
from helpers.packed_project import Packable

from paragen.analysis import benchmark_page
from paragen.benchmark import rows
from paragen.collection import discovery
from paragen.common import files
from paragen.common.cli import UserError

pytestmark = pytest.mark.runs

FAST = {
    "TRAIN_STEPS": 10, "WIDTH": 16, "PROMPTS": made_project.ROWS, "SAMPLES": 2, "REPEATS": 1, "LIMIT": 6,
    "LOSS_ONLY": "exact", "BASELINES": "none",
}  # fmt: skip
FAMILIES = dict(zip(TASKS, ("one", "one", "two", "two"), strict=True))
NEEDED = {"base", "mean", "nearest", "weighted", "generated", "generated-mean", "own", "swapped", "swapped-mean"}


@pytest.fixture(scope="module")
def collected(model_folder, tmp_path_factory) -> Packable:
    """Four collections of a few steps, of two families. Read only but for saves/benchmarks."""
    project = made_project.make(tmp_path_factory.mktemp("benchmark") / "my project", model_folder, TASKS, steps=6)
    info = json.loads(project.info.read_text())
    for name, family in FAMILIES.items():
        info[name] |= {"family": family, "metric": "exact"}
        info[f"{name}_test"]["metric"] = "exact"
        for path in sorted((project.top / "collect_scripts" / CATEGORY / name).glob("*.yaml")):
            path.rename(path.with_name(f"tiny_{name}_{path.stem.rpartition('_')[2]}.yaml"))
    project.info.write_text(json.dumps(info))
    return project


@pytest.fixture(scope="module")
def by_family(collected) -> str:
    """The folder of a benchmark of both families without trainings of its own, and what it printed."""
    return run(collected, "benchmark_generator", **FAST)


def folder(project: Packable, name: str = "tiny_rank-4_by-family") -> Path:
    return project.top / "saves" / "benchmarks" / name


def content(project: Packable, name: str = "tiny_rank-4_by-family") -> dict:
    return benchmark_page.read(folder(project, name) / "benchmark.json")


def test_each_family_is_measured_by_generators_that_did_not_see_it(collected, by_family):
    assert sorted(path.name for path in (folder(collected) / "generators").iterdir()) == ["one_0", "two_0"]
    for name, seen in (("one_0", TASKS[2:]), ("two_0", TASKS[:2])):
        manifest = json.loads((folder(collected) / "generators" / name / "manifest.json").read_text())
        assert manifest["datasets"] == sorted(seen)
    (group,) = content(collected)["groups"]
    assert sorted(row["dataset"] for row in group["rows"]) == sorted(TASKS)
    for row in group["rows"]:
        assert row["methods"].keys() == NEEDED and row["rows"] == 6 and row["metric"] == "loss"
        losses = {name: found["loss"]["value"] for name, found in row["methods"].items()}
        assert losses["own"] < losses["base"] and losses["mean"] != losses["base"]
        facts = {key: value for part in row["facts"] for key, value in part.items()}
        assert FAMILIES[facts["nearest"]] != FAMILIES[row["dataset"]] != FAMILIES[facts["other"]]
        assert losses["nearest"] != losses["own"] and row["closed"]["generated-mean"]["value"] is not None
    assert "one family held out" in by_family and "4 datasets: generated adapters close" in by_family
    assert group["totals"]["all"]["closed_by_seed"].keys() == {"0"}
    assert (folder(collected) / "benchmark.png").stat().st_size > 10_000


def test_losses_are_those_of_make_evaluate(collected, by_family):
    run(collected, "evaluate", LIMIT=6, STEPS="last", DATASET=TASKS[3])
    stored = json.loads((collected.folder("finetune", TASKS[3]) / "evaluation.json").read_text())["evaluations"][0]
    row = next(row for row in content(collected)["groups"][0]["rows"] if row["dataset"] == TASKS[3])
    for name, score in (("base", stored["base"]), ("own", stored["checkpoints"][0])):
        assert row["methods"][name]["loss"]["value"] == pytest.approx(score["loss"], rel=1e-4)


def test_what_was_measured_is_used_again_and_never_with_other_inputs(collected, by_family):
    parts = {path: path.stat().st_mtime_ns for path in folder(collected).glob("*/*.json")}
    (folder(collected) / "folds" / "two.json").unlink()
    (folder(collected) / "benchmark.json").unlink()
    line = refused(collected, "benchmark_generator", **{**FAST, "TRAIN_STEPS": 9})
    assert "is of another benchmark (generator differ); take another OUT" in line, "also before it is measured wholly"
    again = run(collected, "benchmark_generator", **FAST)
    assert "measured already: one" in again and "measured already: two" not in again
    after = {path: path.stat().st_mtime_ns for path in folder(collected).glob("*/*.json")}
    assert {path.name for path in parts if parts[path] != after[path]} == {"two.json"}
    line = refused(collected, "benchmark_generator", **{**FAST, "LIMIT": 5})
    assert "is of another benchmark (settings differ); take another OUT, or FORCE=1 replaces it" in line


def test_a_part_knows_in_which_dtype_and_on_what_it_was_measured(collected, by_family):
    """Parts of a benchmark that was stopped on a GPU are not continued in float32."""
    found = content(collected)
    assert (found["devices"], found["dtypes"]) == (["cpu"], ["float32"])
    for path in folder(collected).glob("*/*.json"):
        inputs = json.loads(path.read_text())["inputs"]
        assert set(inputs["dtype"]) == set(inputs["collections"]) and set(inputs["dtype"].values()) == {"float32"}
        other = {**inputs, "dtype": dict.fromkeys(inputs["dtype"], "bfloat16")}
        with pytest.raises(UserError, match=r"was measured with other inputs \(dtype\)"):
            rows.read_part(path, other, False)
    one = json.loads((folder(collected) / "folds" / "one.json").read_text())["inputs"]
    assert [pair["dataset"] for pair in one["pairs"]] == sorted(TASKS[2:]) and one["families"] == FAMILIES


def test_the_report_has_a_section_and_nothing_else_takes_the_benchmark_for_a_collection(collected, by_family):
    run(collected, "report")
    page = (collected.top / "saves" / "report" / "index.html").read_text()
    assert "Generators on datasets that they have not seen" in page and "generated adapters close" in page
    assert 'src="data:image/png;base64,' in page
    assert len(discovery.find_collections([collected.top / "saves"])) == 4


def test_what_a_generator_writes_is_scored_with_what_it_saw(collected, by_family):
    generator, out = folder(collected) / "generators" / "one_0", collected.top / "my adapters"
    run(collected, "generate", GENERATOR=generator, DATASET=TASKS[0], SAMPLES=2, OUT=out)
    printed = run(collected, "evaluate", GENERATED=out, LIMIT=6)
    scores = json.loads((out / TASKS[0] / "scores.json").read_text())
    assert (scores["training"], scores["training_tasks"]) == ("unseen", sorted(TASKS[2:])) and "unseen" in printed
    (one,) = scores["evaluations"]
    row = next(row for row in content(collected)["groups"][0]["rows"] if row["dataset"] == TASKS[0])
    assert one["base"]["loss"] == pytest.approx(row["methods"]["base"]["loss"]["value"], rel=1e-4)
    assert one["metric"] == "exact" and len(one["samples"]) == 2
    loss = row["methods"]["generated"]["loss"]["value"]
    assert one["samples"][0]["loss"] == pytest.approx(loss, rel=1e-6), "both have all prompts, and a description"


def test_an_edited_benchmark_is_named_in_its_section(collected, by_family, tmp_path):
    made = tmp_path / "benchmarks" / "mine"
    made.mkdir(parents=True)
    text = (folder(collected) / "benchmark.json").read_text()
    (made / "benchmark.json").write_text(text.replace('"rank": 4', '"rank": 5', 1))
    (section,) = benchmark_page.sections(tmp_path)
    assert section["name"] == "mine" and "was edited after it was written" in section["fault"]


@pytest.mark.slow
def test_everything_it_is_compared_with_is_trained_and_measured_on_all_slots(collected):
    """Exact answers, own trainings by the collect path, variants of each family, several processes."""
    full = {
        **FAST,
        "PROMPTS": 4,
        "BASELINES": "again union few context",
        "LOSS_ONLY": "",
        "REPEATS": 2,
        "PER_DEVICE": 2,
    }
    variants = {**full, "VARIANTS": 1, "HOLD": 1}
    printed = run(collected, "benchmark_generator", **variants)
    assert "training 6 adapters to compare with" in printed
    name = "tiny_rank-4_variants"
    (group,) = content(collected, name)["groups"]
    assert group["name"] == "1 variant of each family" and len(group["rows"]) == 2
    for row in group["rows"]:
        assert row["methods"].keys() == NEEDED | {"again", "union", "few", "context"} and row["metric"] == "exact"
        assert all("accuracy" in found for found in row["methods"].values()) and len(row["seeds"]) == 2
        losses = {method: found["loss"]["value"] for method, found in row["methods"].items()}
        assert len({losses[method] for method in ("base", "own", "again", "union", "few", "context")}) == 6
        assert abs(losses["again"] - losses["own"]) < (losses["base"] - losses["own"]) / 2, "the noise is small"
    assert not list((collected.top / "saves").glob("*/*.again")) and "measured already" not in printed
    trained = folder(collected, name) / "trained"
    before = files.hashes_below(trained / "saves")
    generators = files.hashes_below(folder(collected, name) / "generators")
    again = run(collected, "benchmark_generator", **{**variants, "BASELINES": "again few"})
    assert "complete already" in again, "fewer baselines: scored again, nothing trained again"
    assert not {"union", "context"} & content(collected, name)["groups"][0]["rows"][0]["methods"].keys()
    assert generators == files.hashes_below(folder(collected, name) / "generators")
    assert {path: before[path] for path in before if path.endswith(".safetensors")} == {
        path: sha256 for path, sha256 in files.hashes_below(trained / "saves").items() if path.endswith(".safetensors")
    }
    run(collected, "report")


@pytest.mark.slow
def test_killed_it_goes_on_and_ends_the_same(collected):
    settings = {**FAST, "BY": "dataset"}
    killed, whole = (collected.top / "saves" / "benchmarks" / name for name in ("killed", "whole"))
    begun = start(collected, "benchmark_generator", **settings, OUT=killed)
    assert begun.kill_when(lambda: any(killed.glob("folds/*.json")))
    assert not (killed / "benchmark.json").exists()
    assert "measured already" in run(collected, "benchmark_generator", **settings, OUT=killed)
    run(collected, "benchmark_generator", **settings, OUT=whole)
    assert benchmark_page.read(killed / "benchmark.json") == benchmark_page.read(whole / "benchmark.json")
