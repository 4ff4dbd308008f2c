"""On several NVIDIA GPUs: a sweep uses all of them, and a cell trained on two has the losses that it has on one.

`make test-gpu` runs these tests; on a machine with fewer than two GPUs they are skipped.
"""

import re

import pytest
import torch
from helpers.gpu_project import TinyProject

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")]

MODEL = "qwen2.5-0.5b"
OFF = 0.01  # of losses of about 5: the same rows in other micro-batches, in bfloat16


def losses_of(project: TinyProject) -> list[float]:
    """The losses of the collected steps of a project's one collection."""
    (manifest,) = project.manifests()
    return [entry["loss"] for entry in manifest["checkpoints"]]


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> TinyProject:
    """A project in which nothing was trained, to be copied."""
    return TinyProject(tmp_path_factory.mktemp("empty") / "a tree", [MODEL])


@pytest.fixture(scope="module")
def alone(empty, tmp_path_factory) -> TinyProject:
    """A cell that was trained the ordinary way on one GPU."""
    project = empty.copy(tmp_path_factory.mktemp("one") / "a tree")
    project.run("collect", DATASET="Toy", MODEL=MODEL, RANK="4", ENGINE="stock", DEVICES="0")
    return project


def test_a_cell_on_two_devices_has_the_losses_it_has_on_one(empty, alone, tmp_path):
    both = empty.copy(tmp_path / "a tree")
    both.run("collect", DATASET="Toy", MODEL=MODEL, RANK="4", ENGINE="stock", DEVICES="0,1")
    assert losses_of(both) == pytest.approx(losses_of(alone), abs=OFF)
    for phase in ("pretrain", "finetune"):
        assert [one["processes"] for one in both.manifests(phase) + alone.manifests(phase)] == [2, 1]


def test_a_sweep_of_two_devices_a_cell_has_the_losses_of_one(empty, alone, tmp_path):
    both = empty.copy(tmp_path / "a tree")
    both.sweep(RANK="4", GPUS_PER_CELL="2", ENGINE="stock")
    assert losses_of(both) == pytest.approx(losses_of(alone), abs=OFF)
    assert [one["processes"] for one in both.manifests()] == [2]


def test_a_sweep_of_two_cells_trains_them_beside_each_other(empty, tmp_path):
    project = empty.copy(tmp_path / "a tree")
    output = project.sweep(RANK="4 8", DEVICES="0,1")
    events = re.findall(r"^(started|\[\d/2\])", output, re.MULTILINE)
    assert events == ["started", "started", "[1/2]", "[2/2]"], output
    assert project.run("verify").count("whole ") == 2
