"""`make index`: one table over all collections, brought up to date, never built from what cannot be trusted."""

import csv
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import scored
from helpers.clone import copy_folder
from helpers.copies import edit, flip_a_bit, twin
from helpers.forked_python import PYTHON

import index as index_script
from paragen.collection import checkpoints, copies, index, index_tables
from paragen.collection.manifest import read_manifest
from paragen.common import paths
from paragen.common.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
STEP = "checkpoint-9.safetensors"
NAME = "common-sense-reasoning/Toy/Tiny-Llama_lora-rank_4_finetune"


@pytest.fixture
def saves(collected, monkeypatch) -> Path:
    """A saves/ with one collection of six checkpoints, and the pretrain that it resumed from."""
    monkeypatch.setattr(paths, "SAVES", collected.top / "saves")
    for name in ("CATEGORY", "MODELS", "RANKS"):
        monkeypatch.delenv(name, raising=False)
    return collected.top / "saves"


@pytest.fixture
def folder(saves) -> Path:
    return saves / NAME


def make_index(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """What `python utils/index.py` ends with, says and complains."""
    monkeypatch.setattr("sys.argv", ["index.py", *arguments])
    capsys.readouterr()
    status = index_script.main()
    return status, *capsys.readouterr()


def names_in(table: pa.Table) -> list[str]:
    return sorted(set(table["collection"].to_pylist()))


def select(monkeypatch, **asked: str) -> list[str]:
    """The run folders that a selection by the environment gives."""
    for name in ("CATEGORY", "DATASET", "MODEL", "RANK", "SEED"):
        monkeypatch.setenv(name, asked.get(name, ""))
    return [one.folder.name for one in index.chosen()[0]]


def test_a_row_says_what_a_checkpoint_is_and_where(saves, folder):
    table, faults = index.update(saves)
    assert not faults
    assert table["step"].to_pylist() == [7, 8, 9, 10, 11, 12]
    row = table.to_pylist()[2]
    manifest = read_manifest(folder)
    entry = manifest.checkpoints[2]
    assert {key: row[key] for key in asdict(entry)} == asdict(entry)
    assert (row["category"], row["dataset"], row["model"], row["rank"]) == (
        "common-sense-reasoning", "Toy", "tiny-llama", 4
    )  # fmt: skip
    assert (saves / row["file"]).stat().st_size == row["bytes"]
    assert (row["prompts_file"], row["rows"]) == ("common-sense-reasoning/Toy.json", 48)
    assert row["prompts_sha256"] == manifest.data[0].rows_sha256


def test_the_index_is_a_plain_parquet_file_and_a_printed_table(saves, monkeypatch, capsys):
    status, out, err = make_index(monkeypatch, capsys)
    assert status == 0
    assert "Toy" in out and "7-12" in out
    assert pyarrow.parquet.read_table(saves / "index.parquet").schema.names == list(index.COLUMNS)
    _, out, _ = make_index(monkeypatch, capsys, "--rows")
    assert len(out.splitlines()) == 7
    _, out, _ = make_index(monkeypatch, capsys, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["step"] for row in rows] == ["7", "8", "9", "10", "11", "12"]
    assert rows[0]["file"].endswith("checkpoint-7.safetensors")


@pytest.mark.parametrize("argument", ["", "--rows", "--csv"])
def test_a_reader_that_has_seen_enough_is_no_error(saves, argument):
    """As in `make index | head -1`."""
    copy_folder("utils", saves.parent)
    shutil.copy(ROOT / "models" / "models.yaml", saves.parent / "models" / "models.yaml")
    reading, writing = os.pipe()
    os.close(reading)
    command = [PYTHON, saves.parent / "utils" / "index.py", *argument.split()]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False), result.stderr


def test_without_collections_the_index_is_empty_and_says_so(saves, monkeypatch, capsys):
    shutil.rmtree(saves)
    assert make_index(monkeypatch, capsys)[:2] == (0, "no collections yet\n")
    saves.mkdir()
    assert make_index(monkeypatch, capsys)[:2] == (0, "no collections yet\n")
    assert make_index(monkeypatch, capsys, "--csv")[1].startswith('"category"')
    with pytest.raises(UserError, match="no collections yet"):
        index.chosen()
    with pytest.raises(UserError, match="run: make index"):
        index.load()


def test_where_all_are_broken_it_does_not_say_that_there_are_none(saves, folder, monkeypatch, capsys):
    (folder / "manifest.json").write_text("{}")
    status, out, err = make_index(monkeypatch, capsys)[:3]
    assert (status, "FAULTY" in err) == (1, True)
    assert out == "no whole collection\n"


def test_unchanged_collections_are_not_read_again(saves, folder, monkeypatch):
    twin(folder, rank=8)
    first, _ = index.update(saves)
    read = []
    monkeypatch.setattr(index, "read_manifest", lambda folder: read.append(folder.name))
    monkeypatch.setattr(checkpoints, "verified", lambda path, *_: read.append(path.name))
    written = (saves / "index.parquet").stat()
    again, _ = index.update(saves)
    assert again.equals(first) and read == []
    assert os.path.samestat(written, (saves / "index.parquet").stat())


def test_new_changed_and_removed_collections_are_noticed(saves, folder):
    index.update(saves)
    other = twin(folder, rank=8)
    assert len(names_in(index.update(saves)[0])) == 2

    edit(other, lambda manifest: manifest["checkpoints"].pop())
    (other / "checkpoint-12.safetensors").unlink()
    assert index.update(saves)[0].num_rows == 6 + 5

    shutil.rmtree(other)
    assert names_in(index.update(saves)[0]) == [NAME]
    assert names_in(index.load(saves)) == [NAME]


@pytest.mark.parametrize("indexed_before", [False, True])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / STEP).write_bytes((f / STEP).read_bytes()[:100]), f"{STEP}: has 100 bytes"),
        (lambda f: (f / STEP).unlink(), f"{STEP}: is missing"),
        (lambda f: flip_a_bit(f / STEP), f"{STEP}: does not have its recorded sha256"),
        (lambda f: os.replace(f / "checkpoint-8.safetensors", f / STEP), "checkpoint-8.safetensors: is missing"),
        (
            lambda f: shutil.copy2(f / "checkpoint-8.safetensors", f / STEP),
            f"{STEP}: does not have its recorded sha256",
        ),
        (lambda f: edit(f, lambda m: m.update(rank=8), seal=False), "was edited after it was written"),
        (lambda f: (f / "manifest.json").write_text("["), "manifest.json: broken"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (
            lambda f: edit(f, lambda m: m["checkpoints"][0].pop("loss")),
            "manifest.json: not a manifest of format 2: checkpoints[0].loss is missing",
        ),
        (lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()), "manifest.json: cannot be read"),
    ],
)
def test_a_broken_collection_is_named_and_left_out(saves, folder, monkeypatch, capsys, indexed_before, damage, said):
    other = twin(folder, rank=8)
    if indexed_before:
        index.update(saves)
    damage(folder)
    status, out, err = make_index(monkeypatch, capsys)
    assert status == 1
    assert [line for line in err.splitlines() if line.startswith("FAULTY")][0].endswith(said) or said in err
    assert names_in(index.load(saves)) == [f"common-sense-reasoning/Toy/{other.name}"]
    assert make_index(monkeypatch, capsys)[0] == 1


def test_two_swapped_checkpoints_are_found(saves, folder, monkeypatch, capsys):
    os.rename(folder / STEP, folder / "x")
    os.rename(folder / "checkpoint-8.safetensors", folder / STEP)
    os.rename(folder / "x", folder / "checkpoint-8.safetensors")
    status, _, err = make_index(monkeypatch, capsys)
    assert status == 1 and "checkpoint-8.safetensors: does not have its recorded sha256" in err


def test_a_collection_by_any_name_cannot_vanish_by_an_edit(saves, folder, monkeypatch, capsys):
    named = folder.rename(saves / "my runs")
    assert names_in(index.update(saves)[0]) == ["my runs"]
    edit(named, lambda manifest: manifest.update(phase="pretrain"), seal=False)
    status, _, err = make_index(monkeypatch, capsys)
    assert status == 1 and "my runs" in err
    (named / "manifest.json").unlink()
    status, _, err = make_index(monkeypatch, capsys)
    assert status == 1 and "has no manifest.json" in err


def test_a_copied_or_hard_linked_collection_is_accepted(saves, folder, tmp_path):
    for entry in folder.iterdir():
        os.link(entry, tmp_path / entry.name)
    shutil.copytree(folder, folder.with_name("Other_lora-rank_4_finetune"))
    assert index.update(saves)[1] == {}
    shutil.move(saves, tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", saves)
    assert index.load(saves).num_rows == 6
    assert index.update(saves)[1] == {}


# Several copies of one collection


@pytest.fixture
def copy(saves, folder) -> Path:
    """A second copy in a folder of another name, which comes first by its path."""
    return Path(shutil.copytree(folder, saves / "a folder" / "renamed"))


def notes(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("note: ")]


def test_of_two_copies_the_one_at_its_manifests_place_counts(saves, folder, copy, monkeypatch, capsys):
    for _ in range(2):
        status, out, err = make_index(monkeypatch, capsys)
        assert (status, out.count("Toy")) == (0, 1)
        note = f"{paths.relative(copy)}: a second copy of {paths.relative(folder)}, which alone counts"
        assert notes(err) == [f"note: {note}; remove one of both"]
    assert names_in(index.load(saves)) == [NAME]
    assert index.copies_in(saves) == {"a folder/renamed": NAME}
    assert capsys.readouterr().err == "", "the index knows the copy"
    assert [one.name for one in index.chosen(saves)[0]] == [NAME]


def test_of_two_copies_elsewhere_the_first_counts(saves, folder, copy, capsys):
    folder.rename(saves / "b folder")
    assert names_in(index.update(saves)[0]) == ["a folder/renamed"]
    assert "b folder: a second copy of" in capsys.readouterr().err


def test_of_a_broken_and_a_whole_copy_the_whole_one_counts(saves, folder, copy):
    index.update(saves)
    (folder / STEP).unlink()
    table, faults = index.update(saves)
    assert names_in(table) == ["a folder/renamed"] and list(faults) == [NAME]


def test_a_copy_takes_the_place_of_one_that_is_gone(saves, folder, copy, capsys):
    index.update(saves)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"older than {NAME}; run: make index"):
        index.load(saves)
    capsys.readouterr()
    assert names_in(index.update(saves)[0]) == names_in(index.load(saves)) == ["a folder/renamed"]
    assert notes(capsys.readouterr().err) == [] and index.copies_in(saves) == {}


def test_a_copy_that_is_gone_or_became_another_collection_leaves_the_index_usable(saves, folder, copy, capsys):
    index.update(saves)
    edit(copy, lambda manifest: manifest.update(seed=7))
    capsys.readouterr()
    assert names_in(index.load(saves)) == [NAME]
    assert "does not have a folder/renamed" in capsys.readouterr().err
    assert names_in(index.update(saves)[0]) == ["a folder/renamed", NAME]
    shutil.rmtree(copy)
    index.update(saves)
    shutil.copytree(folder, copy)
    index.update(saves)
    shutil.rmtree(copy)
    capsys.readouterr()
    assert names_in(index.load(saves)) == [NAME] and capsys.readouterr().err == ""


def test_an_index_from_before_that_has_both_copies_is_made_again(saves, folder, copy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(copies, "mark", lambda *_: None)
        assert index.update(saves)[0].num_rows == 12
    both = f"has a folder/renamed and {NAME}, copies of one collection; run: make index"
    with pytest.raises(UserError, match=re.escape(both)):
        index.load(saves)
    assert index.update(saves)[0].num_rows == index.load(saves).num_rows == 6


def test_a_link_to_a_collection_is_no_second_copy(saves, folder, capsys):
    (saves / "a link").symlink_to(folder.parent)
    assert names_in(index.update(saves)[0]) == [NAME]
    assert notes(capsys.readouterr().err) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes()[-200:]),
        lambda path: path.write_text("no parquet"),
        lambda path: pyarrow.parquet.write_table(pa.table({"a": [1]}), path),
        lambda path: [path.unlink(), path.mkdir()],
    ],
)
def test_a_damaged_index_is_never_loaded_and_is_made_again(saves, damage):
    first, _ = index.update(saves)
    damage(saves / "index.parquet")
    with pytest.raises(UserError, match="run: make index"):
        index.load(saves)
    if (saves / "index.parquet").is_dir():
        (saves / "index.parquet").rmdir()
    assert index.update(saves)[0].equals(first)
    assert index.load(saves).equals(first)


def test_a_damaged_index_is_made_again_where_there_is_no_collection(saves):
    shutil.rmtree(saves / "common-sense-reasoning")
    (saves / "index.parquet").write_text("no parquet")
    index.update(saves)
    assert pyarrow.parquet.read_table(saves / "index.parquet").num_rows == 0


def test_a_bit_flipped_anywhere_in_the_index_is_noticed(saves):
    index.update(saves)
    path = saves / "index.parquet"
    good = path.read_bytes()
    for place in range(4, len(good), 97):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        table, known = index.read(saves)
        assert not known and not table.num_rows, place


def test_an_index_edited_by_hand_is_not_loaded(saves):
    index.update(saves)
    table = pyarrow.parquet.read_table(saves / "index.parquet")
    worse = table.set_column(table.schema.get_field_index("loss"), "loss", pa.array([0.0] * 6))
    pyarrow.parquet.write_table(worse, saves / "index.parquet")
    with pytest.raises(UserError, match="run: make index"):
        index.load(saves)


def test_an_index_older_than_its_collections_is_refused(saves, folder, capsys):
    index.update(saves)
    other = twin(folder, rank=8)
    assert index.load(saves).num_rows == 6
    assert f"does not have common-sense-reasoning/Toy/{other.name}" in capsys.readouterr().err
    edit(folder, lambda manifest: manifest.update(seed=7))
    with pytest.raises(UserError, match=f"older than {NAME}; run: make index"):
        index.load(saves)
    index.update(saves)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"older than {NAME}; run: make index"):
        index.load(saves)


def test_two_at_once_leave_a_whole_index(saves, folder):
    for rank in (8, 16):
        twin(folder, rank=rank)
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=index.update, args=(saves,)) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 4
    assert index.load(saves).num_rows == 18
    assert [path.name for path in saves.iterdir()].count("index.parquet") == 1
    assert not list(saves.glob(".*.tmp"))


def test_what_is_made_from_collections_and_half_made_runs_are_no_collections(saves, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, saves / "exports" / "peft" / "X_finetune")
    shutil.copytree(folder, folder.with_name(".X_finetune.staging-1"))
    monkeypatch.setattr(paths, "SAVES", tmp_path / "another one")
    shutil.copytree(folder, saves / "my export" / "Toy_finetune")
    (saves / "my export" / "export.json").write_text("{}")
    assert names_in(index.update(saves)[0]) == [NAME]
    assert index.load(saves).num_rows == 6


def test_a_link_to_a_collection_is_followed_and_a_link_upwards_ends(saves, folder, tmp_path):
    shutil.move(folder.parent, tmp_path / "elsewhere")
    folder.parent.symlink_to(tmp_path / "elsewhere")
    (folder.parent / "up").symlink_to(saves)
    (folder.parent / "up2").symlink_to(saves)
    assert NAME in names_in(index.update(saves)[0])


# Scores


SCORES = (
    "metric", "split", "paired", "limit", "scored_rows", "score", "score_low", "score_high", "test_loss", "base_score",
    "base_loss",
)  # fmt: skip


def scores_in(table: pa.Table) -> dict[int, tuple]:
    """The columns of an index that are of an evaluation, by step."""
    return {row["step"]: tuple(row[name] for name in SCORES) for row in table.to_pylist()}


def test_an_evaluated_checkpoint_has_its_scores_in_its_row(saves, folder):
    nothing = (None,) * len(SCORES)
    table, _ = index.update()
    assert set(scores_in(table).values()) == {nothing}
    assert table.column_names[9:20] == list(SCORES)
    few = scored.evaluated({"base": 0.3, 7: 0.9}, rows=10)
    scored.write(folder, few, scored.evaluated({"base": 0.25, 8: 0.5, 12: 0.75}, losses={8: 1.5}))
    found = scores_in(index.update()[0])
    assert found.pop(8) == ("choice", "Toy_test", True, None, 100, 0.5, 0.4, 0.6, 1.5, 0.25, 0.5)
    assert found.pop(12)[5] == 0.75
    assert set(found.values()) == {nothing}, "the evaluation of more rows is the one that is shown"


def test_of_a_dataset_without_choices_the_index_has_the_loss(saves, folder):
    scored.write(folder, scored.evaluated({"base": 2.5, 12: 1.25}, metric="loss"))
    assert scores_in(index.update()[0])[12][-6:] == (None, None, None, 1.25, None, 2.5)


def test_scores_without_the_base_models_are_rows_too(saves, folder):
    scored.write(folder, scored.evaluated({12: 0.5}))
    assert scores_in(index.update()[0])[12][-2:] == (None, None)
    scored.write(folder, scored.evaluated({"base": 2.5, 12: math.nan}, metric="loss"))
    assert scores_in(index.update()[0])[12][8] is None


def test_an_index_older_than_the_scores_is_refused_until_it_is_brought_up_to_date(saves, folder):
    index.update()
    for figures in ({12: 0.5}, {12: 0.625}):
        path = scored.write(folder, scored.evaluated(figures))
        with pytest.raises(UserError, match=f"older than {NAME}; run: make index"):
            index.load()
        index.update()
        assert scores_in(index.load())[12][5] == figures[12]
    os.utime(path)
    index.load()
    path.unlink()
    with pytest.raises(UserError, match="run: make index"):
        index.load()


def test_broken_scores_are_named_and_their_collection_is_left_out(saves, folder, monkeypatch, capsys):
    index.update()
    path = scored.write(folder, scored.evaluated({12: 0.5}))
    path.write_text(path.read_text().replace("0.5", "0.9"))
    status, out, complaint = make_index(monkeypatch, capsys)
    assert status == 1 and "no whole collection" in out
    assert "evaluation.json: was edited after it was written; remove it and run: make evaluate" in complaint
    path.unlink()
    assert names_in(index.update()[0]) == [NAME]


def test_the_printed_table_has_scores_where_something_was_evaluated(saves, folder, monkeypatch, capsys):
    assert "score" not in make_index(monkeypatch, capsys)[1]
    twin(folder, "Other_lora-rank_4_finetune")
    scored.write(folder, scored.evaluated({"base": 0.25, 11: 0.5, 12: 0.75}))
    head, *lines = make_index(monkeypatch, capsys)[1].splitlines()
    assert head.endswith("MB   base    last score       scored on")
    told = "0.2500  0.7500 (choice)  100 rows of Toy_test"
    assert sorted(line.endswith(told) for line in lines) == [False, True]


def test_scores_of_few_rows_or_of_another_dataset_are_marked(saves, folder, monkeypatch, capsys):
    scored.write(folder, scored.evaluated({12: 0.5}, split="PIQA_test", paired=False, limit=4, rows=4))
    row = index.update()[0].to_pylist()[-1]
    assert [row[name] for name in index.MARKS] == [False, 4, 4]
    assert (
        make_index(monkeypatch, capsys)[1].splitlines()[1].endswith("the first 4 rows of PIQA_test, of another dataset")
    )


def test_a_row_has_the_start_of_the_first_description_in_its_manifest(saves, folder):
    assert index.update()[0]["description"].null_count == 6
    texts = ["Answer toy questions. " * 20 + "End.", "Another text."]
    edit(folder, lambda m: m["data"][0]["entry"].update(descriptions={"own": texts}))
    found = set(index.update()[0]["description"].to_pylist())
    assert found == {texts[0][: index.DESCRIPTION - 3] + "..."}


@pytest.mark.parametrize(("number", "lacking"), [("3", index.LATER), ("4", ["description"])])
def test_an_index_of_a_format_before_is_read_and_gets_later_columns_with_the_next_update(
    saves, folder, number, lacking
):
    edit(folder, lambda m: m["data"][0]["entry"].update(descriptions=["Answer toy questions."]))
    scored.write(folder, scored.evaluated({12: 0.5}))
    table, faults = index.update()
    assert not faults and table["description"].null_count == 0
    known = index.read(saves)[1]
    before = table.drop_columns(list(lacking))
    seal = {"format": number, "collections": known, "sha256": index.content_sha256(before, known)}
    pyarrow.parquet.write_table(before.replace_schema_metadata({"paragen": json.dumps(seal)}), saves / "index.parquet")
    loaded = index.load(saves)
    assert loaded.column_names == table.column_names and all(loaded[name].null_count == 6 for name in lacking)
    assert loaded.drop_columns(list(lacking)).equals(before)
    assert index.update()[0].equals(table) and index.load(saves).equals(table)


def test_a_collection_made_from_a_stock_run_has_its_unknowns_empty(saves, folder):
    edit(
        folder, lambda m: (m.update(recipe=None, data=None, seed=None), [e.update(loss=None) for e in m["checkpoints"]])
    )
    table, faults = index.update(saves)
    assert not faults
    assert table["loss"].null_count == table["seed"].null_count == table["rows"].null_count == 6
    index_tables.print_collections(table)
    assert index.load(saves).num_rows == 6


def test_collections_are_selected_by_what_a_user_types(saves, folder, monkeypatch):
    eight = twin(folder, dataset="ARC-c", rank=8)
    seeded = twin(folder, rank=8, seed=7)
    other = twin(folder, model="Other-Model", rank=16)
    everything = sorted(path.name for path in (folder, eight, seeded, other))
    assert sorted(select(monkeypatch)) == everything
    assert select(monkeypatch, DATASET="arcc") == [eight.name]
    assert sorted(select(monkeypatch, DATASET="arcc toy")) == everything
    assert select(monkeypatch, DATASET="Toy", RANK="8") == [seeded.name]
    assert sorted(select(monkeypatch, RANK="08 16")) == sorted([eight.name, seeded.name, other.name])
    assert select(monkeypatch, SEED="7") == [seeded.name]
    assert select(monkeypatch, MODEL="othermodel") == [other.name]
    assert select(monkeypatch, CATEGORY="Common Sense-reasoning".replace(" ", "")) != []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"DATASET": "ARC-e"}, "collected dataset 'ARC-e' is not known; known: Toy"),
        ({"MODEL": "gpt2"}, "collected model 'gpt2' is not known; known: tiny-llama"),
        ({"RANK": "3"}, "no collection fits RANK=3"),
        ({"RANK": "three"}, "rank 'three' is not a positive whole number"),
        ({"SEED": "x"}, "seed 'x' is not a whole number"),
        ({"SEED": "9" * 30}, "is not a whole number"),
    ],
)
def test_a_selection_of_nothing_is_an_error(saves, monkeypatch, asked, said):
    with pytest.raises(UserError, match=said):
        select(monkeypatch, **asked)


def test_a_broken_collection_is_named_and_left_out_by_selections_that_it_may_belong_to(
    saves, folder, monkeypatch, capsys
):
    broken = twin(folder, dataset="Broken", model="Bad", rank=8)
    (broken / "manifest.json").write_text("[")
    assert select(monkeypatch, DATASET="Toy") == [folder.name]
    assert select(monkeypatch, MODEL="tiny-llama") == [folder.name]
    assert select(monkeypatch, RANK="4") == [folder.name]
    assert "broken" not in capsys.readouterr().err
    for asked in ({}, {"CATEGORY": "common-sense-reasoning"}, {"RANK": "4 8"}):
        assert select(monkeypatch, **asked) == [folder.name] and index.chosen()[1] == 1
        assert "manifest.json: broken" in capsys.readouterr().err
    for asked in ({"DATASET": "broken"}, {"MODEL": "bad"}, {"RANK": "8"}):
        with pytest.raises(UserError, match="manifest.json: broken"):
            select(monkeypatch, **asked)
    broken.rename(saves / "anything")
    (saves / "anything" / "manifest.json").unlink()
    assert select(monkeypatch, DATASET="Toy") == [folder.name] and index.chosen()[1] == 1
    assert "anything" in capsys.readouterr().err


def test_a_mark_of_a_manifest_does_not_depend_on_the_order_of_its_keys(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(dict(reversed(manifest.items()))))
    assert read_manifest(folder) is not None


def test_no_flipped_bit_in_an_index_is_believed(trained_place):
    """Bits all over the file: nothing of it is read."""
    index.update()
    path = paths.SAVES / paths.INDEX
    data = path.read_bytes()
    places = range(0, len(data), 127)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        table, known = index.read(paths.SAVES)
        assert not known and not table.num_rows, place
