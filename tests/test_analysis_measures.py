"""`make stats`: what it writes is what a plain computation over all checkpoints gives, in memory that does not grow."""

import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from helpers import factor_walks
from helpers.forked_python import PYTHON
from safetensors.torch import load_file, save_file

import stats
from paragen.analysis import canonical, measures, report_statistics, stats_files, step_reader
from paragen.analysis import layer_stats as ls
from paragen.collection import checkpoints, index, run_files
from paragen.collection.manifest import CheckpointEntry, sealed
from paragen.common import files, paths
from paragen.common.cli import UserError

NAMES = {"stats.parquet", "importance.safetensors", "steps.safetensors", "stats.json"}
CLOSE, CLOSE_IMPORTANCE = 3e-6, 1e-5  # relative: what float32 may lose, as README says


@pytest.fixture(scope="module")
def measured_once(trained_once, tmp_path_factory):
    """The tiny collection with its statistics: (index.Chosen, the statistics' folder)."""
    out = tmp_path_factory.mktemp("statistics")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "SAVES", trained_once.top / "saves")
        ((one,), _) = index.chosen()
        stats_files.update([one], out)
    return one, out / one.name


def plain(one):
    """The layers, and all checkpoints of a collection as NumPy float64: {key: steps x rows x columns}."""
    loaded = [load_file(one.folder / entry.file_name) for entry in one.manifest.checkpoints]
    tensors = {key: np.stack([each[key].double().numpy() for each in loaded]) for key in loaded[0]}
    return checkpoints.layers_of(tensors), tensors


def updates(tensors, layer, scaling):
    return scaling * tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]


def scaling(one):
    config = json.loads((one.folder / "adapter_config.json").read_bytes())
    return config["lora_alpha"] / config["r"]


def test_it_writes_four_files_that_name_the_collection_and_say_what_they_hold(measured_once):
    one, folder = measured_once
    assert {path.name for path in folder.iterdir()} == NAMES
    about = json.loads((folder / "stats.json").read_bytes())
    layers, tensors = plain(one)
    assert about["manifest"] == one.manifest.sha256 and about["layers"] == layers
    assert about["files"].keys() == NAMES - {"stats.json"}
    arrays = load_file(folder / "steps.safetensors")
    assert about["files"]["steps.safetensors"].keys() == arrays.keys()
    steps, count = len(one.manifest.checkpoints), len(layers)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in arrays.items()} == {
        "steps": (torch.int64, (steps,)),
        "sketch": (torch.float32, (steps, 1024)),
        **{name: (torch.float32, (count, steps)) for name in ("norm", "change", "effective_rank")},
    }
    assert arrays["steps"].tolist() == one.manifest.steps
    table = pyarrow.parquet.read_table(folder / "stats.parquet")
    assert about["files"]["stats.parquet"].keys() == set(table.column_names)
    assert table["layer"].to_pylist()[::3] == layers
    assert about["parameters"] == sum(value[0].size for value in tensors.values())


def test_norms_changes_and_effective_ranks_are_those_of_the_multiplied_out_updates(measured_once):
    one, folder = measured_once
    layers, tensors = plain(one)
    arrays = load_file(folder / "steps.safetensors")
    table = pyarrow.parquet.read_table(folder / "stats.parquet").to_pylist()
    for number, layer in enumerate(layers):
        update = updates(tensors, layer, scaling(one))
        norm = np.linalg.norm(update, axis=(1, 2))
        change = np.linalg.norm(np.diff(update, axis=0), axis=(1, 2))
        values = np.linalg.svd(update, compute_uv=False)[:, :4]
        shares = values / values.sum(1, keepdims=True)
        ranks = np.exp(-(shares * np.log(shares)).sum(1))
        np.testing.assert_allclose(arrays["norm"][number], norm, rtol=1e-6)
        np.testing.assert_allclose(arrays["change"][number], [0, *change], rtol=CLOSE)
        np.testing.assert_allclose(arrays["effective_rank"][number], ranks, rtol=CLOSE)
        row = next(row for row in table if row["layer"] == layer and row["tensor"] == "update")
        found = [row[name] for name in ("norm_first", "norm_mean", "norm_last", "change_mean", "change_max")]
        np.testing.assert_allclose(found, [norm[0], norm.mean(), norm[-1], change.mean(), change.max()], rtol=CLOSE)
        found = [row[f"effective_rank_{name}"] for name in ("first", "mean", "last")]
        np.testing.assert_allclose(found, [ranks[0], ranks.mean(), ranks[-1]], rtol=1e-6)


def test_means_and_deviations_of_factors_are_those_of_two_passes(measured_once):
    one, folder = measured_once
    _, tensors = plain(one)
    rows = [
        row for row in pyarrow.parquet.read_table(folder / "stats.parquet").to_pylist() if row["tensor"] != "update"
    ]
    assert len(rows) == len(tensors)
    for row in rows:
        values = tensors[f"{row['layer']}.{row['tensor']}.weight"]
        assert (row["rows"], row["columns"]) == values.shape[1:]
        norm = np.linalg.norm(values, axis=(1, 2))
        change = np.linalg.norm(np.diff(values, axis=0), axis=(1, 2))
        expected = [values.mean(), values.std(0).mean(), norm[0], norm.mean(), norm[-1], change.mean(), change.max()]
        names = ["mean", "std", "norm_first", "norm_mean", "norm_last", "change_mean", "change_max"]
        np.testing.assert_allclose([row[name] for name in names], expected, rtol=CLOSE, atol=1e-9)
        assert row["effective_rank_mean"] is None


def test_importance_is_the_deviation_of_standardised_factors_over_its_mean_and_averages_to_one(measured_once):
    one, folder = measured_once
    layers, tensors = plain(one)
    weights = {key: float(value) for key, value in load_file(folder / "importance.safetensors").items()}
    assert weights.keys() == {*layers, *tensors}
    spread = {
        key: ((x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)).std(0) for key, x in tensors.items()
    }
    overall = np.concatenate([value.ravel() for value in spread.values()]).mean()
    for key, value in spread.items():
        assert weights[key] == pytest.approx(value.mean() / overall, rel=CLOSE_IMPORTANCE)
    for layer in layers:
        both = np.concatenate([spread[f"{layer}.{end}.weight"].ravel() for end in ("lora_A", "lora_B")])
        assert weights[layer] == pytest.approx(both.mean() / overall, rel=CLOSE_IMPORTANCE)
    for keys in (list(tensors), layers):
        sizes = [sum(x[0].size for name, x in tensors.items() if name.startswith(key)) for key in keys]
        assert np.average([weights[key] for key in keys], weights=sizes) == pytest.approx(1, abs=1e-6)
    assert max(weights.values()) > 1.05 > 0.95 > min(weights.values())


def test_chunks_of_steps_and_groups_of_layers_change_nothing(measured_once):
    one, _ = measured_once
    config, entries = checkpoints.adapter_config(one.folder, one.manifest), one.manifest.checkpoints
    whole = measures.measure(one.folder, entries, config, "base")
    parted = measures.measure(one.folder, entries, config, "base", budget=1, chunk=1)
    assert len(measures.groups_of(whole.shapes, 1)) == len(whole.layers)
    for name in whole._fields[2:]:
        rtol = CLOSE_IMPORTANCE if name == "standardised_std" else CLOSE
        torch.testing.assert_close(getattr(parted, name), getattr(whole, name), rtol=rtol, atol=1e-9)


def test_moments_do_not_lose_a_small_deviation_beside_a_large_mean():
    values = 1e4 + torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(0))
    sums = None
    for start in range(0, 40, 7):
        sums = ls.add_factor(sums, values[start : start + 7], values[start : start + 7]).sums
    assert sums.steps == 40
    exact = values.double().flatten(1)
    standardised = (exact - exact.mean(1, keepdim=True)) / exact.std(1, correction=0, keepdim=True)
    for found, expected in zip(ls.deviations(sums), (exact, standardised), strict=True):
        torch.testing.assert_close(found, expected.std(0, correction=0), rtol=1e-5, atol=0)


def test_a_small_change_of_a_large_update_is_exact():
    """The squares' difference would leave nothing of a change of 1e-5."""
    drawn = torch.Generator().manual_seed(0)
    b, a, b_change, a_change = (torch.randn(shape, generator=drawn) for shape in ((9, 3), (3, 7)) * 2)
    a, b = torch.stack([a, a + 1e-5 * a_change]), torch.stack([b, b + 1e-5 * b_change])
    found = ls.difference_norms(ls.add_factor(None, a, a), ls.add_factor(None, b, b.mT))
    expected = (b[1].double() @ a[1].double() - b[0].double() @ a[0].double()).norm()
    torch.testing.assert_close(found, torch.stack([torch.zeros(()).double(), expected]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "values, expected", [([1, 1, 1, 1], 4), ([5, 0, 0], 1), ([0, 0], 0), ([3, 1], 1.7548)], ids=str
)
def test_the_effective_rank_counts_directions(values, expected):
    found = ls.effective_ranks(torch.tensor([values], dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-4)


def sketch_of(base, layer, a, b):
    return ls.sketched(a, b, *ls.projections(base, layer, b.shape[1], a.shape[2]))


def test_a_sketch_depends_on_the_update_alone_not_on_its_factors_or_their_rank():
    drawn = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 20, generator=drawn), torch.randn(2, 30, 3, generator=drawn)
    wider = torch.cat([a, a, -a], dim=1), torch.cat([b, b, b], dim=2)  # B·A + B·A - B·A, rank 9
    expected = sketch_of("model", "layer", a, b)
    assert expected.shape == (2, 1024)
    same = [values.float() for values in canonical.canonical(a, b)]
    for factors in (wider, same):
        torch.testing.assert_close(sketch_of("model", "layer", *factors), expected, rtol=1e-5, atol=1e-5)
    for names in (("model", "other"), ("other", "layer")):
        assert not torch.allclose(sketch_of(*names, a, b), expected)


def test_sketches_of_one_model_fit_together_whenever_and_wherever_they_are_made():
    p, q = ls.projections("SmolLM2-135M-Instruct", "base_model.model.model.layers.0.mlp.up_proj", 3, 2)
    assert (p.shape, q.shape) == ((3, 32), (2, 32))
    np.testing.assert_allclose(p[0, :3], [-0.20929304872466437, -0.21596882367503245, -0.18206076382084796], rtol=1e-7)


def test_inner_products_of_updates_are_kept():
    """Over many layers, as a sketch sums them up; a bias of the normalisation would show."""
    drawn = torch.Generator().manual_seed(0)
    sketch, exact = torch.zeros(3, 1024, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for number in range(100):
        a, b = torch.randn(3, 2, 24, generator=drawn), torch.randn(3, 20, 2, generator=drawn)
        a[1:] += a[0]
        b[1:] += b[0]
        update = (b @ a).double().flatten(1)
        exact += update @ update.T
        sketch += sketch_of("model", f"layer {number}", a, b)
    torch.testing.assert_close(sketch @ sketch.T / exact, torch.ones(3, 3, dtype=torch.float64), rtol=0, atol=0.15)


def test_the_sketch_of_a_step_is_the_sum_over_its_layers(measured_once):
    one, folder = measured_once
    layers, tensors = plain(one)
    expected = 0
    for layer in layers:
        a, b = (torch.from_numpy(tensors[f"{layer}.{end}.weight"]).float() for end in ("lora_A", "lora_B"))
        expected = expected + scaling(one) * sketch_of("Tiny-Llama", layer, a, b)
    found = load_file(folder / "steps.safetensors")["sketch"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-8)


def synthetic(folder, steps, shape=(8, 32, 24, 2), dtype=torch.float32, zero=()):
    """Checkpoints of random layers: the manifest's entries of them. `zero`: steps whose B is zero."""
    folder.mkdir(exist_ok=True)
    count, outputs, inputs, rank = shape
    entries = []
    for step in range(1, steps + 1):
        drawn = torch.Generator().manual_seed(step)
        path = folder / run_files.checkpoint_name(step)
        tensors = {}
        for layer in range(count):
            tensors[f"l.{layer}.lora_A.weight"] = torch.randn(rank, inputs, generator=drawn).to(dtype)
            b = torch.randn(outputs, rank, generator=drawn) * (step not in zero)
            tensors[f"l.{layer}.lora_B.weight"] = b.to(dtype)
        save_file(tensors, path)
        entries.append(CheckpointEntry(step, 0.5, 1e-4, path.stat().st_size, files.sha256_of(path)))
    return entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_step_without_any_update_is_measured_like_others(tmp_path, dtype):
    entries = synthetic(tmp_path / "x", 3, dtype=dtype, zero=[1])
    found = measures.measure(tmp_path / "x", entries, {"r": 2, "lora_alpha": 2}, "base")
    assert (found.norm[:, 0] == 0).all() and (found.effective_rank[:, 0] == 0).all()
    assert all(getattr(found, name).isfinite().all() for name in found._fields[2:])
    torch.testing.assert_close(found.change[:, 1], found.norm[:, 1], rtol=CLOSE, atol=0)


def test_a_single_checkpoint_makes_every_layer_equally_important(tmp_path):
    entries = synthetic(tmp_path / "x", 1)
    found = measures.measure(tmp_path / "x", entries, {"r": 2, "lora_alpha": 2}, "base")
    by_factor, by_layer = measures.importance_of(found)
    assert (by_factor == 1).all() and (by_layer == 1).all() and (found.change == 0).all()


@pytest.mark.parametrize(
    "rank, outputs, inputs, steps, change, decay",
    [(4, 64, 48, 16, 1e-2, 0), (8, 576, 576, 40, 1e-3, 0), (64, 576, 192, 9, 1e-6, 3), (64, 192, 576, 9, 1e-3, 6),
     (16, 300, 200, 30, 1.0, 0), (2, 96, 64, 100, 1e-6, 0), (64, 48, 32, 9, 1e-3, 0)],
)  # fmt: skip
def test_float32_steps_in_chunks_give_what_float64_gives_at_once(rank, outputs, inputs, steps, change, decay):
    """Also where an update's directions are of sizes down to 1e-6, where little changes, and where r > inputs."""
    a, b = factor_walks.walk(rank, outputs, inputs, steps, change, decay)
    found = factor_walks.measured(a, b, "cpu")
    for name, expected in factor_walks.exact(a, b).items():
        apart = (found[name] - expected).abs().max() / expected.abs().max()
        assert apart < CLOSE, name


def stored_as(path, tensors, order):
    """Write a safetensors file by hand, with its tensors in an order that the library does not choose."""
    header, data = {}, b""
    for key in order:
        values = tensors[key].contiguous().view(torch.uint8).numpy().tobytes()
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32"}[tensors[key].dtype]
        header[key] = {
            "dtype": kind, "shape": list(tensors[key].shape), "data_offsets": [len(data), len(data) + len(values)]
        }  # fmt: skip
        data += values
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return CheckpointEntry(int(path.stem.split("-")[1]), 0.5, 1e-4, path.stat().st_size, files.sha256_of(path))


def odd_tensors(step, dtype=torch.bfloat16):
    drawn = torch.Generator().manual_seed(step)
    return {
        "l.lora_A.weight": torch.randn(1, 3, generator=drawn).to(dtype),
        "l.lora_B.weight": torch.randn(5, 1, generator=drawn),
    }


@pytest.mark.parametrize("size", [1, 2])
def test_files_whose_tensors_are_in_another_order_or_not_aligned_are_read(tmp_path, size):
    orders = [["l.lora_A.weight", "l.lora_B.weight"], ["l.lora_B.weight", "l.lora_A.weight"]]
    entries = [
        stored_as(tmp_path / f"checkpoint-{step}.safetensors", odd_tensors(step), orders[1 - step % 2])
        for step in (1, 2, 3)
    ]
    parts = [
        (steps.part, {key: steps.values(key).clone() for key in orders[0]})
        for steps in step_reader.read(tmp_path, entries, size, torch.device("cpu"))
    ]
    assert [part for part, _ in parts] == [slice(start, min(start + size, 3)) for start in range(0, 3, size)]
    for key in orders[0]:
        expected = torch.stack([odd_tensors(step)[key].float() for step in (1, 2, 3)])
        assert torch.equal(torch.cat([values[key] for _, values in parts]), expected)


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda tensors: {**tensors, "m.lora_A.weight": torch.zeros(1, 3)}, "has other keys, shapes or dtypes"),
        (lambda tensors: odd_tensors(2, torch.float32), "has other keys, shapes or dtypes"),
        (lambda tensors: {key: value.int() for key, value in tensors.items()}, "l.lora_A.weight is I32"),
        (lambda tensors: {key: value * float("nan") for key, value in tensors.items()}, "l.lora_A.weight holds values"),
        (lambda tensors: {**tensors, "l.lora_B.weight": torch.full((5, 1), torch.inf)}, "l.lora_B.weight holds values"),
    ],
    ids=["keys", "dtypes", "integers", "nan", "infinite"],
)
def test_a_checkpoint_that_cannot_be_measured_with_the_others_is_named(tmp_path, changed, message):
    entries = []
    for step in (1, 2, 3):
        tensors = changed(odd_tensors(step)) if step == 2 else odd_tensors(step)
        entries.append(stored_as(tmp_path / f"checkpoint-{step}.safetensors", tensors, list(tensors)))
    with pytest.raises(UserError, match=f"checkpoint-2.safetensors: .*{message}"):
        measures.measure(tmp_path, entries, {"r": 1, "lora_alpha": 1}, "base")


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({}, "has no LoRA factors"),
        ({"A": (2, 3), "B": (5, 4)}, "l.lora_B.weight has 4 columns, and l.lora_A.weight has 2 rows"),
        ({"A": (0, 3), "B": (5, 0)}, "l.lora_A.weight has no values: its shape is 0 x 3"),
        ({"A": (2, 3), "B": (0, 2)}, "l.lora_B.weight has no values: its shape is 0 x 2"),
        ({"A": (2, 3)}, "l: has only one of lora_A and lora_B"),
        ({"A": (2, 3, 1, 1), "B": (5, 2, 1, 1)}, "l.lora_A.weight is no matrix"),
    ],
)
def test_factors_that_are_not_those_of_linear_layers_are_named_with_their_collection(tmp_path, shapes, message):
    tensors = {f"l.lora_{half}.weight": torch.ones(shape) for half, shape in shapes.items()}
    entry = stored_as(tmp_path / "checkpoint-1.safetensors", tensors, list(tensors))
    with pytest.raises(checkpoints.UnsupportedAdapter, match=f"{tmp_path.name}: {message}"):
        measures.measure(tmp_path, [entry], {"r": 2, "lora_alpha": 2}, "base")


def test_integers_are_another_kind_of_adapter(tmp_path):
    tensors = {key: value.int() for key, value in odd_tensors(1).items()}
    entry = stored_as(tmp_path / "checkpoint-1.safetensors", tensors, list(tensors))
    with pytest.raises(checkpoints.UnsupportedAdapter, match="checkpoint-1.safetensors: l.lora_A.weight is I32"):
        measures.measure(tmp_path, [entry], {"r": 1, "lora_alpha": 1}, "base")


def test_norms_are_positive_with_a_negative_alpha(tmp_path):
    entries = synthetic(tmp_path / "x", 3)
    positive, negative = (
        measures.measure(tmp_path / "x", entries, {"r": 2, "lora_alpha": alpha}, "base") for alpha in (3, -3)
    )
    assert torch.equal(negative.norm, positive.norm) and torch.equal(negative.change, positive.change)
    assert torch.equal(negative.sketch, -positive.sketch) and (positive.norm > 0).all()


def test_a_file_is_hashed_as_it_is_read_and_once(tmp_path, monkeypatch):
    (entry,) = synthetic(tmp_path / "x", 1)
    path = tmp_path / "x" / "checkpoint-1.safetensors"
    checkpoints._verified.pop(str(path), None)
    monkeypatch.setattr(checkpoints, "PIECE", 1000)
    monkeypatch.setattr(files, "sha256_of", lambda path: pytest.fail("read for its hash alone"))
    read = [bytearray(entry.bytes), bytearray(entry.bytes)]
    for buffer in read:
        checkpoints.read_into(path, entry.bytes, entry.sha256, memoryview(buffer))
        monkeypatch.setattr(checkpoints.hashlib, "sha256", lambda data: pytest.fail("hashed twice"))
    assert read[0] == read[1] and path.read_bytes().endswith(bytes(read[0]).rstrip(b"\0"))


PEAK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from paragen.analysis import measures
from paragen.collection.manifest import CheckpointEntry
lines = json.loads(Path(sys.argv[2], "entries.json").read_text())[: int(sys.argv[3])]
entries = [CheckpointEntry(**line) for line in lines]
measures.measure(Path(sys.argv[2]), entries, {"r": 2, "lora_alpha": 2}, "base", chunk=1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_steps(tmp_path):
    """48 steps of 2.1 MB are 84 MB more than 8; the peaks of both differ by less than half of that."""
    (entry,) = synthetic(tmp_path / "x", 1, shape=(8, 4096, 4096, 8))
    entries = [{**asdict(entry), "step": step} for step in range(1, 49)]
    for step in range(2, 49):
        os.link(tmp_path / "x" / "checkpoint-1.safetensors", tmp_path / "x" / f"checkpoint-{step}.safetensors")
    (tmp_path / "x" / "entries.json").write_text(json.dumps(entries))
    peaks = []
    for count in (8, 48):
        command = [PYTHON, "-c", PEAK, str(paths.ROOT / "utils"), str(tmp_path / "x"), str(count)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024)
    assert peaks[1] - peaks[0] < 42, peaks


def run(project, **environment):
    """utils/stats.py on a project's collections, in this process: (what it printed is captured by the caller)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "SAVES", project.top / "saves")
        for name, value in environment.items():
            patch.setenv(name, value)
        stats.main()


def test_it_is_made_once_and_again_when_the_collection_or_the_method_changed(collected, capsys, monkeypatch):
    def first_line(**environment):
        run(collected, **environment)
        return capsys.readouterr().out.splitlines()[0]

    folder = (
        collected.top / "saves" / "stats" / "common-sense-reasoning" / "Toy" / collected.run_folder("finetune").name
    )
    assert first_line().startswith("statistics: ")
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first_line().startswith("there already: ")
    assert first_line(FORCE="1").startswith("statistics: ")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content, "the same bit for bit"
    monkeypatch.setattr(stats_files, "METHOD", "another")
    assert first_line().startswith("statistics: ")
    manifest_file = collected.run_folder("finetune") / paths.MANIFEST
    manifest = json.loads(manifest_file.read_bytes())
    files.write_json(manifest_file, sealed({**manifest, "device": "another"}))
    assert first_line().startswith("statistics: ")
    assert json.loads((folder / "stats.json").read_bytes())["manifest"] != manifest["sha256"]


def test_it_prints_a_line_per_kind_of_layer(collected, capsys):
    run(collected, DATASET="toy")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("  ")[0] == "layers"
    assert {line.split()[0] for line in lines[2:]} >= {"q_proj", "down_proj"} and len(lines) == 9


@pytest.mark.parametrize("name", ["stats.parquet", "stats.json", "steps.safetensors"])
def test_statistics_with_a_flipped_bit_are_made_again(collected, capsys, name):
    run(collected)
    (path,) = (collected.top / "saves" / "stats").rglob(name)
    whole, before = path.read_bytes(), path.stat()
    path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    run(collected)
    assert "was damaged since it was made" in capsys.readouterr().out and path.read_bytes() == whole


def test_damaged_statistics_of_an_earlier_version_are_named_in_one_line(collected):
    """It recorded no hashes of them."""
    run(collected)
    record = collected.top / "saves" / "stats" / "export.json"
    parts = json.loads(record.read_bytes())
    files.write_json(record, {name: {**part, "sha256": None} for name, part in parts.items()})
    (table,) = record.parent.rglob("stats.parquet")
    content = table.read_bytes()
    table.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match="stats.parquet: broken .*FORCE=1"):
        run(collected)
    about = table.with_name("stats.json")
    about.write_bytes(bytes(about.stat().st_size))
    with pytest.raises(UserError, match=f"{table.parent.name}: broken .*FORCE=1"):
        report_statistics.read(table.parent)


def test_a_collection_of_a_stock_run_has_statistics_too(collected, capsys):
    manifest_file = collected.run_folder("finetune") / paths.MANIFEST
    manifest = json.loads(manifest_file.read_bytes())
    unknown = {key: None for key in ("recipe", "data", "base_model", "tokenizer", "pretrain", "seed")}
    files.write_json(manifest_file, sealed({**manifest, **unknown}))
    run(collected)
    (about,) = (collected.top / "saves" / "stats").rglob("stats.json")
    assert json.loads(about.read_bytes())["base_model"] == "Tiny-Llama"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: is gone"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json: does not have"),
        (lambda folder: swap(*sorted(folder.glob("*.safetensors"))[:2]), "does not have its recorded sha256"),
    ],
    ids=["no config", "half a config", "two files swapped"],
)
def test_a_damaged_collection_is_named_and_has_no_statistics(collected, damage, message):
    damage(collected.run_folder("finetune"))
    with pytest.raises(UserError, match=message):
        run(collected)
    assert not [path for path in (collected.top / "saves" / "stats").rglob("*") if path.name in NAMES]


def test_a_damaged_collection_does_not_keep_the_others_from_their_statistics(collected, monkeypatch, capsys):
    good = collected.run_folder("finetune")
    bad = good.parent.parent / "Bad" / good.name
    shutil.copytree(good, bad)
    manifest = json.loads((bad / paths.MANIFEST).read_bytes())
    files.write_json(bad / paths.MANIFEST, sealed({**manifest, "dataset": "Bad"}))
    (bad / "adapter_config.json").unlink()
    monkeypatch.setattr(paths, "SAVES", collected.top / "saves")
    assert stats_files.update(index.chosen()[0]) == 1
    assert "adapter_config.json: is gone" in capsys.readouterr().err
    assert [path.parent.parent.name for path in paths.SAVES.rglob("stats.json")] == [good.parent.name]


def test_measuring_can_be_given_up_between_chunks_and_says_how_far_it_is(tmp_path):
    entries = synthetic(tmp_path / "x", 4)
    done = []

    def check():
        if len(done) == 3:
            raise stats_files.GivenUp

    with pytest.raises(stats_files.GivenUp):
        measures.measure(
            tmp_path / "x", entries, {"r": 2, "lora_alpha": 2}, "base", chunk=1, check=check, advance=done.append
        )
    assert done == [entry.bytes for entry in entries[:3]]


def swap(one, other):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
