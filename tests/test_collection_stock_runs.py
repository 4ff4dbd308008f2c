"""Bringing stock LLaMA-Factory runs to the collection layout: a real stock run, and every way it can be broken."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import fork_server, scored
from helpers.forked_python import PYTHON

from paragen.collection import stock_files, stock_runs, verification
from paragen.collection.manifest import read_manifest
from paragen.common.cli import UserError
from paragen.recipes import render

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def stock_once(pretrained_once, tmp_path_factory) -> Path:
    """A finetune as LLaMA-Factory leaves it, optimizer states and all: every step saved, from scratch as stock can."""
    top = tmp_path_factory.mktemp("stock")
    folder = top / "Toy" / "Tiny-Llama_lora-rank_4_finetune"
    config = render.render(pretrained_once.finetune, 4)
    config |= {"use_cpu": True, "bf16": False, "save_only_model": False, "output_dir": str(folder)}
    config |= {"resume_from_checkpoint": None, "save_total_limit": None, "logging_steps": 1}
    (top / "config.json").write_text(json.dumps(config))
    result = fork_server.start(
        "stock", [str(top / "config.json"), str(pretrained_once.scripts)], {}, top / "log"
    ).wait()
    assert result.status == 0, result.output
    return folder


@pytest.fixture
def stock(stock_once, tmp_path) -> Path:
    return Path(shutil.copytree(stock_once, tmp_path / "a b" / stock_once.parent.name / stock_once.name))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stock_run_becomes_a_collection_of_its_newest_checkpoints(stock, stock_once):
    outcome = stock_runs.clean(stock, keep=5)
    assert (outcome.state, outcome.checkpoints) == ("cleaned", 5) and outcome.freed > 0
    kept = {f"checkpoint-{step}.safetensors" for step in range(8, 13)}
    expected = {"adapter_config.json", "manifest.json", "trainer_log.jsonl", "training_loss.png"}
    assert {path.name for path in stock.iterdir()} == kept | expected
    for step in range(8, 13):
        original = stock_once / f"checkpoint-{step}" / "adapter_model.safetensors"
        assert (stock / f"checkpoint-{step}.safetensors").read_bytes() == original.read_bytes()
    manifest = read_manifest(stock)
    assert manifest.recipe is None and manifest.data is None and manifest.seed is None
    assert manifest.rank == 4 and manifest.base_name == "Tiny-Llama"
    assert all(entry.loss is not None for entry in manifest.checkpoints)
    assert verification.faults_of(stock, manifest) == []
    assert str(stock.parent) not in (stock / "manifest.json").read_text()


def test_without_a_number_all_saved_steps_are_kept(stock, monkeypatch):
    import argparse

    monkeypatch.delenv("KEEP", raising=False)
    parser = argparse.ArgumentParser()
    stock_runs.add_options(parser)
    saved = len(list(stock.glob("checkpoint-*")))
    assert saved > 5 and stock_runs.clean(stock, parser.parse_args([]).keep).checkpoints == saved


def test_cleaning_again_keeps_the_scores_of_a_collection(stock):
    stock_runs.clean(stock, keep=2)
    scored.write(stock, scored.evaluated({11: 0.5}))
    before = content(stock)
    assert stock_runs.clean(stock, keep=1).state == "clean"
    assert content(stock) == before


def test_cleaning_twice_changes_nothing(stock):
    stock_runs.clean(stock)
    before = content(stock)
    assert stock_runs.clean(stock).state == "clean"
    assert content(stock) == before


def test_a_dry_run_tells_what_it_would_free_and_changes_nothing(stock):
    before = content(stock)
    outcome = stock_runs.clean(stock, keep=5, dry_run=True)
    assert content(stock) == before and outcome.state == "would clean"
    real = stock_runs.clean(stock, keep=5)
    assert abs(real.freed - outcome.freed) < 100_000, "but for log, picture and manifest"


def test_files_that_no_stock_run_writes_stay_and_a_dry_run_lists_every_file(stock, stock_once):
    (stock / "notes.txt").write_text("mine")
    (stock / "plots" / "deep").mkdir(parents=True)
    (stock / "plots" / "deep" / "all_results.json").write_text("mine, whatever its name")
    (stock / "empty").mkdir()
    (stock / "link").symlink_to("plots")
    (stock / "checkpoint-3" / "why.md").write_text("mine, in a checkpoint that goes")
    (stock / "global_step7").mkdir()
    (stock / "global_step7" / "mp_rank_00_model_states.pt").write_text("DeepSpeed's")
    before = content(stock)
    planned = stock_runs.clean(stock, keep=5, dry_run=True)
    assert content(stock) == before
    mine = {"notes.txt", "plots/deep/all_results.json", "empty/", "link", "checkpoint-3/why.md"}
    assert set(planned.others) == mine
    assert set(planned.removed) | set(planned.kept) | mine == {*before, "empty/", "link"}
    assert {"all_results.json", "checkpoint-3/optimizer.pt", "tokenizer.json"} <= set(planned.removed)
    assert {f"checkpoint-{step}/adapter_model.safetensors" for step in range(8, 13)} < set(planned.kept)

    cleaned = stock_runs.clean(stock, keep=5)
    assert cleaned == planned._replace(state="cleaned")
    after = content(stock)
    assert {name for name in after if name in before} == mine - {"empty/", "link"} | {
        "adapter_config.json", "trainer_log.jsonl", "training_loss.png"
    }  # fmt: skip
    assert all(after[name] == before[name] for name in mine & after.keys())
    assert (stock / "empty").is_dir() and (stock / "link").readlink() == Path("plots")
    assert verification.faults_of(stock, read_manifest(stock)) == []


def test_every_file_of_a_stock_run_is_known(stock_once):
    assert stock_files.files_in(stock_once).others == []


def test_a_strangers_file_with_a_checkpoints_name_is_refused_untouched(stock):
    for name, said in (("checkpoint-12.safetensors", "rename it"), ("checkpoint-3.safetensors", "does not belong")):
        (stock / name).write_text("mine")
        before = content(stock)
        with pytest.raises(UserError, match=f"{name}.*{said}.*nothing was changed"):
            stock_runs.clean(stock, keep=5)
        assert content(stock) == before
        (stock / name).unlink()


def test_newest_means_by_step_number_also_where_steps_are_not_consecutive(stock):
    for step in (1, 2, 4, 7, 8, 11):
        shutil.rmtree(stock / f"checkpoint-{step}")
    stock_runs.clean(stock, keep=3)
    manifest = read_manifest(stock)
    assert manifest.steps == [9, 10, 12]


def test_a_crash_in_the_middle_is_put_right_by_the_next_call(stock):
    (stock.parent / f".{stock.name}.staging-dead").mkdir()
    stock.rename(stock.with_name(f".{stock.name}.old"))  # killed between the two renames
    assert stock_runs.clean(stock).state == "cleaned"
    assert [path.name for path in stock.parent.iterdir()] == [stock.name]


def break_adapter(folder):
    path = folder / "checkpoint-3" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def set_state(folder, **values):
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "trainer_state.json").unlink(), "did not finish"),
        (lambda f: set_state(f, max_steps=99), "did not finish"),
        (lambda f: (f / "trainer_state.json").write_text("{"), "broken"),
        (break_adapter, "checkpoint-3: its adapter is broken"),
        (lambda f: (f / "checkpoint-3/adapter_model.safetensors").unlink(), "is missing"),
        (lambda f: (f / "checkpoint-3/adapter_config.json").write_text("{}"), "no LoRA adapter"),
        (lambda f: shutil.rmtree(f / "checkpoint-12"), "the checkpoint of its last step, 12, is missing"),
        (lambda f: [shutil.rmtree(path) for path in f.glob("checkpoint-*")], "holds no checkpoint"),
        (lambda f: (f / "manifest.json").write_text("{"), "broken"),
    ],
)
def test_a_folder_that_is_no_finished_finetune_is_refused_untouched(stock, damage, said):
    damage(stock)
    before = content(stock)
    with pytest.raises(UserError) as refused:
        stock_runs.clean(stock)
    assert said in str(refused.value) and str(stock) in str(refused.value)
    assert content(stock) == before


def test_a_pretrain_run_is_refused(stock, trained_once):
    renamed = stock.rename(stock.with_name("Tiny-Llama_lora-rank_4_pretrain"))
    with pytest.raises(UserError, match="no finetune run"):
        stock_runs.clean(renamed)
    with pytest.raises(UserError, match="is a pretrain run"):
        stock_runs.clean(trained_once.run_folder("pretrain"))


def test_a_running_run_is_left_alone(stock):
    lock = stock.with_name(f".{stock.name}.lock")
    hold = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'utils')!r}); import pathlib; from paragen.common import locks\n"
    )
    hold += f"with locks.lock(pathlib.Path({str(lock)!r})): print('held', flush=True); input()"
    holder = subprocess.Popen([PYTHON, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    with pytest.raises(UserError, match="is being trained or cleaned right now"):
        stock_runs.clean(stock)
    holder.communicate("\n")


def test_a_dataset_folder_ends_with_a_table_and_fails_where_one_run_failed(stock):
    twin = Path(shutil.copytree(stock, stock.with_name("Tiny-Llama_lora-rank_8_finetune")))
    break_adapter(twin)
    shutil.copytree(stock, stock.with_name("Tiny-Llama_lora-rank_4_pretrain"))
    script = ROOT / "utils" / "clean_dataset_dir.py"
    done = subprocess.run([PYTHON, script, stock.parent], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split()[0] == "run" and len(rows) == 3
    assert "cleaned" in rows[0] and "left alone" in rows[1] and "checkpoint-3" in rows[2]
    assert stock_runs.clean(stock).state == "clean"
