"""Training and collecting with LLaMA-Factory on a tiny model: what ends up on disk, and what is refused."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pyarrow.ipc
import pytest
from helpers import fork_server
from helpers.forked_python import PYTHON
from safetensors.torch import load_file

from paragen.common import files, locks
from paragen.recipes.run import Cell
from paragen.training import status

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
STEPS = range(7, 13)  # the last 6 of 12


def hashes(folder: Path) -> dict[int, str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {entry["step"]: entry["sha256"] for entry in manifest["checkpoints"]}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: name, time, content."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def one_error_line(result) -> str:
    """The `error:` line of a failed run; there is exactly one and no traceback."""
    assert result.status == 1, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    return lines[0]


def test_the_documented_command_pretrains_and_collects_from_the_recipes_folder(project):
    """`bash train_with_rank.sh <recipe> <rank>` from the recipe's own folder, in processes of their own."""
    script = ROOT / "utils" / "train_with_rank.sh"
    for recipe in (project.pretrain, project.finetune):
        done = subprocess.run(["bash", script, recipe.name, "4"], cwd=project.scripts, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    expected = {f"checkpoint-{step}.safetensors" for step in STEPS}
    expected |= {"adapter_config.json", "manifest.json", "trainer_log.jsonl", "training_loss.png"}
    assert {path.name for path in project.run_folder("finetune").iterdir()} == expected
    assert sorted(path.name for path in project.scripts.iterdir()) == [project.finetune.name, project.pretrain.name]
    assert sorted(path.name for path in project.saves.iterdir()) == sorted(
        [project.run_folder("finetune").name, project.run_folder("pretrain").name]
    )
    pretrain = {path.name for path in (project.run_folder("pretrain") / "checkpoint-4").iterdir()}
    assert "tokenizer.json" not in pretrain and {"optimizer.pt", "adapter_model.safetensors"} <= pretrain


def test_a_recipe_may_be_given_relative_to_any_folder(project, monkeypatch):
    monkeypatch.chdir(project.top)
    result = project.train(project.pretrain.relative_to(project.top))
    assert result.status == 0, result.output
    assert (project.run_folder("pretrain") / "manifest.json").is_file()


def test_each_checkpoint_is_bit_identical_to_what_the_stock_trainer_saves(trained_once, tmp_path):
    """With save_steps corrected in the resumed trainer state, which the stock trainer reads instead of the recipe's."""
    twin = trained_once.copy(tmp_path / "stock")
    resumed = twin.run_folder("pretrain") / "checkpoint-4"
    state = json.loads((resumed / "trainer_state.json").read_text())
    (resumed / "trainer_state.json").write_text(json.dumps({**state, "save_steps": 1}))
    from paragen.recipes import render

    config = render.render(twin.finetune, 4) | {
        "use_cpu": True,
        "bf16": False,
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "stock.json").write_text(json.dumps(config))
    result = fork_server.start("stock", [str(tmp_path / "stock.json"), str(twin.scripts)], {}, tmp_path / "log").wait()
    assert result.status == 0, result.output
    ours = trained_once.run_folder("finetune")
    assert sorted(tmp_path.glob("out/checkpoint-*")) == sorted(
        tmp_path / "out" / f"checkpoint-{step}" for step in STEPS
    )
    for step in STEPS:
        stock = (tmp_path / "out" / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()
        assert (ours / f"checkpoint-{step}.safetensors").read_bytes() == stock, step
    stock_config = json.loads((tmp_path / "out" / "checkpoint-12" / "adapter_config.json").read_text())
    our_config = json.loads((ours / "adapter_config.json").read_text())
    differing = {key for key in stock_config if stock_config[key] != our_config.get(key)} - {"target_modules"}
    assert differing == {"base_model_name_or_path"}
    assert our_config["base_model_name_or_path"] == "Tiny-Llama"
    assert sorted(stock_config["target_modules"]) == our_config["target_modules"]


def test_every_kept_step_has_its_own_loss_and_the_pretrain_is_untouched(pretrained):
    before = snapshot(pretrained.run_folder("pretrain"))
    result = pretrained.train(pretrained.finetune)
    assert result.status == 0, result.output
    assert snapshot(pretrained.run_folder("pretrain")) == before
    folder = pretrained.run_folder("finetune")
    entries = json.loads((folder / "manifest.json").read_text())["checkpoints"]
    assert [entry["step"] for entry in entries] == list(STEPS)
    assert len({entry["loss"] for entry in entries}) == len(entries)
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    logged = {line["current_steps"]: line["loss"] for line in log if "loss" in line}
    assert min(logged) > 4, "the log is this phase's, not the pretrain's"
    assert {entry["step"]: entry["loss"] for entry in entries} == {step: logged[step] for step in STEPS}


def test_the_manifest_records_data_base_recipe_and_pretrain(trained_once):
    manifest = json.loads((trained_once.run_folder("finetune") / "manifest.json").read_text())
    assert (manifest["dataset"], manifest["rank"], manifest["seed"]) == ("Toy", 4, 42)
    assert manifest["category"] == "common-sense-reasoning" and manifest["phase"] == "finetune"
    (data,) = manifest["data"]
    assert (data["rows_in_file"], data["rows"], manifest["trained_rows"]) == (64, 48, 48)
    assert manifest["pretrain"]["step"] == 4 and manifest["recipe"]["learning_rate"] == 5e-3
    assert manifest["base_model"]["name"] == "Tiny-Llama" and len(manifest["base_model"]["sha256"]) == 64
    assert manifest["device"] == "cpu" and manifest["precision"] == "float32"
    assert manifest["versions"]["llamafactory"] and manifest["attempt"]["id"]
    assert str(trained_once.top) not in json.dumps(manifest), "no path of this machine"


def test_what_is_odd_about_the_data_is_printed_once_and_recorded_and_makes_nothing_stale(project):
    rows = json.loads(project.data.read_text())
    rows = [row | {"response": "[A]"} for row in rows[:40]] + rows[:8]
    rows[5]["prompt"] += " so long that it is cut" * 3
    project.data.write_text(json.dumps(rows))
    odd = [
        "Toy: one answer, '[A]', in 44 of 48 rows (91.7 %)",
        "Toy: repeated prompts: 7, 3 of them with different answers, up to 2 times each, in 14 of 48 rows (29.2 %); "
        "row 41 repeats row 1",
    ]
    result = project.train(project.pretrain, "cutoff_len=80")
    assert result.status == 0, result.output
    *told, cut = [line for line in result.output.splitlines() if line.startswith("warning: ")]
    assert told == [f"warning: {line}" for line in odd]
    assert cut == "warning: cutoff_len 80 is reached by 1 of 48 rows (2.1 %): what is longer is cut off"
    result = project.train(project.finetune, "cutoff_len=80")
    assert result.status == 0 and "warning: " not in result.output, result.output
    for phase in ("pretrain", "finetune"):
        manifest = json.loads((project.run_folder(phase) / "manifest.json").read_text())
        assert [f"warning: {line}" for line in manifest["data_warnings"]] == [*told, cut]
    info = json.loads((project.top / "data" / "dataset_info.json").read_text())
    shutil.copy(project.data, project.data.with_name("Toy_test.json"))
    info["Toy_test"] = {**info["Toy"], "file_name": "common-sense-reasoning/Toy_test.json"}
    (project.top / "data" / "dataset_info.json").write_text(json.dumps(info))
    before = snapshot(project.run_folder("finetune"))
    result = project.train(project.finetune, "cutoff_len=80")
    assert "complete" in result.output and "warning: " not in result.output
    assert snapshot(project.run_folder("finetune")) == before


def test_a_complete_run_is_skipped(trained_once):
    before = snapshot(trained_once.saves)
    result = trained_once.train(trained_once.finetune)
    assert result.status == 0 and "complete" in result.output
    assert snapshot(trained_once.saves) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p.finetune.write_text(p.finetune.read_text().replace("5e-3", "4e-3")),
            "learning_rate (0.005 -> 0.004)",
        ),
        (lambda p: p.data.write_text(p.data.read_text().replace("is 3 even", "is 3 odd")), "the rows of"),
        (lambda p: (p.top / "models/Tiny-Llama/tokenizer_config.json").write_text("{}"), "the tokenizer's files"),
        (lambda p: (p.top / "models/Tiny-Llama/config.json").open("a").write(" "), "the base model's files"),
    ],
)
def test_a_run_whose_recipe_data_or_base_changed_is_stale_and_kept(collected, change, message):
    change(collected)
    before = snapshot(collected.run_folder("finetune"))
    line = one_error_line(collected.train(collected.finetune))
    assert "stale" in line and message in line and "FORCE=1" in line
    assert snapshot(collected.run_folder("finetune")) == before


def test_comments_and_rows_that_are_not_trained_on_do_not_make_a_run_stale(collected):
    collected.finetune.write_text("# a comment\r\n" + collected.finetune.read_text().replace("\n", "\r\n"))
    rows = json.loads(collected.data.read_text())
    collected.data.write_text(json.dumps(rows + rows[:1]))  # max_samples takes the first 48
    info = collected.top / "data" / "dataset_info.json"
    info.write_text(json.dumps({"Toy": json.loads(info.read_text())["Toy"] | {"held_out": 16}}))
    assert "complete" in collected.train(collected.finetune).output


@pytest.mark.parametrize("name", ["checkpoint-9.safetensors", "adapter_config.json"])
def test_a_broken_collection_is_collected_again_and_stays_until_then(collected, name):
    folder = collected.run_folder("finetune")
    before = hashes(folder)
    (folder / name).unlink()
    left = snapshot(folder)
    failed = collected.train(collected.finetune, "template=nonsense")
    assert "stale" in one_error_line(failed) and snapshot(folder) == left, "what is left of it is not of this recipe"
    (collected.top / "models" / "Tiny-Llama" / "tokenizer.json").rename(collected.top / "tokenizer.json")
    one_error_line(collected.train(collected.finetune))
    assert snapshot(folder) == left, "nothing is removed before it is replaced"
    (collected.top / "tokenizer.json").rename(collected.top / "models" / "Tiny-Llama" / "tokenizer.json")
    result = collected.train(collected.finetune)
    assert result.status == 0, result.output
    assert f"{name} is missing; it is made again, and what is left of it stays until then" in result.output
    assert hashes(folder) == before


def test_a_broken_pretrain_is_trained_again_and_a_finetune_names_what_it_lacks(pretrained, pretrained_once):
    resumed = pretrained.run_folder("pretrain") / "checkpoint-4"
    os.truncate(resumed / "optimizer.pt", 100)
    line = one_error_line(pretrained.train(pretrained.finetune))
    assert "checkpoint-4 has " in line and line.endswith("train the pretrain recipe again")
    assert pretrained.train(pretrained.pretrain).status == 0
    stored = pretrained_once.run_folder("pretrain") / "checkpoint-4" / "adapter_model.safetensors"
    assert (resumed / "adapter_model.safetensors").read_bytes() == stored.read_bytes()
    assert pretrained.train(pretrained.finetune).status == 0


def test_a_pretrain_with_a_flipped_bit_in_its_adapter_config_is_not_resumed(pretrained):
    config = pretrained.run_folder("pretrain") / "checkpoint-4" / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"lora_dropout": 0.0', '"lora_dropout": 0.1'))
    assert config.read_text() != text
    line = one_error_line(pretrained.train(pretrained.finetune))
    assert "adapter_config.json does not have its recorded sha256" in line and "FORCE=1" in line


def test_force_redoes_a_stale_run_with_the_same_result(collected):
    folder = collected.run_folder("finetune")
    before = hashes(folder)
    collected.finetune.write_text(collected.finetune.read_text().replace("save_total_limit: 6", "save_total_limit: 3"))
    result = collected.train(collected.finetune, FORCE="1")
    assert result.status == 0, result.output
    assert hashes(folder) == {step: before[step] for step in (10, 11, 12)}
    assert {p.name for p in collected.saves.iterdir()} == {folder.name, collected.run_folder("pretrain").name}


def test_force_replaces_runs_of_the_same_phase_only(collected):
    """An output_dir without a run folder's name must not replace other files."""
    before = snapshot(collected.saves) | snapshot(collected.scripts)
    for output_dir in (str(collected.saves), ".", str(collected.run_folder("pretrain"))):
        result = collected.train(collected.finetune, f"output_dir={output_dir}", FORCE="1")
        line = one_error_line(result)
        assert any(said in line for said in ("change output_dir", "folder for this run alone", "is a pretrain's")), line
    assert snapshot(collected.saves) | snapshot(collected.scripts) == before


def test_changed_data_with_unchanged_file_times_is_trained_on(pretrained):
    """datasets caches a file by its time and size, and `cp -p` or rsync keep both."""
    assert pretrained.train(pretrained.finetune).status == 0
    before = hashes(pretrained.run_folder("finetune"))
    stat = pretrained.data.stat()
    pretrained.data.write_text(pretrained.data.read_text().replace("[A]", "[C]"))
    os.utime(pretrained.data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert pretrained.train(pretrained.finetune, FORCE="1").status == 0
    assert hashes(pretrained.run_folder("finetune"))[12] != before[12]


def test_a_run_fails_when_its_data_changes_during_the_training(project):
    run = project.start(project.pretrain, "max_steps=100", "save_steps=100")
    while not list(project.saves.glob(".*staging*/trainer_log.jsonl")):
        assert run.process.is_alive(), run.log.read_text()
        time.sleep(0.05)
    project.data.write_text(project.data.read_text().replace("[A]", "[C]"))
    assert "changed while it was trained on" in one_error_line(run.wait())
    assert not project.run_folder("pretrain").exists()


def test_a_run_folder_may_be_a_link_to_a_larger_disk(collected, tmp_path):
    folder = collected.run_folder("finetune")
    shutil.move(folder, tmp_path / folder.name)
    folder.symlink_to(tmp_path / folder.name)
    before = hashes(folder)
    assert collected.train(collected.finetune, "save_total_limit=2", FORCE="1").status == 0
    assert folder.is_symlink() and hashes(folder) == {step: before[step] for step in (11, 12)}


def test_recipes_may_be_reached_through_a_link(project, tmp_path):
    (tmp_path / "short").symlink_to(project.scripts)
    assert project.train(tmp_path / "short" / project.pretrain.name).status == 0
    assert project.run_folder("pretrain").is_dir()


def test_a_diverged_training_fails(project):
    result = project.train(project.pretrain, "learning_rate=1e30", "max_grad_norm=0")
    assert "diverged" in one_error_line(result)
    assert not project.run_folder("pretrain").exists()


def test_keeping_fewer_steps_is_an_override(pretrained):
    assert pretrained.train(pretrained.finetune, "save_total_limit=2").status == 0
    assert sorted(hashes(pretrained.run_folder("finetune"))) == [11, 12]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learning_rate=1e-3", "learning_rate=0.001 has no effect: it resumes with the value in its checkpoint"),
        ("weight_decay=0.1", "weight_decay=0.1 has no effect"),
        ("adam_beta2=0.9", "adam_beta2=0.9 has no effect"),
        ("num_train_epochs=3", "num_train_epochs=3 has no effect: max_steps, 12, decides"),
        ("save_strategy=epoch", "save_strategy=epoch has no effect"),
        ("save_steps=2", "save_steps 2 would collect nothing"),
    ],
)
def test_an_override_without_effect_is_refused_and_a_complete_collection_stays_complete(collected, override, said):
    folder = collected.run_folder("finetune")
    before = hashes(folder)
    for force in ("", "1"):
        assert said in one_error_line(collected.train(collected.finetune, override, FORCE=force))
    assert hashes(folder) == before
    assert collected.train(collected.finetune).status == 0


def test_an_override_that_the_pretrain_was_given_too_is_taken_by_the_finetune(project):
    assert project.train(project.pretrain, "learning_rate=1e-3", "weight_decay=0.1").status == 0
    result = project.train(project.finetune, "learning_rate=1e-3", "weight_decay=0.1")
    assert result.status == 0 and "has no effect" not in result.output, result.output
    shutil.rmtree(project.run_folder("pretrain"))
    again = project.train(project.finetune, "learning_rate=1e-3", "weight_decay=0.1")
    assert again.status == 0 and "complete: " in again.output


@pytest.mark.parametrize("gone", [False, True])
def test_a_resumed_checkpoint_that_was_never_there_is_refused_though_the_collection_is_complete(collected, gone):
    if gone:  # as after PRUNE_PRETRAIN=1
        shutil.rmtree(collected.run_folder("pretrain"))
        assert "complete: " in collected.train(collected.finetune).output
    own = "../../../saves/common-sense-reasoning/Toy/Tiny-Llama_lora-rank_4_pretrain/checkpoint"
    for place in (f"{own}-5", "nowhere", own.replace("Tiny", "Other") + "-4"):
        line = one_error_line(collected.train(collected.finetune, f"resume_from_checkpoint={place}"))
        assert f"{Path(place).name} does not exist" in line and ("steps there: 4, 8" in line) == (
            place[-1] == "5" and not gone
        )
    collected.finetune.write_text(collected.finetune.read_text().replace("checkpoint-4", "checkpoint-5"))
    assert "checkpoint-5 does not exist" in one_error_line(collected.train(collected.finetune))


def test_a_learning_rate_that_resuming_overrides_is_reported(pretrained):
    pretrained.finetune.write_text(
        pretrained.finetune.read_text().replace("learning_rate: 5e-3", "learning_rate: 1e-3")
    )
    result = pretrained.train(pretrained.finetune)
    assert result.status == 0 and "learning_rate 0.001 has no effect" in result.output
    entries = json.loads((pretrained.run_folder("finetune") / "manifest.json").read_text())["checkpoints"]
    assert max(entry["learning_rate"] for entry in entries) > 1e-3, "the pretrain's 5e-3 is used"


def test_another_seed_gets_its_own_run_folder(project):
    assert project.train(project.pretrain, "seed=7").status == 0
    assert project.train(project.finetune, "seed=7").status == 0
    manifest = json.loads((project.run_folder("finetune", seed="_seed-7") / "manifest.json").read_text())
    assert manifest["seed"] == 7 and manifest["pretrain"]["run"].endswith("_lora-rank_4_seed-7_pretrain")


def test_the_phase_follows_from_a_recipes_content_not_its_name(project):
    named = project.top / "any name.yaml"
    text = project.pretrain.read_text().replace("../../../", "")
    named.write_text(text.replace("_lora-rank_4_pretrain", "_plain"))
    result = project.train(named)
    assert result.status == 0, result.output
    folder = project.saves / "Tiny-Llama_plain"
    assert json.loads((folder / "manifest.json").read_text())["phase"] == "pretrain"
    assert (folder / "checkpoint-8" / "optimizer.pt").is_file()


def test_a_finetune_without_its_pretrain_names_the_command_that_makes_it(project):
    line = one_error_line(project.train(project.finetune))
    assert "train_with_rank.sh" in line and project.pretrain.name in line and "no checkpoints" in line
    *_, recipe, rank = shlex.split(line.split("make it with: ")[1])
    assert Path(recipe) == project.pretrain and rank == "4", "the path has a blank"
    assert not project.saves.exists() or not any(project.saves.iterdir())


def test_a_missing_resume_step_lists_the_saved_steps(pretrained):
    pretrained.finetune.write_text(pretrained.finetune.read_text().replace("checkpoint-4", "checkpoint-5"))
    line = one_error_line(pretrained.train(pretrained.finetune))
    assert "checkpoint-5 does not exist" in line and "4, 8" in line


def test_a_resumed_checkpoint_of_another_rank_is_refused(pretrained):
    pretrained.run_folder("pretrain").rename(pretrained.saves / "pre")
    text = pretrained.finetune.read_text()
    pretrained.finetune.write_text(text.replace("Tiny-Llama_lora-rank_4_pretrain/", "pre/"))
    assert "has rank 4, not 2" in one_error_line(pretrained.train(pretrained.finetune, rank=2))


@pytest.mark.parametrize("content", ["{", "[]", '{"peft_type": "LORA", "r": 4, "megatron_core": "this"}', None])
def test_a_broken_adapter_config_of_a_resumed_checkpoint_is_one_line(pretrained, content):
    path = pretrained.run_folder("pretrain") / "checkpoint-4" / "adapter_config.json"
    path.write_text(content) if content else path.unlink()
    assert "checkpoint-4/adapter_config.json" in one_error_line(pretrained.train(pretrained.finetune))


def test_more_kept_steps_than_remain_are_refused(pretrained):
    line = one_error_line(pretrained.train(pretrained.finetune, "save_total_limit=9"))
    assert "only 8 remain" in line and "max_steps to 13" in line
    assert not pretrained.run_folder("finetune").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("learning_rat=1e-4", "learning_rat"),
        ("lr_scheduler_type=cosin", "cosin"),
        ("template=smollm3", "template 'smollm3' is not known"),
        ("dataset=Nothing", "Nothing"),
        ("model_name_or_path=../../../models/Absent", "models/Absent"),
        ("finetuning_type=full", "has no rank"),
        ("output_dir=saves/x_lora-rank_16_y", "names rank 16"),
        ("lora_rank=16", "contradicts rank 4"),
        ("save_safetensors=true", "save_safetensors"),
        ("max_samples=abc", "max_samples 'abc' is not a whole number"),
        ("max_steps=0", "max_steps 0 trains nothing"),
        ("per_device_train_batch_size=0", "is less than 1"),
        ("lora_target=nonsense", "nonsense"),
        ("learning_rate=fast", "fast"),
        ("stage=dpo", "cannot be trained"),
        ("tokenized_path=x", "tokenized_path reads other rows"),
        ("hf_hub_token=hf_x", "is no place for a token"),
        ("dataset_dir=null", "dataset_dir"),
    ],
)
def test_an_invalid_setting_is_one_error_line_and_leaves_no_files(project, argument, message):
    before = snapshot(project.top)
    result = project.train(project.pretrain, argument)
    assert message in one_error_line(result)
    (project.top / "log.txt").unlink()
    assert {name for name in snapshot(project.top) if ".hashes.json" not in name} == set(before)


def test_a_dataset_without_responses_is_refused(project):
    info = project.top / "data" / "dataset_info.json"
    project.data.write_text(json.dumps([{"prompt": "x"}]))
    entry = {"file_name": "common-sense-reasoning/Toy.json", "columns": {"prompt": "prompt"}, "prompts_only": True}
    info.write_text(json.dumps({"Toy": entry}))
    assert "prompts" in one_error_line(project.train(project.pretrain))


def test_a_second_run_of_the_same_recipe_and_rank_ends_immediately(project):
    first = project.start(project.pretrain, "max_steps=2000", "save_steps=2000")
    temporary = project.scripts / "tiny_Toy_pretrain_temp_rank_4.yaml"
    while not temporary.exists():
        assert first.process.is_alive(), first.log.read_text()
        time.sleep(0.05)
    log = project.top / "second.txt"
    second = fork_server.start("train", [str(project.pretrain), "4"], {}, log).wait()
    assert "is running already" in one_error_line(second)
    assert temporary.exists() and first.process.is_alive()
    assert first.kill_when(lambda: True, signal.SIGTERM)
    assert first.process.exitcode == 143
    assert not temporary.exists() and not list(project.saves.iterdir()), "a stopped run leaves nothing behind"


def test_ctrl_c_removes_the_rendered_recipe(project):
    run = project.start(project.pretrain, "max_steps=2000", "save_steps=2000")
    temporary = project.scripts / "tiny_Toy_pretrain_temp_rank_4.yaml"
    assert run.kill_when(temporary.exists, signal.SIGINT)
    assert run.process.exitcode == 130
    assert not temporary.exists() and "Traceback" not in run.log.read_text()


def test_a_pretrain_killed_at_any_moment_is_repeated_with_the_same_hashes(project, trained_once):
    points = [
        lambda: any(project.saves.glob(".*staging*")),
        lambda: any(project.saves.glob(".*staging*/checkpoint-4/adapter_model.safetensors")),
        lambda: any(project.saves.glob(".*staging*/manifest.json")),
    ]
    for point in points:
        project.start(project.pretrain).kill_when(point)
        folder = project.run_folder("pretrain")
        assert not folder.exists() or (folder / "manifest.json").is_file()
    assert project.train(project.pretrain).status == 0
    assert hashes(folder) == hashes(trained_once.run_folder("pretrain"))


KILL_POINTS = {
    "rendered": lambda project: (project.scripts / "tiny_Toy_finetune_temp_rank_4.yaml").exists(),
    "staging": lambda project: any(project.saves.glob(".*staging*")),
    "first checkpoint": lambda project: any(project.saves.glob(".*staging*/checkpoint-7.safetensors")),
    "half a file": lambda project: any(project.saves.glob(".*staging*/.checkpoint-*.tmp")),
    "collected": lambda project: any(project.saves.glob(".*staging*/collected.json")),
    "manifest": lambda project: any(project.saves.glob(".*staging*/manifest.json")),
    "published": lambda project: project.run_folder("finetune").exists(),
}
LIKE_OTHERS = ("rendered", "first checkpoint", "collected")  # as "staging", "half a file" and "manifest"


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[pytest.mark.slow] if point in LIKE_OTHERS else []) for point in KILL_POINTS]
)
def test_a_finetune_killed_at_any_moment_is_repeated_with_the_same_hashes(pretrained, trained_once, point):
    killed = pretrained.start(pretrained.finetune)
    killed.kill_when(lambda: KILL_POINTS[point](pretrained))
    folder = pretrained.run_folder("finetune")
    if folder.exists():
        assert hashes(folder) == hashes(trained_once.run_folder("finetune"))
    for path in pretrained.saves.rglob("checkpoint-*.safetensors"):
        load_file(path)  # a file under its final name is complete
    result = pretrained.train(pretrained.finetune)
    assert result.status == 0, result.output
    assert hashes(folder) == hashes(trained_once.run_folder("finetune"))
    assert {path.name for path in pretrained.saves.iterdir()} == {folder.name, pretrained.run_folder("pretrain").name}
    assert len(list(pretrained.scripts.iterdir())) == 2


LEFT = {
    "staging": lambda project, folder: (folder.parent / f".{folder.name}.staging-01234567").mkdir(),
    "lock": lambda project, folder: (folder.parent / f".{folder.name}.lock").write_text(
        f"4194305 {socket.gethostname()}\n"
    ),
    "old": lambda project, folder: shutil.copytree(folder, folder.parent / f".{folder.name}.old"),
    "rendered": lambda project, folder: (
        project.scripts / f"tiny_Toy_{folder.name.rpartition('_')[2]}_temp_rank_4.yaml"
    ).write_text("x: 1\n"),
    "claim": lambda project, folder: (
        (folder.parent / f".{folder.name}.attempt").write_text("01234567"),
        os.utime(folder.parent / f".{folder.name}.attempt", (1, 1)),
    ),
}


@pytest.mark.parametrize("how", ["train", "collect"])
def test_a_call_on_a_complete_run_removes_what_killed_ones_left(collected, monkeypatch, how):
    """A FORCE=1 run that was killed, or one that was killed between naming its folder and unlocking it."""
    before = {path.name for path in [*collected.saves.iterdir(), *collected.scripts.iterdir()]}
    for leave in LEFT.values():
        for phase in ("pretrain", "finetune"):
            leave(collected, collected.run_folder(phase))
    if how == "train":
        for recipe in (collected.pretrain, collected.finetune):
            done = collected.train(recipe)
            assert done.status == 0 and "complete: " in done.output
    else:
        cell = Cell("Toy", "tiny", 4, (collected.pretrain, collected.finetune))
        assert status.is_complete(cell)
    assert {path.name for path in [*collected.saves.iterdir(), *collected.scripts.iterdir()]} == before
    assert len(hashes(collected.run_folder("finetune"))) == 6


def test_what_a_running_forced_run_uses_is_not_removed(collected):
    cell = Cell("Toy", "tiny", 4, (collected.pretrain, collected.finetune))
    folder = collected.run_folder("finetune")
    staging = folder.parent / f".{folder.name}.staging-01234567"
    staging.mkdir()
    claim = folder.parent / f".{folder.name}.attempt"
    claim.write_text("01234567")
    with locks.lock(files.beside(folder, "lock")):
        assert status.is_complete(cell) and staging.is_dir()
    assert status.is_complete(cell) and not staging.is_dir() and claim.is_file(), "it may be about to start"


def test_data_loader_processes_that_outlive_a_killed_run_do_not_hold_its_lock(project):
    run = project.start(project.pretrain, "max_steps=3000", "save_steps=3000", "dataloader_num_workers=2")
    assert run.kill_when(lambda: any(project.saves.glob(".*staging*/trainer_log.jsonl")))
    result = project.train(project.pretrain)
    assert result.status == 0, result.output


def test_a_forced_run_killed_between_the_two_renames_keeps_the_old_one(collected):
    folder = collected.run_folder("finetune")
    before = hashes(folder)
    folder.rename(folder.with_name(f".{folder.name}.old"))  # where a kill inside the swap leaves it
    folder.with_name(f".{folder.name}.staging-dead").mkdir()
    assert "complete" in collected.train(collected.finetune).output
    assert hashes(folder) == before
    assert not any(path.name.startswith(".") for path in collected.saves.iterdir())


def test_shared_tokenised_rows_with_a_flipped_bit_are_made_again(pretrained, trained_once, tmp_path):
    """A flipped bit in the cache that a sweep's runs share leaves size and time alone, and is a valid other token."""
    cache = tmp_path / "tokens"
    assert pretrained.train(pretrained.finetune, PARAGEN_TOKENS=str(cache)).status == 0
    (cached,) = cache.iterdir()
    (arrow,) = cached.glob("train/*.arrow")
    before = arrow.stat()
    content = bytearray(arrow.read_bytes())
    tokens = pyarrow.ipc.open_stream(arrow.read_bytes()).read_all()["input_ids"][9].values
    content[content.index(tokens.to_numpy().tobytes())] ^= 1
    arrow.write_bytes(content)
    os.utime(arrow, ns=(before.st_atime_ns, before.st_mtime_ns))
    damaged = files.sha256_of(arrow)

    again = pretrained.train(pretrained.finetune, FORCE="1", PARAGEN_TOKENS=str(cache))
    assert again.status == 0 and "these tokenised rows are damaged; they are made again" in again.output, again.output
    assert hashes(pretrained.run_folder("finetune")) == hashes(trained_once.run_folder("finetune"))
    (made,) = cache.iterdir()
    assert made == cached and files.sha256_of(arrow) != damaged

    used = pretrained.train(pretrained.finetune, FORCE="1", PARAGEN_TOKENS=str(cache))
    assert used.status == 0 and "made again" not in used.output
    assert hashes(pretrained.run_folder("finetune")) == hashes(trained_once.run_folder("finetune"))


@pytest.mark.parametrize("phase", ["pretrain", "finetune"])
def test_a_full_disk_is_one_error_line_and_leaves_no_run(project, phase):
    """A file-size limit stands in for the disk; it stops adapters (300 kB), not tokenised rows (60 kB)."""
    recipe = getattr(project, phase)
    if phase == "finetune":
        assert project.train(project.pretrain, rank=64).status == 0
    before = snapshot(project.saves) if project.saves.exists() else {}
    result = project.train(recipe, rank=64, FILE_SIZE_LIMIT="200000")
    line = one_error_line(result)
    assert "File too large" in line and f"_lora-rank_64_{phase}" in line
    assert snapshot(project.saves) == before


def test_two_processes_train_the_same_adapters_as_one(pretrained, trained_once):
    """With DEVICES=cpu,cpu, through torchrun: the same rows in each step, so the same weights."""
    result = pretrained.train(pretrained.finetune, DEVICES="cpu,cpu")
    assert result.status == 0, result.output
    manifest = json.loads((pretrained.run_folder("finetune") / "manifest.json").read_text())
    assert manifest["processes"] == 2 and manifest["trained_rows"] == 48
    for step in STEPS:
        ours = load_file(pretrained.run_folder("finetune") / f"checkpoint-{step}.safetensors")
        alone = load_file(trained_once.run_folder("finetune") / f"checkpoint-{step}.safetensors")
        for key in alone:
            assert (ours[key] - alone[key]).norm() <= 1e-4 * alone[key].norm() + 1e-8, (step, key)


@pytest.mark.slow
def test_a_failure_of_several_processes_is_one_line_with_its_cause(project):
    """Each of them finds it, after the import of LLaMA-Factory."""
    line = one_error_line(project.train(project.pretrain, "template=nonsense", DEVICES="cpu,cpu"))
    assert "template 'nonsense' is not known" in line


def test_several_gpus_on_a_machine_without_one_are_one_error_line(project):
    from paragen.common import devices

    if devices.nvidia_driver():
        pytest.skip("this machine has a GPU")
    line = one_error_line(project.train(project.pretrain, DEVICES="0,1", CUDA_VISIBLE_DEVICES=""))
    assert line == "error: DEVICES=0,1: there is no NVIDIA GPU here; omit DEVICES, or set DEVICES=cpu"


def test_a_batch_that_devices_cannot_share_is_refused(project):
    """Rows or accumulation are divided. With a processor, only accumulation: the loss is a mean over micro-batches."""
    from paragen.recipes import batches

    assert batches.split_batch({"gradient_accumulation_steps": 4}, 2, True) == {"gradient_accumulation_steps": 2}
    one_batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert batches.split_batch(one_batch, 2, False) == {"per_device_train_batch_size": 4}
    for count, has_processor in ((3, False), (2, True)):
        with pytest.raises(batches.UserError, match="cannot share"):
            batches.split_batch(one_batch, count, has_processor)


def test_a_gpu_that_torch_cannot_use_is_an_error_and_not_a_cpu_run(project, tmp_path):
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 470.57.02\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "DEVICES": ""}
    line = one_error_line(project.train(project.pretrain, **environment))
    assert "470.57.02" in line and "DEVICES=cpu" in line


def test_beside_a_busy_process_a_run_has_the_same_threads_and_the_same_bits(pretrained, tmp_path):
    """Cores that other programs use do not count. The manifest has the number, and another one makes nothing stale."""
    other = pretrained.copy(tmp_path / "beside a busy process")
    environment = {"OMP_NUM_THREADS": "2"}
    assert pretrained.train(pretrained.finetune, **environment).status == 0
    busy = [subprocess.Popen([PYTHON, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        result = other.train(other.finetune, **environment)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert result.status == 0 and "float32 on the CPU, 2 threads" in result.output, result.output
    alone, beside = pretrained.run_folder("finetune"), other.run_folder("finetune")
    assert hashes(alone) == hashes(beside) and len(hashes(alone)) == len(STEPS)
    assert [json.loads((folder / "manifest.json").read_text())["threads"] for folder in (alone, beside)] == [2, 2]
    assert "complete: " in other.train(other.finetune, OMP_NUM_THREADS="1").output


def test_a_run_prints_neither_tokens_nor_advice_that_its_device_cannot_follow(project):
    """LLaMA-Factory prints its first row's token numbers, and twice recommends a precision that the CPU lacks."""
    result = project.train(project.pretrain)
    assert result.status == 0, result.output
    assert not any(text in result.output for text in ("input_ids", "label_ids", "example:", "mixed precision"))
    shown = project.train(project.pretrain, FORCE="1", LLAMAFACTORY_VERBOSITY="INFO").output
    assert "input_ids" in shown and "training example:" in shown and "mixed precision" not in shown
    line = one_error_line(project.train(project.pretrain, FORCE="1", LLAMAFACTORY_VERBOSITY="loud"))
    assert line == "error: LLAMAFACTORY_VERBOSITY=LOUD: is not a level; DEBUG, INFO, WARN or ERROR"


def test_a_bfloat16_base_is_trained_in_float32_on_the_cpu(project, tmp_path):
    model = project.top / "models" / "Tiny-Llama"
    shutil.rmtree(model)
    subprocess.run([PYTHON, ROOT / "tests/helpers/tiny.py", model, "bfloat16"], check=True)
    result = project.train(project.pretrain)
    assert result.status == 0 and "float32 on the CPU" in result.output, result.output


def test_a_template_of_prompt_templates_is_known_to_llamafactory(project):
    result = project.train(project.pretrain, "template=question_answer", LLAMAFACTORY_VERBOSITY="info")
    assert result.status == 0 and "Question: is " in result.output, result.output


@pytest.mark.parametrize("key", ["bf16", "pure_bf16"])
def test_a_card_without_bfloat16_is_one_line_with_the_way_out(monkeypatch, key):
    import torch

    from paragen.common.cli import UserError
    from paragen.training import process

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(UserError, match=f"^x.yaml: {key}: true, but Tesla T4 has no bfloat16; write fp16: true in"):
        process.check_bf16(Path("x.yaml"), {key: True})
    process.check_bf16(Path("x.yaml"), {"fp16": True, "bf16": False})
