"""make export: parts that are whole, made once and never over what others made."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from helpers import handmade, scored
from helpers.handmade import tree

import export
from paragen.collection import derived, index, verification
from paragen.common import files, paths, settings
from paragen.common.cli import UserError

FORMATS = settings.SETTINGS["FORMAT"].choices


@pytest.mark.parametrize("format_name", ["dnd", "peft", "table", "w2t"])
def test_a_second_export_writes_nothing(place, format_name):
    scored.write(place.collect(), scored.evaluated(scored.RISING))
    place.export(format_name)
    before = {path: path.stat().st_mtime_ns for path in place.out.rglob("*")}
    place.export(format_name)
    assert {path: path.stat().st_mtime_ns for path in place.out.rglob("*")} == before
    place.export(format_name, FORCE="1")
    assert {path: path.stat().st_mtime_ns for path in place.out.rglob("*")} != before


@pytest.mark.parametrize("format_name", ["dnd", "peft", "w2t"])
def test_a_damaged_export_is_made_again(place, format_name):
    scored.write(place.collect(), scored.evaluated(scored.RISING))
    place.export(format_name)
    whole = tree(place.out)
    damaged = sorted(place.out.rglob("*.safetensors"))
    damaged[0].unlink()
    damaged[1].write_bytes(b"cut")
    place.export(format_name)
    assert tree(place.out) == whole


@pytest.mark.parametrize("format_name", ["dnd", "peft", "archive"])
def test_a_flipped_bit_in_an_export_is_found_when_it_is_used_again(place, capsys, format_name):
    place.collect()
    place.export(format_name)
    whole = tree(place.out)
    path = max(place.out.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    place.export(format_name)
    assert f"{path.name}: was damaged since it was made; it is made again" in capsys.readouterr().out
    assert tree(place.out) == whole


def test_an_export_of_an_earlier_version_says_that_it_was_not_checked_again(place, capsys):
    place.collect()
    place.export("peft")
    record = place.out / "export.json"
    parts = json.loads(record.read_text())
    record.write_text(json.dumps({name: {"source": e["source"], "files": e["files"]} for name, e in parts.items()}))
    place.export("peft")
    assert "was not checked again" in capsys.readouterr().out


@pytest.mark.parametrize("format_name", ["dnd", "peft", "w2t"])
def test_nothing_of_others_is_overwritten(place, format_name):
    scored.write(place.collect(dataset="A"), scored.evaluated(scored.RISING))
    folder = next(place.export(format_name).rglob("*.safetensors")).parent
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" in place.refused(format_name, FORCE="1")
    assert (folder / "notes.txt").read_text() == "mine"
    shutil.rmtree(place.out)
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert "no export of ours" in place.refused(format_name)
    assert list(tree(place.out).values()) == [b"mine"]


def test_formats_do_not_mix_in_one_part(place):
    run = place.collect()
    place.export("peft")
    source = {"format": "canonical", "sha256": "x"}
    with pytest.raises(UserError, match="FORMAT=peft"):
        derived.make_part(place.out, run.relative_to(place.saves).as_posix(), source, lambda staging: staging.mkdir())


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", ""])
def test_a_part_lies_in_its_export(place, name):
    with pytest.raises(UserError):
        derived.make_part(place.out, name, {"format": "x"}, lambda staging: staging.write_text("x"))
    assert not place.out.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"source": null, "files": {}}}'])
def test_a_broken_record_is_named(place, content):
    place.collect()
    place.out.mkdir()
    (place.out / "export.json").write_text(content)
    assert "export.json" in place.refused("dnd")


@pytest.mark.parametrize("out", [".", "common-sense-reasoning/A", "new"])
def test_an_export_does_not_go_among_the_collections(place, out):
    place.collect()
    before = tree(place.saves)
    assert "among the collections" in place.refused("peft", OUT=place.saves / out)
    assert tree(place.saves) == before


def test_without_out_it_goes_to_exports(place):
    place.collect()
    place.export("peft", OUT="")
    assert list((place.saves / "exports" / "peft").rglob("adapter_config.json"))


def test_out_may_not_be_a_file(place, tmp_path):
    place.collect()
    (tmp_path / "file").write_text("x")
    assert "is not a folder" in place.refused("dnd", OUT=tmp_path / "file" / "below")


@pytest.mark.parametrize("format_name", ["dnd", "peft"])
def test_a_cast_is_made_only_when_asked_and_is_recorded(place, format_name):
    import torch
    from safetensors.torch import load_file

    run = place.collect()
    wanted = load_file(run / "checkpoint-6.safetensors")
    root = place.export(format_name)
    recorded = [part["source"].get("dtype") for part in derived.read_record(root).values()]
    assert "float32" in recorded and "bfloat16" not in recorded
    place.export(format_name, DTYPE="bfloat16")
    recorded = [part["source"].get("dtype") for part in derived.read_record(root).values()]
    assert "bfloat16" in recorded and "float32" not in recorded
    path = next(path for path in root.rglob("*.safetensors") if "6" in path.name or path.parent.name.endswith("-6"))
    found = load_file(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key].to(torch.bfloat16)) for key in wanted)


def test_values_that_float16_cannot_hold_are_refused(place):
    tensors = {key: tensor * 1e6 for key, tensor in handmade.tensors_of(handmade.llama_keys(), 4, 1).items()}
    place.collect(states=[tensors], steps=[1])
    assert "holds values that float16 cannot" in place.refused("peft", DTYPE="float16")
    assert not list(place.out.rglob("*.safetensors"))


@pytest.mark.parametrize("format_name", ["dnd", "peft", "archive"])
def test_values_that_bfloat16_rounds_to_infinity_are_refused(place, format_name):
    import torch

    tensors = handmade.tensors_of(handmade.llama_keys(), 4, 1)
    key = next(iter(tensors))
    tensors[key][0, 0] = torch.finfo(torch.float32).max
    place.collect(states=[tensors], steps=[1])
    said = place.refused(format_name, DTYPE="bfloat16")
    assert "checkpoint-1.safetensors" in said and f"{key} holds values that bfloat16 cannot" in said


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("step", [5, 7])
def test_a_flipped_bit_is_named_before_anything_is_written(place, format_name, step):
    """As a disk flips it: the times do not tell, so that the index does not see it."""
    run = place.collect(steps=(5, 6, 7))
    scored.write(run, scored.evaluated(scored.RISING))
    path = run / f"checkpoint-{step}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(run / "manifest.json")  # later than the checkpoint, as it was before
    assert f"A/Tiny_lora-rank_4_finetune: {path.name}" in place.refused(format_name)
    assert not place.out.exists()


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_collection_that_does_not_verify_is_named_before_anything_is_written(place, format_name):
    run = place.collect(steps=(5, 6, 8))
    scored.write(run, scored.evaluated({5: 0.5}))
    told = place.refused(format_name)
    assert "A/Tiny_lora-rank_4_finetune: the steps are not consecutive" in told and "make verify" in told
    assert not place.out.exists()


def test_each_collection_that_does_not_verify_is_named_and_left_out(place, monkeypatch, capsys):
    for dataset in "AB":
        place.collect(dataset=dataset, steps=(5, 7))
    (place.collect(dataset="D") / "manifest.json").write_text("[")
    place.collect(dataset="C")
    monkeypatch.setenv("FORMAT", "peft")
    monkeypatch.setenv("OUT", str(place.out))
    assert export.main() == 1
    named = re.findall(r"common-sense-reasoning/(\w)/", capsys.readouterr().err)
    assert named == ["D", "A", "B"]
    assert [path.name for path in place.out.glob("common-sense-reasoning/*")] == ["C"]
    monkeypatch.setenv("DATASET", "C")
    assert export.main() == 0 and "error" not in capsys.readouterr().err, "the others are not asked for"


@pytest.fixture
def verified_datasets(monkeypatch) -> list[str]:
    """The datasets of the collections that are read whole, in order."""
    read: list[str] = []

    def faults_of(folder, manifest, whole=verification.faults_of):
        read.append(manifest.dataset)
        return whole(folder, manifest)

    monkeypatch.setattr(verification, "faults_of", faults_of)
    return read


@pytest.mark.parametrize("format_name", ["peft", "table", "w2t"])
def test_what_was_exported_before_is_not_read_again(place, verified_datasets, format_name):
    scored.write(place.collect(dataset="A"), scored.evaluated(scored.RISING))
    place.export(format_name)
    place.collect(dataset="B")  # without scores, so that FORMAT=w2t names it nowhere
    place.export(format_name)
    assert verified_datasets == ["A", "B"]
    place.export(format_name)
    assert verified_datasets == ["A", "B"]
    place.export(format_name, FORCE="1")
    assert verified_datasets == ["A", "B", "A", "B"]


def test_collections_that_a_table_only_names_are_read_again_once_a_file_changed(place, verified_datasets):
    run = place.collect(dataset="A")
    place.export("table")
    path = run / "checkpoint-6.safetensors"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # so that the index does not see it
    assert "A/Tiny_lora-rank_4_finetune: checkpoint-6.safetensors" in place.refused("table")
    assert verified_datasets == ["A", "A"]


def test_an_index_that_is_older_than_a_collection_is_updated_first(place):
    place.collect(dataset="A", rank=4)
    index.update()
    shutil.rmtree(place.saves / handmade.CATEGORY / "A")
    place.collect(dataset="A", rank=8)
    assert [path.name for path in place.export("peft").rglob("Tiny_*")] == ["Tiny_lora-rank_8_finetune"]


@pytest.mark.parametrize(("format_name", "given"), [("peft", {}), ("table", {"COPY": "1"}), ("w2t", {})])
def test_a_disk_that_is_too_small_is_said_first(place, monkeypatch, format_name, given):
    scored.write(place.collect(), scored.evaluated(scored.RISING))
    usage = shutil.disk_usage(place.saves)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "are free" in place.refused(format_name, **given)
    assert not place.out.exists()


@pytest.mark.parametrize("moment", ["making", "publishing", "published"])
def test_a_part_cut_off_at_any_moment_is_made_whole_by_the_next_run(place, monkeypatch, moment):
    """A process that dies runs no clean-up: here the remains of each moment, as a kill leaves them."""
    place.collect()
    place.export("dnd")
    whole = tree(place.out)
    folder = place.out / "data" / "common_sense_reasoning" / "A"
    record = json.loads((place.out / "export.json").read_text())
    name = "data/common_sense_reasoning/A"
    staging = files.beside(folder, "staging-dead")
    if moment == "making":
        del record[name]
        folder.rename(staging)
        next(staging.iterdir()).unlink()
    else:
        record[name]["files"] = None
        if moment == "publishing":
            folder.rename(files.beside(folder, "old"))
    (place.out / "export.json").write_text(json.dumps(record))
    place.export("dnd")
    assert tree(place.out) == whole and sorted(os.listdir(folder.parent)) == ["A"]


@pytest.mark.parametrize("format_name", ["dnd", "peft", "w2t"])
def test_a_part_that_has_its_name_but_not_yet_its_record_is_still_ours(place, monkeypatch, format_name):
    scored.write(place.collect(), scored.evaluated(scored.RISING))
    place.export(format_name)
    whole = tree(place.out)
    shutil.rmtree(place.out)

    def publish_and_be_stopped(staging, target, publish=files.publish_folder):
        publish(staging, target)
        raise SystemExit(143)  # what SIGTERM becomes

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(files, "publish_folder", publish_and_be_stopped)
        place.export(format_name)
    place.export(format_name)
    assert tree(place.out) == whole


def test_killed_runs_and_two_at_once_end_with_the_same_export(place):
    for name in "AB":
        place.collect(dataset=name, steps=range(1, 40))
    place.export("dnd", OUT=str(place.out) + " wanted")
    killed = place.start("dnd")
    while killed.poll() is None and not list(place.out.glob("data/*/.B.staging*")):
        time.sleep(0.001)
    killed.kill()
    killed.communicate()
    assert all(path.name.endswith(".safetensors") for path in place.out.glob("data/*/[AB]/*"))
    runs = [place.start("dnd") for _ in range(2)]
    for run in runs:
        told, fault = run.communicate()
        assert run.returncode == 0, told + fault
    assert tree(place.out) == tree(Path(str(place.out) + " wanted"))


def test_a_refusal_is_one_line_and_status_one(place):
    place.collect(dataset="A", rank=4)
    place.collect(dataset="B", rank=8)
    run = place.start("dnd")
    told, fault = run.communicate()
    assert run.returncode == 1 and told == "" and fault.startswith("error: ") and fault.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_no_part(place):
    place.collect(steps=range(1, 5))
    run = place.start("peft", limit=3000)
    _, fault = run.communicate()
    assert run.returncode == 1 and "File too large" in fault and fault.count("\n") == 1
    assert not list(place.out.rglob("*.safetensors")) and not list(place.out.rglob(".*staging*"))


@pytest.mark.parametrize(
    "setting", [{"SEED": "x"}, {"SEED": "1" * 30}, {"RANK": "x"}, {"DTYPE": "int8"}, {"DATASET": "Z"}]
)
def test_a_selection_that_makes_no_sense_is_refused(place, setting):
    place.collect()
    assert next(iter(setting.values())) in place.refused("peft", **setting)
    assert not place.out.exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no folders")
def test_an_out_that_cannot_be_made_is_one_line(place):
    place.collect(dataset="A")
    assert "/proc/x: cannot be made: No such file or directory; choose another OUT" in place.refused(
        "canonical", OUT="/proc/x"
    )


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_has_a_line_in_the_readmes_table(format_name):
    text = (paths.UTILS.parent / "saves" / "README.md").read_text(encoding="utf-8")
    assert f"| `{format_name}` |" in text or f"| [`{format_name}`](#{format_name}) |" in text
