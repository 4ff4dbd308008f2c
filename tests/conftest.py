"""What the tests share: a tiny random model, a small dataset, recipes for both, and real LLaMA-Factory runs of them."""

import compileall
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "utils"))
sys.path.insert(0, str(ROOT / "tests"))
for name in (
    "DATASET",
    "MODEL",
    "RANK",
    "RANKS",
    "ENGINE",
    "KEEP",
    "SEED",
    "FORCE",
    "FORMAT",
    "OUT",
    "DTYPE",
    "STEPS",
    "SPLIT",
    "LIMIT",
    "DEVICES",
    "ENGINE",
    "CUDA_VISIBLE_DEVICES",
    "MAKEFLAGS",
    "MAKELEVEL",
):
    os.environ.pop(name, None)
if not os.environ.get("TEST_GPU"):
    os.environ["DEVICES"] = "cpu"  # the same hashes on a machine with a GPU
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it is ignored
# The scripts are compiled once, or each of hundreds of processes would do it. These processes compile nothing, or of a
# script that is changed twice within a second the first would be kept.
compileall.compile_dir(ROOT / "utils", quiet=1)
sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = False, "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as runs have it; the process that runs are forked from reads it early
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors; two runs at once then do not fight for two cores

from helpers import fork_server, handmade, packed_project, tiny, tiny_models  # noqa: E402
from helpers.clone import copy_folder  # noqa: E402
from helpers.forked_python import PYTHON  # noqa: E402

os.environ["PY"] = PYTHON  # no test sets up a .venv, or changes this one, unless it unsets PY

CATEGORY = "common-sense-reasoning"


@pytest.fixture(autouse=True)
def own_environment():
    """Variables that a test sets, or code that it calls (such as devices.pin), are gone after it."""
    before = dict(os.environ)
    yield
    before.update({key: value for key, value in os.environ.items() if key == "PYTEST_CURRENT_TEST"})
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A random two-layer Llama with its own tokenizer, made in another process so that this one stays fork-safe."""
    folder = tmp_path_factory.mktemp("models") / "Tiny-Llama"
    subprocess.run([PYTHON, ROOT / "tests" / "helpers" / "tiny.py", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def every_model(tmp_path_factory) -> Path:
    """A folder with the tiny models of every architecture, by name. Read only."""
    folder = tmp_path_factory.mktemp("every")
    packed_project.make_models(folder, *tiny_models.NAMES, *tiny_models.KIN)
    return folder


class Project:
    """A user's folder tree: models/, data/, collect_scripts/, saves/, with a space in its path."""

    def __init__(self, top: Path, model: Path):
        self.top = top
        self.scripts = top / "collect_scripts" / CATEGORY / "Toy"
        self.saves = top / "saves" / CATEGORY / "Toy"
        self.scripts.mkdir(parents=True)
        shutil.copytree(model, top / "models" / model.name)
        (top / "data" / CATEGORY).mkdir(parents=True)
        rows = [{"prompt": f"is {n} even?", "response": f"[{'AB'[n % 2]}]", "system": "answer"} for n in range(64)]
        self.data = top / "data" / CATEGORY / "Toy.json"
        self.data.write_text(json.dumps(rows))
        columns = {"prompt": "prompt", "response": "response", "system": "system"}
        info = {"Toy": {"file_name": f"{CATEGORY}/Toy.json", "columns": columns}}
        (top / "data" / "dataset_info.json").write_text(json.dumps(info))
        self.pretrain = self.scripts / "tiny_Toy_pretrain.yaml"
        self.finetune = self.scripts / "tiny_Toy_finetune.yaml"
        self.pretrain.write_text(tiny.RECIPE.format(phase="pretrain", model=model.name) + tiny.PRETRAIN)
        self.finetune.write_text(
            tiny.RECIPE.format(phase="finetune", model=model.name) + tiny.FINETUNE.format(model=model.name)
        )

    def run_folder(self, phase: str, rank: int = 4, seed: str = "") -> Path:
        return self.saves / f"Tiny-Llama_lora-rank_{rank}{seed}_{phase}"

    def train(self, recipe: Path, *arguments: str, rank: int = 4, **environment: str) -> fork_server.Result:
        """Run utils/train.py on a recipe, forked from a process that has imported LLaMA-Factory."""
        return self.start(recipe, *arguments, rank=rank, **environment).wait()

    def start(self, recipe: Path, *arguments: str, rank: int = 4, **environment: str) -> fork_server.Run:
        return fork_server.start("train", [str(recipe), str(rank), *arguments], environment, self.top / "log.txt")

    def copy(self, top: Path) -> "Project":
        """The same project at another place, whatever it holds by now."""
        shutil.copytree(self.top, top)
        twin = object.__new__(Project)
        for name, value in vars(self).items():
            setattr(twin, name, top / value.relative_to(self.top))
        return twin


@pytest.fixture
def project(tmp_path, model_folder) -> Project:
    return Project(tmp_path / "my project", model_folder)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, model_folder) -> Project:
    """A project whose pretrain and collection are complete. Read only: tests that change something take `collected`."""
    project = Project(tmp_path_factory.mktemp("trained") / "my project", model_folder)
    for recipe in (project.pretrain, project.finetune):
        result = project.train(recipe)
        assert result.status == 0, result.output
    return project


@pytest.fixture(scope="session")
def pretrained_once(trained_once, tmp_path_factory) -> Project:
    """The same with the pretrain alone. Read only."""
    project = trained_once.copy(tmp_path_factory.mktemp("pretrained") / "my project")
    shutil.rmtree(project.run_folder("finetune"))
    return project


@pytest.fixture
def pretrained(pretrained_once, tmp_path) -> Project:
    return pretrained_once.copy(tmp_path / "my project")


@pytest.fixture
def collected(trained_once, tmp_path) -> Project:
    return trained_once.copy(tmp_path / "my project")


@pytest.fixture
def repository(tmp_path, model_folder) -> Path:
    """A copy of the repository with recipes for two tiny models and two datasets alone."""
    top = tmp_path / "a clone"
    copy_folder("utils", top)
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy(ROOT / name, top)
    for model in ("Tiny-One", "Tiny-Two"):
        shutil.copytree(model_folder, top / "models" / model)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    (top / "data" / CATEGORY).mkdir(parents=True)
    info = {}
    for dataset in ("To-y", "Other"):
        rows = [{"prompt": f"{dataset} {n}", "response": "[A]", "system": ""} for n in range(16)]
        (top / "data" / CATEGORY / f"{dataset}.json").write_text(json.dumps(rows))
        columns = {"prompt": "prompt", "response": "response", "system": "system"}
        info[dataset] = {"file_name": f"{CATEGORY}/{dataset}.json", "columns": columns}
        folder = top / "collect_scripts" / CATEGORY / dataset
        folder.mkdir(parents=True)
        for model in ("Tiny-One", "Tiny-Two"):
            for phase, ending in (("pretrain", tiny.PRETRAIN), ("finetune", tiny.FINETUNE.format(model=model))):
                text = (tiny.RECIPE.format(phase=phase, model=model) + ending).replace("Toy", dataset)
                (folder / f"{model.lower()}_{dataset}_{phase}.yaml").write_text(text)
    (top / "data" / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(ROOT / "collect_scripts" / CATEGORY / "collect_all_dataset.sh", top / "collect_scripts" / CATEGORY)
    return top


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A browser, for all tests that look at a page; skips them where there is none, but fails where CI is set."""
    from helpers import chromium

    if not chromium.is_installed():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Chromium and chromedriver are not installed")
    browser = chromium.start(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.quit()


@pytest.fixture
def place(tmp_path, monkeypatch) -> handmade.Place:
    """A saves/ and a data/ for handmade collections, which every script of this process takes for its own."""
    return handmade.Place(tmp_path / "my place", monkeypatch)


@pytest.fixture
def trained_place(place, trained_once) -> handmade.Place:
    """The same with the really trained collection."""
    shutil.copytree(trained_once.top / "saves", place.saves, dirs_exist_ok=True)
    shutil.copytree(trained_once.top / "data", place.data)
    return place


def pytest_collection_finish():
    """Have the garbage collector leave alone what was imported so far: modules of which some are very large."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; `make test-all` runs it, `make test` does not")
    config.addinivalue_line(
        "markers", "runs: waits for processes such as trainings; `make test` has a pytest for these"
    )
    config.addinivalue_line("markers", "alone: kills what runs; `make test-all` has nothing beside it")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; `make test-gpu` runs it")
