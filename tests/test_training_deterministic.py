"""Both engines train with deterministic kernels unless DETERMINISTIC=0, and the manifest records it.

That they give the same bits twice on a GPU is tested in test_gpu_deterministic.py.
"""

import json
import os

import pytest
import torch
import torch.utils.deterministic
from helpers import fork_server, packed_project

from paragen.common.cli import UserError
from paragen.sweep import ray_cluster
from paragen.training import deterministic

FEW = {"pretrain": {"max_steps": 4, "save_steps": 2}, "finetune": {"max_steps": 6, "save_total_limit": 2}, "resumed": 4}
LINE = "put_ has no deterministic kernel on this device; DETERMINISTIC=0 trains with the fastest ones"


@pytest.fixture
def as_before(monkeypatch):
    """Put PyTorch's settings back after the test."""
    monkeypatch.setenv(deterministic.WORKSPACE, "")
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize(("value", "wanted"), [("", True), ("1", True), ("yes", True), ("0", False), ("off", False)])
def test_kernels_are_deterministic_unless_the_setting_is_off(as_before, monkeypatch, value, wanted):
    monkeypatch.setenv("DETERMINISTIC", value)
    torch.use_deterministic_algorithms(not wanted, warn_only=True)
    deterministic.choose_kernels()
    assert torch.are_deterministic_algorithms_enabled() is wanted
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "a warning would change no kernel"
    assert deterministic.are_kernels_deterministic() is wanted
    assert torch.backends.cuda.cudnn_sdp_enabled() is not wanted, "its backward pass has no deterministic kernel"
    assert os.environ[deterministic.WORKSPACE] == (":4096:8" if wanted else "")


def test_a_process_that_also_scores_has_them_while_it_trains_alone(as_before, monkeypatch):
    monkeypatch.setenv("DETERMINISTIC", "1")
    with pytest.raises(UserError), deterministic.chosen_kernels():
        assert deterministic.are_kernels_deterministic()
        raise UserError("cannot be trained")
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_workspace_of_the_users_own_is_kept_where_pytorch_accepts_it(as_before, monkeypatch):
    for own, taken in ((":16:8", ":16:8"), (":0:0", ":4096:8")):
        monkeypatch.setenv(deterministic.WORKSPACE, own)
        deterministic.choose_kernels()
        assert os.environ[deterministic.WORKSPACE] == taken


def test_a_value_that_is_no_switch_is_refused(monkeypatch):
    monkeypatch.setenv("DETERMINISTIC", "perhaps")
    with pytest.raises(UserError, match="^DETERMINISTIC=perhaps: is neither yes nor no"):
        deterministic.choose_kernels()


def test_a_sweeps_workers_get_the_setting(monkeypatch):
    monkeypatch.setenv("DETERMINISTIC", "0")
    assert ray_cluster.run_settings(on_cpu=False)["DETERMINISTIC"] == "0"


def test_pytorchs_message_about_a_missing_kernel_is_known(as_before):
    deterministic.choose_kernels()
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(1).put_(torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(UserError, match=LINE), deterministic.naming_missing_kernel():
        raise raised.value
    assert deterministic.missing_kernel(raised.value) == deterministic.one_line(raised.value) == LINE
    other = RuntimeError("some\nthing else")
    assert deterministic.missing_kernel(other) is None and deterministic.one_line(other) == "some thing else"


@pytest.mark.runs
def test_the_manifest_says_whether_kernels_were_deterministic_and_the_cpus_bits_are_the_same(pretrained):
    folder = pretrained.run_folder("finetune")
    found = []
    for value in ("", "0"):
        result = pretrained.train(pretrained.finetune, DETERMINISTIC=value, FORCE="1")
        assert result.status == 0, result.output
        found.append(json.loads((folder / "manifest.json").read_text()))
    assert [manifest["deterministic"] for manifest in found] == [True, False]
    hashes = [[entry["sha256"] for entry in manifest["checkpoints"]] for manifest in found]
    assert hashes[0] == hashes[1]
    result = pretrained.train(pretrained.finetune)
    assert result.status == 0 and "stale" not in result.output, "the setting makes no run stale"
    assert json.loads((folder / "manifest.json").read_text()) == found[1]


@pytest.mark.runs
def test_the_packed_engine_records_it_too(tmp_path, model_folder):
    project = packed_project.Packable(tmp_path / "my project", model_folder)
    cell, found = project.cell(**FEW), []
    for value in ("", "0"):
        result = project.packed(cell, DETERMINISTIC=value, FORCE="1")
        assert result.status == 0, result.output
        found.append(project.folder("finetune"))
        assert packed_project.manifest_of(found[-1])["deterministic"] is (value == "")
        found[-1] = packed_project.hashes(found[-1])
    assert found[0] == found[1]


@pytest.mark.runs
@pytest.mark.parametrize("engine", ["train", "paragen.packed.packed_train"])
def test_an_operation_without_a_deterministic_kernel_ends_in_one_line(tmp_path, model_folder, engine):
    project = packed_project.Packable(tmp_path / "my project", model_folder)
    cell = project.cell(**FEW)
    arguments = [str(cell.pretrain), "4"] if engine == "train" else cell.arguments()
    environment = {"NO_KERNEL": engine, "ENGINE": "packed"}
    result = fork_server.start("helpers.no_kernel", arguments, environment, tmp_path / "log.txt").wait()
    assert result.status == 1 and "Traceback" not in result.output, result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: ") and cell.pretrain.name in error and error.endswith(f"cannot be trained: {LINE}")
    off = fork_server.start("helpers.no_kernel", arguments, environment | {"DETERMINISTIC": "0"}, tmp_path / "log.txt")
    assert (result := off.wait()).status == 0, result.output
