"""States of cells by names and lengths: what is damaged, what is stale, what is not here, and what is not even read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import many

from paragen.collection import row_hashes, run_identity, stock_runs
from paragen.collection.discovery import State
from paragen.dataset import registration
from paragen.recipes.run import Cell
from paragen.training import inputs, status

UTILS = Path(__file__).resolve().parent.parent / "utils"
HEAVY = "torch transformers llamafactory peft ray pandas pyarrow numpy scipy datasets accelerate matplotlib sklearn"
# Runs a script as its command does; then prints the heavy modules that it imported and the checkpoints that it opened.
WATCH = """
import runpy, sys
opened = []
sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
heavy, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    code = ended.code
print("imported:", *(set(heavy.split()) & sys.modules.keys()), file=sys.stderr)
print("read:", *(path for path in opened if "/saves/" in path and "/checkpoint-" in path), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    """A project with ten collections. Read only."""
    top = tmp_path_factory.mktemp("many") / "my project"
    many.make(top, datasets=2)
    return top


@pytest.fixture
def top(made_once, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made_once, tmp_path / "my project", copy_function=shutil.copy2))


@pytest.fixture
def cell(top) -> Cell:
    """Its cell of Toy0 at rank 8."""
    folder = top / "collect_scripts" / many.CATEGORY / "Toy0"
    return Cell("Toy0", "tiny", 8, (folder / "tiny_Toy0_pretrain.yaml", folder / "tiny_Toy0_finetune.yaml"))


def fresh(cell: Cell) -> Cell:
    """The same cell, rendered anew."""
    return Cell(cell.dataset, cell.model, cell.rank, cell.recipes, cell.overrides, cell.finetune_overrides)


def script(top: Path, name: str, *arguments: object, **settings: str) -> subprocess.CompletedProcess:
    """Run a script on a project, watched."""
    command = [sys.executable, "-c", WATCH, HEAVY, str(UTILS / f"{name}.py"), *map(str, arguments)]
    environment = {**os.environ, "PARAGEN_TOP": str(top), **settings}
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def collection(cell: Cell, name: str) -> Path:
    return cell.finetune.folder / name


def resumed(cell: Cell, name: str) -> Path:
    return cell.finetune.resumed / name


# ------------------------------------------------------------------------------------------------------------ one state


def test_a_whole_collection_is_complete_and_a_pretrain_alone_is_pretrained(cell):
    assert status.state_of(cell) == ("complete", "")
    shutil.rmtree(cell.finetune.folder)
    assert status.state_of(cell) == ("pretrained", "")
    shutil.rmtree(cell.pretrain.folder)
    assert status.state_of(cell) == ("missing", "")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: collection(c, "checkpoint-95.safetensors").unlink(), "checkpoint-95.safetensors is missing"),
        (lambda c: truncate(collection(c, "checkpoint-96.safetensors")), "checkpoint-96.safetensors has "),
        (lambda c: collection(c, "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda c: truncate(collection(c, "adapter_config.json")), "adapter_config.json does not have its recorded"),
    ],
)
def test_a_collection_that_lacks_something_is_broken_with_the_command_that_mends_it(cell, damage, said):
    damage(cell)
    state, reason = status.state_of(cell)
    assert state == "broken" and reason.startswith(said)
    assert reason.endswith("mend it with: make collect DATASET=Toy0 MODEL=tiny RANK=8")
    assert not status.is_done(cell)


def test_of_many_reasons_the_first_are_named_and_the_rest_counted():
    assert State("broken", list("abcdefgh"), None).reason == "a; b; c; d; e; and 3 more"
    assert State("broken", ["a", "b"], None).reason == "a; b"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda c: shutil.rmtree(c.finetune.resumed), "checkpoint-90 is missing"),
        (lambda c: resumed(c, "optimizer.pt").unlink(), "checkpoint-90/optimizer.pt is missing"),
        (lambda c: truncate(resumed(c, "adapter_model.safetensors")), "checkpoint-90 has "),
    ],
)
def test_a_damaged_pretrain_matters_only_where_the_finetune_needs_it(cell, damage, said):
    damage(cell)
    assert status.state_of(cell) == ("complete", ""), "the collection is there"
    shutil.rmtree(cell.finetune.folder)
    state, reason = status.state_of(cell)
    assert state == "broken" and f"its pretrain run: {said}" in reason and "make collect" in reason


def test_files_that_do_not_belong_there_break_nothing(cell):
    collection(cell, "notes.txt").write_text("mine")
    resumed(cell, "notes.txt").write_text("mine")
    assert status.state_of(cell) == ("complete", "")
    shutil.rmtree(cell.finetune.folder)
    assert status.state_of(cell) == ("pretrained", "")


def test_what_changed_makes_stale_also_in_the_pretrain_recipe_alone(cell):
    rows = cell.finetune.data_dir / many.CATEGORY / "Toy0.json"
    before = rows.read_text()
    rows.write_text(before.replace("[A]", "[B]", 1))
    assert status.state_of(cell) == ("stale", "the rows of common-sense-reasoning/Toy0.json (32 -> 32 rows)")
    rows.write_text(before)
    assert status.state_of(cell) == ("complete", "")
    cell.recipes[0].write_text(cell.recipes[0].read_text().replace("max_steps: 100", "max_steps: 200"))
    assert status.state_of(fresh(cell)) == ("stale", "its pretrain run: max_steps (100 -> 200)")


def test_descriptions_of_the_task_make_nothing_stale(cell):
    registration.describe("Toy0", ["Answer toy questions."], "own", cell.finetune.data_dir)
    assert status.state_of(fresh(cell)) == ("complete", "")


def test_a_collection_is_complete_without_its_model_and_data_and_says_what_it_was_not_compared_with(cell, top):
    shutil.rmtree(top / "models" / "Tiny-Llama")
    (top / "data" / "dataset_info.json").write_text("{}")
    state, reason = status.state_of(cell)
    assert (state, status.is_done(cell)) == ("complete", True)
    assert reason == "not here, so not compared: the base model Tiny-Llama, the data of Toy0"


def test_a_broken_collection_whose_recipe_changed_is_stale(cell):
    """What is left of it is replaced only with FORCE=1."""
    collection(cell, "checkpoint-95.safetensors").unlink()
    cell.recipes[1].write_text(cell.recipes[1].read_text().replace("max_steps: 96", "max_steps: 97"))
    assert status.state_of(fresh(cell)) == ("stale", "max_steps (96 -> 97)")


def test_a_broken_collection_need_not_come_from_the_present_pretrain(cell):
    """On a GPU a pretrain that is made again has other bits."""
    collection(cell, "checkpoint-95.safetensors").unlink()
    other = fresh(cell)
    for name in ("adapter_model.safetensors", "optimizer.pt"):
        resumed(cell, name).write_bytes(b"x")
    shutil.rmtree(cell.pretrain.folder)
    many.write_pretrain(other.pretrain, optimizer_bytes=77)
    assert status.state_of(other).name == "broken"


def test_a_stock_pretrain_beside_a_complete_collection_is_no_obstacle(cell):
    """As clean-checkpoints leaves it: the collection is done for status and for collect."""
    (cell.pretrain.folder / "manifest.json").unlink()
    assert status.state_of(cell) == ("complete", "") and status.is_done(cell)
    shutil.rmtree(cell.finetune.folder)
    state, reason = status.state_of(cell)
    assert state == "broken" and "_pretrain has no manifest.json" in reason


def test_the_quick_identity_is_the_whole_one_and_sees_each_change(cell, monkeypatch):
    for run in cell.runs:
        assert run_identity.quick_identity_of(run) == run_identity.identity_of(run)
    assert run_identity.quick_identity_of(cell.finetune)["pretrain"]["step"] == many.RESUMED
    rows = cell.finetune.data_dir / many.CATEGORY / "Toy0.json"
    assert not (rows.parent / row_hashes.CACHE).exists(), "so fresh a file could change within its time stamp"
    monkeypatch.setattr(row_hashes, "SETTLED_SECONDS", -1)
    os.utime(rows, (1, 1))
    assert run_identity.quick_identity_of(cell.finetune) == run_identity.identity_of(cell.finetune)
    assert (rows.parent / row_hashes.CACHE).is_file()
    rows.write_text(rows.read_text().replace("[A]", "[B]", 1))
    os.utime(rows, (1, 1))  # the same length and time, as a tool that preserves times leaves it
    assert run_identity.quick_identity_of(cell.finetune) == run_identity.identity_of(cell.finetune)


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"Toy0.json|48": 1}', '{"Toy0.json|48": [[], 1, 2, 3, 4]}'])
def test_a_broken_cache_of_hashes_costs_nothing_but_time(cell, broken):
    (cell.finetune.data_dir / many.CATEGORY / row_hashes.CACHE).write_text(broken)
    assert run_identity.quick_identity_of(cell.finetune) == run_identity.identity_of(cell.finetune)


# ---------------------------------------------------------------------------------------------------------- the scripts


NOTHING_TO_DO = [
    ("status", [], {}, "10 cells: 10 complete"),
    ("plan", [], {}, "10 cells: 10 complete"),
    ("collect", [], {"DATASET": "Toy0", "RANKS": "2 4 8 16 64"}, "complete: saves/"),
    ("collect_all", [many.CATEGORY], {}, "complete already"),
    ("train", ["collect_scripts/common-sense-reasoning/Toy0/tiny_Toy0_pretrain.yaml", 8], {}, "complete: saves/"),
    ("train", ["collect_scripts/common-sense-reasoning/Toy0/tiny_Toy0_finetune.yaml", 8], {}, "complete: saves/"),
]


@pytest.mark.parametrize(("name", "arguments", "settings", "said"), NOTHING_TO_DO)
def test_what_is_complete_is_neither_read_nor_are_heavy_modules_imported(made_once, name, arguments, settings, said):
    arguments = [made_once / one if str(one).endswith(".yaml") else one for one in arguments]
    done = script(made_once, name, *arguments, **settings)
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
    assert done.stderr.split() == ["imported:", "read:"]


def test_collect_says_how_it_knows_that_a_collection_is_complete(made_once):
    done = script(made_once, "collect", DATASET="Toy0", RANK="8")
    folder = "saves/common-sense-reasoning/Toy0/Tiny-Llama_lora-rank_8_finetune"
    assert done.stdout == f"complete: {folder} (by names and sizes; make verify re-reads)\n"


def test_status_shows_what_is_there_and_counts_the_rest(top, cell):
    shutil.rmtree(top / "saves" / many.CATEGORY / "Toy1")
    collection(cell, "checkpoint-95.safetensors").unlink()
    shown = script(top, "status").stdout
    assert [line.split()[0] for line in shown.splitlines()] == ["dataset", "Toy0", "broken:", "10"]
    assert shown.splitlines()[-1] == "10 cells: 4 complete, 1 broken, 5 missing; ALL=1 shows the missing ones, too"
    everything = script(top, "status", ALL="1").stdout
    assert everything.splitlines()[2].split() == ["Toy1", "tiny", *["missing"] * 5]
    shutil.rmtree(top / "saves")
    assert script(top, "status").stdout == "10 cells: 10 missing; ALL=1 shows the missing ones, too\n"


def test_a_reason_that_many_cells_share_is_one_line(top):
    shutil.rmtree(top / "models" / "Tiny-Llama")
    (line,) = [line for line in script(top, "status").stdout.splitlines() if line.startswith("complete: ")]
    assert line.startswith(
        "complete: Toy0 tiny rank 2 and 9 more: not here, so not compared: the base model Tiny-Llama"
    )


def test_status_and_plan_as_json_are_one_document_each(top, cell):
    collection(cell, "checkpoint-95.safetensors").unlink()
    states = json.loads(script(top, "status", JSON="1").stdout)
    assert states["summary"] == {"complete": 9, "broken": 1} and len(states["cells"]) == 10
    (broken,) = [found for found in states["cells"] if found["state"] == "broken"]
    assert broken.pop("reason").startswith("checkpoint-95.safetensors is missing")
    folder = "saves/common-sense-reasoning/Toy0/Tiny-Llama_lora-rank_8_finetune"
    named = {"category": many.CATEGORY, "dataset": "Toy0", "model": "tiny", "rank": 8, "seed": 42, "folder": folder}
    assert broken == {**named, "state": "broken"}
    plan = json.loads(script(top, "plan", JSON="1").stdout)
    (planned,) = plan["to_do"]
    assert planned["steps"] == {"pretrain": 100, "finetune": 6} and planned["engine"] == "packed"
    assert plan["bytes"] == planned["bytes"] > 0 and plan["missing_inputs"] == [] and plan["seconds"] is None


# ----------------------------------------------------------------------------------------------------- inputs and plan


def remove_inputs(top: Path) -> None:
    """Remove what the cells are trained from, and what was trained."""
    shutil.rmtree(top / "saves")
    shutil.rmtree(top / "models" / "Tiny-Llama")
    (top / "data" / many.CATEGORY / "Toy1.json").unlink()


def test_what_is_unknown_before_a_model_is_there_is_no_number(top):
    remove_inputs(top)
    done = script(top, "plan")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {tuple(line.split()[-4:]) for line in lines if line.startswith("Toy")} == {("+", "6", "?", "?")}
    assert "engine: not known for 10 until their model is there" in lines
    assert any(line.startswith("disk: needed is not known until the models are there, ") for line in lines)
    missing = [line for line in lines if line.startswith("missing: ")]
    assert len(missing) == 2 and "make model MODEL=" in missing[0] and missing[0].endswith("(10 cells)")
    assert "data/common-sense-reasoning/Toy1.json" in missing[1] and missing[1].endswith("(5 cells)")
    plan = json.loads(script(top, "plan", JSON="1").stdout)
    assert (plan["bytes"], len(plan["missing_inputs"])) == (None, 2)
    assert {(one["bytes"], one["engine"]) for one in plan["to_do"]} == {(None, None)}


@pytest.mark.parametrize(("name", "arguments"), [("collect_all", [many.CATEGORY]), ("collect", [])])
def test_missing_inputs_are_named_once_before_anything_starts(top, name, arguments):
    remove_inputs(top)
    done = script(top, name, *arguments, **({"DATASET": "Toy1", "RANKS": "2 4 8"} if name == "collect" else {}))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 3, done.stderr
    assert "models/Tiny-Llama: no such model folder; download it with: make model MODEL=" in errors[0]
    assert "Toy1.json" in errors[1] and "nothing was trained, 2 inputs are missing" in errors[2]
    assert "imported:\n" in done.stderr and not list((top / "collect_scripts").rglob("*_temp_rank_*"))
    assert not (top / "saves").exists()


def test_a_broken_recipe_is_left_to_its_own_training(cell):
    cell.recipes[1].write_text("lora_rank: x\n")
    assert inputs.faults_of([fresh(cell)]) == {}


# ---------------------------------------------------------------------------------------------------- clean-checkpoints


def test_clean_checkpoints_knows_datasets_alone(top):
    for other in (".tokens/0123abcd", "exports/peft", "test/Tiny-Llama_lora-rank_8_pretrain"):
        (top / "saves" / other).mkdir(parents=True)
    done = script(top, "clean_dataset_dir", DATASET="nothing")
    assert done.returncode == 1 and "known: Toy0, Toy1" in done.stderr and "0123abcd" not in done.stderr
    assert "peft" not in done.stderr and "lora-rank" not in done.stderr


def test_a_stock_run_that_was_cleaned_is_complete_for_collect_too(cell, top):
    """Its manifest knows neither recipe nor data, and its pretrain is stock LLaMA-Factory's."""
    stock = cell.finetune.folder
    config, kept = json.loads((stock / "adapter_config.json").read_text()), sorted(stock.glob("*.safetensors"))
    adapters = {path.stem: path.read_bytes() for path in kept}
    shutil.rmtree(stock)
    for name, data in adapters.items():
        (stock / name).mkdir(parents=True)
        (stock / name / "adapter_model.safetensors").write_bytes(data)
        (stock / name / "adapter_config.json").write_text(json.dumps(config))
    state = {"global_step": 96, "max_steps": 96, "log_history": []}
    (stock / "trainer_state.json").write_text(json.dumps(state))
    (cell.pretrain.folder / "manifest.json").unlink()
    assert stock_runs.clean(stock).state == "cleaned"
    done = script(top, "collect", DATASET="Toy0", RANK="8")
    assert done.returncode == 0 and done.stdout.startswith("complete: "), done.stderr
