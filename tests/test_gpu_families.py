"""On an NVIDIA GPU: a tiny model of every family goes through a sweep, is verified, and scored as on the CPU.

`make test-gpu` runs these tests; on a machine without a GPU they are skipped.
"""

from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.gpu_project import TinyProject

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

FAMILIES = sorted(set(tiny_models.NAMES) - {"smollm2-135m"})  # which is a Llama, too
IN_FLOAT16 = "mistral-7b"
IN_BFLOAT16 = "qwen2.5-0.5b"  # whose base model is stored so; the others are float32 on disk
OFF = 0.01  # of losses between 5 and 6: a mean over 60 tokens, each off by 0.5 % of bfloat16's rounding at most


class Swept(TinyProject):
    """A project of all families, and what a sweep over them printed."""

    def __init__(self, top: Path):
        super().__init__(top, FAMILIES, in_float16=(IN_FLOAT16,))
        self.store_in_bfloat16(IN_BFLOAT16)
        self.output = self.sweep(RANK="4")

    def store_in_bfloat16(self, model: str) -> None:
        from safetensors.torch import load_file, save_file

        file = self.folder(model) / "model.safetensors"
        save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Swept:
    return Swept(tmp_path_factory.mktemp("families") / "a tree")


def test_every_family_is_collected_on_the_gpu(swept):
    manifests = swept.manifests()
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
