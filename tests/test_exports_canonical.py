"""FORMAT=canonical with PARTS: decompositions, products, and statistics over collections."""

import json
import shutil

import pytest
import torch
from helpers import handmade
from helpers.handmade import tree
from safetensors.torch import load_file

from paragen.collection import checkpoints


def update(tensors, layer):
    return tensors[f"{layer}.lora_B.weight"].double() @ tensors[f"{layer}.lora_A.weight"].double()


def test_each_part_holds_the_same_update(place):
    run = place.collect(rank=4)
    out = place.export("canonical", PARTS="usv delta")
    name = run.relative_to(place.saves)
    for step in (5, 6, 7):
        file = f"checkpoint-{step}.safetensors"
        stored = load_file(run / file)
        usv, delta, factors = (load_file(out / part / name / file) for part in ("usv", "delta", "."))
        layers = checkpoints.layers_of(stored)
        assert delta.keys() == {f"{layer}.delta" for layer in layers}
        assert usv.keys() == {f"{layer}.{part}" for layer in layers for part in ("U", "S", "Vt")}
        for layer in layers:
            expected, scale = update(stored, layer), update(stored, layer).norm()
            left, values, right = (usv[f"{layer}.{part}"].double() for part in ("U", "S", "Vt"))
            assert left.shape == (12, 4) and values.shape == (4,) and right.shape == (4, 16)
            assert (delta[f"{layer}.delta"].double() - expected).norm() < 1e-6 * scale
            assert (left * values @ right - expected).norm() < 1e-6 * scale
            for vectors in (left.T @ left, right @ right.T):
                torch.testing.assert_close(vectors, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
            assert list(values) == sorted(values, reverse=True)
            reference = torch.linalg.svdvals(expected)[:4]
            torch.testing.assert_close(values, reference, rtol=1e-6, atol=0)
            torch.testing.assert_close(
                factors[f"{layer}.lora_B.weight"].double(), left * values.sqrt(), rtol=0, atol=1e-5
            )
    about = json.loads((out / "delta" / name / "canonical.json").read_bytes())
    assert about["scaling"] == 2.0 and about["part"] == "delta"


def test_an_update_of_lower_rank_has_zeros_behind_it(place):
    tensors = handmade.tensors_of(handmade.llama_keys(), 4, 1)
    for key, tensor in tensors.items():
        tensor[2:] = 0 if "lora_A" in key else tensor[2:]
    run = place.collect(states=[tensors], steps=[1])
    out = place.export("canonical", PARTS="usv")
    for key, tensor in load_file(out / "usv" / run.relative_to(place.saves) / "checkpoint-1.safetensors").items():
        behind = {"U": tensor[..., 2:], "S": tensor[2:], "t": tensor[2:]}[key[-1]]
        before = {"U": tensor[..., :2], "S": tensor[:2], "t": tensor[:2]}[key[-1]]
        assert not behind.any() and before.all()


def test_statistics_are_those_of_the_written_factors(place):
    place.collect(dataset="A", rank=4)
    place.collect(dataset="B", rank=4, steps=(1, 2))
    out = place.export("canonical", PARTS="stats")
    written = [load_file(path) for path in sorted(out.glob("common*/*/*/checkpoint-*.safetensors"))]
    assert len(written) == 5
    mean, std = (load_file(out / "stats" / f"{name}.safetensors") for name in ("mean", "std"))
    about = json.loads((out / "stats" / "stats.json").read_bytes())
    assert about["checkpoints"] == 5 and about["keys"].keys() == mean.keys() == std.keys() == written[0].keys()
    for key in written[0]:
        values = torch.stack([tensors[key].double() for tensors in written])
        torch.testing.assert_close(mean[key], values.mean(0).float())
        torch.testing.assert_close(std[key], values.std(0, correction=0).float())
        assert about["keys"][key] == pytest.approx(
            {"mean": float(values.mean()), "std": float(values.std(correction=0))}, rel=1e-6
        )
    place.collect(dataset="C", rank=4)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("checkpoint-*")}
    place.export("canonical", PARTS="stats")
    assert json.loads((out / "stats" / "stats.json").read_bytes())["checkpoints"] == 8
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_collections_of_other_shapes_have_no_common_statistics(place):
    place.collect(dataset="A", rank=4)
    place.collect(dataset="B", rank=8)
    said = place.refused("canonical", PARTS="stats")
    assert "lora_A.weight is 8 x 16, in " in said and "it is 4 x 16" in said and "choose with MODEL=.. RANK=.." in said
    assert not place.out.exists()
    place.export("canonical", PARTS="stats", RANK="8")


def test_what_stands_in_the_way_of_the_statistics_is_said_before_other_parts_are_written(place, monkeypatch):
    place.collect()
    (place.out / "stats").mkdir(parents=True)
    (place.out / "stats" / "notes.txt").write_text("mine")
    assert "stats: is there already, and no export of ours" in place.refused("canonical", PARTS="stats")
    assert list(tree(place.out)) == ["stats/notes.txt"]
    assert place.export("canonical", OUT=f"{place.out} 2")
    usage = shutil.disk_usage(place.saves)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "are free" in place.refused("canonical", PARTS="stats", OUT=f"{place.out} 2")


def test_products_say_their_size_and_ask_for_room(place, monkeypatch, capsys):
    place.collect()
    place.export("canonical", PARTS="Delta", DRY_RUN="1")
    assert "note: PARTS=delta writes the products themselves, 0.0 GB for 1 collections" in capsys.readouterr().out
    usage = shutil.disk_usage(place.saves)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5000))
    assert "are free" in place.refused("canonical", PARTS="delta")
    assert not place.out.exists()


def test_parts_that_are_not_known_or_of_another_format_are_refused(place):
    place.collect()
    assert "PARTS=products: is not known; PARTS is usv or delta or stats" in place.refused(
        "canonical", PARTS="usv products"
    )
    assert "PARTS=usv: FORMAT=canonical alone takes it; omit it" in place.refused("peft", PARTS="usv")
    assert not place.out.exists()


def test_a_second_export_writes_nothing(place):
    place.collect()
    out = place.export("canonical", PARTS="usv delta stats")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    place.export("canonical", PARTS="usv delta stats")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    whole = tree(out)
    for path in sorted(out.rglob("*.safetensors"))[::2]:
        path.unlink()
    place.export("canonical", PARTS="usv delta stats")
    assert tree(out) == whole
