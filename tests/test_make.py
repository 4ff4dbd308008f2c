"""The Makefile's targets as a user calls them, in a copy of the repository without its models and saves."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import cells
import rank_config

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["setup", "lock", "model", "register", "check-data", "pretrain", "finetune", "collect", "clean-checkpoints"]
TARGETS += ["verify", "demo", "test", "lint"]


@pytest.fixture
def repository(tmp_path) -> Path:
    top = tmp_path / "a clone"
    for name in ("utils", "collect_scripts", "data"):
        shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy(ROOT / name, top)
    for name in ("models", "saves"):
        (top / name).mkdir()
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    (top / ".venv").symlink_to(ROOT / ".venv")
    return top


def make(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DEVICES": "cpu", "HF_ENDPOINT": "http://127.0.0.1:9"}  # no hub is reached from here
    return subprocess.run(["make", *arguments], cwd=repository, env=environment, capture_output=True, text=True)


def files_in(folder: Path) -> dict[str, bytes]:
    kept = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() for path in kept if ".venv" not in path.parts}


def test_make_alone_lists_every_target_with_a_line_of_help(repository):
    done = make(repository)
    assert done.returncode == 0
    for target in TARGETS:
        assert f"make {target} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain"], "say which dataset"),
        (["pretrain", "DATASET=arcd"], "dataset 'arcd' is not known; known: ARC-c, Demo"),
        (["collect", "DATASET=arcc", "MODEL=gpt5"], "known: qwen2.5-0.5b, smollm2-135m"),
        (["pretrain", "DATASET=arcc", "RANK=0"], "rank '0' is not a positive whole number"),
        (["collect", "DATASET=Demo", "SEED=x"], "seed 'x' is not a whole number"),
        (["collect", "DATASET=Demo", "KEEP=0"], "save_total_limit 0 is less than 1"),
        (["collect", "DATASET=Demo"], "make model MODEL=smollm2-135m"),
        (["pretrain", "DATASET=Demo"], "make model MODEL=smollm2-135m"),
        (["pretrain", "DATASET=ARC c", "MODEL=smollm2"], "known: qwen2.5-0.5b, smollm2-135m"),
        (["model", "MODEL=llama-9b"], "model 'llama-9b' is not known; known: bert, gemma-3-4b, gpt2,"),
        (["model", "MODEL=qwen2.5-0.5b"], "Qwen/Qwen2.5-0.5B-Instruct: http://127.0.0.1:9 cannot be reached"),
        (["verify", "DATASET=Demo"], "'Demo' is not known; known: none yet"),
        (["clean-checkpoints", "DATASET=Demo"], "known: none yet"),
        (["register", "FILE=data/nowhere/x.json"], "x.json"),
        (["register", "FILE=; touch injected"], "touch injected"),
    ],
)
def test_a_wrong_value_is_one_line_that_lists_the_right_ones(repository, arguments, said):
    before = files_in(repository)
    done = make(repository, *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1, done.stderr
    assert said in errors[0] and "Traceback" not in done.stderr
    assert files_in(repository) == before


def test_verify_of_an_empty_saves_folder_is_fine(repository):
    assert make(repository, "verify").returncode == 0


def test_check_data_is_clean_on_what_the_repository_ships(repository):
    done = make(repository, "check-data")
    assert done.returncode == 0, done.stderr


def test_register_takes_a_users_file(repository):
    (repository / "data" / "math" / "My Set.json").parent.mkdir(exist_ok=True)
    (repository / "data" / "math" / "My Set.json").write_text('[{"q": "1+1", "a": "2"}, {"q": "1+2", "a": "3"}]')
    done = make(repository, "register", "FILE=data/math/My Set.json", "MAP=prompt=q response=a")
    assert done.returncode == 0, done.stderr
    assert make(repository, "check-data").returncode == 0


@pytest.mark.parametrize("path", cells.recipes().values(), ids=lambda path: path.name)
def test_each_recipe_that_we_ship_is_filed_under_its_own_name(path):
    """Model, dataset, phase and rank in the file's name, its paths and its keys agree; a pair resumes what it saved."""
    config = rank_config.load(path)
    dataset = path.parent.name
    phase = rank_config.phase_of(config)
    assert path.name.endswith(f"_{dataset}_{phase}.yaml") and config["dataset"] == dataset
    category = path.parent.parent.name
    model = Path(config["model_name_or_path"]).name
    run = f"{model}_lora-rank_{config['lora_rank']}_{phase}"
    assert rank_config.run_folder(path, config) == ROOT / "saves" / category / dataset / run
    assert rank_config.resolve(path, config["dataset_dir"]) == ROOT / "data"
    if phase == "finetune":
        pretrain = rank_config.load(path.with_name(path.name.replace("_finetune", "_pretrain")))
        resumed = rank_config.resolve(path, config["resume_from_checkpoint"])
        assert resumed.parent == rank_config.run_folder(path, pretrain)
        step = int(resumed.name.removeprefix("checkpoint-"))
        assert step % pretrain["save_steps"] == 0 and step <= pretrain["max_steps"]
        assert config["max_steps"] == step + config["save_total_limit"]
        for key in ("template", "learning_rate", "lora_target", "cutoff_len", "max_samples"):
            assert config[key] == pretrain[key], key


def test_recipes_are_read_by_plain_yaml_too():
    for path in cells.recipes().values():
        assert yaml.safe_load(path.read_text()) == rank_config.load(path), path
