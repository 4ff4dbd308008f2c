"""Triton kernels of packed training on an NVIDIA GPU, each in one pass over memory."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # features that a program computes


def keep(x: Tensor, out: Tensor, keys: Tensor, thresholds: Tensor, layer: int, adds: bool) -> Tensor:
    """Write the kept features of x to `out`, and zeros for the others; with `adds`, add the kept ones to it.

    Args:
        x, out: [N, features], contiguous, of one dtype.
        keys, thresholds, layer: as LayerDropout has them, whose `mask` says the same in PyTorch's operations.
    """
    tokens, features = x.shape
    _keep[tokens, triton.cdiv(features, BLOCK)](x, out, keys, thresholds, layer, features, adds, BLOCK)
    return out


@triton.jit
def _finalise(numbers):
    """MurmurHash3's finaliser, of uint32."""
    numbers = (numbers ^ (numbers >> 16)) * 0x85EBCA6B
    numbers = (numbers ^ (numbers >> 13)) * 0xC2B2AE35
    return numbers ^ (numbers >> 16)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["keys"])
def _keep(x, out, keys, thresholds, layer, features, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK features of a token.

    One variant serves all layers, wherever in memory the keys are: while a graph is captured, none can be loaded.
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(keys + token).to(tl.int32).to(tl.uint32, bitcast=True) + 0x9E3779B9
    row = _finalise(row ^ layer.to(tl.uint32))
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    number = _finalise(row + feature.to(tl.uint32) * 0x9E3779B9).to(tl.int32, bitcast=True)
    place = token * features + feature
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(number >= tl.load(thresholds + token), value, 0.0)
    if ADDS:
        value += tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
