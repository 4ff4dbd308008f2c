"""Hashes and headers that several rooms read: git's blob ids, and what a safetensors file begins with."""

import fcntl
import itertools
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import killed
from safetensors.torch import save, save_file

from paragen.common import files, locks, safetensors_header
from paragen.common.cli import UserError


@pytest.fixture
def checkpoint(tmp_path):
    tensors = {"b": torch.ones(2, 3), "a": torch.zeros(4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("content", [b"", b"text\n", bytes(range(256)) * 9000])
def test_a_blob_id_is_gits(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    git = subprocess.run(["git", "hash-object", tmp_path / "file"], capture_output=True, text=True, check=True)
    assert files.git_blob_id(tmp_path / "file") == git.stdout.strip()


def test_a_header_names_each_tensor_with_its_shape(checkpoint):
    tensors = safetensors_header.read_tensors(checkpoint)
    assert {name: entry["shape"] for name, entry in tensors.items()} == {"a": [4], "b": [2, 3]}
    assert tensors == safetensors_header.tensors_in(safetensors_header.header_in(checkpoint.read_bytes()))
    assert safetensors_header.fault_of(checkpoint) is None


def test_bytes_without_a_whole_header_are_refused(checkpoint):
    whole = save({"a": torch.zeros(4)})
    for data in (b"", whole[:7], whole[:40]):
        with pytest.raises(ValueError, match="is no safetensors file"):
            safetensors_header.header_in(data)
        checkpoint.write_bytes(data)
        with pytest.raises(ValueError, match=f"has only {len(data)} bytes"):
            safetensors_header.read_header(checkpoint)


def test_a_file_whose_size_or_header_is_wrong_has_a_fault(checkpoint):
    data = checkpoint.read_bytes()
    not_an_object = json.dumps(["a"]).encode()
    for content, fault in (
        (data[:-1], f"has {len(data) - 1} bytes, its header states {len(data)}"),
        (len(not_an_object).to_bytes(8, "little") + not_an_object, "is not a safetensors file"),
        (files.GIT_LFS_POINTER + b"v1\n", "is a Git LFS pointer, not the weights"),
    ):
        checkpoint.write_bytes(content)
        assert safetensors_header.fault_of(checkpoint) == fault


def test_a_lock_is_held_only_while_a_live_process_holds_it(tmp_path):
    lock = tmp_path / ".run.lock"
    assert not locks.is_held(lock)
    with locks.lock(lock):
        assert locks.is_held(lock)
    lock.write_text(f"{os.getpid()} {socket.gethostname()}\n")  # of a killed process, whose number another one has now
    assert not locks.is_held(lock) and lock.exists()
    lock.write_text(f"{2**22 + 1} {socket.gethostname()}\n")
    assert not locks.is_held(lock)


def test_a_lock_of_another_host_counts_until_its_run_has_been_silent_for_long(tmp_path):
    lock, staging = tmp_path / ".run.lock", tmp_path / ".run.staging-01234567"
    lock.write_text("1 another-host\n")
    assert locks.is_held(lock)
    long_ago = time.time() - locks.SILENT_SECONDS - 1
    os.utime(lock, (long_ago, long_ago))
    assert not locks.is_held(lock) and lock.exists()
    staging.mkdir()
    (staging / "trainer_log.jsonl").touch()
    assert locks.is_held(lock), "its log grows"
    for path in (staging / "trainer_log.jsonl", staging):
        os.utime(path, (long_ago, long_ago))
    assert not locks.is_held(lock)
    with locks.lock(lock):
        lock.write_text("1 another-host\n")  # on a disk whose locks this host's kernel knows
        os.utime(lock, (long_ago, long_ago))
        assert locks.is_held(lock)


def test_looking_at_a_lock_does_not_turn_a_starting_run_away(tmp_path):
    lock = tmp_path / ".run.lock"
    lock.write_text(f"{os.getpid()} {socket.gethostname()}\n")
    looked = os.open(lock, os.O_RDONLY)
    fcntl.flock(looked, fcntl.LOCK_SH)  # as `is_held` does for a moment
    threading.Timer(locks.LOOK_SECONDS / 4, os.close, [looked]).start()
    with locks.lock(lock):
        pass


def killed_while_writing(path: Path) -> Path:
    """What a process leaves that is killed while it writes `path`, a while ago."""
    temporary = path.with_name(f".{path.name}.{2**22 + 1}.tmp")
    temporary.write_text("half")
    long_ago = time.time() - 2 * files.WRITING_SECONDS
    os.utime(temporary, (long_ago, long_ago))
    return temporary


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_that_lives(tmp_path):
    dead, path = killed_while_writing(tmp_path / "index.parquet"), tmp_path / "index.parquet"
    other = killed_while_writing(tmp_path / "other.json")
    ours = path.with_name(f".{path.name}.{os.getppid()}.tmp")
    ours.write_text("half")
    os.utime(ours, (1, 1))
    files.write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole" and not dead.exists() and ours.exists() and other.exists()
    remote = killed_while_writing(path)
    with open(remote) as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a process on another host does
        files.write_atomically(path, b"whole")
        assert remote.exists()
    files.write_atomically(path, b"whole")
    assert not remote.exists()


def test_temporary_folders_of_killed_processes_are_removed_and_those_of_live_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed.killed(lambda pause: stand_still_in_a_folder(pause))
    (left,) = tmp_path.glob("paragen-*")
    (tmp_path / "paragen-notes").mkdir()
    long_ago = time.time() - 2 * files.WRITING_SECONDS
    os.utime(left, (long_ago, long_ago))
    with killed.running(lambda pause: stand_still_in_a_folder(pause)):
        with locks.process_folder() as folder:
            locks.remove_abandoned_process_folders()
            assert not left.exists() and folder.exists() and (tmp_path / "paragen-notes").is_dir()
        assert not folder.exists() and len(list(tmp_path.glob("paragen-*"))) == 2, "one is of a live process"


@pytest.mark.parametrize("place", range(4))
def test_a_process_killed_while_its_temporary_folder_is_removed_leaves_one_that_is_known(tmp_path, monkeypatch, place):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed.killed(lambda pause: stand_still_while_removing(pause, place))
    (left,) = tmp_path.glob("paragen-*")
    long_ago = time.time() - 2 * files.WRITING_SECONDS
    os.utime(left, (long_ago, long_ago))
    locks.remove_abandoned_process_folders()
    assert list(tmp_path.iterdir()) == []


def stand_still_while_removing(pause, place: int) -> None:
    """Call `pause` before the deletion number `place` of a process's folder: of two files, the lock and the folder."""
    calls = itertools.count()
    with locks.process_folder() as folder:
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
        for name in ("unlink", "rmdir"):
            real = getattr(os, name)
            setattr(os, name, lambda *path, real=real, **more: (next(calls) == place and pause(), real(*path, **more)))
    raise AssertionError("it was not stopped")


def test_the_temporary_folder_is_found_without_trying_it(tmp_path, monkeypatch):
    """tempfile writes a file to try it, which stays where it is killed at that moment."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: pytest.fail("it was tried"))
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    assert locks.temporary_folder() == Path("/tmp")
    monkeypatch.setenv("TMP", str(tmp_path))
    assert locks.temporary_folder() == tmp_path
    with locks.process_folder() as folder:
        assert folder.parent == tmp_path
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", "own")
    assert locks.temporary_folder() == tmp_path / "own"
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    assert locks.temporary_folder() == tmp_path
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="set TMPDIR to one that can"):
        locks.temporary_folder()


def stand_still_in_a_folder(pause) -> None:
    with locks.process_folder():
        pause()


def test_a_folder_in_place_of_a_file_is_one_line_and_stays(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match="a.json: is a folder, where a file is to be written"):
        files.write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").is_dir()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_lock_file_is_named_and_hangs_nothing(tmp_path, make):
    path = tmp_path / ".x.lock"
    make(path)
    assert not locks.is_held(path) and locks.holder_of(path) is None
    with pytest.raises(UserError, match=r"\.x\.lock: is .* where a lock file is to be; move it away"), locks.lock(path):
        pass
    assert os.path.lexists(path)


def test_what_a_process_left_that_was_killed_just_now_is_removed_by_the_next_write(tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    (tmp_path / f".x.json.{killed.pid}.tmp").write_bytes(b"half")
    files.write_atomically(tmp_path / "x.json", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
