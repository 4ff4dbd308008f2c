"""An archive gives back what was put into it, bit for bit, or says what is damaged; nothing is left half-written."""

import filecmp
import hashlib
import json
import os
import shutil
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import fork_server, scored
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import import_archive
from paragen.archives import archive, read, write
from paragen.collection import discovery, index, run_files, verification
from paragen.collection.manifest import CheckpointEntry, new_manifest, read_manifest, sealed
from paragen.common import devices, paths
from paragen.common.cli import UserError
from paragen.exports import archive as export_archive

RUN = "Synth_lora-rank_2_finetune"


def make_collection(folder: Path, steps: int = 20, dtypes=(torch.float32,), size: int = 64, **changed) -> Path:
    """A collection of random walks, as made from a stock run: not all facts are known."""
    folder.mkdir(parents=True)
    generator, entries = torch.Generator().manual_seed(0), []
    tensors = {}
    for number, dtype in enumerate(dtypes):
        for factor, shape in (("A", (2, size)), ("B", (size, 2))):
            walk = torch.randn(shape, generator=generator)
            tensors[f"base_model.model.layers.{number}.q_proj.lora_{factor}.weight"] = walk.to(dtype)
    for step in range(5, 5 + steps):
        for key, tensor in tensors.items():
            tensors[key] = tensor + (torch.randn(tensor.shape, generator=generator) * 1e-3).to(tensor.dtype)
        path = folder / run_files.checkpoint_name(step)
        save_file(tensors, path, {"format": "pt"})
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        entries.append(CheckpointEntry(step, None, None, path.stat().st_size, sha256))
    (folder / "adapter_config.json").write_text('{"r": 2}')
    identity = dict.fromkeys(("recipe", "data", "base_model", "tokenizer", "pretrain"))
    facts = {"seed": None, "adapter_config_sha256": hashlib.sha256(b'{"r": 2}').hexdigest()}
    manifest = new_manifest(folder, "finetune", 2, identity, entries, facts)
    (folder / paths.MANIFEST).write_text(json.dumps(sealed(manifest.content | changed)))
    return folder


@pytest.fixture
def synthetic(tmp_path) -> Path:
    return make_collection(tmp_path / "from here" / "math" / "Toy" / RUN)


def archived(folder: Path, target: Path, part_bytes: int | None = None) -> list[Path]:
    return archive.write(folder, read_manifest(folder), target, part_bytes)


def same_folders(one: Path, other: Path) -> bool:
    names = sorted(os.listdir(one))
    return names == sorted(os.listdir(other)) and filecmp.cmpfiles(one, other, names, shallow=False)[0] == names


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype
        and one[key].shape == other[key].shape
        and torch.equal(one[key].contiguous().view(torch.uint8), other[key].contiguous().view(torch.uint8))
        for key in one
    )


def flip(path: Path, place: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    read._opened.cache_clear()  # within a tick of the clock a file's times do not tell that it changed


def left_overs(top: Path) -> list[Path]:
    return [path for path in top.rglob(".*") if path.name.startswith(".") and path.name != ".export.json.lock"]


def test_a_real_collection_comes_back_with_the_same_bytes(trained_once, tmp_path, monkeypatch, capsys):
    folder, saves = trained_once.run_folder("finetune"), tmp_path / "other saves"
    for name in ("DATASET", "MODEL", "RANK", "FORCE"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "my exports"
    chosen, _ = index.chosen(trained_once.top / "saves")
    export_archive.export(chosen, out, None)
    (path,) = out.rglob("*.archive")
    assert path.relative_to(out).as_posix() == f"common-sense-reasoning/Toy/{folder.name}.archive"
    export_archive.export(chosen, out, None)
    assert "there already" in capsys.readouterr().out

    restored = archive.restore([path], saves)
    assert restored == saves / "common-sense-reasoning" / "Toy" / folder.name
    assert same_folders(folder, restored)
    assert verification.faults_of(restored, read_manifest(restored)) == []
    assert index.update(saves)[0].num_rows == 6 and not index.update(saves)[1]
    for entry in read_manifest(folder).checkpoints:
        tensors = archive.load_step(path, entry.step)
        assert list(tensors) == sorted(tensors)
        assert same(tensors, load_file(folder / entry.file_name))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float64, torch.float8_e5m2),
    ],
)
def test_any_dtypes_are_lossless_over_several_full_checkpoints(tmp_path, dtypes):
    folder = tmp_path / "math" / "Toy" / RUN
    make_collection(folder, 2 * write.GROUP + 3, tuple(dtype for dtype in dtypes if dtype.itemsize > 1))
    if any(dtype.itemsize == 1 for dtype in dtypes):
        content = read_manifest(folder).content
        for entry in content["checkpoints"]:
            file = folder / run_files.checkpoint_name(entry["step"])
            tensors = load_file(file) | {"flags": torch.tensor([True, False, True]), "empty": torch.zeros(0, 3)}
            save_file(tensors | {"small": torch.ones(5).to(torch.float8_e5m2)}, file, {"order": "x" * entry["step"]})
            entry.update(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
        (folder / paths.MANIFEST).write_text(json.dumps(sealed(content)))
    (path,) = archived(folder, tmp_path / "x.archive")
    archive.verify(path)
    manifest = read_manifest(folder)
    assert archive.steps_of(path) == manifest.steps
    for step, data in archive.read_all(path):
        file = folder / run_files.checkpoint_name(step)
        assert bytes(data) == file.read_bytes()
        assert same(archive.load_step(path, step), load_file(file))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_edited_adapter_config_is_not_archived(synthetic, tmp_path, dtype):
    manifest = read_manifest(synthetic)
    manifest = archive.converted(synthetic, manifest, dtype) if dtype else manifest
    config = synthetic / "adapter_config.json"
    for spoil in (lambda: config.write_text('{"r": 2, "lora_alpha": 99}'), config.unlink):
        spoil()
        with pytest.raises(UserError, match=r"adapter_config\.json: (does not have its recorded sha256|is gone)"):
            archive.write(synthetic, manifest, tmp_path / "x.archive")
        assert not (tmp_path / "x.archive").exists()


def test_differences_make_it_small(tmp_path):
    folder = make_collection(tmp_path / "math" / "Toy" / RUN, 14, (torch.bfloat16,), size=20_000)
    (path,) = archived(folder, tmp_path / "x.archive")
    raw = sum(entry.bytes for entry in read_manifest(folder).checkpoints)
    assert path.stat().st_size < 0.5 * raw  # a random walk; figures of real runs: bench/archive.py


def test_it_is_a_safetensors_file(synthetic, tmp_path):
    (path,) = archived(synthetic, tmp_path / "x.archive")
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["blocks", "index", "seal"]
        assert file.metadata()["paragen_archive"] == archive.FORMAT


def test_a_step_is_read_without_the_groups_before_it(synthetic, tmp_path):
    (path,) = archived(synthetic, tmp_path / "x.archive")
    first_block = archive.opened(path).index["steps"][0]["planes"][0]
    flip(path, read.HEAD + first_block[1])
    with pytest.raises(UserError, match="byte plane 0 of checkpoint 5 is damaged"):
        archive.load_step(path, 5)
    archive.load_step(path, 5 + write.GROUP)
    with pytest.raises(UserError, match="does not hold step 99; it holds 5 to 24"):
        archive.load_step(path, 99)


def test_a_flipped_bit_anywhere_is_found_and_named(tmp_path):
    folder = make_collection(tmp_path / "math" / "Toy" / RUN, 6, (torch.bfloat16,), size=32)
    (path,) = archived(folder, tmp_path / "x.archive")
    found = archive.opened(path).index
    named = {HEADER: range(read.HEAD)}
    for name, entry in found["files"].items():
        named[name] = block_of(entry["block"])
    for entry in found["headers"]:
        named["the header of checkpoint"] = block_of(entry["block"])
    for step in found["steps"]:
        for number, block in enumerate(step["planes"]):
            named[f"byte plane {number} of checkpoint {step['step']}"] = block_of(block)
    end = max(places.stop for places in named.values())
    named["its header or its index"] = range(end, path.stat().st_size)
    assert sum(len(places) for places in named.values()) == path.stat().st_size  # no byte is left out
    for what, places in named.items():
        for place in {*places[:9], *places[:: max(1, len(places) // 30)], *places[-2:]}:
            flip(path, place, place % 8)
            with pytest.raises(UserError) as caught:
                archive.verify(path)
            assert "x.archive" in str(caught.value) and "\n" not in str(caught.value)
            assert what == HEADER or what in str(caught.value), place
            flip(path, place, place % 8)
    archive.verify(path)


HEADER = "the safetensors header and its padding"  # the library finds some of it, in its words


def block_of(block: list) -> range:
    return range(read.HEAD + block[1], read.HEAD + block[1] + block[2])


def test_a_truncated_or_lengthened_file_is_found(synthetic, tmp_path):
    (path,) = archived(synthetic, tmp_path / "x.archive")
    data = path.read_bytes()
    for wrong in (b"", data[:5], data[:600], data[: len(data) // 2], data[:-1], data + b"\0", b"no archive" * 100):
        path.write_bytes(wrong)
        read._opened.cache_clear()
        with pytest.raises(UserError, match=r"x\.archive: is truncated"):
            archive.restore([path], tmp_path / "saves")
    with pytest.raises(UserError, match="no such archive"):
        archive.restore([tmp_path / "gone.archive"], tmp_path / "saves")
    assert not (tmp_path / "saves").exists()


def test_a_checkpoint_changed_since_is_not_archived(synthetic, tmp_path):
    flip(synthetic / "checkpoint-9.safetensors", 400)
    with pytest.raises(UserError, match=r"checkpoint-9\.safetensors: does not have its recorded sha256"):
        archived(synthetic, tmp_path / "x.archive")
    assert not list(tmp_path.glob("*.archive*"))


def test_what_is_there_is_kept_unless_forced(synthetic, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "SAVES", tmp_path / "saves")
    monkeypatch.delenv("FORCE", raising=False)
    (path,) = archived(synthetic, tmp_path / "x.archive")
    monkeypatch.setattr(sys, "argv", ["import_archive.py", str(path)])
    folder = tmp_path / "saves" / "math" / "Toy" / RUN

    assert import_archive.main() == 0
    stamp = folder.stat().st_ino
    assert import_archive.main() == 0
    assert "there already" in capsys.readouterr().out
    assert folder.stat().st_ino == stamp

    flip(folder / "checkpoint-9.safetensors", 400)
    assert import_archive.main() == 1
    assert "but checkpoint-9.safetensors does not have its recorded sha256; FORCE=1" in capsys.readouterr().err
    shutil.rmtree(folder)
    make_collection(folder, 3)
    assert import_archive.main() == 1
    assert "another collection than the archive's is there already; FORCE=1" in capsys.readouterr().err
    assert len(list(folder.glob("*.safetensors"))) == 3
    (folder / paths.MANIFEST).unlink()
    assert import_archive.main() == 1
    assert "without a manifest.json; FORCE=1" in capsys.readouterr().err

    (folder / "notes.txt").write_text("mine")
    monkeypatch.setenv("FORCE", "1")
    assert import_archive.main() == 0
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert same_folders(synthetic, folder)
    assert not left_overs(tmp_path / "saves")


@pytest.mark.parametrize("place", ["math/Toy/renamed", "Math/To_y/" + RUN, "by hand", "math/Other/" + RUN])
def test_a_collection_that_is_at_another_place_is_known_by_its_manifest(
    synthetic, tmp_path, monkeypatch, capsys, place
):
    monkeypatch.setattr(paths, "SAVES", tmp_path / "saves")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.delenv("FORCE", raising=False)
    other = make_collection(paths.SAVES / "math" / "Another" / RUN, 3)
    folder = paths.SAVES / place
    shutil.copytree(synthetic, folder)
    scored.write(synthetic, scored.evaluated(FEW))
    (path,) = archived(synthetic, tmp_path / "x.archive")
    monkeypatch.setattr(sys, "argv", ["import_archive.py", str(path)])

    def collections() -> list[Path]:
        return discovery.find_collections([paths.SAVES])

    there = collections()
    assert import_archive.main() == 0
    out = capsys.readouterr().out
    assert f"there already: saves/{place}\n" in out and "scores imported: saves/" in out
    assert collections() == there and figures_in(folder) == FEW

    flip(folder / "checkpoint-9.safetensors", 400)
    assert import_archive.main() == 1
    told = capsys.readouterr().err
    assert f"saves/{place}: is there already, but checkpoint-9.safetensors does not have its recorded sha256" in told
    monkeypatch.setenv("FORCE", "1")
    assert import_archive.main() == 0
    assert collections() == there and same_folders(synthetic, folder)
    assert len(list(other.glob("*.safetensors"))) == 3 and not left_overs(paths.SAVES)


def test_of_two_copies_the_one_at_its_place_gets_the_scores(synthetic, tmp_path):
    saves = tmp_path / "saves"
    for place in ("a", f"math/Toy/{RUN}"):
        shutil.copytree(synthetic, saves / place)
    scored.write(synthetic, scored.evaluated(FEW))
    assert archive.restore(archived(synthetic, tmp_path / "x.archive"), saves) == saves / "math" / "Toy" / RUN
    assert not (saves / "a" / "evaluation.json").exists()


def test_a_collection_that_a_crash_left_between_two_renames_is_found(synthetic, tmp_path):
    saves = tmp_path / "saves"
    moved = saves / "elsewhere" / RUN
    shutil.copytree(synthetic, moved.with_name(f".{RUN}.old"))
    assert archive.restore(archived(synthetic, tmp_path / "x.archive"), saves) == moved
    assert same_folders(synthetic, moved) and not left_overs(saves)


def test_a_strangers_names_do_not_leave_saves(tmp_path):
    for number, names in enumerate((
        {"run": "../../../evil_finetune"},
        {"run": "/evil_finetune"},
        {"run": ".."},
        {"run": ".hidden_finetune"},
        {"run": ""},
        {"run": None},
        {"run": "a\nb_finetune"},
        {"dataset": ".."},
        {"dataset": "a/b"},
        {"dataset": ["x"]},
        {"category": "../math"},
        {"category": "elsewhere"},
        {"category": None, "dataset": "exports"},
        {"phase": "pretrain"},
        {"checkpoints": [{"step": "../../evil", "bytes": 1, "sha256": "0"}]},
        {"checkpoints": "none"},
        {"recipe": "none"},
    )):  # fmt: skip
        folder = make_collection(tmp_path / str(number) / "math" / "Toy" / RUN, 1)
        manifest = read_manifest(folder)
        target = tmp_path / f"{number}.archive"
        crafted = sealed(manifest.content | names)
        small = {paths.MANIFEST: json.dumps(crafted).encode()}
        write._write_part(target, folder, None, crafted["sha256"], small, manifest.checkpoints, None)
        with pytest.raises(UserError, match=f"{number}.archive"):
            archive.restore([target], tmp_path / "saves")
        assert not (tmp_path / "saves").exists(), names
    small = {paths.MANIFEST: json.dumps(manifest.content).encode(), "../evil": b"evil"}
    write._write_part(target, folder, None, manifest.sha256, small, manifest.checkpoints, None)
    with pytest.raises(UserError, match=r"'\.\./evil', which belongs to no collection"):
        archive.restore([target], tmp_path / "saves")
    assert not (tmp_path / "saves").exists() and not list(tmp_path.rglob("evil*"))


def test_what_differs_from_the_manifest_or_lies_between_blocks_is_refused(synthetic, tmp_path, monkeypatch):
    target, manifest = tmp_path / "x.archive", read_manifest(synthetic)
    entries = [dict(entry) for entry in manifest.content["checkpoints"]]
    entries[4]["sha256"] = entries[3]["sha256"]
    crafted = sealed(manifest.content | {"checkpoints": entries})
    small = {paths.MANIFEST: json.dumps(crafted).encode()}
    write._write_part(target, synthetic, None, crafted["sha256"], small, manifest.checkpoints, None)
    with pytest.raises(UserError, match="checkpoint 9 is not the one that its manifest records"):
        archive.restore([target], tmp_path / "saves")
    assert not list(tmp_path.glob("saves/*/*/*")) and not left_overs(tmp_path / "saves")

    put = write._put
    monkeypatch.setattr(write, "_put", lambda file, *block: (file.write(b"?"), put(file, *block))[1])
    archived(synthetic, target)
    with pytest.raises(UserError, match=r"x\.archive: its index is not one of format"):
        archive.restore([target], tmp_path / "saves")


def test_a_collection_of_no_category_comes_back(tmp_path):
    folder = make_collection(tmp_path / "mine" / "Toy" / RUN, 3)
    assert read_manifest(folder).category is None
    (path,) = archived(folder, tmp_path / "x.archive")
    assert same_folders(folder, archive.restore([path], tmp_path / "saves"))
    assert (tmp_path / "saves" / "Toy" / RUN).is_dir()


def test_parts_stay_below_the_limit_and_come_back_together(synthetic, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "SAVES", tmp_path / "saves")
    target = tmp_path / "parts here" / "x.archive"
    target.parent.mkdir()
    parts = archived(synthetic, target, part_bytes=12_000)
    assert len(parts) > 2 and parts[0].name == f"x-00001-of-{len(parts):05}.archive"
    assert sorted(target.parent.iterdir()) == parts
    assert all(path.stat().st_size <= 12_000 for path in parts)
    assert [step for path in parts for step in archive.steps_of(path)] == list(range(5, 25))
    for path in parts:
        archive.verify(path)
        step = archive.steps_of(path)[-1]
        assert same(archive.load_step(path, step), load_file(synthetic / run_files.checkpoint_name(step)))

    hidden = parts[1].rename(tmp_path / "hidden")
    monkeypatch.setattr(sys, "argv", ["import_archive.py", str(target.parent)])
    assert import_archive.main() == 1
    assert "give the folder that holds all parts" in capsys.readouterr().err
    hidden.rename(parts[1])
    assert import_archive.main() == 0
    assert same_folders(synthetic, tmp_path / "saves" / "math" / "Toy" / RUN)

    assert archived(synthetic, tmp_path / "one.archive", part_bytes=10**9) == [tmp_path / "one.archive"]
    with pytest.raises(UserError, match="are too few for one checkpoint"):
        archived(synthetic, tmp_path / "none.archive", part_bytes=3000)
    assert not list(tmp_path.glob("none*"))


def test_parts_of_different_collections_are_not_mixed(synthetic, tmp_path):
    other = make_collection(tmp_path / "other" / "math" / "Toy" / RUN, 3)
    one, two = archived(synthetic, tmp_path / "1.archive") + archived(other, tmp_path / "2.archive")
    with pytest.raises(UserError, match=r"2\.archive: is of another collection than"):
        archive.restore([one, two], tmp_path / "saves")


def test_another_dtype_only_when_asked_for_and_recorded(trained_once, tmp_path, monkeypatch):
    monkeypatch.delenv("FORCE", raising=False)
    folder = trained_once.run_folder("finetune")
    source = read_manifest(folder)
    ((chosen,), _) = index.chosen(trained_once.top / "saves")
    export_archive.export([chosen], tmp_path / "out", "bfloat16")
    (path,) = (tmp_path / "out").rglob("*.archive")
    restored = archive.restore([path], tmp_path / "saves")
    manifest = read_manifest(restored)

    assert manifest.content["converted"] == {"from": "float32", "to": "bfloat16", "sha256": source.sha256}
    assert manifest.sha256 != source.sha256
    assert verification.faults_of(restored, manifest) == []
    assert discovery.state_of(restored, source.identity)[0] == "complete"
    assert index.update(tmp_path / "saves")[1] == {}
    for entry, before in zip(manifest.checkpoints, source.checkpoints, strict=True):
        file = entry.file_name
        expected = {key: tensor.bfloat16() for key, tensor in load_file(folder / file).items()}
        assert same(load_file(restored / file), expected)
        assert (entry.loss, entry.step) == (before.loss, before.step)
    assert archive.converted(folder, source, "float32") == source
    with pytest.raises(UserError, match=r"another collection than the archive's \(in bfloat16\) is there already"):
        archive.restore([path], trained_once.top / "saves")


def test_a_value_that_a_dtype_cannot_hold_is_named(tmp_path):
    folder = make_collection(tmp_path / "math" / "Toy" / RUN, 1)
    file = folder / "checkpoint-5.safetensors"
    save_file({"big.lora_A.weight": torch.full((2, 2), 1e6)}, file)
    manifest = read_manifest(folder)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = replace(manifest.checkpoints[0], bytes=file.stat().st_size, sha256=sha256)
    manifest = replace(manifest, checkpoints=(entry,))
    with pytest.raises(UserError, match="big.lora_A.weight holds values that float16 cannot"):
        archive.converted(folder, manifest, "float16")


# The scores in evaluation.json


FEW, MORE, OTHER = ({"base": 0.4, 5: 0.5}, {"base": 0.4, 5: 0.5, 6: 0.7}, {"base": 0.4, 5: 0.6})


@pytest.fixture
def imported(synthetic, tmp_path):
    """imported(figures there, figures in the archive): the collection after the import; None for no evaluation."""

    def bring(here: dict | None, coming: dict | None) -> Path:
        saves = tmp_path / "saves"
        (path,) = archived(synthetic, tmp_path / "plain.archive")
        folder = archive.restore([path], saves)
        if here:
            scored.write(folder, scored.evaluated(here))
        if coming:
            scored.write(synthetic, scored.evaluated(coming))
            (path,) = archived(synthetic, tmp_path / "x.archive")
        return archive.restore([path], saves)

    return bring


def figures_in(folder: Path) -> dict:
    (found,) = archive.evaluation.read(folder, read_manifest(folder))
    return {"base": found["base"]["score"]} | {one["step"]: one["score"] for one in found["checkpoints"]}


def test_scores_travel_and_a_collection_without_any_is_archived_as_before(synthetic, tmp_path):
    (plain,) = archived(synthetic, tmp_path / "plain.archive")
    label = scored.write(synthetic, scored.evaluated(MORE))
    parts = archived(synthetic, tmp_path / "x.archive", part_bytes=25_000)
    assert len(parts) > 1
    assert same_folders(synthetic, archive.restore(parts, tmp_path / "saves"))
    label.unlink()
    assert archived(synthetic, tmp_path / "again.archive")[0].read_bytes() == plain.read_bytes()


def test_cast_checkpoints_have_no_scores_of_those_that_were_not(synthetic, tmp_path):
    scored.write(synthetic, scored.evaluated(MORE))
    cast = archive.converted(synthetic, read_manifest(synthetic), "bfloat16")
    archive.write(synthetic, cast, tmp_path / "x.archive")
    folder = archive.restore([tmp_path / "x.archive"], tmp_path / "saves")
    assert not (folder / "evaluation.json").exists()


@pytest.mark.parametrize(
    "here, coming, then", [(None, FEW, FEW), (FEW, None, FEW), (FEW, MORE, MORE), (MORE, FEW, MORE)]
)
def test_an_import_loses_no_score(imported, here, coming, then):
    assert figures_in(imported(here, coming)) == then


def test_other_scores_than_those_here_are_brought_only_with_force(imported, monkeypatch):
    with pytest.raises(UserError, match=r"evaluation\.json: holds other scores than .* FORCE=1 replaces"):
        imported(FEW, OTHER)
    monkeypatch.setenv("FORCE", "1")
    assert figures_in(imported(FEW, OTHER)) == OTHER


@pytest.mark.parametrize("here, coming, then", [(MORE, FEW, MORE), (MORE, None, MORE), (FEW, MORE, MORE)])
def test_force_keeps_the_scores_of_the_same_whole_collection(imported, monkeypatch, here, coming, then):
    monkeypatch.setenv("FORCE", "1")
    assert figures_in(imported(here, coming)) == then


def test_force_replaces_a_folder_whose_manifest_cannot_be_read(synthetic, tmp_path, monkeypatch):
    monkeypatch.delenv("FORCE", raising=False)
    (path,) = archived(synthetic, tmp_path / "x.archive")
    folder = archive.restore([path], tmp_path / "saves")
    (folder / paths.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: broken"):
        archive.restore([path], tmp_path / "saves")
    monkeypatch.setenv("FORCE", "1")
    assert same_folders(synthetic, archive.restore([path], tmp_path / "saves"))


def test_parts_of_different_ages_bring_the_fullest_scores(synthetic, tmp_path):
    scored.write(synthetic, scored.evaluated(FEW))
    older = archived(synthetic, tmp_path / "older.archive", part_bytes=25_000)
    scored.write(synthetic, scored.evaluated(MORE))
    newer = archived(synthetic, tmp_path / "newer.archive", part_bytes=25_000)
    assert figures_in(archive.restore([older[0], *newer[1:]], tmp_path / "saves")) == MORE


def test_scores_that_cannot_be_trusted_are_not_archived(synthetic, tmp_path):
    path = scored.write(synthetic, scored.evaluated(MORE))
    path.write_text(path.read_text().replace("0.7", "0.8"))
    with pytest.raises(UserError, match=r"evaluation\.json: was edited after it was written; remove it and run"):
        archived(synthetic, tmp_path / "x.archive")
    archive.evaluation.write(synthetic, replace(read_manifest(synthetic), sha256="another's"), [scored.evaluated(MORE)])
    with pytest.raises(UserError, match=r"evaluation\.json: is of other checkpoints than its manifest\.json"):
        archived(synthetic, tmp_path / "x.archive")
    assert not list(tmp_path.glob("*.archive"))


def test_an_export_is_out_of_date_when_the_scores_changed(place, capsys):
    folder = place.collect(category="math")
    out = place.export("archive")
    capsys.readouterr()
    for said in ("exported", "there already"):
        scored.write(folder, scored.evaluated(scored.RISING))
        place.export("archive")
        assert capsys.readouterr().out.startswith(said)
    (path,) = out.rglob("*.archive")
    assert archive.read_files(path)["evaluation.json"] == (folder / "evaluation.json").read_bytes()


# In processes of their own: killed, two at once, on a full disk


def start(script: str, saves: Path, *arguments, **environment: str) -> fork_server.Run:
    """utils/<script>.py on this saves/ folder."""
    log = saves.with_name(f"log {time.monotonic_ns()}.txt")
    return fork_server.start(
        script, [str(value) for value in arguments], {"SAVES_FOLDER": str(saves), **environment}, log
    )


@pytest.fixture
def large(tmp_path) -> Path:
    return make_collection(tmp_path / "from" / "math" / "Toy" / RUN, 40, size=20_000)


def test_a_killed_import_leaves_nothing_half_written(large, tmp_path):
    (path,) = archived(large, tmp_path / "x.archive")
    saves = tmp_path / "saves"
    folder = saves / "math" / "Toy" / RUN
    run = start("import_archive", saves, path)
    assert run.kill_when(lambda: len(list(saves.glob("*/*/.*staging*/checkpoint-*"))) >= 3)
    assert not folder.exists() and left_overs(saves)
    assert start("import_archive", saves, path).wait().status == 0
    assert same_folders(large, folder) and not left_overs(saves)


def test_a_killed_export_leaves_nothing_half_written(large, tmp_path):
    out, saves = tmp_path / "out", tmp_path / "from"
    environment = {"FORMAT": "archive", "OUT": str(out)}
    run = start("export", saves, **environment)
    assert run.kill_when(lambda: any(path.stat().st_size > 10**6 for path in out.rglob(".*staging*")))
    assert not list(out.rglob("*_finetune.archive"))
    assert start("export", saves, **environment).wait().status == 0
    (path,) = out.rglob("*.archive")
    archive.verify(path)
    assert not left_overs(out)


def test_two_imports_at_once_make_one_collection(large, tmp_path):
    (path,) = archived(large, tmp_path / "x.archive")
    saves = tmp_path / "saves"
    both = [start("import_archive", saves, path) for _ in range(2)]
    results = [run.wait() for run in both]
    assert sum("imported: " in result.output for result in results) == 1
    for result in results:
        assert result.status == 0 or "is being trained or imported" in result.output, result
    assert same_folders(large, saves / "math" / "Toy" / RUN) and not left_overs(saves)


def test_a_full_disk_is_one_line_and_leaves_nothing(large, tmp_path):
    (path,) = archived(large, tmp_path / "x.archive")
    out = tmp_path / "out"
    for run in (
        start("import_archive", tmp_path / "saves", path, FILE_SIZE_LIMIT="100000"),
        start("export", tmp_path / "from", FILE_SIZE_LIMIT="100000", FORMAT="archive", OUT=str(out)),
    ):
        result = run.wait()
        assert result.status == 1 and result.output.count("\n") == 1, result
        assert result.output.startswith("error: ") and "File too large" in result.output
    assert not list(tmp_path.glob("saves/*/*/*")) and not list(out.rglob("*.archive"))
    assert not left_overs(tmp_path / "saves") and not left_overs(out)


def test_a_file_below_the_home_folder_is_found_where_the_shell_left_the_tilde(synthetic, tmp_path, monkeypatch):
    archived(synthetic, tmp_path / "x.archive")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["import_archive.py"])
    monkeypatch.setattr(paths, "SAVES", tmp_path / "saves")
    for given in ("~/x.archive", "~"):
        monkeypatch.setenv("FILE", given)
        assert import_archive.main() == 0
    assert len(list((tmp_path / "saves").rglob(paths.MANIFEST))) == 1


def test_without_a_file_it_says_what_to_type(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["import_archive.py", ""])
    with pytest.raises(UserError, match=r"make import FILE=x\.archive, or a folder"):
        import_archive.main()


# ---------------------------------------------------------------------------------------------------------------------
# What unpacks to more than it can be


def rewritten(path: Path, change) -> None:
    """Change an archive's index and make its seal right, as a stranger would."""
    with safe_open(path, "np") as file:
        blocks = file.get_tensor("blocks").tobytes()
        size = int(file.metadata()["index_bytes"])
        index = json.loads(read.codec().decompress(file.get_tensor("index").tobytes(), size, asbytes=True))
    change(index)
    text = json.dumps(index).encode()
    with open(path, "wb") as file:
        file.write(bytes(read.HEAD) + blocks)
        write._finish(file, read.codec().compress(text, asbytes=True), len(text))


def enlarge_a_step(index: dict) -> None:
    index["steps"][0]["bytes"] = 20 * 10**9


def enlarge_a_file(index: dict) -> None:
    index["files"]["adapter_config.json"]["bytes"] = 10**10


def enlarge_headers(index: dict) -> None:
    for header in index["headers"]:
        header["bytes"] = 2**26 - 1


def deepen(index: dict) -> None:
    index["more"] = json.loads("[" * 400 + "]" * 400)


def lengthen(index: dict) -> None:
    index["more"] = "x" * 2**25


def enlarge_small_files(index: dict) -> None:
    for entry in index["files"].values():
        entry["bytes"] = 2**25


def enlarge_a_step_a_little(index: dict) -> None:
    index["steps"][0]["bytes"] = 500 * 10**6


def need_many_at_once(index: dict) -> None:
    for place in range(10, 20):
        index["steps"][place]["base"] = place - 10


CHANGES = [
    enlarge_a_step, enlarge_a_step_a_little, enlarge_a_file, enlarge_small_files, enlarge_headers, need_many_at_once,
    deepen, lengthen,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_an_archive_that_declares_more_than_it_can_hold_is_refused_at_once(synthetic, tmp_path, change):
    (path,) = archived(synthetic, tmp_path / "x.archive")
    rewritten(path, lambda index: None)
    archive.verify(path)
    rewritten(path, change)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"x\.archive: [^\n]+$"):
        archive.restore([path], tmp_path / "saves")
    assert tracemalloc.get_traced_memory()[1] < 2e8
    tracemalloc.stop()
    assert not (tmp_path / "saves").exists()


def test_an_archive_that_does_not_fit_on_the_disk_is_refused_before_it_is_unpacked(synthetic, tmp_path, monkeypatch):
    (path,) = archived(synthetic, tmp_path / "x.archive")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="are to be written, 0.0 GB are free; make room, or import less"):
        archive.restore([path], tmp_path / "saves")
    assert not list((tmp_path / "saves").rglob("*.safetensors"))


def test_an_archive_that_does_not_fit_into_memory_is_refused_before_it_is_unpacked(synthetic, tmp_path, monkeypatch):
    (path,) = archived(synthetic, tmp_path / "x.archive")
    size = max(read.sizes_of(path).values())
    monkeypatch.setattr(devices, "available_memory", lambda: 5 * size)
    archive.verify(path)
    monkeypatch.setattr(devices, "available_memory", lambda: 5 * size - 1)
    with pytest.raises(UserError, match=r"x\.archive: reading it takes 0\.0 GB of memory, 0\.0 GB are free; end other"):
        archive.restore([path], tmp_path / "saves")
    assert not list((tmp_path / "saves").rglob("*.safetensors"))


def test_all_of_an_archive_is_read_in_the_memory_of_a_few_checkpoints(tmp_path):
    folder = make_collection(tmp_path / "math" / "Toy" / RUN, steps=24, size=2**16)
    (path,) = archived(folder, tmp_path / "x.archive")
    size = max(read.sizes_of(path).values())
    tracemalloc.start()
    assert len([step for step, _ in read.read_all(path)]) == 24
    assert tracemalloc.get_traced_memory()[1] < 7 * size
    tracemalloc.stop()


def test_a_folder_with_a_fifo_or_a_device_does_not_hang(synthetic, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "all of them"
    folder.mkdir()
    os.mkfifo(folder / "a.archive")
    (folder / "b.archive").symlink_to("/dev/zero")
    (folder / "c.archive").mkdir()
    archived(synthetic, folder / "d.archive")
    monkeypatch.setattr(paths, "SAVES", tmp_path / "saves")
    monkeypatch.setattr(sys, "argv", ["import_archive.py", str(folder)])
    assert import_archive.main() == 1
    assert capsys.readouterr().err.count("is no file, so no archive") == 3
    assert len(discovery.find_collections([tmp_path / "saves"])) == 1


def test_a_large_checkpoint_is_verified_a_piece_at_a_time(tmp_path):
    folder = make_collection(tmp_path / "math" / "Toy" / RUN, steps=1, size=2**21)
    tracemalloc.start()
    assert verification.faults_of(folder, read_manifest(folder)) == []
    assert tracemalloc.get_traced_memory()[1] < 1.5e7, "of 34 MB"
    tracemalloc.stop()
