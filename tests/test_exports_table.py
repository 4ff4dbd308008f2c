"""FORMAT=table: what a program finds that reads pairs.jsonl or pairs.parquet and nothing else of this repository."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from helpers import scored
from helpers.handmade import tree
from safetensors.torch import load_file

from paragen.collection import derived
from paragen.collection.manifest import sealed
from paragen.common import files

COLUMNS = {"prompt": "prompt", "response": "response", "system": "system"}
DESCRIPTIONS = {"own": ["Answer briefly.", "Give a short answer."]}


def rows_in(out: Path) -> list[dict]:
    """The rows of pairs.jsonl, which has to agree with pairs.parquet."""
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    table = pyarrow.parquet.read_table(out / "pairs.parquet")
    assert table.to_pylist() == rows
    return rows


def with_recipe(run: Path, **recipe) -> None:
    """Put keys into the recipe that a collection's manifest records."""
    content = json.loads((run / "manifest.json").read_text())
    files.write_json(run / "manifest.json", sealed({**content, "recipe": {**content["recipe"], **recipe}}))


def test_a_row_leads_to_a_checkpoint_with_its_hash_its_prompts_and_its_scores(place):
    run = place.collect(dataset="A", entry={"columns": COLUMNS, "descriptions": DESCRIPTIONS}, hub_id="org/tiny")
    scored.write(run, scored.evaluated(scored.RISING))
    out = place.export("table")
    rows = rows_in(out)
    assert [row["step"] for row in rows] == [5, 6, 7]
    assert sorted(tree(out)) == ["export.json", "pairs.jsonl", "pairs.parquet"]
    for row in rows:
        assert files.sha256_of(out / row["path"]) == files.sha256_of(out / row["file"]) == row["sha256"]
        assert json.loads((out / row["adapter_config"]).read_text())["lora_alpha"] == row["alpha"] == 8
        assert files.sha256_of_value(json.loads((out / row["prompts_file"]).read_text())) == row["prompts_sha256"]
    first = rows[0]
    assert first["id"] == "common-sense-reasoning/A/Tiny_lora-rank_4_finetune/checkpoint-5"
    known = {"base_model": "org/tiny", "dataset": "A", "rank": 4, "seed": 42, "loss": 0.5, "score": 0.5}
    known |= {"base_score": 0.4, "test_loss": 0.5, "scored_rows": 100, "dtype": "float32", "rows": 8}
    assert known.items() <= first.items() and first["descriptions"] == DESCRIPTIONS["own"]


def test_with_copy_the_adapters_lie_beside_the_table_and_can_be_moved_with_it(place, tmp_path):
    run = place.collect(dataset="A")
    out = place.export("table", COPY="1").rename(tmp_path / "moved")
    for row in rows_in(out):
        assert Path(row["path"]).parts[0] == "adapters" and not Path(row["path"]).is_absolute()
        assert {"adapter_model.safetensors", "adapter_config.json"} <= set(tree(out / row["path"]))
        assert files.sha256_of(out / row["file"]) == row["sha256"] == row["collected_sha256"]
        assert (out / row["file"]).read_bytes() == (run / f"checkpoint-{row['step']}.safetensors").read_bytes()


def test_a_cast_copy_has_the_hash_and_the_dtype_of_its_own_file(place):
    place.collect(dataset="A")
    out = place.export("table", COPY="1", DTYPE="bfloat16", STEPS="last")
    (row,) = rows_in(out)
    assert row["sha256"] == files.sha256_of(out / row["file"]) != row["collected_sha256"]
    assert {str(tensor.dtype) for tensor in load_file(out / row["file"]).values()} == {"torch.bfloat16"}
    assert row["dtype"] == "bfloat16"


def test_recipe_keys_that_vary_are_columns_and_those_that_do_not_are_none(place):
    with_recipe(place.collect(dataset="A", rank=4), learning_rate=1e-4, max_steps=10, bf16=True, lora_target="all")
    with_recipe(place.collect(dataset="A", rank=8), learning_rate=2e-4, max_steps=10.5, lora_target="all")
    with_recipe(place.collect(dataset="B", rank=8), learning_rate="1e-4", max_steps=None, lora_target="all")
    rows = [row for row in rows_in(place.export("table")) if row["step"] == 7]
    assert {key for key in rows[0] if key.startswith("recipe.")} == {
        "recipe.bf16", "recipe.learning_rate", "recipe.max_steps"
    }  # fmt: skip
    assert [row["recipe.bf16"] for row in rows] == [True, None, None]
    assert [row["recipe.max_steps"] for row in rows] == [10.0, 10.5, None]
    assert [row["recipe.learning_rate"] for row in rows] == ["0.0001", "0.0002", '"1e-4"']


@pytest.mark.parametrize(("steps", "expected"), [("last", [7]), ("best", [5]), ("every:2", [5, 7])])
def test_steps_selects_rows(place, steps, expected):
    others = scored.evaluated({5: 0.9, 6: 0.2, 7: 0.3}, split="Other", paired=False)
    scored.write(place.collect(dataset="A"), scored.evaluated(scored.RISING), others)
    assert [row["step"] for row in rows_in(place.export("table", STEPS=steps))] == expected


@pytest.mark.parametrize("reported", [[], [scored.evaluated(scored.RISING)]])
def test_best_without_scores_to_choose_by_names_the_command_that_makes_them(place, reported):
    scored.write(place.collect(dataset="My A"), *reported)
    said = place.refused("table", STEPS="best")
    assert "make evaluate DATASET=MyA MODEL=Tiny RANK=4 SEED=42 SPLIT=.., or take STEPS=last" in said
    assert not place.out.exists()


def test_a_dtype_without_copies_is_refused(place):
    place.collect()
    assert "COPY=1" in place.refused("table", DTYPE="float16")
    assert "COPY=1: FORMAT=table alone takes it" in place.refused("peft", COPY="1")


def test_the_table_follows_a_change_of_descriptions_and_copies_stay(place):
    place.collect(dataset="A")
    out = place.export("table", COPY="1")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert all(row["descriptions"] == [] for row in rows_in(out))
    info = place.data / "dataset_info.json"
    known = json.loads(info.read_text())
    known["A"]["descriptions"] = DESCRIPTIONS
    info.write_text(json.dumps(known))
    place.export("table", COPY="1")
    assert all(row["descriptions"] == DESCRIPTIONS["own"] for row in rows_in(out))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


@pytest.mark.parametrize("copied", [{}, {"COPY": "1"}])
def test_a_dry_run_lists_the_files_and_writes_nothing(place, capsys, copied):
    place.collect(dataset="A")
    place.export("table", DRY_RUN="1", **copied)
    told = capsys.readouterr().out
    assert "pairs.jsonl" in told and "pairs.parquet" in told and ("adapters/" in told) == bool(copied)
    assert not place.out.exists()


def test_tables_of_others_are_not_overwritten(place):
    place.collect(dataset="A")
    place.out.mkdir()
    (place.out / "pairs.parquet").write_text("mine")
    assert "pairs.parquet: is there already" in place.refused("table", COPY="1")
    assert sorted(tree(place.out)) == ["pairs.parquet"]


def test_a_stock_run_has_a_row_with_what_is_known(place):
    from helpers import handmade

    handmade.collect(place.saves, None, "math", "Stock", seed=None)
    rows = rows_in(place.export("table"))
    assert rows[0]["prompts_file"] is None and rows[0]["seed"] is None and rows[0]["rank"] == 4
    assert derived.read_record(place.out).keys() == {"pairs.jsonl", "pairs.parquet"}
