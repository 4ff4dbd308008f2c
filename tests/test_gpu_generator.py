"""A generator on an NVIDIA GPU, wherever checkpoints are kept. `make test-gpu` runs it."""

import json

import pytest
import torch
from helpers import made_project
from helpers.made_project import MIXTURE, TASKS, generator, run
from safetensors.torch import load_file

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

SETTINGS = {"TRAIN_STEPS": 60, "BASE_STEPS": 6, "WIDTH": 64, "MIX": 1}
CLOSE = 0.05  # of the losses in bfloat16, beside those in float32
# Of the factors from prompts that are read in bfloat16, beside float32: what tells prompts from each other is a small
# part of their hidden states, so that their rounding counts for more (0.13 on an H200).
ALIKE = 0.3


def losses_of(project, name: str) -> dict[str, float]:
    return json.loads((generator(project, name) / "manifest.json").read_text())["losses"]


def test_a_generator_has_the_losses_it_has_on_the_cpu_wherever_checkpoints_are_kept(model_folder, tmp_path):
    project = made_project.make(tmp_path / "my project", model_folder, TASKS[:2], steps=20)
    run(project, "train_generator", NAME="cpu", **SETTINGS)
    for place in ("device", "pinned", "disk"):
        output = run(project, "train_generator", NAME=place, PLACE=place, DEVICES=0, **SETTINGS)
        assert f"loading from {place}" in output
        assert losses_of(project, place) == pytest.approx(losses_of(project, "cpu"), rel=CLOSE)
    made = {}
    for device in ("0", "cpu"):
        out = tmp_path / device
        run(project, "generate", GENERATOR="device", DATASET=MIXTURE, SAMPLES=1, OUT=out, DEVICES=device)
        made[device] = load_file(out / MIXTURE / "1" / "adapter_model.safetensors")
    for key, value in made["cpu"].items():
        assert (made["0"][key] - value).norm() <= ALIKE * value.norm(), key
