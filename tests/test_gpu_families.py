"""On an NVIDIA GPU: a tiny model of every family goes through a sweep, is verified, and scored as on the CPU.

`make test-gpu` runs these tests; on a machine without a GPU they are skipped.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_models

from paragen.model import base_models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = sorted(set(tiny_models.NAMES) - {"smollm2-135m"})  # which is a Llama, too
# What makes the recipes small; one family computes in float16.
PRETRAIN = {"max_steps": 6, "save_steps": 3, "cutoff_len": 96}
FINETUNE = {"max_steps": 10, "save_total_limit": 3, "cutoff_len": 96, "checkpoint": 6}
IN_FLOAT16 = "mistral-7b"
IN_BFLOAT16 = "qwen2.5-0.5b"  # whose base model is stored so; the others are float32 on disk
OFF = 0.01  # of losses between 5 and 6: a mean over 60 tokens, each off by 0.5 % of bfloat16's rounding at most


class Swept:
    """A user's folders with all families and one dataset, and what a sweep over them made."""

    def __init__(self, top: Path):
        self.top = top
        (top / "data" / "math").mkdir(parents=True)
        (top / "models").mkdir()
        (top / "collect_scripts").mkdir()
        shutil.copy(ROOT / "models" / "models.yaml", top / "models")
        shutil.copy(ROOT / "collect_scripts" / "figures.yaml", top / "collect_scripts")
        (top / "data" / "dataset_info.json").write_text("{}")
        shutil.copy(ROOT / "data" / "sources.yaml", top / "data")
        make_models = [sys.executable, ROOT / "tests" / "helpers" / "tiny_models.py", top, *FAMILIES]
        subprocess.run(make_models, check=True, capture_output=True)
        for name in FAMILIES:
            (top / name).rename(top / "models" / base_models.table()[name]["folder"])
        self._store_in_bfloat16(top / "models" / base_models.table()[IN_BFLOAT16]["folder"])
        rows = [{"prompt": f"is {n} even?", "response": ["yes", "no"][n % 2]} for n in range(64)]
        for name, some in (("Toy", rows), ("Toy_test", rows[:20])):
            file = top / "data" / "math" / f"{name}.json"
            file.write_text(json.dumps(some))
            self.run("register_dataset", FILE=str(file), NAME=name)
        self.run("make_recipe", DATASET="Toy", MODEL=" ".join(FAMILIES))
        for path in (top / "collect_scripts" / "math" / "Toy").glob("*.yaml"):
            path.write_text(small(path.read_text(), path.name))
        self.output = self.run("collect_all", CATEGORY="math", DATASET="Toy", MODEL=" ".join(FAMILIES), RANK="4")

    @staticmethod
    def _store_in_bfloat16(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        save_file(
            {key: tensor.bfloat16() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
        )

    def run(self, script: str, **settings: str) -> str:
        """Run a script of utils/; what it printed."""
        environment = {**os.environ, "PARAGEN_TOP": str(self.top), **settings}
        command = [sys.executable, ROOT / "utils" / f"{script}.py"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def losses(self) -> dict[str, float]:
        """The loss of each family's last checkpoint, as evaluation.json has it."""
        found = {}
        for path in self.top.glob("saves/math/Toy/*_finetune/evaluation.json"):
            (entry,) = json.loads(path.read_text())["evaluations"]
            found[path.parent.name] = entry["checkpoints"][-1]["loss"]
        return found


def small(recipe: str, name: str) -> str:
    """A recipe with few steps, on short rows."""
    figures = PRETRAIN if name.endswith("_pretrain.yaml") else FINETUNE
    for key, value in figures.items():
        pattern, new = (
            (r"checkpoint-\d+", f"checkpoint-{value}") if key == "checkpoint" else (rf"^{key}: .*", f"{key}: {value}")
        )
        recipe = re.sub(pattern, new, recipe, flags=re.MULTILINE)
    return recipe.replace("\nbf16: true", "\nfp16: true") if name.startswith(IN_FLOAT16) else recipe


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Swept:
    return Swept(tmp_path_factory.mktemp("families") / "a tree")


def test_every_family_is_collected_on_the_gpu(swept):
    manifests = [json.loads(path.read_text()) for path in swept.top.glob("saves/math/Toy/*_finetune/manifest.json")]
    assert len(manifests) == len(FAMILIES), swept.output
    assert {one["device"] for one in manifests} == {torch.cuda.get_device_name()}
    assert {one["precision"] for one in manifests} == {"bfloat16", "float16"}
    assert swept.run("verify").count("whole ") == len(FAMILIES)


def test_scores_are_those_of_the_cpu(swept):
    swept.run("evaluate", DATASET="Toy", STEPS="last")
    there = swept.losses()
    swept.run("evaluate", DATASET="Toy", STEPS="last", DEVICES="cpu", FORCE="1")
    assert len(there) == len(FAMILIES) and swept.losses() == pytest.approx(there, abs=OFF)
    assert swept.losses() != there
