"""FORMAT=w2t by the rules of Weight2Token's own code, as llm/regression/perf_prediction_pipeline.py documents them.

Its columns and casts; a path is a file or a PEFT folder relative to the current folder; the first row's layers count
for all; rows whose run_id repeats are dropped; a row without a target makes that target's mean NaN.
"""

import json
import math
import re
import shlex
from pathlib import Path

import pandas
import pytest
import torch
from helpers import handmade, scored
from helpers.handmade import tree
from safetensors.torch import load_file

from paragen.collection.manifest import sealed
from paragen.common import files, paths
from paragen.exports import w2t

WHOLE = ("run_id", "epochs", "batch_size", "grad_accum", "max_len", "lora_r", "lora_alpha", "seed")
REAL = ("lr", "warmup_ratio", "weight_decay", "lora_dropout", "test_loss", "test_ppl")
FACTOR = re.compile(r"^(?P<base>.+?)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")


def read(out: Path, monkeypatch, accuracies: bool = True) -> pandas.DataFrame:
    """Read an export as its scripts `prepare` and `cache` do, from the export's folder."""
    monkeypatch.chdir(out)
    table = pandas.read_csv("w2t.csv")
    assert list(table.columns[: len(w2t.REQUIRED)]) == list(w2t.REQUIRED)
    assert len(table.drop_duplicates(subset=["run_id"])) == len(table)
    layers = None
    for row in table.sort_values("run_id").itertuples(index=False):
        assert all(int(getattr(row, name)) == getattr(row, name) for name in WHOLE)
        assert all(math.isfinite(float(getattr(row, name))) for name in REAL)
        assert math.isfinite(row.test_acc) == accuracies
        assert Path(row.sidecar_config).is_file()
        assert Path(row.safetensors_path).is_dir()
        groups: dict[str, dict] = {}
        for key, tensor in load_file(Path(row.safetensors_path, "adapter_model.safetensors")).items():
            found = FACTOR.match(key)
            groups.setdefault(found["base"], {})[found["side"]] = tensor.float()
        assert all(both["A"].shape[0] == both["B"].shape[1] == row.lora_r for both in groups.values())
        layers = layers or groups.keys()
        assert groups.keys() == layers
    return table


def scored_collection(place, figures=scored.RISING, metric="choice", others=None, **how) -> Path:
    """A collection with scores on its held-out rows and, as `others` has them, on those of another split."""
    run = place.collect(**how)
    more = [scored.evaluated(others, split="Other", paired=False)] if others else []
    scored.write(run, scored.evaluated(figures, metric), *more)
    return run


def rewritten(run: Path, **changed) -> None:
    """Change keys of a collection's manifest."""
    content = json.loads((run / paths.MANIFEST).read_text())
    files.write_json(run / paths.MANIFEST, sealed({**content, **changed}))


def test_its_scripts_read_a_row_per_scored_checkpoint(place, monkeypatch, capsys):
    scored_collection(place, dataset="A", rank=4, hub_id="org/tiny")
    scored_collection(place, dataset="B", rank=8)
    table = read(place.export("w2t"), monkeypatch)
    assert table.groupby("dataset").size().to_dict() == {"A": 3, "B": 3}
    first = table.iloc[0]
    assert first.test_acc == 0.5 and first.test_ppl == math.exp(0.5) and first.base_model == "org/tiny"
    assert first.target_modules == "down_proj,q_proj,v_proj" and first.train_samples == 8
    told = capsys.readouterr().out
    assert "random split" in told and f"--path-map {shlex.quote(f'adapters={place.out}/adapters')}" in told


def test_a_run_id_stays_when_other_collections_are_exported_too(place, monkeypatch):
    scored_collection(place, dataset="A")
    before = read(place.export("w2t"), monkeypatch)["run_id"].tolist()
    scored_collection(place, dataset="B")
    after = read(place.export("w2t"), monkeypatch)
    assert after[after["dataset"] == "A"]["run_id"].tolist() == before


@pytest.mark.parametrize(("steps", "expected", "accuracy"), [("last", 7, 0.6), ("best", 5, 0.5)])
def test_steps_gives_one_row_a_run_and_no_warning_about_the_split(
    place, monkeypatch, capsys, steps, expected, accuracy
):
    for dataset in "AB":
        scored_collection(place, dataset=dataset, others={5: 0.9, 6: 0.2, 7: 0.3})
    table = read(place.export("w2t", STEPS=steps), monkeypatch)
    assert table["optimizer_steps"].tolist() == [expected, expected]
    assert table["test_acc"].tolist() == [accuracy, accuracy]  # of the held-out rows, which did not choose the step
    assert "random split" not in capsys.readouterr().out
    assert len(list(place.out.rglob("adapter_model.safetensors"))) == 2


@pytest.mark.parametrize("steps", ["all", "last", "best"])
def test_unscored_checkpoints_are_left_out_and_counted_with_the_command(place, monkeypatch, capsys, steps):
    scored_collection(place, dataset="A", figures={5: 0.5, 7: 0.6}, others={5: 0.5, 7: 0.6})
    place.collect(dataset="B")
    table = read(place.export("w2t", STEPS=steps), monkeypatch)
    assert set(table["dataset"]) == {"A"}
    selected, left_out = (6, 4) if steps == "all" else (2, 1)
    told = capsys.readouterr().out
    assert f"{left_out} of {selected} checkpoints are left out" in told and "make evaluate DATASET=" in told
    assert not list(place.out.rglob("B"))


def test_adapters_of_rank_1_of_which_its_model_makes_nan_are_refused(place):
    """Its projector takes the deviation across ranks as torch does, by their number less one: 0 / 0 for one."""
    scored_collection(place, dataset="A", rank=1)
    scored_collection(place, dataset="B", rank=4)
    said = place.refused("w2t")
    assert "A/Tiny_lora-rank_1_finetune: is of rank 1" in said and "NaN: choose others with RANK=.." in said
    assert not place.out.exists()
    place.export("w2t", RANK="4")


def test_rows_without_an_accuracy_are_left_out_beside_rows_with_one(place, monkeypatch, capsys):
    scored_collection(place, dataset="A")
    scored_collection(place, dataset="B", metric="loss")
    assert set(read(place.export("w2t"), monkeypatch)["dataset"]) == {"A"}
    assert "3 of 6 checkpoints are left out" in capsys.readouterr().out


def test_where_no_row_has_an_accuracy_the_loss_is_the_target(place, monkeypatch, capsys):
    scored_collection(place, dataset="A", metric="loss")
    table = read(place.export("w2t"), monkeypatch, accuracies=False)
    assert table["test_loss"].tolist() == [0.5, 0.7, 0.6]
    assert "--target-col test_loss" in capsys.readouterr().out


def test_epochs_are_whole_and_the_exact_value_counts_the_pretrain_with_its_own_batch(place, monkeypatch):
    run = place.collect(dataset="A", steps=(20, 21))
    counted = {"processes": 1, "accumulated": 1, "trained_rows": 160, "total_steps": 40}
    pretrain = {"run": "pretrained", "step": 20, "sha256": "0" * 64}
    rewritten(run, **counted, rows_at_a_time=2, pretrain=pretrain)
    scored.write(run, scored.evaluated({20: 0.5, 21: 0.6}))
    table = read(place.export("w2t"), monkeypatch)
    assert table["epochs"].tolist() == [0, 0] and table["epochs_exact"].isna().all()
    before = run.parent / "pretrained"
    before.mkdir()
    content = json.loads((run / paths.MANIFEST).read_text())
    content |= {"phase": "pretrain", "run": "pretrained", "pretrain": None, "rows_at_a_time": 4}
    files.write_json(before / paths.MANIFEST, sealed(content))
    table = read(place.export("w2t"), monkeypatch)
    assert table["epochs"].tolist() == [1, 1] and table["epochs_exact"].tolist() == [0.5, 0.5125]


def test_what_a_recipe_omits_has_the_trainers_default():
    from transformers import TrainingArguments

    defaults = {name: field.default for name, field in TrainingArguments.__dataclass_fields__.items()}
    assert {name: defaults[name] for name in w2t.OMITTED} == w2t.OMITTED


def test_other_layers_are_refused_since_its_scripts_would_drop_them_silently(place):
    scored_collection(place, dataset="A")
    scored_collection(place, dataset="B", modules=handmade.llama_keys(layers=3))
    told = place.refused("w2t")
    assert "B/Tiny_lora-rank_4_finetune: has other layers or widths" in told and "lora_A" in told
    assert not place.out.exists()


def test_other_layers_of_a_collection_that_is_left_out_do_not_matter(place, monkeypatch):
    scored_collection(place, dataset="A")
    place.collect(dataset="B", modules=handmade.llama_keys(layers=3))
    assert set(read(place.export("w2t"), monkeypatch)["dataset"]) == {"A"}


def test_without_any_scores_it_is_refused_with_the_command(place):
    place.collect(dataset="A")
    assert "make evaluate DATASET=A MODEL=Tiny RANK=4" in place.refused("w2t")
    assert not place.out.exists()


def test_a_stock_run_is_refused_since_its_recipe_is_not_known(place):
    run = handmade.collect(place.saves, None, "math", "Stock")
    scored.write(run, scored.evaluated(scored.RISING))
    assert "does not know its recipe" in place.refused("w2t")


def test_bfloat16_is_noted_and_can_be_cast(place, monkeypatch, capsys):
    scored_collection(place, dataset="A", dtype="bfloat16")
    place.export("w2t")
    assert "DTYPE=float32" in capsys.readouterr().out
    table = read(place.export("w2t", DTYPE="float32"), monkeypatch)
    tensors = load_file(Path(table.iloc[0].safetensors_path, "adapter_model.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_dry_run_lists_and_writes_nothing(place, capsys):
    scored_collection(place, dataset="A")
    place.export("w2t", DRY_RUN="1")
    told = capsys.readouterr().out
    assert "w2t.csv" in told and "adapters/common-sense-reasoning/A/" in told and not place.out.exists()


def test_a_table_of_others_is_not_overwritten(place):
    scored_collection(place, dataset="A")
    place.out.mkdir()
    (place.out / "w2t.csv").write_text("mine")
    assert "w2t.csv: is there already" in place.refused("w2t")
    assert sorted(tree(place.out)) == ["w2t.csv"]


def test_a_killed_export_leaves_no_table_and_is_finished_by_the_next(place, monkeypatch):
    for dataset in "AB":
        scored_collection(place, dataset=dataset)
    place.export("w2t", OUT=str(place.out) + " wanted")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):

        def stopped(*_):
            raise SystemExit(143)

        patch.setattr(w2t, "write_csv", stopped)
        place.export("w2t")
    assert not list(place.out.rglob("*.csv")) and not list(place.out.rglob(".*staging*"))
    place.export("w2t")
    assert tree(place.out) == tree(Path(str(place.out) + " wanted"))
