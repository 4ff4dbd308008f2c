"""What others put into a run folder stays when the run is replaced or removed; what a run writes does not."""

import os
import shutil

import pytest

from paragen.collection import replacing
from paragen.common import files
from paragen.common.cli import UserError

PHASES = ("pretrain", "finetune")


def put_into(folder) -> dict[str, bytes | str]:
    """Files, links and folders of others in a run folder; returns what has to be there later, by path."""
    (folder / "my plots" / "deep").mkdir(parents=True)
    (folder / "empty").mkdir()
    kept = {"notes.txt": b"mine", "my plots/deep/a.png": b"png", "README.md": b"text", ".hidden": b"", "a\nb": b"1"}
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to("notes.txt")
    (folder / "folder link").symlink_to("my plots")
    return kept


def still_there(folder, kept) -> None:
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert os.readlink(folder / "link") == "notes.txt" and os.readlink(folder / "folder link") == "my plots"
    assert (folder / "empty").is_dir()


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_writes_nothing_that_is_taken_for_others(trained_once, phase):
    assert replacing.others_in(trained_once.run_folder(phase)) == []
    assert replacing.others_in(trained_once.top / "gone") == []


@pytest.mark.parametrize("phase", PHASES)
def test_what_others_put_into_a_run_folder_is_in_the_one_that_replaces_it(collected, phase):
    folder = collected.run_folder(phase)
    staging = files.beside(folder, "staging-00000000")
    shutil.copytree(folder, staging)
    kept = put_into(folder)
    (folder / ".manifest.json.99999999.tmp").write_text("half-written")
    checkpoint = next(folder.glob("checkpoint-*"))
    if checkpoint.is_dir():
        (checkpoint / "notes.txt").write_text("of this step")
    new = {path.relative_to(staging) for path in staging.rglob("*")}
    replacing.publish(staging, folder)
    still_there(folder, kept)
    others = {*kept, "my plots", "my plots/deep", "empty", "link", "folder link"}
    others |= {f"{checkpoint.name}/notes.txt"} if checkpoint.is_dir() else set()
    assert {path.relative_to(folder) for path in folder.rglob("*")} - new == set(map(type(folder), others))
    assert not files.companions(folder, "")


def test_what_cannot_be_kept_is_named_before_anything_is_done(collected):
    folder = collected.run_folder("finetune")
    (folder / "training_loss.png").unlink()
    (folder / "training_loss.png").mkdir()
    (folder / "training_loss.png" / "a.png").write_text("x")
    result = collected.train(collected.finetune, FORCE="1")
    assert result.status == 1 and "training_loss.png: is a folder with the name of a run's file" in result.output
    shutil.rmtree(folder / "training_loss.png")
    os.mkfifo(folder / "pipe")
    with pytest.raises(UserError, match="pipe: is no regular file"):
        replacing.check(folder)


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_done(collected, monkeypatch):
    folder = collected.run_folder("finetune")
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("x")
    replacing.check(folder)
    # the kernel lets root, as whom tests may run, write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder / "mine")
    with pytest.raises(UserError, match="mine: cannot be written to"):
        replacing.check(folder)


def test_a_run_folder_with_files_of_others_is_not_removed(collected, capsys):
    folder = collected.run_folder("pretrain")
    for name in ("a", "b", "c", "d"):
        (folder / name).write_text("mine")
    replacing.remove(folder)
    assert (folder / "manifest.json").is_file() and "no run wrote 'a', 'b', 'c' and 1 more" in capsys.readouterr().out
    for name in ("a", "b", "c", "d"):
        (folder / name).unlink()
    replacing.remove(folder)
    assert not folder.exists()


def test_of_a_stock_run_the_files_of_others_are_known_too(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    for name in ("tokenizer.json", "checkpoint-5/optimizer.pt", "notes.txt", "checkpoint-5/mine.txt"):
        (tmp_path / name).write_text("x")
    assert replacing.others_in(tmp_path) == ["checkpoint-5/mine.txt", "notes.txt"]
