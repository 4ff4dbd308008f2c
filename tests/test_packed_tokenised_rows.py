"""Rows that other processes tokenise ahead of a pack: the same as those of a run alone, whatever happens to one."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import packed_project

SIDE = {"OMP_NUM_THREADS": "2"}  # so many processes tokenise, on any machine
MIXED = [{"prompt": "a", "response": "yes", "note": 1}, {"prompt": "b", "response": "no", "note": {"of": "b"}}]


@pytest.fixture
def project(tmp_path, model_folder) -> packed_project.Packable:
    return packed_project.Packable(tmp_path / "my project", model_folder)


def source_of(project: packed_project.Packable, dataset: str, staging: Path, tokenizers, **keys):
    """What the rows of a dataset are made from, for a pretrain with these keys of the recipe."""
    import yaml

    from paragen.packed.tokenised_rows import Source
    from paragen.recipes import templates
    from paragen.training import process

    recipe = project.cell(dataset).pretrain
    staging.mkdir()
    job = {
        "recipe": str(recipe), "config": {**yaml.safe_load(recipe.read_text()), **keys}, "phase": "pretrain",
        "staging": str(staging), "devices": ["cpu"], "tokens": None, "tokens_ready": False, "continued": None,
    }  # fmt: skip
    templates.register()
    parsed = process.check_arguments(recipe, process.arguments_of(job))
    return Source(staging, None, parsed, tokenizers)


def assert_equal(ours, theirs) -> None:
    assert len(ours) == len(theirs) > 1
    for mine, other in zip(ours, theirs, strict=True):
        for one, two in zip(mine, other, strict=True):
            assert one.dtype == two.dtype == np.int64 and one.tolist() == two.tolist()


def test_rows_made_ahead_are_those_of_a_run_alone_and_a_broken_dataset_fails_alone(project, tmp_path, monkeypatch):
    from datasets.exceptions import DatasetsError

    from paragen.packed import tokenised_rows

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    project.data("Long", 40)
    project.data("Mixed", rows=MIXED)
    shared = tokenised_rows.Tokenizers()
    settings = {"Toy": {}, "Mixed": {}, "Long": {}, "Other": {"template": "llama3"}, "Cut": {"cutoff_len": 8}}
    sources = {name: source_of(project, name, tmp_path / name, shared, **keys) for name, keys in settings.items()}
    for source in sources.values():
        shared.of(source.parsed)
    assert len(shared.known) == 3, "runs with equal settings share a tokenizer"
    with tokenised_rows.ahead(sources) as found:
        taken = {name: found.take(name) for name in reversed(sources)}
    assert not list(tmp_path.glob("*/rows.npz"))
    for name, keys in settings.items():
        alone = source_of(project, name, tmp_path / f"{name} alone", tokenised_rows.Tokenizers(), **keys)
        rows, fault = taken[name]
        if name == "Mixed":
            assert rows is None and "DatasetGenerationError" in fault
            assert not any((tmp_path / name).iterdir()), "what the process left would hinder the next attempt"
            with pytest.raises(DatasetsError):
                alone.rows()
        else:
            assert fault is None
            assert_equal(rows, alone.rows())


def test_rows_that_a_killed_process_did_not_finish_are_made_again(project, tmp_path, capsys):
    """With what it left of the datasets library's files, the library would take them for whole."""
    from types import SimpleNamespace

    from paragen.packed import tokenised_rows
    from paragen.packed.frozen_base import FrozenBase

    source = source_of(project, "Toy", tmp_path / "Toy", tokenised_rows.Tokenizers())
    expected = source.rows()
    (source.staging / "tokens").mkdir()
    (source.staging / "tokens" / "half").write_text("a part")
    source.parsed[1].tokenized_path = str(source.staging / "tokens")
    base = FrozenBase(["cpu"])
    killed = SimpleNamespace(fault_of=lambda number: "it was killed")
    base.ahead = tokenised_rows.RowsAhead({"its key": source}, killed)
    assert_equal(base._new_rows("its key", source, "this run"), expected)
    assert "this run: a process that tokenised its rows failed (it was killed)" in capsys.readouterr().out


def test_rows_are_read_as_the_dataset_has_them(tmp_path):
    from datasets import Dataset, concatenate_datasets

    from paragen.packed import tokenised_rows

    lists = {"input_ids": [[1, 2, 3], [4], [5, 6]], "labels": [[-100, 2, 3], [4], [-100, 6]], "images": [None] * 3}
    whole = Dataset.from_dict(lists)
    for dataset in (whole, whole.select([2, 0]), concatenate_datasets([whole, whole.select([1])])):
        rows = tokenised_rows.rows_of(dataset)
        assert [row.tokens.tolist() for row in rows] == list(dataset["input_ids"])
        assert [row.labels.tolist() for row in rows] == list(dataset["labels"])
        tokenised_rows.write(tmp_path / "rows.npz", rows)
        assert_equal(tokenised_rows.read(tmp_path / "rows.npz"), rows)


def test_calls_are_made_side_by_side_and_each_fails_alone(tmp_path):
    from paragen.packed.side_processes import STOPPED, Calls

    def call(number: int) -> None:
        if number == 1:
            raise ValueError("no such number")
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        (tmp_path / str(number)).write_text(str(os.getpid()))

    with Calls(call, 6, 3) as calls:
        assert [calls.fault_of(number) for number in range(6)] == [
            None, "ValueError: no such number", STOPPED, None, None, None,
        ]  # fmt: skip
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert made.keys() == {"0", "3", "4", "5"} and str(os.getpid()) not in made.values()


def test_calls_that_are_not_needed_any_more_are_stopped(tmp_path):
    from paragen.packed.side_processes import Calls

    def call(number: int) -> None:
        (tmp_path / str(number)).write_text(str(os.getpid()))
        signal.pause()

    with pytest.raises(RuntimeError, match="meanwhile"), Calls(call, 3, 2):
        while len(list(tmp_path.iterdir())) < 2 or not all(path.read_text() for path in tmp_path.iterdir()):
            time.sleep(0.001)
        raise RuntimeError("meanwhile")
    assert len(list(tmp_path.iterdir())) == 2
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def tokens_in(cache: Path) -> dict[str, list]:
    """The rows in a cache of tokenised rows, by their folder."""
    from datasets import load_from_disk

    return {path.name: load_from_disk(str(path))["train"][:] for path in cache.iterdir()}


@pytest.mark.runs
def test_a_pack_of_many_datasets_keeps_what_each_cell_alone_keeps(project, tmp_path):
    names, bad = ("Toy", "Other", "Third"), "Mixed"
    project.data(bad, rows=MIXED)
    cells = [project.cell(name) for name in names]
    together = project.packed(*cells, project.cell(bad), PARAGEN_TOKENS=str(tmp_path / "together"), **SIDE)
    (line,) = [line for line in together.output.splitlines() if line.startswith("error: ")]
    assert together.status == 1 and "Mixed.json" in line and "Arrow Table" in line, together.output
    assert "Traceback" not in together.output and "failed (" not in together.output, together.output
    assert not project.folder("pretrain", bad).exists() and project.left_over() == []
    aside = project.set_aside("together saves")
    for cell in cells:
        assert project.packed(cell, PARAGEN_TOKENS=str(tmp_path / "alone"), **SIDE).status == 0
    packed_project.assert_same_adapters(project.saves, aside)
    assert tokens_in(tmp_path / "together") == tokens_in(tmp_path / "alone")
    assert len(tokens_in(tmp_path / "alone")) == len(names)


@pytest.mark.runs
def test_rows_are_made_ahead_for_a_second_base_model_after_a_training(project):
    """The process has trained by then, on several CPU threads, which those forked from it have not."""
    few = {"lora_target": "q_proj,v_proj"}
    cells = [project.cell(name) for name in ("Toy", "Other")]
    cells += [project.cell(name, pretrain=few, finetune=few) for name in ("Third", "Fourth")]
    result = project.packed(*cells, **SIDE)
    assert result.status == 0 and "failed (" not in result.output, result.output
    assert project.left_over() == [] and len(list(project.saves.glob("*/*_finetune/manifest.json"))) == len(cells)


@pytest.mark.runs
def test_a_file_that_is_no_table_is_one_error_line_of_the_ordinary_path(project):
    project.data("Mixed", rows=MIXED)
    result = project.ordinary(project.cell("Mixed"), "pretrain")
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.status == 1 and "Mixed.json" in line and "Traceback" not in result.output, result.output
    assert project.left_over() == []


@pytest.mark.runs
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_rows_are_tokenised(project, kind):
    """A stop leaves nothing behind; after a kill, the next start tidies up and is whole."""
    cells = [project.cell(name) for name in ("Toy", "Other", "Third")]
    run = project.start(*cells, **SIDE)
    assert run.kill_when(lambda: any(project.saves.glob("*/.*staging*/cache")), kind), run.log.read_text()
    assert "Traceback" not in run.log.read_text(), run.log.read_text()
    if kind == signal.SIGTERM:
        assert run.process.exitcode == 143
        assert not any(project.saves.glob("*/*")) and project.left_over() == []
    result = project.packed(*cells, **SIDE)
    assert result.status == 0, result.output
    assert project.left_over() == [] and len(list(project.saves.glob("*/*_finetune/manifest.json"))) == 3
    assert json.loads(project.info.read_text()).keys() == {"Toy", "Other", "Third"}


def test_processes_that_answer_nothing_are_stopped(monkeypatch):
    from paragen.packed import side_processes

    monkeypatch.setattr(side_processes, "PATIENCE", 0.2)
    with side_processes.Calls(lambda number: time.sleep(600), 2, 2) as calls:
        assert calls.fault_of(0) == side_processes.HUNG
        assert calls.fault_of(1) == side_processes.STOPPED
        assert not calls.processes


def test_processes_that_have_just_been_forked_are_stopped_too():
    from paragen.packed import side_processes

    for _ in range(5):
        with side_processes.Calls(lambda number: time.sleep(600), 2, 2) as calls:
            processes = [process.pid for process in calls.processes]
        for pid in processes:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
