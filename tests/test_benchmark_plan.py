"""What the benchmark holds out, and how its intervals and shares are computed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import handmade, tiny

from paragen.analysis import benchmark_page
from paragen.benchmark import bootstrap, picture, plan, results, rows, run, trainings
from paragen.benchmark.plan import Wanted
from paragen.collection import index, manifest, prompts
from paragen.common import devices, files, paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info
from paragen.generator import options
from paragen.recipes import keys, lookup, render

FAMILIES = {f"{family}-{number:02}": family for family in ("copy", "sort", "swap") for number in range(16)}


def test_a_fold_holds_a_whole_family_out():
    folds = plan.folds_of(Wanted(repeats=2), FAMILIES)
    assert [fold.name for fold in folds] == ["copy", "sort", "swap"]
    for fold in folds:
        assert {FAMILIES[name] for name in fold.held} == {fold.name} and len(fold.held) == 16
        assert {FAMILIES[name] for name in fold.trained} == set(FAMILIES.values()) - {fold.name}
        assert len(fold.trained) == 32 and fold.seeds == (0, 1)


def test_or_a_single_dataset_out():
    folds = plan.folds_of(Wanted(by="dataset", repeats=1), FAMILIES)
    assert [fold.held for fold in folds] == [(name,) for name in sorted(FAMILIES)]
    assert all(set(fold.trained) == FAMILIES.keys() - set(fold.held) for fold in folds)


def test_or_some_variants_of_each_family_out_and_trains_on_random_subsets_of_the_others():
    folds = plan.folds_of(Wanted(variants=(1, 6, 12), repeats=3), FAMILIES)
    assert len(folds) == 9 and len({fold.name for fold in folds}) == 9
    assert len({fold.held for fold in folds}) == 1, "the same ones in all, so that the numbers are of one set"
    held = folds[0].held
    assert (
        len(held) == 12
        and [sum(FAMILIES[name] == family for name in held) for family in ("copy", "sort", "swap")] == [4] * 3
    )
    for fold, (count, number) in zip(folds, [(c, n) for c in (1, 6, 12) for n in range(3)], strict=True):
        assert not set(fold.held) & set(fold.trained) and fold.seeds == (number,)
        assert all(sum(FAMILIES[name] == family for name in fold.trained) == count for family in set(FAMILIES.values()))
    assert folds[3].trained != folds[4].trained and folds[6].trained == folds[7].trained, "12 of 12 are all"
    assert folds == plan.folds_of(Wanted(variants=(1, 6, 12), repeats=3), dict(reversed(FAMILIES.items())))


@pytest.mark.parametrize(
    ("wanted", "families", "left"),
    [
        (Wanted(), "xxyy", ["C", "D"]),
        (Wanted(), "xxxx", ["B", "C", "D"]),  # as in each fold of two families
        (Wanted(by="dataset"), "xxyy", ["B", "C", "D"]),
        (Wanted(variants=(1,)), "xxyy", ["B", "C", "D"]),
    ],
)
def test_a_training_dataset_is_left_out_like_a_held_one_and_others_are_always_left(tmp_path, wanted, families, left):
    made = plan.Plan(tmp_path, wanted, {}, dict(zip("ABCD", families, strict=True)), [])
    assert made.others_of("A", list("ABCD")) == left


@pytest.mark.parametrize(
    ("wanted", "known", "said"),
    [
        (Wanted(), {"A": "x", "B": "y"}, "x: leaves 1 datasets to train a generator on"),
        (Wanted(variants=(13,)), FAMILIES, "VARIANTS=13: family copy has 16 datasets, 4 of which are held out"),
        (Wanted(variants=(1,), hold=1), {"A": "x", "B": "x"}, "VARIANTS=1: leaves 1 datasets"),
    ],
)  # fmt: skip
def test_too_few_datasets_are_one_line(wanted, known, said):
    with pytest.raises(UserError, match=said):
        plan.folds_of(wanted, known)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"BY": "family", "VARIANTS": "1 3"}, "give one of the two"),
        ({"BY": "rule"}, "BY is family or dataset"),
        ({"HOLD": "2"}, "HOLD=2: says how many datasets of each family VARIANTS holds out; set VARIANTS, too"),
        ({"VARIANTS": "0"}, "from 1 on"),
        ({"VARIANTS": "x"}, "VARIANTS=x"),
        ({"BASELINES": "none few"}, "none stands alone"),
        ({"BASELINES": "fewer"}, "BASELINES=fewer"),
        ({"REPEATS": "0"}, "REPEATS=0"),
    ],
)
def test_settings_that_cannot_be_are_one_line(monkeypatch, settings, said):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        plan.of_settings()


def test_settings_say_what_is_measured(monkeypatch):
    given = {"VARIANTS": "12 1", "REPEATS": "2", "LIMIT": "50", "LOSS_ONLY": "math", "BASELINES": "context again"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wanted = plan.of_settings()
    assert (wanted.variants, wanted.repeats, wanted.limit, wanted.hold) == ((1, 12), 2, 50, 4)
    assert (wanted.loss_only, wanted.baselines) == (("math",), ("again", "context"))


def test_the_rows_of_a_sample_are_its_own_and_the_same_each_time():
    drawn = [plan.drawn_rows("A", 16, 100, number) for number in range(3)]
    assert all(len(set(rows)) == 16 and max(rows) < 100 for rows in drawn)
    assert drawn[0] != drawn[1] and drawn[0] == plan.drawn_rows("A", 16, 100, 0)
    assert sorted(plan.drawn_rows("A", 16, 5, 0)) == [0, 1, 2, 3, 4]


def test_a_prompt_that_was_trained_on_is_not_scored_and_rows_of_one_prompt_are_a_cluster(place):
    trained = handmade.texts("A", 8)
    place.collect(dataset="A", rows=trained)
    test = [trained[0], {**trained[1], "system": "be long"}, *handmade.texts("B", 2), *handmade.texts("B", 1)]
    handmade.register(place.data, handmade.CATEGORY, "A_test", test)
    chosen = plan.collections_by_dataset(index.chosen()[0])
    made = plan.Plan(place.out, Wanted(limit=4), chosen, {"A": "A"}, [])
    scored = rows.scored_rows(made, "A")
    assert [text["prompt"] for text in scored.split.texts] == ["A 1?", "B 0?", "B 1?", "B 0?"]
    assert (scored.clusters, scored.left_out, scored.metric) == ([0, 1, 2, 1], 1, "loss")
    handmade.register(place.data, handmade.CATEGORY, "A_test", trained[:3])
    with pytest.raises(UserError, match="A_test: all its prompts stand among the rows that A was trained on"):
        rows.scored_rows(made, "A")


def test_a_dataset_of_two_collections_has_to_be_chosen_by_a_setting(place):
    for rank in (2, 4):
        place.collect(dataset="A", rank=rank)
    with pytest.raises(UserError, match="takes one collection of a dataset; choose by MODEL, RANK or SEED"):
        plan.collections_by_dataset(index.chosen()[0])


def test_a_collection_of_several_datasets_is_refused_because_no_fold_could_hold_one_of_them_out(place):
    for dataset in ("A", "B", "C"):
        place.collect(dataset=dataset)
    place.collect(dataset="A,B")
    with pytest.raises(UserError, match=r"A,B.*: was trained on several datasets \(A,B\).*with DATASET="):
        plan.collections_by_dataset(index.chosen()[0])


def test_its_folder_is_named_after_what_is_held_out_and_is_never_among_collections(place, monkeypatch):
    place.collect(dataset="A")
    chosen = plan.collections_by_dataset(index.chosen()[0])
    assert plan.folder_of(Wanted(), chosen) == place.saves / "benchmarks" / "tiny_rank-4_by-family"
    assert plan.folder_of(Wanted(variants=(1,)), chosen).name == "tiny_rank-4_variants"
    monkeypatch.setenv("OUT", str(place.saves / "math" / "A"))
    with pytest.raises(UserError, match="lies among the collections"):
        plan.folder_of(Wanted(), chosen)


def test_a_part_is_used_again_only_with_the_same_inputs_and_unedited(tmp_path):
    path, inputs = tmp_path / "datasets" / "A.json", {"limit": 4, "rows": {"A": "1"}, "trained": {}, "context": False}
    assert rows.read_part(path, inputs, False) is None
    rows.write_part(path, inputs, {"dataset": "A"})
    assert rows.read_part(path, inputs, False)["dataset"] == "A" and rows.read_part(path, inputs, True) is None
    assert rows.read_part(path, {**inputs, "context": True}, False) is None, "compared with more: scored again"
    assert rows.read_part(path, {**inputs, "seeds": [0, 1]}, False) is None, "more REPEATS: scored again"
    with pytest.raises(UserError, match=r"A.json: was measured with other inputs \(limit, rows\); FORCE=1"):
        rows.read_part(path, {**inputs, "limit": 5, "rows": {"A": "2"}}, False)
    path.write_text(path.read_text().replace('"A"', '"B"', 1))
    with pytest.raises(UserError, match="A.json: broken .was edited.*; remove it"):
        rows.read_part(path, inputs, False)


def test_a_part_is_refused_where_its_dataset_has_another_metric_or_other_options_now(place):
    """Its rows and its collection are the same."""
    place.collect(dataset="A")
    made = plan.Plan(place.out, Wanted(limit=3), plan.collections_by_dataset(index.chosen()[0]), {"A": "A"}, [])
    path = place.out / "datasets" / "A.json"

    def inputs_with(letters: str, **entry: str) -> dict:
        columns = {"columns": {"prompt": "prompt", "response": "response"}}
        test = [{"prompt": f"which {number}?", "response": f"[{letter}]"} for number, letter in enumerate(letters)]
        handmade.register(place.data, handmade.CATEGORY, "A_test", test, {**columns, **entry})
        return rows.inputs_of(made, ["A"], [], {})

    first = inputs_with("ABAB")
    rows.write_part(path, first, {"dataset": "A"})
    assert first["metric"]["A"][0] == "choice" and rows.read_part(path, inputs_with("ABAB"), False) is not None
    assert rows.read_part(path, inputs_with("ABAA"), False) is not None, "the same options, in a row that is not scored"
    for other in (inputs_with("ABAB", metric="exact"), inputs_with("ABAC")):
        with pytest.raises(UserError, match=r"A.json: was measured with other inputs \(metric\); FORCE=1"):
            rows.read_part(path, other, False)


def sealed_in(path: Path, content: dict) -> None:
    files.write_json(path, {**content, "sha256": files.sha256_of_value(content)})


@pytest.mark.parametrize("name", ["identity.json", "benchmark.json"])
def test_a_later_call_may_measure_more_and_never_something_else(place, name):
    for dataset in "AB":
        place.collect(dataset=dataset)
    chosen = plan.collections_by_dataset(index.chosen()[0])
    first = Wanted(variants=(1, 3), repeats=1)
    identity = run.identity_of(plan.Plan(place.out, first, chosen, {}, []), options.Options())
    (place.out / "trained").mkdir(parents=True)
    formats = {"identity.json": run.IDENTITY_FORMAT, "benchmark.json": benchmark_page.FORMAT}
    sealed_in(place.out / name, {"format": formats[name], **identity, "groups": []})

    def check(wanted: Wanted, **given: object) -> None:
        run.check_same(plan.Plan(place.out, wanted, chosen, {}, []), options.Options(**given))

    for more in (first, Wanted(variants=(1, 3, 6), repeats=3), Wanted(variants=(1, 3), baselines=("context",))):
        check(more)
    check(first, base_learning_rate=0.5)  # of a stage that there is not
    for other in (Wanted(variants=(1, 3), limit=5), Wanted(repeats=1), Wanted(variants=(1, 3), samples=9)):
        with pytest.raises(UserError, match="is of another benchmark .settings differ.; take another OUT"):
            check(other)
    with pytest.raises(UserError, match="is of another benchmark .generator differ.; take another OUT"):
        check(first, steps=5)
    (place.out / "trained").rmdir()
    if name == "identity.json":
        check(Wanted(repeats=1))  # nothing was made for the other one


def test_what_cannot_be_measured_is_named_and_the_others_are_measured(capsys):
    measured = []

    def broken() -> None:
        raise UserError("has no rows")

    parts = [("A", lambda: measured.append("A")), ("B", broken), ("C", lambda: measured.append("C"))]
    with pytest.raises(UserError, match="1 of 3 parts could not be measured"):
        run.measure_each(parts)
    assert measured == ["A", "C"] and capsys.readouterr().err == "error: B: has no rows\n"
    run.measure_each(parts[::2])


def test_without_a_device_it_says_what_to_set(monkeypatch):
    """A machine whose GPUs are hidden has its CPU, as in a sweep."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("DEVICES", raising=False)
    monkeypatch.setattr(devices, "nvidia_driver", lambda: "550")
    assert run.slots() == ["cpu"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices, "nvidia_gpus", lambda: {})
    with pytest.raises(UserError, match="no device: this machine has a driver, but shows no GPU; set DEVICES=cpu"):
        run.slots()


def test_a_process_knows_how_many_share_its_device_and_the_main_memory():
    found = [run.environment_of(device, ["0", "1", "0"]) for device in ("0", "1")]
    assert [one["PARAGEN_GPU_SLOTS"] for one in found] == ["2", "1"]
    assert [one["PARAGEN_CPU_SLOTS"] for one in found] == ["3", "3"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "1"]
    assert run.environment_of("cpu", ["cpu"])["CUDA_VISIBLE_DEVICES"] == ""


def test_a_process_that_was_killed_is_said_to_be_and_is_not_looked_for_in_its_log(place):
    made = plan.Plan(place.out, Wanted(), {}, {}, [])
    killed = "was killed by SIGKILL, as the kernel does where memory runs out (see dmesg)"
    assert run.faults_of(made, {"job-2": -9}) == f"job-2: its process {killed}"
    text = run.faults_of(made, {"job-1": 1, "job-2": -9, "job-3": 1, "job-4": 255})
    first, lost, others = text.split("; ")
    assert first.endswith(killed) and lost == "job-4: the process that it was forked from died"
    assert others.startswith("job-1, job-3: could not measure all of its parts, ")
    assert others.endswith("logs/job-1.log says why")


# Trainings of its own


@pytest.fixture
def three(place, monkeypatch) -> plan.Plan:
    """A benchmark of three collections with recipes, of which one is held out."""
    scripts = place.saves.parent / "collect_scripts"
    monkeypatch.setattr(paths, "SCRIPTS", scripts)
    monkeypatch.setattr(paths, "MODELS", place.saves.parent / "models")
    for name in "ABC":
        folder = place.collect(dataset=name, rows=handmade.texts(name, 20))
        (scripts / handmade.CATEGORY / name).mkdir(parents=True)
        for phase, ending in (("pretrain", tiny.PRETRAIN), ("finetune", tiny.FINETUNE)):
            text = (tiny.RECIPE.format(phase=phase, model="Tiny") + ending.format(model="Tiny")).replace("Toy", name)
            recipe = scripts / handmade.CATEGORY / name / f"tiny_{name}_{phase}.yaml"
            recipe.write_text(text)
        known = json.loads((folder / paths.MANIFEST).read_text())
        trained = {key: value for key, value in render.load(recipe).items() if key not in keys.NOT_TRAINED}
        kept = {"seed": 42, "save_total_limit": 4}  # as KEEP=4 sets it
        files.write_json(folder / paths.MANIFEST, manifest.sealed({**known, "recipe": {**trained, **kept}}))
    chosen = plan.collections_by_dataset(index.chosen()[0])
    fold = plan.Fold("A", "one dataset held out", ("A",), ("B", "C"), (0,))
    return plan.Plan(place.out, Wanted(prompts=3), chosen, {"A": "A", "B": "B", "C": "C"}, [fold])


def test_its_own_trainings_are_recipes_of_the_dataset_with_other_rows_or_another_order(three):
    wanted = trainings.needed(three)
    assert [one.name for one in wanted] == ["A.again", "A.union", "A.few"]
    again, union, few = (one.rows for one in wanted)
    own = [{key: row[key] for key in trainings.COLUMNS} for row in prompts.of_collection(three.chosen["A"].manifest)]
    assert again == own and len(few) == 3 and all(row in own for row in few)
    assert {row["prompt"][0] for row in union} == {"B", "C"} and len(union) == 40, "all: the recipes see 8 x 4 + 4 x 2"
    trainings.write_project(three, wanted)
    top = trainings.place_of(three)
    found = lookup.recipes(top / "collect_scripts")
    config = {
        name: [render.render(found[f"A.{name}", "tiny", phase], 4) for phase in paths.PHASES]
        for name in ("again", "union", "few")
    }
    plain = render.load(lookup.find("A", "tiny", "finetune"))
    for name, (pretrain, finetune) in config.items():
        folder = f"../../../saves/{handmade.CATEGORY}/A.{name}/Tiny_lora-rank_4"
        assert (pretrain["output_dir"], finetune["output_dir"]) == (f"{folder}_pretrain", f"{folder}_finetune")
        assert finetune["learning_rate"] == plain["learning_rate"] and finetune["dataset"] == f"A.{name}"
        assert finetune["resume_from_checkpoint"].startswith(f"{folder}_pretrain/checkpoint-")
    assert config["again"][1]["data_seed"] != config["again"][1].get("seed") and "data_seed" not in config["union"][1]
    assert [one["max_steps"] for one in config["few"]] == [50, 60]
    assert [one["max_steps"] for one in config["union"]] == [8, 12] == [one["max_steps"] for one in config["again"]]
    assert config["union"][1]["resume_from_checkpoint"].endswith("checkpoint-4"), "as the recipe of the dataset says"
    assert sorted(dataset_info.read_info(top / "data")) == ["A.again", "A.few", "A.union"]
    assert (top / "models").resolve() == paths.MODELS.resolve()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [("", "\nlora_alpha: 99\n", "lora_alpha (None -> 99)"), ("max_steps: 12", "max_steps: 20", "max_steps (12 -> 20)")],
)
def test_recipes_that_changed_since_the_collection_are_not_trained_with(three, old, new, named):
    (path,) = paths.SCRIPTS.glob("*/A/*_finetune.yaml")
    text = path.read_text()
    path.write_text(text.replace(old, new) if old else text + new)
    with pytest.raises(UserError, match=re.escape(f"its recipes have changed since it was made: {named}; the")):
        trainings.needed(three)


def test_a_link_to_models_that_are_gone_is_made_anew(three):
    top = trainings.place_of(three)
    top.mkdir(parents=True)
    (top / "models").symlink_to(top / "gone")
    trainings.write_project(three, trainings.needed(three))
    assert (top / "models").readlink() == paths.MODELS


def test_without_recipes_it_says_how_to_measure_without_trainings(three):
    (path,) = paths.SCRIPTS.glob("*/A/*_pretrain.yaml")
    path.unlink()
    with pytest.raises(UserError, match="no recipes of A for Tiny.*BASELINES=context"):
        trainings.write_project(three, trainings.needed(three))


# Intervals and shares


def part(methods: dict[str, list[float]], clusters: list[int] | None = None, right: dict | None = None, **more) -> dict:
    """A part of the benchmark: the loss of each row by method, rows of one token."""
    count = len(next(iter(methods.values())))
    runs = {
        name: [{"losses": losses, "tokens": [1] * count, "right": (right or {}).get(name, []), "run": "0"}]
        for name, losses in methods.items()
    }
    known = {"dataset": "A", "metric": "exact" if right else "loss", "chance": 0.1, "facts": {}}
    return {**known, "clusters": clusters or [*range(count)], "methods": runs, **more}


def measured(
    base: float, own: float, made: float, rows: int = 200, noise: float = 0.5, seed: int = 0, family: str = ""
) -> results.Measured:
    """A dataset on which three methods have these losses, with noise that all rows share."""
    shared = np.random.default_rng(seed).normal(0, noise, rows)
    methods = {"base": base, "own": own, "generated-mean": made, "swapped-mean": made + 0.1, "mean": made + 0.05}
    rows_by_method = {name: (shared + level).tolist() for name, level in methods.items()}
    return results.Measured([part(rows_by_method)], family or str(seed))


def test_differences_are_paired_so_that_what_rows_share_does_not_widen_them():
    row = measured(3.0, 1.0, 2.0).row()
    loss = row["methods"]["generated-mean"]["loss"]
    assert loss["interval"][0] < 2 < loss["interval"][1] and loss["interval"][1] - loss["interval"][0] > 0.1
    assert row["loss_difference"]["mean"]["interval"] == pytest.approx([-0.05, -0.05], abs=1e-9)
    assert row["closed"]["generated-mean"]["value"] == pytest.approx(0.5)
    assert row["uses_prompts"] and not results.uses_prompts({"value": 0.0, "interval": [-0.1, 0.1]}, None)


def test_rows_of_one_prompt_are_drawn_together():
    """Forty copies of two rows say no more than the two."""
    twins = {name: [1.0, 2.0] * 40 for name in ("base", "own", "generated-mean", "swapped-mean")}
    alone, together = (results.Measured([part(twins, clusters)], "A") for clusters in ([*range(80)], [0, 1] * 40))
    widths = [np.ptp(one.row()["methods"]["base"]["loss"]["interval"]) for one in (alone, together)]
    assert widths[1] == pytest.approx(1) and widths[0] < 0.3


def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_claims():
    drawn = np.random.default_rng(0)
    held = 0
    for number in range(100):
        values = drawn.gamma(2, 0.5, 60)
        weights = bootstrap.draws_of([*range(60)], number)
        low, high = bootstrap.figure(bootstrap.ratio(weights, values, np.ones(60)))["interval"]
        held += low <= 1 <= high
    assert 0.88 <= held / 100 <= 0.99


def test_the_share_closed_of_several_datasets_is_a_ratio_of_sums():
    """A dataset with nothing to close does not blow the share up, as it would a mean of ratios."""
    datasets = [measured(3.0, 1.0, 2.0), measured(2.0, 1.9999, 2.5, seed=1), measured(5.0, 1.0, 1.0, seed=2)]
    total = results.total_of(datasets, [one.row() | {"seeds": {"0": {}}} for one in datasets])
    assert total["closed_by_seed"] == {"0": total["closed"]["generated-mean"]["value"]}
    assert total["closed"]["generated-mean"]["value"] == pytest.approx((1 - 0.5 + 4) / (2 + 0.0001 + 4))
    assert (total["better_loss"]["mean"], total["worse_loss"]["mean"], total["without_prompts"]) == (3, 0, [])


def test_the_share_of_the_accuracy_is_from_base_to_own_as_that_of_the_loss_is():
    right = {"base": [0] * 100, "own": [1] * 80 + [0] * 20, "generated-mean": [1] * 20 + [0] * 80}
    levels = {"base": 3.0, "own": 1.0, "generated-mean": 2.0, "swapped-mean": 3.0}
    losses = {name: [level] * 100 for name, level in levels.items()}
    one = results.Measured([part(losses, right={**right, "swapped-mean": [0] * 100})], "A")
    assert results.closed([one], "generated-mean", "accuracy")["value"] == pytest.approx(0.25)
    group = results.group_of("A", [one])
    assert "25 %" in next(line for line in benchmark_page.sentences_of(group) if "of the accuracy" in line)
    worse = results.Measured([part(losses, right={**right, "own": [0] * 100, "swapped-mean": [0] * 100})], "A")
    assert results.closed([worse], "generated-mean", "accuracy")["value"] is None, "there is nothing to close"


def test_variants_of_one_rule_count_as_one_rule_in_the_interval_of_a_total():
    """Four variants each of two rules, of which one is closed wholly and one not at all: any share may be the truth."""
    made = [measured(3.0, 1.0, 1.0 if number % 2 else 3.0, seed=number, family=str(number % 2)) for number in range(8)]
    alone = [measured(3.0, 1.0, 1.0 if number % 2 else 3.0, seed=number) for number in range(8)]
    together = results.closed(made, "generated-mean")
    assert together["value"] == pytest.approx(0.5) and together["interval"] == pytest.approx([0, 1])
    assert np.ptp(results.closed(alone, "generated-mean")["interval"]) < 0.8
    one = results.closed([*made[::2], measured(3.0, 1.0, 1.0, family="0", seed=9)], "generated-mean")["interval"]
    assert 0 < np.ptp(one) <= 0.8, "of a single family its datasets are drawn"


def test_where_own_is_no_better_than_base_no_share_is_known():
    methods = {"base": [1.0] * 50, "own": [0.5, 1.5] * 25, "generated-mean": [0.9] * 50, "swapped-mean": [1.0] * 50}
    row = results.Measured([part(methods)], "A").row()
    assert row["closed"]["generated-mean"] == {"value": None, "interval": None}


def test_a_choice_at_chance_is_form_and_a_learned_one_is_skill():
    methods = {name: [1.0] * 100 for name in ("base", "own", "generated-mean", "swapped-mean")}
    for own, kind in (([1] * 52 + [0] * 48, "form"), ([1] * 90 + [0] * 10, "skill")):
        right = {name: own if name == "own" else [0] * 100 for name in methods}
        row = results.Measured([part(methods, right=right, metric="choice", chance=0.5)], "A").row()
        assert row["kind"] == kind and row["methods"]["own"]["accuracy"]["value"] == sum(own) / 100
    assert not row["uses_prompts"], "the loss is the same with other prompts"


def test_a_picture_of_many_datasets_has_a_line_for_each_family_with_all_of_its_datasets():
    rows = [
        {"dataset": f"{family}-{number}", "family": family, "methods": {"base": {"loss": {"value": float(number)}}}}
        for family in ("copy", "sort") for number in range(21)
    ]  # fmt: skip
    found = picture.rows_of({"rows": rows})
    assert [row["dataset"] for row in found] == ["copy (21)", "sort (21)"]
    assert all(row["methods"]["base"]["loss"]["value"] == 10 for row in found)
    assert picture.rows_of({"rows": rows[:40]}) == rows[:40]


def test_a_picture_shows_datasets_or_the_course_over_variants(tmp_path):
    made = [measured(3.0, 1.0, level, seed=number) for number, level in enumerate((2.0, 1.5))]
    right = {
        name: [number % 3 == 0 for number in range(60)] for name in ("base", "own", "generated-mean", "swapped-mean")
    }
    methods = {name: [2.0 - number] * 60 for number, name in enumerate(right)}
    made.append(results.Measured([part(methods, right=right)], "A"))
    groups = [results.group_of(f"{count} variants of each family", made) for count in (1, 3, 12)]
    for count, name in ((1, "datasets.png"), (3, "course.png")):
        picture.draw({"groups": groups[:count]}, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 10_000
    lines = benchmark_page.lines_of(groups[0])
    assert [line[3] for line in lines] == ["loss", "loss", "loss", "accuracy"]
    assert all(len(line) == len(benchmark_page.head_of(groups[0])) for line in lines)
    assert any("all of these on" in sentence for sentence in benchmark_page.sentences_of(groups[0]))
