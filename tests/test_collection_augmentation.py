"""Augmented pairs: other factors of the same product, the same on every run."""

import numpy
import pytest
import torch
from helpers import handmade
from helpers.handmade import llama_keys
from torch.utils.data import DataLoader

from pairs import Pairs, collate
from paragen.collection import augmentation, checkpoints, index
from paragen.common.cli import UserError

KINDS = ["permute", "sign", "gl"]


@pytest.fixture
def indexed(place):
    place.collect(rank=4)
    place.collect(dataset="B", rank=8)
    index.update()
    return place


def distance(new, old) -> float:
    """The largest distance of a layer's products, relative to the norms of its factors."""
    found = []
    for layer in checkpoints.layers_of(old):
        a, b, new_a, new_b = (part[f"{layer}.lora_{half}.weight"].double() for part in (old, new) for half in "AB")
        found.append(float((new_b @ new_a - b @ a).norm() / (b.norm() * a.norm())))
    return max(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_stays_and_the_factors_change(indexed, kind):
    plain, changed = Pairs(prompts=2), Pairs(prompts=2, augment=kind)
    for old, new in zip(plain, changed, strict=True):
        assert list(new.checkpoint) == list(old.checkpoint) and new.prompts == old.prompts and new.row == old.row
        assert all(new.checkpoint[key].shape == old.checkpoint[key].shape for key in old.checkpoint)
        assert any(not torch.equal(new.checkpoint[key], old.checkpoint[key]) for key in old.checkpoint)
        assert distance(new.checkpoint, old.checkpoint) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, near", [("float32", 1e-6), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_the_dtype_stays_and_bounds_the_rounding(kind, dtype, near):
    tensors = handmade.tensors_of(llama_keys(), 16, 3, dtype=dtype)
    new = augmentation.augmented(tensors, kind, numpy.random.default_rng(0))
    assert {tensor.dtype for tensor in new.values()} == {getattr(torch, dtype)}
    assert distance(new, tensors) < (near if kind == "gl" else 1e-12)


def test_a_random_g_is_well_conditioned():
    """The factor of an identity matrix shows the G that was drawn."""
    tensors = {"m.lora_A.weight": torch.eye(32), "m.lora_B.weight": torch.eye(32)}
    for seed in range(20):
        g = augmentation.augmented(tensors, "gl", numpy.random.default_rng(seed))["m.lora_B.weight"]
        assert float(torch.linalg.cond(g.double())) < augmentation.SPREAD**2 + 1e-3
        assert float((g - torch.eye(32)).norm()) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_factors_depend_on_seed_epoch_and_pair_alone(indexed, kind):
    pairs = Pairs(prompts=0, augment=kind, vector=True, dataset="B")
    first = [pair.checkpoint for pair in pairs]
    again = Pairs(prompts=3, augment=kind, vector=True, dataset="B")
    assert all(torch.equal(one, pair.checkpoint) for one, pair in zip(first, again, strict=True))
    pairs.set_epoch(1)
    assert not any(torch.equal(one, pair.checkpoint) for one, pair in zip(first, pairs, strict=True))
    pairs.set_epoch(0)
    assert torch.equal(pairs[1].checkpoint, first[1])
    seeded = Pairs(prompts=0, augment=kind, vector=True, dataset="B", seed=1)
    assert not torch.equal(seeded[1].checkpoint, first[1])


def test_workers_draw_the_same_factors(indexed):
    pairs = Pairs(prompts=0, augment="gl", vector=True, dataset="B")
    loader = DataLoader(pairs, batch_size=2, collate_fn=collate, num_workers=2)
    for epoch in (0, 1):
        pairs.set_epoch(epoch)
        loaded = torch.cat([batch["checkpoint"] for batch in loader])
        assert torch.equal(loaded, torch.stack([pair.checkpoint for pair in pairs]))


def test_what_cannot_be_augmented_is_named(indexed):
    with pytest.raises(UserError, match="augment='rotate' is not known; known: permute, sign, gl"):
        Pairs(prompts=0, augment="rotate")
    with pytest.raises(checkpoints.UnsupportedAdapter, match="lora_magnitude_vector"):
        augmentation.augmented({"m.lora_magnitude_vector": torch.ones(2)}, "sign", numpy.random.default_rng(0))
