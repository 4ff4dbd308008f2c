"""FORMAT=dnd: criterion_weight.pt, computed as Drag-and-Drop LLMs' own scripts do, at the place where it is read."""

import math

import pytest
import torch
from helpers.handmade import tree
from safetensors.torch import load_file

from paragen.exports import dnd_weights

TASK = "common_sense_reasoning"
WEIGHTS = f"workspace/datasets/{TASK}/A/criterion_weight.pt"
LAYERS, HIDDEN, WIDE, KEYS, RANK, COLUMNS = 24, 896, 4864, 128, 8, 128  # of Qwen2.5-0.5B, which has a tokenizer there
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, KEYS), "self_attn.v_proj": (HIDDEN, KEYS),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (HIDDEN, WIDE), "mlp.gate_proj": (HIDDEN, WIDE),
    "mlp.down_proj": (WIDE, HIDDEN),
}  # fmt: skip


def state(seed: int, spread: float = 0.02) -> dict[str, torch.Tensor]:
    """A checkpoint that walked off from a common start."""
    tensors = {}
    for layer in range(LAYERS):
        for module, (inputs, outputs) in SIZES.items():
            made = torch.Generator().manual_seed(layer)
            walked = torch.Generator().manual_seed(1000 * seed + layer)
            for half, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                start = 0.1 * torch.randn(shape, generator=made)
                step = spread * (layer + 1) * torch.randn(shape, generator=walked)
                tensors[f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"] = start + step
    return tensors


@pytest.fixture(scope="module")
def states() -> list[dict[str, torch.Tensor]]:
    return [state(seed) for seed in range(3)]


def collect(place, states, dataset="A"):
    return place.collect(dataset=dataset, model="Qwen2.5-0.5B-Instruct", rank=RANK, states=states, steps=(1, 2, 3))


def tokens_of(path, layers) -> list[torch.Tensor]:
    """Some layers of a checkpoint as Drag-and-Drop's tokenizer cuts them: float32, one at a time."""
    tensors, tokens = load_file(path), []
    for layer in layers:
        for module in SIZES:
            for half in "AB":
                factor = tensors[f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"].float()
                for chunk in (factor if half == "A" else factor.T).split(COLUMNS, 1):
                    mean, deviation = chunk.mean(), chunk.std()
                    token = (chunk - mean) / deviation
                    scale = [float(mean) * 8.0, math.log(float(deviation) * 0.9 + 0.1) + 1.6]
                    token[-2:] = torch.tensor(scale * (COLUMNS // 2))
                    token[:, -2:] = torch.tensor(scale)
                    tokens.append(token)
    return tokens


def by_its_script(folder, layers) -> torch.Tensor:
    """The weights of some layers' tokens from the exported files, in two passes over them as in
    criterion_weight_for_0.5B.py; up to the factor by which the mean over all layers is 1."""
    read = torch.stack([torch.stack(tokens_of(path, layers)) for path in sorted(folder.iterdir())])
    deviation = (read - read.mean(0)).square().mean(0).sqrt()
    return deviation.mean((1, 2))


def test_the_weights_are_those_of_its_own_script(place, states, capsys):
    collect(place, states)
    place.export("dnd", DRY_RUN="1")
    told = capsys.readouterr().out
    assert f"would write: {place.out / WEIGHTS}" in told and not place.out.exists()
    out = place.export("dnd")
    told = capsys.readouterr().out
    assert "has no tokenizer" not in told
    assert "real_length of 50" in told and "workspace/datasets/criterion_weight_for_*.py" in told
    found = torch.load(out / WEIGHTS, map_location="cpu", weights_only=True)
    assert found.shape == (4296,) and found.dtype == torch.float32
    assert float(found.double().mean()) == pytest.approx(1, abs=1e-6)
    assert float(found.std()) > 0.1, "the layers differ"
    expected = by_its_script(out / "data" / TASK / "A", (0, LAYERS - 1))
    both_ends = torch.cat([found[: len(expected) // 2], found[-len(expected) // 2 :]])
    torch.testing.assert_close(both_ends / both_ends.sum(), expected / expected.sum(), rtol=1e-4, atol=1e-8)
    whole = tree(place.out)
    (out / WEIGHTS).unlink()
    place.export("dnd")
    assert tree(place.out) == whole, "the same bytes again"


def test_weights_of_other_checkpoints_are_replaced_only_with_force(place, states, capsys):
    collect(place, states)
    path = place.out / WEIGHTS
    path.parent.mkdir(parents=True)
    torch.save(torch.ones(4296), path)
    theirs = path.read_bytes()
    said = place.refused("dnd")
    assert "criterion_weight.pt: holds weights that were computed from other checkpoints" in said and "FORCE=1" in said
    assert list(tree(place.out)) == [WEIGHTS] and path.read_bytes() == theirs
    place.export("dnd", FORCE="1", DRY_RUN="1")
    assert f"would keep: {path}.before-export" in capsys.readouterr().out and list(tree(place.out)) == [WEIGHTS]
    place.export("dnd", FORCE="1")
    assert path.with_name("criterion_weight.pt.before-export").read_bytes() == theirs and path.read_bytes() != theirs
    place.export("dnd")


def test_checkpoints_without_any_difference_have_no_weights(place, states):
    place.collect(dataset="A", model="Qwen2.5-0.5B-Instruct", rank=RANK, states=states[:1], steps=[1])
    assert "has one checkpoint" in place.refused("dnd") and not place.out.exists()
    collect(place, [states[0]] * 3, dataset="B")
    assert "checkpoints are all equal" in place.refused("dnd", DATASET="B")
    assert not list(place.out.rglob("criterion_weight.pt"))


def test_a_model_without_tokenizer_there_has_no_weights(place, capsys):
    place.collect(steps=range(1, 61))
    place.export("dnd")
    told = capsys.readouterr().out
    assert "has no tokenizer" in told and "criterion_weight.pt, which has a number per token" in told
    assert "60 checkpoints, more than the real_length of 50" in told and "arbitrary order of os.listdir" in told
    assert not list(place.out.rglob("criterion_weight.pt"))


def test_weights_do_not_depend_on_the_memory_that_computing_them_may_take(monkeypatch):
    factors = torch.randn(5, RANK, 6 * COLUMNS, generator=torch.Generator().manual_seed(0))
    expected = dnd_weights.token_deviations(factors, COLUMNS)
    monkeypatch.setattr(dnd_weights, "VALUES", 2 * factors[..., :COLUMNS].numel())
    assert torch.allclose(dnd_weights.token_deviations(factors, COLUMNS), expected, rtol=1e-12) and len(expected) == 6
