"""Pictures of a dataset: refused before training unless safe and sound, and part of what a run was trained on."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import tiny_pictures
from test_training_architectures import RANK, SMALL_PRETRAIN, Projects

from paragen.collection import run_identity
from paragen.common.cli import UserError
from paragen.dataset import pictures
from paragen.recipes.run import run_of

NAME = "qwen2.5-vl-3b"


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Projects:
    return Projects(tmp_path_factory.mktemp("pictures") / "my project", (NAME,))


@pytest.fixture
def project(made_once, tmp_path) -> Projects:
    copy = object.__new__(Projects)
    copy.top = shutil.copytree(made_once.top, tmp_path / "my project")
    return copy


def folder(project: Projects) -> Path:
    return project.top / "data" / tiny_pictures.PICTURES


def data_of(project: Projects, *overrides: str) -> dict:
    """The data section of a run's identity, as before any training."""
    recipe = project.recipe(NAME, "pretrain")
    (data,) = run_identity.identity_of(run_of(recipe, RANK, (*SMALL_PRETRAIN, *overrides)))["data"]
    return data


def edit_row(project: Projects, number: int, picture: str) -> None:
    """Let row `number` (from 1) show another picture first."""
    path = project.top / "data" / "multimodal" / "MathV360K.json"
    rows = json.loads(path.read_text())
    rows[number - 1]["images"][0] = picture
    path.write_text(json.dumps(rows))


def edit_text(project: Projects, number: int, text: str) -> None:
    """Let row `number` (from 1) ask something else."""
    path = project.top / "data" / "multimodal" / "MathV360K.json"
    rows = json.loads(path.read_text())
    rows[number - 1]["conversations"][0]["value"] = text
    path.write_text(json.dumps(rows))


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


PICTURE = f"{tiny_pictures.PICTURES}/4.png"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda p: (folder(p) / "4.png").unlink(), "row 5: the picture 'multimodal/colours/4.png' is not there"),
        (lambda p: cut(folder(p) / "4.png"), "row 5: the picture 'multimodal/colours/4.png' cannot be read"),
        (lambda p: (folder(p) / "4.png").write_text("<html>"), "row 5: the picture 'multimodal/colours/4.png' cannot"),
        (lambda p: edit_row(p, 5, str(folder(p) / "4.png")), "outside data/"),
        (lambda p: edit_row(p, 5, "../data/multimodal/colours/4.png"), "outside data/"),
        (lambda p: edit_row(p, 5, "multimodal/colours"), "row 5: the picture 'multimodal/colours' is not a file"),
        (lambda p: edit_row(p, 5, "multimodal/\0.png"), "row 5: the picture 'multimodal/\\x00.png' is not there"),
        (lambda p: edit_row(p, 5, "x" * 5000), "is not there"),
        (lambda p: edit_row(p, 5, ["a list"]), "is not a path"),
        (lambda p: edit_text(p, 5, "no mark"), "row 5: 1 pictures, but 0 <image> marks"),
        (lambda p: link(folder(p) / "4.png", p.top / "secret.png"), "leads out of"),
        (lambda p: link(folder(p) / "4.png", folder(p) / "4.png"), "is not there"),
    ],
)
def test_a_picture_that_cannot_be_trained_on_is_named_by_row_before_training(project, fault, said):
    shutil.copy(folder(project) / "4.png", project.top / "secret.png")
    fault(project)
    with pytest.raises(UserError) as refused:
        data_of(project)
    message = str(refused.value)
    assert "MathV360K.json: row 5: " in message and said in message and "\n" not in message


def test_of_many_faulty_rows_the_first_and_their_number_are_told(project):
    shutil.rmtree(folder(project))
    recipe = project.recipe(NAME, "pretrain")
    result = project.start(recipe, *SMALL_PRETRAIN)
    assert result.status == 1 and "Traceback" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert all(f"row {number}: the picture" in line for number in (1, 2, 3)) and "row 4:" not in line
    assert "12 of 12 rows" in line and "media_dir" in line
    assert not (project.top / "saves").exists() or not list((project.top / "saves").rglob("*pretrain*"))


def test_rows_that_are_not_trained_on_need_no_pictures(project):
    (folder(project) / "14.png").unlink()
    assert data_of(project, "max_samples=12")["pictures"]["count"] == 12
    with pytest.raises(UserError, match="row 15: the picture"):
        data_of(project, "max_samples=16")


def test_media_dir_is_relative_to_the_recipe_and_may_lie_anywhere(project):
    before = data_of(project)
    elsewhere = project.top / "big disk"
    elsewhere.mkdir()
    (project.top / "data" / "multimodal" / "colours").rename(elsewhere / "colours")
    (elsewhere / "multimodal").mkdir()
    (elsewhere / "colours").rename(elsewhere / "multimodal" / "colours")
    assert data_of(project, "media_dir=../../../big disk") == before, "the place of equal pictures changes nothing"
    result = project.start(project.recipe(NAME, "pretrain"), *SMALL_PRETRAIN, "media_dir=../../../big disk")
    assert result.status == 0, result.output


def test_a_changed_picture_makes_the_run_stale_and_the_redone_one_sees_it(project):
    finetune, overrides = project.recipe(NAME, "finetune"), project.overrides(NAME, "finetune")
    for phase in ("pretrain", "finetune"):
        project.train(NAME, phase)
    assert "complete" in project.start(finetune, *overrides).output
    tiny_pictures.draw(folder(project) / "14.png", "red")  # of a row behind max_samples
    assert "complete" in project.start(finetune, *overrides).output
    tiny_pictures.draw(folder(project) / "2.png", "red", size=(112, 84))  # more tokens than before
    stale = project.start(finetune, *overrides)
    assert stale.status == 1 and "stale, changed since: the pictures of multimodal/MathV360K.json" in stale.output
    redone = project.start(finetune, *overrides, FORCE="1")
    assert redone.status == 0, redone.output


def test_pictures_that_did_not_change_are_not_read_again(project, monkeypatch):
    first = data_of(project)
    read = []
    monkeypatch.setattr(pictures, "hash_of_picture", lambda path: read.append(path.name) or "new")
    assert data_of(project) == first and not read
    os.utime(folder(project) / "3.png")
    assert data_of(project) != first and read == ["3.png"]


def test_a_picture_that_cutoff_len_cuts_short_is_refused_before_the_first_step(project):
    """LLaMA-Factory would stop in the middle of the training, at the first such row, with a shape mismatch."""
    result = project.start(project.recipe(NAME, "pretrain"), *SMALL_PRETRAIN, "cutoff_len=56")
    assert result.status == 1 and "Traceback" not in result.output, result.output
    assert "cutoff_len 56 cuts pictures short in 3 rows, first in row 4" in result.output


def test_cutting_text_alone_is_fine(project):
    edit_text(project, 1, "<image>look" + " closely" * 30)
    result = project.start(project.recipe(NAME, "pretrain"), *SMALL_PRETRAIN)
    assert result.status == 0, result.output


def test_a_template_that_takes_no_pictures_is_refused_with_them(project):
    result = project.start(project.recipe(NAME, "pretrain"), *SMALL_PRETRAIN, "template=qwen")
    assert result.status == 1 and "Traceback" not in result.output, result.output
    assert "template 'qwen' takes no pictures" in result.output


def test_a_template_for_pictures_needs_a_model_with_a_processor(project):
    (project.model(NAME) / "processor_config.json").unlink()
    result = project.start(project.recipe(NAME, "pretrain"), *SMALL_PRETRAIN)
    assert result.status == 1 and "Traceback" not in result.output, result.output
    assert "has no preprocessor_config.json" in result.output
