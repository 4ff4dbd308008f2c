"""Recipes: those that we ship are sound, each kind of fault is found, and new pairs come without editing any Python."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers.forked_python import PYTHON

from paragen.common import paths
from paragen.model import base_models
from paragen.recipes import check, figures, lookup, new_pair, recipe_file, render, vocabulary

ROOT = Path(__file__).resolve().parent.parent
COMMON = ("ARC-c", "ARC-e", "BoolQ", "HellaSwag", "OBQA", "PIQA", "WinoGrande")
CODING = ("Code-74k-ShareGPT", "CodeAlpaca-20K", "Evol-Instruct-Code-80K-V1", "Glaive-Code-Assistant-V2")
CODING += ("LLaMA-Python-Codes-30K", "Python-Codes-25K", "Rosetta-Code")
MATH = ("Competition_Math", "Math-IIO-68K-Mini", "Math-Plus", "Math_QA", "Mu-Math", "ToT-Math-V1", "MATH")
SHIPPED = {(dataset, model) for dataset in COMMON for model in base_models.table() if "-1.5b" not in model}
SHIPPED = {(dataset, model) for dataset, model in SHIPPED if model not in ("qwen2.5-7b", "qwen2.5-vl-3b")}
SHIPPED |= {(dataset, model) for dataset in CODING + MATH for model in ("qwen2.5-1.5b", "qwen2.5-7b")}
SHIPPED |= {("MathV360K", "qwen2.5-vl-3b"), ("Demo", "smollm2-135m")}
PRETRAIN, FINETUNE = "qwen2.5-0.5b_ARC-c_pretrain.yaml", "qwen2.5-0.5b_ARC-c_finetune.yaml"


@pytest.fixture
def repository(tmp_path) -> Path:
    """A copy of what we ship but the scripts, in a folder with a blank in its name; nothing that a user added to it."""
    top = tmp_path / "a project"
    for folder in ("models", "saves", "data/common-sense-reasoning"):
        (top / folder).mkdir(parents=True)
    known = lookup.recipes()
    recipes = [known[dataset, model, phase] for dataset, model in SHIPPED for phase in paths.PHASES]
    recipes += [ROOT / "collect_scripts" / name for name in ("figures.yaml", "test.yaml")]
    data = [ROOT / "data" / name for name in ("sources.yaml", "common-sense-reasoning/Demo_train.json")]
    for path in [*recipes, *data, ROOT / "models" / "models.yaml"]:
        copy = top / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    info = json.loads((ROOT / "data" / "dataset_info.json").read_text())
    (top / "data" / "dataset_info.json").write_text(json.dumps({"Demo": info["Demo"]}))
    return top


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A copy of some recipes that the scripts, in this process, take for the repository."""
    for dataset in ("common-sense-reasoning/ARC-c", "math/MATH"):
        shutil.copytree(ROOT / "collect_scripts" / dataset, tmp_path / "collect_scripts" / dataset)
    folders = {"SCRIPTS": "collect_scripts", "DATA": "data", "MODELS": "models", "SAVES": "saves", "ROOT": ""}
    for name, folder in folders.items():
        monkeypatch.setattr(paths, name, tmp_path / folder)
    return tmp_path


def run(repository: Path, script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    unset = {name: value for name, value in os.environ.items() if name not in ("FROM", "TEMPLATE", "CATEGORY")}
    command = [PYTHON, ROOT / "utils" / script, *arguments]
    environment = unset | {"PARAGEN_TOP": str(repository)} | environment
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)


def errors_of(done: subprocess.CompletedProcess) -> list[str]:
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()


def pair_in(repository: Path, name: str = PRETRAIN) -> Path:
    return next(repository.glob(f"collect_scripts/*/*/{name}"))


def edit(path: Path, old: str, new: str) -> int:
    """Replace the one `old` in a file; the line where it stood."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))
    return text[: text.index(old)].count("\n") + 1


def new_model(repository: Path, name: str, config: dict) -> None:
    (repository / "models" / name).mkdir()
    (repository / "models" / name / "config.json").write_text(json.dumps(config))


def new_dataset(repository: Path, name: str, rows: int, category: str = "math", **entry) -> None:
    file = repository / "data" / category / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps([{"prompt": f"{n} + 1 =", "response": str(n + 1)} for n in range(rows)]))
    info_file = repository / "data" / "dataset_info.json"
    info = json.loads(info_file.read_text())
    columns = {"prompt": "prompt", "response": "response"}
    info[name] = {"file_name": f"{category}/{name}.json", "columns": columns, **entry}
    info_file.write_text(json.dumps(info))


# --- what the repository ships


def test_every_dataset_has_a_pair_for_each_of_its_models():
    assert {(*pair, phase) for pair in SHIPPED for phase in paths.PHASES} <= set(lookup.recipes())


def test_all_that_we_ship_is_clean(repository):
    done = run(repository, "check_recipes.py")
    assert done.returncode == 0, done.stderr
    assert f"{2 * len(SHIPPED) + 1} recipes, no faults" in done.stdout
    assert "no row was rendered with models that are not in models/: make model MODEL='bert gemma-3-4b" in done.stdout


@pytest.mark.parametrize(("dataset", "model"), sorted(SHIPPED - {("Demo", "smollm2-135m")}))
def test_each_shipped_pair_collects_the_100_steps_after_its_pretrain(dataset, model):
    """... with the rows a step of its source: in one batch for a small model on short rows, else activations twice."""
    pretrain, finetune = (render.load(lookup.recipes()[dataset, model, phase]) for phase in paths.PHASES)
    assert finetune["save_total_limit"] == 100 and finetune["max_steps"] == pretrain["max_steps"] + 100
    rows = {"MathV360K": (64, 64)}.get(dataset, (8, 2) if dataset in COMMON else (8, 8))
    entry = base_models.table()[model]
    for config, expected in zip((pretrain, finetune), rows, strict=True):
        micro, accumulated = config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
        small = entry["parameters"] < 2e9 and config["cutoff_len"] <= 2048 and not entry["processor"]
        assert micro * accumulated == expected
        assert config["disable_gradient_checkpointing"] is small
        assert accumulated == 1 or not small
        assert config["lora_target"] == entry["lora_target"] and config["template"] == entry["template"]
        assert config["max_samples"] <= (vocabulary.trainable_rows(dataset) or 100_000) or dataset in COMMON


def test_models_with_a_processor_keep_their_sources_micro_batches():
    """Their loss is a mean of micro-batch means, so another split of the same rows trains something else."""
    known = lookup.recipes()
    for dataset, model, split in (("ARC-c", "gemma-3-4b", (1, 8)), ("MathV360K", "qwen2.5-vl-3b", (8, 8))):
        config = render.load(known[dataset, model, "pretrain"])
        assert (config["per_device_train_batch_size"], config["gradient_accumulation_steps"]) == split


def test_a_recipe_with_a_template_of_ours_says_that_stock_llamafactory_lacks_it():
    for (dataset, model, _), path in lookup.recipes().items():
        if (dataset, model) not in SHIPPED:
            continue
        head = path.read_text().split("###")[0]
        assert ("utils/prompt_templates.py" in head and "stock LLaMA-Factory" in head) == (model in ("bert", "gpt2"))


def test_recipes_are_read_by_plain_yaml_too():
    for path in [*lookup.recipes().values(), ROOT / "collect_scripts" / "test.yaml"]:
        assert yaml.safe_load(path.read_text()) == render.load(path), path


def test_keys_and_templates_are_those_of_llamafactory_itself():
    """They are read from its source text, since importing it takes many seconds; here it is imported once."""
    code = """
import dataclasses, json
from llamafactory.hparams import parser
from llamafactory.data.template import TEMPLATES
keys = sorted({f.name for c in parser._TRAIN_ARGS for f in dataclasses.fields(c) if f.init})
print("RESULT" + json.dumps([keys, sorted(TEMPLATES)]))
"""
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True)
    keys, templates = json.loads(done.stdout.split("RESULT")[1])
    assert sorted(vocabulary.known_keys()) == keys
    assert sorted(vocabulary.stock_templates()) == templates


# --- faults, planted

FAULTS = [
    # file, what stands there, what is planted, the key that is named, a part of what is said
    (PRETRAIN, "dataset: ARC-c\n", "dataset: ARC-e\n", "dataset", "the file and its folder say 'ARC-c'"),
    (PRETRAIN, "dataset: ARC-c\n", "dataset: ARC-x\n", "dataset", "make register FILE=data/<category>/ARC-x.json"),
    (PRETRAIN, "dataset: ARC-c\n", "dataset: Human_Eval\n", "dataset", "'Human_Eval' "),
    (PRETRAIN, "dataset_dir: ../../../data", "dataset_dir: ../data", "dataset_dir", "../../../data"),
    (
        PRETRAIN,
        "models/Qwen2.5-0.5B-Instruct",
        "models/gpt2",
        "model_name_or_path",
        "the file's name says qwen2.5-0.5b",
    ),
    (PRETRAIN, "../../../models/Qwen", "Qwen/Qwen", "model_name_or_path", "is not a folder in models/"),
    (PRETRAIN, "../../../models/Qwen", "/home/me/models/Qwen", "model_name_or_path", "a path of one machine"),
    (PRETRAIN, "template: qwen ", "template: qwn ", "template", "near: qwen"),
    (PRETRAIN, "lora_target: all", "lora_target: q_porj,v_proj", "lora_target", "'q_porj'"),
    (PRETRAIN, "lora_target: all", "lora_target: q_proj,lm_head", "lora_target", "tied"),
    ("gpt2_ARC-c_pretrain.yaml", "lora_target: c_attn,c_proj,c_fc", "lora_target: all", "lora_target", "c_attn,c_proj"),
    ("bert_ARC-c_pretrain.yaml", "intermediate.dense,output.dense", "decoder", "lora_target", "head or an embedding"),
    (PRETRAIN, "lora-rank_8_pretrain", "lora-rank_16_pretrain", "output_dir", "lora-rank_8_pretrain"),
    (PRETRAIN, "lora-rank_8_pretrain", "lora-rank_8_finetune", "output_dir", "lora-rank_8_pretrain"),
    (PRETRAIN, "../../../saves/", "../../../../saves/", "output_dir", "leaves the repository"),
    (PRETRAIN, "trust_remote_code: false", "trust_remote_code: true", "trust_remote_code", "set it to false"),
    (PRETRAIN, "warmup_steps: 0.01 ", "warmup_ratio: 0.01 ", "warmup_ratio", "`warmup_steps: 0.01` is the same"),
    (PRETRAIN, "plot_loss: true", "overwrite_output_dir: true", "overwrite_output_dir", "deprecated"),
    (PRETRAIN, "plot_loss: true", "save_safetensors: true", "save_safetensors", "LLaMA-Factory has no such key"),
    (PRETRAIN, "learning_rate: 5.0e-5", "learning_rat: 5.0e-5", "learning_rat", "near: learning_rate"),
    (PRETRAIN, "learning_rate: 5.0e-5", "learning_rate: fast", "learning_rate", "'fast' is not a number"),
    (PRETRAIN, "max_steps: 700 ", "num_train_epochs: 5 ", "max_steps", "is missing"),
    (PRETRAIN, "max_steps: 700 ", "max_steps: 600 ", "resume_from_checkpoint", "step 700 is not there after"),
    (
        PRETRAIN,
        "save_steps: 350 ",
        "save_total_limit: 1\nsave_only_model: true\nsave_steps: 350 ",
        "save_only_model",
        "",
    ),
    (PRETRAIN, "cutoff_len: 2048", "cutoff_len: 1024", "cutoff_len", "is 2048, in"),
    (PRETRAIN, "MODEL=qwen2.5-0.5b RANK", "MODEL=gpt2 RANK", "header", "line 4 says MODEL=gpt2"),
    (FINETUNE, "make data DATASET=ARC-c", "make data DATASET=ARC-e", "header", "line 2 says DATASET=ARC-e"),
    (FINETUNE, "learning_rate: 5.0e-5", "learning_rate: 1.0e-4", "learning_rate", "is 0.0001, in"),
    (FINETUNE, "template: qwen ", "template: qwen3 ", "template", "is 'qwen3', in"),
    (FINETUNE, "checkpoint-700", "checkpoint-650", "resume_from_checkpoint", "step 650 is not there after"),
    (FINETUNE, "/checkpoint-700", "/", "resume_from_checkpoint", "is no checkpoint-<step>"),
    (FINETUNE, "max_steps: 800 ", "max_steps: 799 ", "max_steps", "800 = the resumed step 700 + save_total_limit 100"),
    (FINETUNE, "save_steps: 1 ", "save_steps: 100 ", "save_steps", "does not collect every step"),
    (FINETUNE, "save_total_limit: 100 ", "# ", "save_total_limit", "None is not how many"),
    (FINETUNE, "save_only_model: true ", "save_only_model: false ", "save_only_model", "optimizer's state"),
    ("qwen2.5-7b_MATH_pretrain.yaml", "max_samples: 4750", "max_samples: 5000", "max_samples", "after the first 4750"),
    ("qwen2.5-7b_MATH_pretrain.yaml", "max_samples: 4750", "# ", "max_samples", "all rows are trained on"),
    (PRETRAIN, "do_train: true", "do_train: false", "do_train", "nothing would be trained"),
    (PRETRAIN, "dataset: ARC-c\n", "dataset: ARC-c_test\n", "dataset", "'ARC-c_test' is a test split: checkpoints are"),
    (PRETRAIN, "max_steps: 700 ", "max_steps: 0 ", "max_steps", "0 is not a positive whole number"),
    (FINETUNE, "max_steps: 800 ", "max_steps: 700 ", "max_steps", "700 leaves no step to collect"),
]


@pytest.mark.parametrize(("name", "old", "new", "key", "said"), FAULTS)
def test_a_planted_fault_is_named_with_file_line_and_key(clone, name, old, new, key, said):
    recipe = pair_in(clone, name)
    edit(recipe, old, new)
    messages = check.check([recipe, recipe_file.other_half(recipe)]).messages
    told = [message for message in messages if f": {key}" in message and said in message]
    assert told, messages
    file, _, number = told[0].split(": ")[0].partition(":")  # FILE:LINE: KEY: ...
    if number:
        assert (clone / file).read_text().splitlines()[int(number) - 1].startswith(f"{key}:")


@pytest.mark.parametrize(
    ("name", "old", "new", "keys"),
    [
        # the other model's layers and run folder are not asked for, too
        (PRETRAIN, "models/Qwen2.5-0.5B-Instruct", "models/gpt2", {"model_name_or_path"}),
        # ... nor the other dataset's rows and category
        (PRETRAIN, "dataset: ARC-c\n", "dataset: MATH\n", {"dataset"}),
        # max_steps is to be set, so num_train_epochs is not without effect beside it
        (PRETRAIN, "max_steps: 700 ", "num_train_epochs: 5 ", {"max_steps"}),
        # a pretrain by name is not asked for a finetune's keys
        (PRETRAIN, "save_steps: 350 ", "save_steps: 1\nresume_from_checkpoint: x #", {"resume_from_checkpoint"}),
    ],
)
def test_a_fault_is_not_followed_by_others_that_contradict_it(clone, name, old, new, keys):
    recipe = pair_in(clone, name)
    edit(recipe, old, new)
    messages = [line for line in check.check([recipe]).messages if f"/{name}" in line]
    assert {line.split(": ")[1] for line in messages} == keys, messages


def test_a_finetune_may_train_more_steps_than_it_keeps(clone):
    recipe = pair_in(clone, FINETUNE)
    edit(recipe, "max_steps: 800 ", "max_steps: 950 ")
    assert check.check([recipe, pair_in(clone)]).messages == []


def test_all_faults_are_named_not_just_the_first(repository):
    first, second = pair_in(repository), pair_in(repository, FINETUNE)
    edit(first, "template: qwen ", "template: qwn ")
    edit(first, "trust_remote_code: false", "trust_remote_code: true")
    edit(second, "save_steps: 1 ", "save_steps: 2 ")
    done = run(repository, "check_recipes.py")
    assert done.returncode == 1
    for key in ("template", "trust_remote_code", "save_steps"):
        assert any(f": {key}: " in line for line in errors_of(done)), key
    assert f"in 2 of {2 * len(SHIPPED) + 1} recipes" in errors_of(done)[-1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("dataset: [", "not valid YAML"),
        ("", "not a recipe"),
        ("- a\n- b\n", "not a recipe"),
        ("just text\n", "not a recipe"),
        ("dataset: ARC-c\ndataset: ARC-e\n", "duplicate key"),
        ("a: !!python/object/apply:os.system ['touch /tmp/x']\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_a_fault_too(repository, content, said):
    recipe = pair_in(repository)
    recipe.write_text(content)
    lines = errors_of(run(repository, "check_recipes.py", recipe))
    assert any(PRETRAIN in line and said in line for line in lines), lines


def test_half_a_pair_and_a_misnamed_recipe_are_faults(repository):
    pair_in(repository, FINETUNE).unlink()
    pair_in(repository, "bert_PIQA_pretrain.yaml").rename(repository / "collect_scripts" / "math" / "bert.yaml")
    lines = errors_of(run(repository, "check_recipes.py"))
    assert any(PRETRAIN in line and f"{FINETUNE} is missing" in line for line in lines)
    assert any("collect_scripts/math/bert.yaml: its name: is not of the form" in line for line in lines)


def test_the_layers_of_a_model_that_is_here_are_looked_up_in_its_weights(repository, model_folder):
    shutil.copytree(model_folder, repository / "models" / "Tiny-Llama")
    new_dataset(repository, "Sums", 40)
    assert run(repository, "make_recipe.py", MODEL="tiny-llama", DATASET="Sums", TEMPLATE="qwen").returncode == 0
    recipe = pair_in(repository, "tiny-llama_Sums_pretrain.yaml")
    edit(recipe, "lora_target: all", "lora_target: q_proj,c_attn")
    lines = errors_of(run(repository, "check_recipes.py", recipe))
    assert any("'c_attn': models/Tiny-Llama has no such layer" in line for line in lines)
    assert not any("'q_proj'" in line for line in lines[:1])


def test_rows_that_a_recipes_cutoff_cuts_are_counted_where_tokenizer_and_data_are_here(repository, model_folder):
    shutil.copytree(model_folder, repository / "models" / "Tiny-Llama")
    new_dataset(repository, "Sums", 40)
    file = repository / "data" / "math" / "Sums.json"
    rows = json.loads(file.read_text())
    rows[3]["response"] = "é" * 1100  # two tokens each
    rows[39]["response"] = "x" * 5000  # is not trained on
    file.write_text(json.dumps(rows))
    assert run(repository, "make_recipe.py", MODEL="tiny-llama", DATASET="Sums", TEMPLATE="qwen").returncode == 0
    recipe = pair_in(repository, "tiny-llama_Sums_pretrain.yaml")
    for half in (recipe, recipe_file.other_half(recipe)):
        text = re.sub(r"max_samples: \d+.*|cutoff_len: \d+.*", "", half.read_text())
        half.write_text(f"{text}max_samples: 38\ncutoff_len: 2048\n")
    done = run(repository, "check_recipes.py", recipe)
    assert done.returncode == 0, done.stderr
    [note] = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert note.endswith(": cutoff_len: 2048 cuts at least 1 of 38 rows (2.6 %) of Sums"), note
    for half in (recipe, recipe_file.other_half(recipe)):
        half.write_text(half.read_text().replace("cutoff_len: 2048", "cutoff_len: 4096"))
    assert "note: " not in run(repository, "check_recipes.py", recipe).stdout


# --- make recipe


def test_a_new_dataset_and_a_new_model_get_a_pair_that_is_sound(repository):
    new_dataset(repository, "My Sums", 800)
    new_model(repository, "Falcon-Mini", {"model_type": "llama", "max_position_embeddings": 2048})
    done = run(repository, "make_recipe.py", MODEL="falconmini", DATASET="mysums", TEMPLATE="falcon")
    assert done.returncode == 0, done.stderr
    assert "make collect DATASET=MySums MODEL=falcon-mini RANK=16" in done.stdout, (
        "as settings take a name with a blank"
    )
    folder = repository / "collect_scripts" / "math" / "My Sums"
    pretrain, finetune = (folder / f"falcon-mini_My Sums_{phase}.yaml" for phase in ("pretrain", "finetune"))
    told, collecting = yaml.safe_load(pretrain.read_text()), yaml.safe_load(finetune.read_text())
    assert told["template"] == "falcon" and told["cutoff_len"] == 2048  # no longer than the model's positions
    assert told["max_steps"] == 300 and "3 epochs of 100 steps" in pretrain.read_text()
    assert collecting["max_steps"] == 400
    assert run(repository, "check_recipes.py").returncode == 0


def test_a_gpt2_of_ones_own_gets_the_layers_that_all_does_not_find(repository):
    new_model(repository, "My-GPT2", {"model_type": "gpt2", "n_positions": 1024})
    done = run(repository, "make_recipe.py", MODEL="my-gpt2", DATASET="ARC-c", TEMPLATE="gpt2")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(pair_in(repository, "my-gpt2_ARC-c_pretrain.yaml").read_text())
    assert config["lora_target"] == "c_attn,c_proj,c_fc" and config["cutoff_len"] == 1024


def test_from_takes_the_figures_of_another_model_or_dataset(repository):
    new_dataset(repository, "Sums", 1600)
    pair = pair_in(repository)
    edit(pair, "bf16: true", "weight_decay: 0.1\nbf16: true")
    edit(pair, "learning_rate: 5.0e-5", "learning_rate: 3.25e-5")
    done = run(repository, "make_recipe.py", MODEL="qwen2.5-1.5b", DATASET="ARC-c", FROM="qwen2.5-0.5b")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(pair_in(repository, "qwen2.5-1.5b_ARC-c_pretrain.yaml").read_text())
    assert (config["learning_rate"], config["weight_decay"], config["max_steps"]) == (3.25e-5, 0.1, 700)
    done = run(repository, "make_recipe.py", MODEL="qwen2.5-0.5b", DATASET="Sums", FROM="arcc")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(pair_in(repository, "qwen2.5-0.5b_Sums_pretrain.yaml").read_text())
    assert config["max_steps"] == 1000  # ARC-c's 5 epochs, here of 200 steps
    done = run(repository, "make_recipe.py", MODEL="gpt2", DATASET="Sums", FROM="demo/smollm2-135m")
    assert done.returncode == 0, done.stderr
    finetune = yaml.safe_load(pair_in(repository, "gpt2_Sums_finetune.yaml").read_text())
    assert finetune["save_total_limit"] == 16


def test_what_we_ship_is_what_make_recipe_writes(repository):
    """So that the form of all recipes is said in one place."""
    for dataset, model in (
        ("ARC-c", "qwen2.5-0.5b"),
        ("PIQA", "bert"),
        ("MATH", "qwen2.5-7b"),
        ("MathV360K", "qwen2.5-vl-3b"),
    ):
        shipped = {path: path.read_bytes() for path in repository.glob(f"collect_scripts/*/{dataset}/{model}_*")}
        assert len(shipped) == 2
        for path in shipped:
            path.unlink()
        assert run(repository, "make_recipe.py", MODEL=model, DATASET=dataset).returncode == 0
        assert {path: path.read_bytes() for path in shipped} == shipped


def test_rows_that_a_dataset_holds_out_are_not_trained_on(repository):
    new_dataset(repository, "Sums", 800, held_out=80)
    assert run(repository, "make_recipe.py", MODEL="gpt2", DATASET="Sums").returncode == 0
    config = yaml.safe_load(pair_in(repository, "gpt2_Sums_pretrain.yaml").read_text())
    assert config["max_samples"] == 720 and config["max_steps"] == 270


def test_a_recipe_can_be_taken_from_one_that_does_not_say_when_it_saves(repository):
    new_dataset(repository, "Sums", 800)
    pretrain = pair_in(repository, "qwen2.5-0.5b_ARC-c_pretrain.yaml")
    kept = [line for line in pretrain.read_text().splitlines(True) if not line.startswith("save_steps:")]
    pretrain.write_text("".join(kept))
    done = run(repository, "make_recipe.py", MODEL="gpt2", DATASET="Sums", FROM="ARC-c/qwen2.5-0.5b")
    assert done.returncode == 0, errors_of(done)
    assert "save_steps" in yaml.safe_load(pair_in(repository, "gpt2_Sums_pretrain.yaml").read_text())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "make recipe MODEL=... DATASET=..."),
        ({"MODEL": "qwen2.5-0.5b"}, "make recipe MODEL=... DATASET=..."),
        ({"MODEL": "qwen2.5-0.5b", "DATASET": "ARC-c"}, "is there already"),
        ({"MODEL": "qwen2.5-9b", "DATASET": "ARC-c"}, "model 'qwen2.5-9b' is not known; did you mean qwen2.5-7b?"),
        ({"MODEL": "gpt2", "DATASET": "ARC-x"}, "make register FILE=data/<category>/ARC-x.json"),
        ({"MODEL": "my-qwen", "DATASET": "ARC-c"}, "TEMPLATE=...; near: "),
        ({"MODEL": "my-qwen", "DATASET": "ARC-c", "TEMPLATE": "qwn"}, "near: qwen"),
        ({"MODEL": "gpt2", "DATASET": "Mu-Math", "FROM": "nothing"}, "FROM=nothing: no such pair"),
        ({"MODEL": "gpt2", "DATASET": "Mu-Math", "CATEGORY": "coding"}, "omit CATEGORY"),
        ({"MODEL": "gpt2", "DATASET": "Mu-Math", "CATEGORY": "sums"}, "category 'sums' is not known"),
        ({"MODEL": "gpt2", "DATASET": "../x"}, "'../x' is not known"),
        (
            {"MODEL": "gpt2", "DATASET": "arcctest"},
            "dataset 'ARC-c_test' is a test split: checkpoints are scored on it",
        ),
        ({"MODEL": "gpt2", "DATASET": "Mu-Math ARC-c_test"}, "make recipe DATASET=ARC-c MODEL=..."),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_everything_as_it_was(repository, asked, said):
    new_model(repository, "My-Qwen", {"model_type": "qwen2"})
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    done = run(repository, "make_recipe.py", **asked)
    assert done.returncode == 1 and len(errors_of(done)) == 1 and said in done.stderr, done.stderr
    after = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    assert after == before


def test_near_templates_are_those_of_the_models_family():
    known = sorted(vocabulary.stock_templates())
    assert "qwen3" in new_pair.near_templates("qwen3-4b-instruct", known)
    assert "llama3" in new_pair.near_templates("meta-llama-3.1-8b", known)


def test_a_small_model_takes_short_rows_in_one_batch_and_a_large_one_accumulates():
    def split(model: str, batch: list[int], cutoff_len: int) -> tuple:
        pair = new_pair.requested_pair(model, "ARC-c")
        return figures.split_batch(batch, pair, cutoff_len)

    assert split("qwen2.5-0.5b", [1, 8], 2048) == (8, 1, True)
    assert split("qwen2.5-1.5b", [1, 8], 4096) == (2, 4, False)
    assert split("qwen2.5-7b", [1, 8], 4096) == (1, 8, False)
    assert split("gemma-3-4b", [1, 8], 2048) == (1, 8, False)


@pytest.mark.parametrize("content", ["datasets: [", "datasets: {}\n", "- a\n"])
def test_a_broken_table_of_figures_is_named(repository, content):
    (repository / "collect_scripts" / "figures.yaml").write_text(content)
    done = run(repository, "make_recipe.py", MODEL="gpt2", DATASET="Mu-Math")
    assert done.returncode == 1 and "collect_scripts/figures.yaml" in errors_of(done)[0]


def test_a_pair_without_a_resumed_step_has_no_figures_to_take(repository):
    edit(pair_in(repository, FINETUNE), "/checkpoint-700", "")
    done = run(repository, "make_recipe.py", MODEL="gpt2", DATASET="Demo", FROM="ARC-c/qwen2.5-0.5b")
    assert done.returncode == 1 and FINETUNE in errors_of(done)[0]
