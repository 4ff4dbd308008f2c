"""The canonical factors of a LoRA update: one form for all factorizations of the same B·A.

Plain functions on tensors, batched over a leading dimension.
B·A = (B·G)(G^-1·A) for every invertible G, so the factors as trained are an arbitrary choice. The canonical ones are
B' = U sqrt(S) and A' = sqrt(S) V^T from the singular value decomposition U S V^T of B·A. The scaling (lora_alpha / r)
is not part of it: it stays in adapter_config.json.

The form is not unique within a block of equal singular values, where U's columns may be rotated with V's; only the
block's product U_k S_k V_k^T is. Values that differ by less than rounding make such a block.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
METHOD = "qr-svd-1"  # to be changed whenever the numbers change
NOISE = torch.finfo(torch.float32).eps  # relative rounding of the float32 in which adapters are trained, 1.2e-7
TIED = 1e-3  # entries within this relative distance of a vector's largest count as equally large for its sign


def canonical(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The canonical factors of B·A, by QR of both factors and SVD of the small core R_B·R_A^T.

    Singular values descend. In each left singular vector the entry of largest magnitude is positive; of several equally
    large ones (within 0.1 %), the first. Singular values of rounding noise are exactly zero (see `without_noise`), and
    so are their columns and those beyond min(inputs, outputs): an update of lower rank than its factors has one form,
    too.

    Args:
        a: the factor A, r x inputs or n x r x inputs, any floating dtype, finite.
        b: the factor B, outputs x r or n x outputs x r.

    Returns (A', B') with the same shapes, float64; a product in a batch has the same bits as alone. B'·A' differs from
    B·A by the noise that was removed.
    """
    left, s, right = usv(a, b)
    root = s.sqrt()
    return (right * root.unsqueeze(-1)) + 0.0, (left * root.unsqueeze(-2)) + 0.0  # no -0.0: 0.0 in other bits


def usv(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The singular value decomposition of B·A, with the arguments, signs, order and zeros of `canonical`.

    Returns (U, outputs x r; S, r; V^T, r x inputs), batched as the arguments, float64: B·A = U diag(S) V^T. Columns of
    U and rows of V^T whose singular value is zero are zero.
    """
    if a.dim() == 2:  # a single product is computed by another kernel than a batch of one, and differs in the last bit
        left, values, right = usv(a[None], b[None])
        return left[0], values[0], right[0]
    if len(a) > 1:
        found = one_by_one(usv, a, b)
        left, values, right = (torch.cat(parts) for parts in zip(*found, strict=True))
        return left, values, right
    rank = a.shape[-2]
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, v_t = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    left, right = q_b @ u, q_a @ v_t.mT
    signs, values = signs_of(left), without_noise(s, rank)
    kept = (values > 0).unsqueeze(-2)
    missing = (0, rank - s.shape[-1])  # columns beyond min(inputs, outputs)
    left, right = (torch.nn.functional.pad(torch.where(kept, part * signs, 0.0), missing) for part in (left, right))
    return left + 0.0, torch.nn.functional.pad(values, missing), right.mT + 0.0  # no -0.0: 0.0 in other bits


def one_by_one(function: Callable[..., Result], a: torch.Tensor, b: torch.Tensor) -> list[Result]:
    """`function` of each of n pairs of factors, as a batch of one.

    In a batch, MKL chooses a matrix's kernel by the address where it begins, so the last bits would depend on its place
    in the batch, and this on the number of cores. LAPACK takes the matrices of a batch one after the other, too.
    """
    return [function(one[None], other[None]) for one, other in zip(a, b, strict=True)]


def signs_of(vectors: torch.Tensor) -> torch.Tensor:
    """The sign (1 or -1) per column that makes its leading entry positive.

    Args:
        vectors: ... x n x k, nonzero columns.

    Returns ... x 1 x k.
    """
    size = vectors.abs()
    leading = size >= size.amax(-2, keepdim=True) * (1 - TIED)
    first = leading.to(torch.uint8).argmax(-2, keepdim=True)  # of several ones, the first
    return torch.where(vectors.gather(-2, first) < 0, -1.0, 1.0).to(vectors.dtype)


def without_noise(s: torch.Tensor, rank: int) -> torch.Tensor:
    """Singular values (... x k, descending) with those of at most rank · 1.2e-7 times the largest set to zero."""
    return torch.where(s > rank * NOISE * s[..., :1], s, 0.0)
