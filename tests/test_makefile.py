"""The Makefile's targets as a user calls them, in a copy of the repository without its models and saves."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.clone import copy_folder
from helpers.forked_python import PLAIN

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ["setup", "lock", "model", "register", "check-data", "pretrain", "finetune", "collect", "clean-checkpoints"]
TARGETS += ["plan", "index", "export", "import", "stats", "report", "publish", "pull"]
TARGETS += [
    "recipe",
    "check-recipes",
    "verify",
    "demo",
    "test",
    "lint",
    "setup-dev",
    "format",
    "test-all",
    "test-gpu",
    "evaluate",
]
TARGETS += ["generator", "generate", "data", "data-all", "made-tasks", "collect-all", "status", "disk", "clean-up"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A copy of the repository, for all targets that leave it as it is."""
    return copied(tmp_path_factory.mktemp("makefile"))


@pytest.fixture
def own_repository(tmp_path) -> Path:
    """A copy for one test alone."""
    return copied(tmp_path)


def copied(folder: Path) -> Path:
    top = folder / "a clone"
    for name in ("utils", "collect_scripts", "data"):
        copy_folder(name, top)
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy(ROOT / name, top)
    for name in ("models", "saves"):
        (top / name).mkdir()
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
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
        (["pretrain"], "name a dataset"),
        (["pretrain", "DATASET=arcd"], "dataset 'arcd' is not known; did you mean ARC-e?; known: ARC-c, ARC-e, BoolQ,"),
        (["collect", "DATASET=arcc", "MODEL=gpt5"], "known: bert, gemma-3-4b, gpt2,"),
        (["pretrain", "DATASET=arcc", "RANK=0"], "rank '0' is not a positive whole number"),
        (["collect", "DATASET=Demo", "SEED=x"], "seed 'x' is not a whole number"),
        (["collect", "DATASET=Demo", "KEEP=0"], "KEEP=0: is not a whole number from 1 on"),
        (["collect", "DATASET=Demo"], "make model MODEL=smollm2-135m"),
        (["pretrain", "DATASET=Demo"], "make model MODEL=smollm2-135m"),
        (["pretrain", "DATASET=ARC-c", "MODEL=smollm2"], "did you mean smollm2-135m?; known: bert, gemma-3-4b, gpt2,"),
        (
            ["model", "MODEL=llama-9b"],
            "model 'llama-9b' is not known; did you mean llama-7b?; known: bert, gemma-3-4b, gpt2,",
        ),
        (["model", "MODEL=qwen2.5-0.5b"], "Qwen/Qwen2.5-0.5B-Instruct: http://127.0.0.1:9 cannot be reached"),
        (["recipe", "MODEL=gpt2"], "make recipe MODEL=... DATASET=..."),
        (["recipe", "MODEL=gpt2", "DATASET=arcc"], "gpt2_ARC-c_pretrain.yaml: is there already"),
        (["recipe", "MODEL=gpt2", "DATASET=Demo", "FROM=; touch injected"], "touch injected"),
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


def test_register_takes_a_users_file(own_repository):
    (own_repository / "data" / "math" / "My Set.json").parent.mkdir(exist_ok=True)
    (own_repository / "data" / "math" / "My Set.json").write_text('[{"q": "1+1", "a": "2"}, {"q": "1+2", "a": "3"}]')
    done = make(own_repository, "register", "FILE=data/math/My Set.json", "MAP=prompt=q response=a")
    assert done.returncode == 0, done.stderr
    assert make(own_repository, "check-data").returncode == 0


def test_recipe_writes_a_pair_that_check_recipes_accepts(own_repository):
    done = make(own_repository, "recipe", "MODEL=gpt2", "DATASET=demo", "FROM=smollm2-135m", "TEMPLATE=default")
    assert done.returncode == 0, done.stderr
    pair = sorted(own_repository.glob("collect_scripts/*/Demo/gpt2_Demo_*.yaml"))
    assert len(pair) == 2 and "template: default" in pair[0].read_text()
    assert make(own_repository, "check-recipes").returncode == 0
    done = make(own_repository, "check-recipes", f"FILE={pair[0]}")
    assert done.returncode == 0 and "2 recipes, no faults" in done.stdout
    pair[0].write_text(pair[0].read_text().replace("template: default", "template: none"))
    done = make(own_repository, "check-recipes")
    assert done.returncode != 0 and "template" in done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_with_py_runs_that_python_and_sets_nothing_up(repository, target):
    done = make(repository, "-n", target, "PY=/usr/bin/python3")
    assert done.returncode == 0, done.stderr
    assert ".venv" not in done.stdout and "setup_env" not in done.stdout
    assert "/usr/bin/python3 " in done.stdout or target.startswith("setup")
    environment = {**os.environ, "PY": "/usr/bin/python3"}
    named = subprocess.run(["make", "-n", target], cwd=repository, env=environment, capture_output=True, text=True)
    assert named.stdout == done.stdout, "in the environment it counts as on the command line"


def test_py_runs_a_target_without_venv(repository):
    done = make(repository, "check-recipes", f"PY={PLAIN}")
    assert done.returncode == 0 and "no faults" in done.stdout, done.stderr
    assert not (repository / ".venv").exists()


def test_py_reaches_the_script_that_a_target_calls(repository):
    done = make(repository, "pretrain", "DATASET=Demo", f"PY={PLAIN}")
    assert "make model MODEL=smollm2-135m" in done.stderr and not (repository / ".venv").exists()


@pytest.mark.parametrize("options", ["", " -X utf8"])
def test_py_in_the_environment_is_the_python_of_a_shell_script(repository, tmp_path, options):
    """From any folder; a command of several words will do."""
    (recipe,) = repository.glob("collect_scripts/*/Demo/smollm2-135m_*_pretrain.yaml")
    environment = {**os.environ, "PY": PLAIN + options}
    for command, said in (
        (["utils/train_with_rank.sh", recipe, "0"], "rank '0' is not a positive whole number"),
        (["collect_scripts/math/collect_all_dataset.sh", "Nothing"], "dataset 'Nothing' is not known"),
    ):
        command = ["bash", repository / command[0], *command[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 1 and said in done.stderr, done.stderr
    assert not (repository / ".venv").exists()


def test_every_shell_script_takes_its_python_by_the_same_rule():
    scripts = [*ROOT.glob("utils/*.sh"), *ROOT.glob("collect_scripts/*/*.sh")]
    assert len(scripts) > 5
    for script in scripts:
        calls = [line for line in script.read_text().splitlines() if "bin/python" in line]
        assert calls and all(re.search(r'\$\{PY:-"\$[^"]+/\.venv/bin/python"\}', line) for line in calls), script
