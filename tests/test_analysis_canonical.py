"""`make export FORMAT=canonical`: one form for every factorization of an update, and the same adapter for PEFT."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import export
from paragen.analysis import canonical
from paragen.collection import checkpoints, index
from paragen.collection.manifest import CheckpointEntry
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.exports import canonical as export_canonical

FLOAT32 = torch.finfo(torch.float32).eps


def factors(outputs=48, inputs=40, rank=6, steps=3, dtype=torch.float64, seed=0):
    """Random A and B whose update has well separated singular values, as trained ones have."""
    drawn = torch.Generator().manual_seed(seed)
    a = torch.randn(steps, rank, inputs, generator=drawn, dtype=torch.float64)
    b = torch.randn(steps, outputs, rank, generator=drawn, dtype=torch.float64)
    return a.to(dtype), (b * 0.6 ** torch.arange(rank)).to(dtype)


def rotation(rank=6):
    return torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q


REMIXED = {
    "rescaled": torch.eye(6, dtype=torch.float64) * 1000,
    "rescaled column by column": torch.diag(torch.tensor([1e-3, -2.0, 7.0, 0.5, 1e3, -1.0], dtype=torch.float64)),
    "permuted": torch.eye(6, dtype=torch.float64)[[3, 0, 5, 1, 2, 4]],
    "rotated": rotation(),
    "mixed": rotation() @ torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64)) @ rotation().T.roll(1, 0),
}


@pytest.mark.parametrize("mix", REMIXED.values(), ids=REMIXED.keys())
def test_any_factorization_of_an_update_has_the_same_form(mix):
    a, b = factors()
    expected_a, expected_b = canonical.canonical(a, b)
    found_a, found_b = canonical.canonical(torch.linalg.inv(mix) @ a, b @ mix)
    torch.testing.assert_close(found_a, expected_a, rtol=0, atol=1e-11)
    torch.testing.assert_close(found_b, expected_b, rtol=0, atol=1e-11)


def test_factorizations_stored_in_float32_agree_to_its_rounding():
    a, b = factors()
    found = canonical.canonical((rotation().T @ a).float(), (b @ rotation()).float())
    for values, expected in zip(found, canonical.canonical(a, b), strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=50 * FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(48, 40, 6), (4, 40, 6), (48, 4, 6), (3, 4, 6), (5, 5, 5)], ids=lambda shape: "x".join(map(str, shape))
)
def test_the_product_is_unchanged_within_float32_rounding(shape, dtype):
    """Rounding both factors to float32 costs at most 2^-23 · r^(1/4) of the update's norm."""
    a, b = factors(*shape, dtype=dtype)
    new_a, new_b = (values.float().double() for values in canonical.canonical(a, b))
    assert new_a.shape == a.shape and new_b.shape == b.shape
    update = b.double() @ a.double()
    error = torch.linalg.matrix_norm(new_b @ new_a - update) / torch.linalg.matrix_norm(update)
    assert (error < FLOAT32 * shape[2] ** 0.25).all()


def test_factors_are_balanced_and_ordered_and_signed():
    a, b = canonical.canonical(*factors())
    torch.testing.assert_close(b.mT @ b, a @ a.mT, rtol=0, atol=1e-11)
    squares = (b.mT @ b).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(torch.diag_embed(squares), b.mT @ b, rtol=0, atol=1e-11)
    assert (squares.diff() <= 0).all()
    largest = b.abs().argmax(1, keepdim=True)
    assert (b.gather(1, largest) > 0).all()


def test_of_several_largest_entries_the_first_decides_the_sign():
    left = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    for sign in (1.0, -1.0):
        for noise in (1 - 1e-6, 1 + 1e-6):
            b = sign * left * torch.tensor([[1.0], [noise], [1.0], [1.0]])
            found = canonical.canonical(sign * torch.ones(1, 3), b)[1]
            assert found[:, 0].sign().tolist() == [1, -1, 1, -1]


def test_an_update_of_lower_rank_has_one_form_with_exact_zeros():
    a, b = factors(rank=6)
    low_a, low_b = a[:, :2].float(), b[:, :, :2].float()
    mix = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    spread_b = (low_b.double() @ torch.linalg.pinv(mix)).float()  # six columns for two directions, rounded to float32
    spread_a = (mix @ low_a.double()).float()
    new_a, new_b = canonical.canonical(spread_a, spread_b)
    expected_a, expected_b = canonical.canonical(low_a, low_b)
    assert (new_a[:, 2:] == 0).all() and (new_b[:, :, 2:] == 0).all()
    torch.testing.assert_close(new_a[:, :2], expected_a, rtol=0, atol=50 * FLOAT32)
    torch.testing.assert_close(new_b[:, :, :2], expected_b, rtol=0, atol=50 * FLOAT32)


def test_the_first_step_whose_b_is_zero_becomes_zero():
    a, b = factors(steps=2)
    b[0] = 0
    for values in canonical.canonical(-a, b):
        assert values[0].view(torch.int64).count_nonzero() == 0, "not even a negative zero"
        assert values[1].count_nonzero() == values[1].numel()


def test_inside_equal_singular_values_only_the_blocks_product_is_unique():
    u = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(7, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).Q
    b, a = u * torch.tensor([5.0, 2.0, 2.0, 2.0]), v.T
    turn = torch.block_diag(torch.ones(1, 1), rotation(3)).double()
    one, other = canonical.canonical(a, b), canonical.canonical(turn.T @ a, b @ turn)
    torch.testing.assert_close(one[1][:, :1], other[1][:, :1], rtol=0, atol=1e-12)
    for found_a, found_b in (one, other):
        torch.testing.assert_close(found_b[:, 1:] @ found_a[1:], b[:, 1:] @ a[1:], rtol=0, atol=1e-12)


def test_a_canonical_form_is_its_own():
    once = [values.float() for values in canonical.canonical(*factors(dtype=torch.float32))]
    for values, expected in zip(canonical.canonical(*once), once, strict=True):
        torch.testing.assert_close(values.float(), expected, rtol=0, atol=20 * FLOAT32)


@pytest.mark.parametrize("shape", [(48, 40, 8), (48, 40, 6), (31, 17, 5), (3, 40, 6), (130, 7, 8), (64, 64, 1)])
def test_one_call_for_all_steps_gives_the_bits_of_a_call_per_step(shape):
    a, b = factors(*shape, steps=7, dtype=torch.float32)
    together = canonical.canonical(a, b)
    for step in range(7):
        alone = canonical.canonical(a[step], b[step])
        assert torch.equal(alone[0], together[0][step]) and torch.equal(alone[1], together[1][step])


@pytest.fixture
def selected(trained_once, monkeypatch):
    """The tiny collection as `make export` selects it."""
    monkeypatch.setattr(paths, "SAVES", trained_once.top / "saves")
    return index.chosen()[0]


def made(out, one):
    return {path.name: path.read_bytes() for path in sorted((out / one.name).iterdir())}


def test_a_collection_becomes_adapters_of_the_same_shape_and_says_what_it_was_made_from(selected, tmp_path):
    (one,) = selected
    export_canonical.export(selected, tmp_path / "out", None)
    folder = tmp_path / "out" / one.name
    names = [entry.file_name for entry in one.manifest.checkpoints]
    assert {path.name for path in folder.iterdir()} == {*names, "adapter_config.json", "canonical.json"}
    for name in names:
        raw, new = load_file(one.folder / name), load_file(folder / name)
        assert {key: value.shape for key, value in raw.items()} == {key: value.shape for key, value in new.items()}
        for layer in checkpoints.layers_of(raw):
            update, found = (
                tensors[f"{layer}.lora_B.weight"].double() @ tensors[f"{layer}.lora_A.weight"].double()
                for tensors in (raw, new)
            )
            assert (update - found).norm() <= FLOAT32 * 4**0.25 * update.norm()
    about = json.loads((folder / "canonical.json").read_bytes())
    assert about["manifest"] == one.manifest.sha256 and about["dtype"] == "float32"
    config = (one.folder / "adapter_config.json", folder / "adapter_config.json")
    assert json.loads(config[0].read_bytes()) == json.loads(config[1].read_bytes()), "the scaling is not touched"


def test_the_files_are_the_same_bit_for_bit_in_any_memory_and_at_any_time(selected, tmp_path):
    (one,) = selected
    source = export_canonical.source_of(one, "float32")
    for name, budget in (("one", 1 << 30), ("other", 1)):
        (tmp_path / name).mkdir()
        export_canonical.write(one, source, tmp_path / name / "made", budget)
    assert made(tmp_path / "one", one._replace(name="made")) == made(tmp_path / "other", one._replace(name="made"))


def test_it_is_made_once_and_again_when_the_collection_or_the_dtype_is_another(selected, tmp_path, capsys):
    (one,) = selected
    for chosen, dtype, expected in (
        (one, None, "exported: "),
        (one, None, "there already: "),
        (one, "bfloat16", "exported: "),
        (one._replace(manifest=replace(one.manifest, sha256="another")), "bfloat16", "exported: "),
    ):
        export_canonical.export([chosen], tmp_path / "out", dtype)
        assert capsys.readouterr().out.startswith(expected)
    step = one.manifest.steps[0]
    tensors = load_file(tmp_path / "out" / one.name / f"checkpoint-{step}.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def logits(model, adapter):
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return loaded(torch.arange(3, 40)[None]).logits


def adapter_folder(folder, collection, step):
    folder.mkdir()
    shutil.copy(collection / "adapter_config.json", folder)
    shutil.copy(collection / f"checkpoint-{step}.safetensors", folder / paths.ADAPTER)
    return folder


def test_peft_loads_it_and_the_model_says_the_same(selected, trained_once, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("FORMAT", "canonical")
    monkeypatch.setenv("OUT", str(tmp_path / "an export"))
    export.main()
    (one,) = selected
    step = one.manifest.steps[-1]
    said = []
    for name, collection in (("raw", one.folder), ("canonical", tmp_path / "an export" / one.name)):
        base = AutoModelForCausalLM.from_pretrained(trained_once.top / "models" / "Tiny-Llama")
        with torch.no_grad():
            plain = base(torch.arange(3, 40)[None]).logits
        said.append(logits(base, adapter_folder(tmp_path / name, collection, step)))
    assert (said[0] - plain).abs().max() > 0.01, "the adapter does something"
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-5)


def test_gpt2s_transposed_layers_and_rslora_keep_what_the_model_says(tmp_path):
    """Conv1D stores its weight transposed (fan_in_fan_out); PEFT's factors have the same shapes all the same."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    def base():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))

    model = get_peft_model(
        base(), LoraConfig(r=4, lora_alpha=12, use_rslora=True, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "raw")
    raw = load_file(tmp_path / "raw" / paths.ADAPTER)
    new = {}
    for layer in checkpoints.layers_of(raw):
        keys = [f"{layer}.{end}.weight" for end in ("lora_A", "lora_B")]
        found = canonical.canonical(*(raw[key] for key in keys))
        new |= {key: value.float().contiguous() for key, value in zip(keys, found, strict=True)}
    shutil.copytree(tmp_path / "raw", tmp_path / "new")
    save_file(new, tmp_path / "new" / paths.ADAPTER, metadata={"format": "pt"})
    assert not torch.allclose(new[keys[0]], raw[keys[0]])
    expected = logits(base(), tmp_path / "raw")
    assert (expected - base()(torch.arange(3, 40)[None]).logits).abs().max() > 0.01
    torch.testing.assert_close(logits(base(), tmp_path / "new"), expected, rtol=1e-4, atol=1e-5)


def test_a_changed_checkpoint_is_named_and_nothing_is_exported(collected, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SAVES", collected.top / "saves")
    chosen, _ = index.chosen()
    path = sorted(chosen[0].folder.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=path.name):
        export_canonical.export(chosen, tmp_path / "out", None)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_factors_that_a_dtype_cannot_hold_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "checkpoint-1.safetensors"
    save_file({"x.lora_A.weight": torch.full((1, 2), 1e6), "x.lora_B.weight": torch.full((2, 1), 1e6)}, path)
    entries = [CheckpointEntry(1, 0.5, 1e-4, path.stat().st_size, files.sha256_of(path))]
    handles = list(checkpoints.open_all(tmp_path, entries))
    with pytest.raises(UserError, match="x: does not fit into float16"):
        export_canonical.rounded(tmp_path, entries, handles, torch.float16, export_canonical.factors_of, "x")


@pytest.mark.parametrize("what", ["infinite", "other keys"])
def test_a_checkpoint_that_does_not_fit_the_others_is_named(tmp_path, what):
    from safetensors.torch import save_file

    entries = []
    for step in (1, 2):
        value = torch.tensor([[1.0, float("inf") if what == "infinite" and step == 2 else 1.0]])
        name = "y" if what == "other keys" and step == 2 else "x"
        path = tmp_path / f"checkpoint-{step}.safetensors"
        save_file({f"{name}.lora_A.weight": value, f"{name}.lora_B.weight": torch.ones(3, 1)}, path)
        entries.append(CheckpointEntry(step, 0.5, 1e-4, path.stat().st_size, files.sha256_of(path)))
    with pytest.raises(UserError, match="checkpoint-2.safetensors: .*(not finite|other keys)"):
        for part, handles in checkpoints.in_chunks(tmp_path, entries, 2):
            checkpoints.factors_of(tmp_path, entries[part], handles, "x")
