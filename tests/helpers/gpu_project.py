"""A project with tiny models and one dataset, whose recipes are short; its scripts run on the GPUs that there are."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from paragen.model import base_models

ROOT = Path(__file__).resolve().parents[2]
# What makes the recipes small.
PRETRAIN = {"max_steps": 6, "save_steps": 3, "cutoff_len": 96}
FINETUNE = {"max_steps": 10, "save_total_limit": 3, "cutoff_len": 96, "checkpoint": 6}


class TinyProject:
    """models/, data/, collect_scripts/ and saves/ for the dataset Toy, with recipes for each model.

    Args:
        top: a folder to be made.
        models: names of models/models.yaml, of which tiny ones are made.
        in_float16: the models whose recipes compute in float16; the others in bfloat16.
    """

    def __init__(self, top: Path, models: list[str], in_float16: tuple[str, ...] = ()):
        self.top, self.models = top, models
        (top / "data" / "math").mkdir(parents=True)
        (top / "models").mkdir()
        (top / "collect_scripts").mkdir()
        shutil.copy(ROOT / "models" / "models.yaml", top / "models")
        shutil.copy(ROOT / "collect_scripts" / "figures.yaml", top / "collect_scripts")
        (top / "data" / "dataset_info.json").write_text("{}")
        shutil.copy(ROOT / "data" / "sources.yaml", top / "data")
        make_models = [sys.executable, ROOT / "tests" / "helpers" / "tiny_models.py", top, *models]
        subprocess.run(make_models, check=True, capture_output=True)
        for name in models:
            (top / name).rename(self.folder(name))
        rows = [{"prompt": f"is {n} even?", "response": ["yes", "no"][n % 2]} for n in range(64)]
        for name, some in (("Toy", rows), ("Toy_test", rows[:20])):
            file = top / "data" / "math" / f"{name}.json"
            file.write_text(json.dumps(some))
            self.run("register_dataset", FILE=str(file), NAME=name)
        self.run("make_recipe", DATASET="Toy", MODEL=" ".join(models))
        for path in (top / "collect_scripts" / "math" / "Toy").glob("*.yaml"):
            path.write_text(small(path.read_text(), path.name, in_float16))

    def copy(self, top: Path) -> "TinyProject":
        """The same project in a folder to be made."""
        shutil.copytree(self.top, top)
        other = object.__new__(TinyProject)
        other.top, other.models = top, self.models
        return other

    def folder(self, model: str) -> Path:
        """Where a model lies."""
        return self.top / "models" / base_models.table()[model]["folder"]

    def run(self, script: str, **settings: str) -> str:
        """Run a script of utils/; what it printed."""
        environment = {**os.environ, "PY": sys.executable, "PARAGEN_TOP": str(self.top), **settings}
        command = [sys.executable, ROOT / "utils" / f"{script}.py"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def sweep(self, **settings: str) -> str:
        """Collect all models of Toy; what it printed."""
        return self.run("collect_all", CATEGORY="math", DATASET="Toy", MODEL=" ".join(self.models), **settings)

    def manifests(self, phase: str = "finetune") -> list[dict]:
        """The manifests of a phase's runs, by the name of the folder."""
        paths = sorted(self.top.glob(f"saves/math/Toy/*_{phase}/manifest.json"))
        return [json.loads(path.read_text()) for path in paths]

    def losses(self) -> dict[str, float]:
        """The loss of the last checkpoint of each collection, as evaluation.json has it."""
        found = {}
        for path in self.top.glob("saves/math/Toy/*_finetune/evaluation.json"):
            (entry,) = json.loads(path.read_text())["evaluations"]
            found[path.parent.name] = entry["checkpoints"][-1]["loss"]
        return found


def small(recipe: str, name: str, in_float16: tuple[str, ...] = ()) -> str:
    """A recipe with few steps, on short rows."""
    figures = PRETRAIN if name.endswith("_pretrain.yaml") else FINETUNE
    for key, value in figures.items():
        pattern, new = (
            (r"checkpoint-\d+", f"checkpoint-{value}") if key == "checkpoint" else (rf"^{key}: .*", f"{key}: {value}")
        )
        recipe = re.sub(pattern, new, recipe, flags=re.MULTILINE)
    return recipe.replace("\nbf16: true", "\nfp16: true") if name.startswith(in_float16 or "-") else recipe
