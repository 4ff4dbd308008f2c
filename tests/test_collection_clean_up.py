"""make disk and make clean-up: what is listed goes, nothing else does, and never what a process uses."""

import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import handmade
from helpers.handmade import CATEGORY, tree
from helpers.killed import context, killed, running

import clean_up as script
import disk
from paragen.collection import clean_up
from paragen.common import files, locks, paths
from paragen.recipes.run import Cell
from paragen.sweep import jobs

RUN = "Tiny_lora-rank_4_finetune"
KEY = "0123456789abcdef" * 4


@pytest.fixture
def top(tmp_path, monkeypatch) -> Path:
    """A repository with a collection, its log, a recipe, a model and a dataset; its own $TMPDIR."""
    top = tmp_path / "a repository"
    for name in ("saves", "data", "models", "collect_scripts"):
        monkeypatch.setattr(paths, "SCRIPTS" if name == "collect_scripts" else name.upper(), top / name)
        (top / name).mkdir(parents=True)
    monkeypatch.setattr(paths, "ROOT", top)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in (*handmade.KEYS, "DRY_RUN", "JSON"):
        monkeypatch.delenv(name, raising=False)
    data = handmade.register(paths.DATA, CATEGORY, "Toy", handmade.texts("Toy"))
    folder = handmade.collect(paths.SAVES, data, CATEGORY, "Toy")
    folder.with_name(f"{folder.name}.log").write_text("a log")
    (paths.SCRIPTS / CATEGORY / "Toy").mkdir(parents=True)
    (paths.SCRIPTS / CATEGORY / "Toy" / "tiny_Toy_finetune.yaml").write_text("stage: sft\n")
    (paths.MODELS / "Tiny").mkdir()
    (paths.MODELS / "Tiny" / "config.json").write_text("{}")
    return top


def folder_of(run: str = RUN) -> Path:
    return paths.SAVES / CATEGORY / "Toy" / run


def lying_in(top: Path) -> set[str]:
    """All files and folders of a repository and its $TMPDIR, by path."""
    return {path.relative_to(top.parent).as_posix() for path in top.parent.rglob("*")}


def call(capsys, main: Callable = script.main, **settings: str) -> tuple[int, str]:
    """The status and the output of a script."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        status = main() or 0
    return status, "".join(capsys.readouterr())


def age(top: Path) -> None:
    """Make all files old, as they are some minutes after a kill."""
    for path in top.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2, follow_symlinks=False)


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "some.bin").write_bytes(b"x" * 1000)
    return folder


# What processes leave that are killed


def a_training(pause) -> None:
    recipe = paths.SCRIPTS / CATEGORY / "Toy" / "tiny_Toy_finetune_temp_rank_8.yaml"
    run = folder_of("Tiny_lora-rank_8_finetune")
    with locks.lock(files.beside(run, "lock")), locks.lock(recipe) as handle:
        os.truncate(handle, 0)
        os.write(handle, b"stage: sft\nlora_rank: 8\n")
        fill(files.beside(run, "staging-0a1b2c3d"))
        pause()


def a_seeded_training(pause) -> None:
    recipe = paths.SCRIPTS / CATEGORY / "Toy" / "tiny_Toy_finetune_temp_rank_8_seed-7.yaml"
    with locks.lock(files.beside(folder_of("Tiny_lora-rank_8_seed-7_finetune"), "lock")), locks.lock(recipe):
        pause()


def an_import_that_replaces(pause) -> None:
    """Killed after the new folder has its name, before the old one is deleted."""
    staging = files.beside(folder_of(), "staging-00000000")
    shutil.copytree(folder_of(), staging)
    files.remove_folder = pause
    with locks.lock(files.beside(folder_of(), "lock")):
        files.publish_folder(staging, folder_of())


def an_evaluation(pause) -> None:
    with locks.lock(files.beside(folder_of(), "evaluation.lock")):
        os.replace = pause
        files.write_json(folder_of() / "evaluation.json", {})


def an_export(pause) -> None:
    from paragen.collection import derived

    out = paths.SAVES / "exports" / "archive"
    derived.make_part(out, "math/A.archive", {"format": "x"}, lambda path: path.write_text("A"), quiet=True)
    derived.make_part(out, "math/B", {"format": "x"}, lambda staging: (fill(staging), pause()))


def a_first_export(pause) -> None:
    from paragen.collection import derived

    derived.make_part(paths.SAVES / "stats", "math/B", {"format": "x"}, lambda staging: (fill(staging), pause()))


def an_index(pause) -> None:
    os.replace = pause
    files.write_atomically(paths.SAVES / paths.INDEX, b"index")


def a_registration(pause) -> None:
    with locks.lock(files.beside(paths.DATA / "dataset_info.json", "lock")):
        os.replace = pause
        files.write_json(paths.DATA / "dataset_info.json", {})


def a_model_that_is_made(pause) -> None:
    with locks.lock(files.beside(paths.MODELS / "New", "lock")):
        fill(files.beside(paths.MODELS / "New", "staging-0a1b2c3d"))
        pause()


def a_sweep(pause) -> None:
    run = type("Run", (), {"folder": folder_of("Tiny_lora-rank_16_finetune")})
    cell = type("Cell", (Cell,), {"runs": (run,)})("Toy", "tiny", 16, (Path("a"), Path("b")))
    with locks.lock(paths.SAVES / ".sweep-0a1b2c3d.lock"):
        assert jobs.claim_runs(jobs.new_job(cell, None, "0a1b"))
        fill(paths.SAVES / paths.TOKENS / KEY)
        with locks.process_folder() as folder:
            (folder / "results").write_text("{}")
            pause()


def a_publishing(pause) -> None:
    tree = fill(paths.SAVES / "publish" / "user--toy")
    with locks.lock(files.beside(tree, "lock")):
        pause()


LEFT = {
    a_training: 3, a_seeded_training: 2, an_import_that_replaces: 2, an_evaluation: 2, an_export: 2, a_first_export: 2,
    an_index: 1, a_registration: 2, a_model_that_is_made: 2, a_sweep: 4, a_publishing: 1,
}  # fmt: skip


@pytest.mark.parametrize("action", LEFT, ids=lambda action: action.__name__)
def test_what_a_killed_process_left_goes_and_nothing_else(top, capsys, action):
    before = lying_in(top)
    content = tree(top)
    with running(action):
        age(top.parent)
        while_running = lying_in(top)
        for settings in ({"DRY_RUN": "1"}, {}):
            status, told = call(capsys, **settings)
            assert status == 0 and "delete" not in told, told
            if action is not an_index:  # a file that is written in one go has no lock
                assert "in use, and left: " in told
        assert lying_in(top) == while_running

    status, told = call(capsys, DRY_RUN="1")
    listed = [line for line in told.splitlines() if line.startswith("would delete: ")]
    assert (status, len(listed)) == (0, LEFT[action]), told
    assert lying_in(top) == while_running

    status, told = call(capsys)
    deleted = [line for line in told.splitlines() if line.startswith("deleted: ")]
    assert status == 0
    assert [line.removeprefix("deleted: ") for line in deleted] == [
        line.removeprefix("would delete: ") for line in listed
    ]
    after = tree(top)
    assert all(after[name] == data for name, data in content.items())
    made = {an_export: "exports", a_first_export: "stats", a_publishing: "publish", a_sweep: "tokens"}
    new = {name for name in lying_in(top) - before if made.get(action, "nothing") not in name}
    assert not new, "what was left is gone"
    assert call(capsys, DRY_RUN="1")[1] == "make clean-up would free 0 bytes\n"


def test_a_real_training_that_was_killed(pretrained, top, monkeypatch, capsys):
    for name in ("SAVES", "DATA", "MODELS"):
        monkeypatch.setattr(paths, name, pretrained.top / name.lower())
    monkeypatch.setattr(paths, "SCRIPTS", pretrained.top / "collect_scripts")
    before = tree(pretrained.top).keys()
    run = pretrained.start(pretrained.finetune)
    staged = f".{pretrained.run_folder('finetune').name}.staging-*/checkpoint-*"
    alive = []

    def is_collecting() -> bool:
        if not list(pretrained.saves.glob(staged)):
            return False
        if not alive:
            found = clean_up.find()
            alive.append((found.left_overs, len(found.in_use)))
        return True

    assert run.kill_when(is_collecting)
    assert alive == [([], 3)], "the staging folder, the run's lock and the rendered recipe were in use"
    assert len([line for line in call(capsys)[1].splitlines() if line.startswith("deleted: ")]) == 3
    assert tree(pretrained.top).keys() == before | {"log.txt"}
    assert pretrained.train(pretrained.finetune).status == 0


def test_the_only_copy_of_a_run_stays(top, capsys):
    def an_import(pause) -> None:
        staging = files.beside(folder_of(), "staging-00000000")
        shutil.copytree(folder_of(), staging)
        rename = Path.rename
        Path.rename = lambda self, target: pause() if self == staging else rename(self, target)
        with locks.lock(files.beside(folder_of(), "lock")):
            files.publish_folder(staging, folder_of())

    content = tree(folder_of())
    killed(an_import)
    assert not folder_of().exists()
    call(capsys)
    assert tree(files.beside(folder_of(), "old")) == content
    assert [path.name for path in folder_of().parent.glob(".*")] == [f".{RUN}.old"]
    with locks.lock(files.beside(folder_of(), "lock")):
        files.recover_folder(folder_of())
    assert tree(folder_of()) == content


def strangers(top: Path, elsewhere: Path) -> None:
    """Files that look like left-overs, and are not ours, not whole reasons to delete, or somewhere else."""
    here = folder_of().parent
    fill(elsewhere / "staging")
    fill(elsewhere / KEY)
    (here / f".{RUN}.staging-0a1b2c3d").symlink_to(elsewhere / "staging")
    (here / "linked").symlink_to(elsewhere)
    fill(elsewhere / f".{RUN}.staging-0a1b2c3d")
    (paths.SAVES / paths.TOKENS).symlink_to(elsewhere)
    fill(here / f".{RUN}.staging")
    fill(here / f".{RUN}.staging-mine")
    fill(here / ".gone_finetune.old")
    (here / f".{RUN}.lock").write_text("do not touch\n")
    (here / ".empty.lock").write_text("")
    (here / ".other_finetune.lock").write_text("17 another-host\n")
    (here / ".a.attempt").write_text("my attempt at it")
    (here / "b.attempt").write_text("0a1b2c3d")
    (here / f".c.{os.getpid()}.tmp").write_text("being written")
    (here / ".d.tmp").write_text("of another program")
    fill(paths.MODELS / ".Big.download")
    (paths.DATA / CATEGORY / ".X.json.0a1b2c3d4e5f.part").write_text("arriving")
    (paths.SCRIPTS / CATEGORY / "Toy" / "mine_temp_rank_8.yaml").write_text("no recipe of this name is beside it")
    (paths.SAVES / "tiny_Toy_temp_rank_8.yaml").write_text("not among the recipes")
    fill(paths.SAVES / "publish" / "pull--user--toy")
    fill(paths.SAVES / "exports" / "peft")
    fill(paths.SAVES / "test")
    for name in ("paragen-stage-0", "paragen-0a1b2c3d", "other-0a1b2c3d"):
        fill(Path(tempfile.gettempdir()) / name)
    fill(Path(tempfile.gettempdir()) / "paragen-mine")
    (Path(tempfile.gettempdir()) / "paragen-mine" / locks.PROCESS_LOCK).write_text("mine")


def test_strangers_and_what_links_lead_to_stay(top, tmp_path, capsys):
    strangers(top, tmp_path / "elsewhere")
    age(tmp_path)
    (folder_of().parent / ".young.999999999.tmp").write_text("of another machine, perhaps")
    before = lying_in(top)
    status, told = call(capsys)
    assert status == 0 and "deleted" not in told
    assert lying_in(top) == before
    assert [line for line in told.splitlines() if "in use" in line] == [
        f"in use, and left: saves/{CATEGORY}/Toy/.other_finetune.lock"
    ]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_another_users_files_stay(top, capsys):
    killed(a_training)
    for path in (*folder_of().parent.glob(".*"), *paths.SCRIPTS.rglob("*_temp_*")):
        os.chown(path, 12345, 12345)
    before = lying_in(top)
    assert call(capsys) == (0, "0 bytes freed\n")
    assert lying_in(top) == before


def test_what_runs_share_stays_while_anything_runs(top, capsys):
    killed(a_sweep)
    with running(a_training):
        told = call(capsys)[1]
        assert (paths.SAVES / paths.TOKENS / KEY).is_dir()
        assert (folder_of().parent / ".Tiny_lora-rank_16_finetune.attempt").is_file()
        assert told.count("deleted: ") == 2, "the sweep's lock and its temporary folder, which nothing shares"
    call(capsys)
    assert not list((paths.SAVES / paths.TOKENS).iterdir())


def test_a_run_that_starts_after_the_search_keeps_what_it_uses(top, capsys, monkeypatch):
    killed(a_training)
    killed(a_sweep)
    find, started = clean_up.find, []

    def find_before_a_start():
        found = find()
        started.append(running(a_training))
        started[0].__enter__()
        return found

    monkeypatch.setattr(
        files.secrets if hasattr(files, "secrets") else clean_up.secrets, "token_hex", lambda _: "0" * 8
    )
    shutil.rmtree(folder_of().parent / ".Tiny_lora-rank_8_finetune.staging-0a1b2c3d")
    monkeypatch.setattr(clean_up, "find", find_before_a_start)
    status, told = call(capsys)
    assert status == 0 and "in use since, and left: " in told
    assert (folder_of().parent / ".Tiny_lora-rank_8_finetune.staging-0a1b2c3d").is_dir()
    assert (paths.SAVES / paths.TOKENS / KEY).is_dir()
    started[0].__exit__(None, None, None)


def test_tokenised_rows_come_back_where_a_run_starts_while_they_are_renamed(top, monkeypatch):
    rows = fill(paths.SAVES / paths.TOKENS / KEY)
    answers = iter([[], [Path("a lock")]])
    monkeypatch.setattr(clean_up, "locks_in_use", lambda: next(answers))
    assert clean_up.delete(clean_up.LeftOver(rows, 1000, clean_up.SHARED, None, is_shared=True)) is False
    assert [path.name for path in rows.parent.iterdir()] == [KEY] and len(tree(rows)) == 1


def test_a_killed_clean_up_is_continued_and_no_cached_rows_are_half_there(top):
    rows = paths.SAVES / paths.TOKENS / KEY
    rows.mkdir(parents=True)
    for number in range(8_000):
        (rows / str(number)).touch()
    first, *both = [context.Process(target=script.main) for _ in range(3)]
    first.start()
    while rows.exists():
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    (half,) = rows.parent.iterdir()
    assert half.name.startswith(paths.REMOVED_TOKENS) and any(half.iterdir())
    for run in both:
        run.start()
    for run in both:
        run.join()
    assert [run.exitcode for run in both] == [0, 0]
    assert not list(rows.parent.iterdir())
    assert not list(paths.SAVES.glob(".*.lock"))


def test_what_cannot_be_deleted_is_one_line_and_the_rest_goes(top, capsys, monkeypatch):
    killed(a_training)
    killed(a_model_that_is_made)
    remove = files.remove_folder

    def refuse(folder: Path) -> None:
        if folder.is_relative_to(paths.MODELS):
            raise PermissionError(13, "Permission denied", str(folder))
        remove(folder)

    monkeypatch.setattr(files, "remove_folder", refuse)
    status, told = call(capsys)
    assert status == 1
    assert "error: models/.New.staging-0a1b2c3d: cannot be deleted: Permission denied" in told
    assert not list(folder_of().parent.glob(".*"))


# What all takes


def use_of(capsys) -> dict:
    return json.loads(call(capsys, disk.main, JSON="1")[1])


def test_each_kind_has_its_bytes_and_the_total_is_that_of_the_files(top, capsys):
    pretrain = fill(folder_of("Tiny_lora-rank_4_pretrain") / "checkpoint-5").parent
    fill(paths.SAVES / "exports" / "peft" / "x")
    published = paths.SAVES / "publish" / "user--toy"
    published.mkdir(parents=True)
    for path in folder_of().iterdir():
        os.link(path, published / path.name)
    fill(paths.SAVES / "publish" / "pull--user--other")
    fill(paths.SAVES / "stats" / "x")
    fill(paths.SAVES / "test" / "x")
    fill(paths.MODELS / ".Big.download")
    fill(top / ".venv" / "lib")
    killed(a_sweep)
    killed(a_training)
    with running(a_model_that_is_made):
        found = use_of(capsys)
        kinds = found["kinds"]
        assert {kind: use["bytes"] for kind, use in kinds.items() if kind not in ("data", "left-overs")} == {
            "collections": sum(map(len, tree(folder_of()).values())),
            "pretrains": 1000,
            "exports": 1000,
            "index, report, statistics": 1000,
            "token cache": 1000,
            "logs": len("a log"),
            "runs in progress": kinds["runs in progress"]["bytes"],
            "other files in saves/": 1000,
            "unfinished downloads": 2000,
            "models": 2,
            "Python packages": 1000,
        }
        assert kinds["token cache"]["clean_up"] == 0, "something is running"
        assert len(found["in_use"]) == 4
    found = use_of(capsys)
    assert found["kinds"]["token cache"]["clean_up"] == 1000
    temporary = tree(Path(tempfile.gettempdir()))
    recipes = [path for path in tree(paths.SCRIPTS) if "_temp_rank_" not in path]
    whole = {name: data for name, data in tree(top).items() if not name.startswith(("saves/publish/user--toy/",))}
    whole = {name: data for name, data in whole.items() if name.removeprefix("collect_scripts/") not in recipes}
    assert found["total_bytes"] == sum(map(len, [*whole.values(), *temporary.values()]))
    told = call(capsys, disk.main)[1]
    assert "total" in told and "make clean-up deletes " in told
    shutil.rmtree(folder_of())
    assert use_of(capsys)["kinds"]["published trees"]["files"] == len(list(published.iterdir()))
    assert pretrain.exists()


def test_a_links_target_is_not_counted_and_named(top, tmp_path, capsys):
    fill(tmp_path / "big" / "X")
    (paths.SAVES / "linked").symlink_to(tmp_path / "big")
    assert use_of(capsys)["links_not_counted"] == ["saves/linked"]
    assert "not counted: what 1 links lead to, such as saves/linked" in call(capsys, disk.main)[1]


def test_an_empty_repository_is_fine(top, capsys):
    shutil.rmtree(paths.SAVES)
    assert call(capsys, disk.main)[0] == 0
    assert call(capsys, DRY_RUN="1") == (0, "make clean-up would free 0 bytes\n")
    assert call(capsys)[0] == 0


def test_a_lock_of_another_machine_counts_as_held(top):
    lock = folder_of().parent / ".x.lock"
    for host, held in (("another", True), (socket.gethostname(), False)):
        lock.write_text(f"1 {host}\n")
        assert clean_up.is_in_use(lock) is held
    lock.unlink()
    assert clean_up.is_in_use(lock) is False
