"""What a pack keeps in memory beside the device until it is written, and what it says of a full disk."""

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from paragen.common import devices
from paragen.packed import loop, memory, stock_checkpoint
from paragen.training import attempts


def test_a_checkpoint_is_queued_when_the_one_before_is_written(monkeypatch):
    """Each that waits is a copy of an adapter and its moments in memory, and a disk can be slower than the training."""
    before, saving = Future(), []
    monkeypatch.setattr(stock_checkpoint, "prepare_save", lambda *arguments: None)
    pack = object.__new__(loop.Pack)
    pack.engine, pack.logged, pack.saving = SimpleNamespace(diverged={}), [{}], [[before]]
    pack.unsaved = {(0, 4): (None, {})}
    pack.threads = SimpleNamespace(submit=lambda write: saving.append(before.done()))
    schedule = SimpleNamespace(begins=1, last=8)
    log = SimpleNamespace(add=lambda loss: None, unlogged=[])
    recorder = SimpleNamespace(writing=lambda write, step, unlogged: write)
    member = SimpleNamespace(schedule=schedule, log=log, recorder=recorder, adapter=None, config=None)
    threading.Timer(0.1, before.set_result, (None,)).start()
    pack._log_loss(0, member, 3, 0.5)
    assert saving == [True]


def test_a_full_disk_that_torch_does_not_name_is_named(tmp_path, monkeypatch):
    """torch.save raises "unexpected pos" there."""
    failed = Future()
    failed.set_exception(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"))
    attempt = SimpleNamespace(run=SimpleNamespace(folder=tmp_path / "a_pretrain"))
    pack = object.__new__(loop.Pack)
    assert "unexpected pos" in str(pack._publish(attempt, failed))
    monkeypatch.setattr(attempts.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert "the disk is full; free some space and run it again" in str(pack._publish(attempt, failed))


@pytest.mark.parametrize(("slots", "count"), [("", 4), ("2", 2), ("8", 1)])
def test_the_packs_of_several_gpus_share_the_hosts_memory(monkeypatch, slots, count):
    """An adapter of 1,000 values takes 12 kB and three pinned copies, each of 4,096 bytes in place of 4,000."""
    monkeypatch.setenv("PARAGEN_CPU_SLOTS", slots)
    room = 4 * (12 * 1000 + 3 * 4096) / memory.USABLE
    monkeypatch.setattr(devices, "available_memory", lambda: int(room) + 100)
    adapters = [SimpleNamespace(start=torch.zeros(1000)) for _ in range(6)]
    assert memory.count_within_host_memory(adapters) == count
