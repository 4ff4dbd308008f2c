"""The mathematics of `make stats`: running moments, norms of updates from their factors, effective rank, the sketch.

Plain functions on tensors, on the CPU or on a GPU. A is steps x r x inputs, B is steps x outputs x r, both float32.
Moments, changes and sketches are computed in float32; the factors' Gram matrices, and what follows from them, in
float64. All figures are those of float64 to 3e-6 relative, the deviation of standardised factors to 1e-5, on either
device.
"""

import hashlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from paragen.analysis import canonical
from paragen.collection import lora_config

SKETCH_SIDE = 32  # a sketch has SKETCH_SIDE x SKETCH_SIDE numbers
ROUNDING = torch.finfo(torch.float64).eps
SPREAD = 1e-15  # a factor that deviates less from its mean counts as constant
STATE_BYTES = 32  # of a layer's running sums, per entry of its factors


class FactorSums(NamedTuple):
    """The running sums of a factor of n entries between two chunks of its steps.

    Let d be a step less the first one (exact, where steps differ little), w = 1 / the deviation of its entries, u = w
    less the first step's, and v = w · (the mean of its entries less that of the first step's). The standardised step
    less the first one is then w·d + u·e - v, with e the first step less its mean.
    """

    steps: int
    first: torch.Tensor  # n: the first step
    last: torch.Tensor  # r x columns: the last step
    last_gram: torch.Tensor  # r x r
    first_mean: torch.Tensor  # of its entries
    first_weight: torch.Tensor  # its w
    means: torch.Tensor  # the sum of the steps' means
    linear: torch.Tensor  # 4 x n: the sums of d, w·d, w·u·d, w·v·d
    squares: torch.Tensor  # 2 x n: those of d², w²·d²
    scalars: torch.Tensor  # those of u, v, u², u·v, v²


class Running(NamedTuple):
    """The running sums of a layer between two chunks of its steps."""

    scaling: float
    projections: tuple[torch.Tensor, torch.Tensor]
    factors: tuple[FactorSums | None, FactorSums | None]  # A and B; None before the first step


class FactorFigures(NamedTuple):
    """What the steps of one factor, written as X, r x columns (A, or B transposed), give: float64 but for the sums."""

    sums: FactorSums
    gram: torch.Tensor  # X Xᵀ, steps x r x r
    gram_before: torch.Tensor  # that of the step before
    cross: torch.Tensor  # dX Xᵀ, with dX the difference to the step before
    change_gram: torch.Tensor  # dX dXᵀ


@lru_cache(maxsize=512)
def projections(base_model: str, layer: str, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two random matrices that a layer's updates are sketched with: (P, outputs x 32; Q, inputs x 32), float32.

    Independent normal entries of variance 1/32, drawn from a hash of the two names: the same for every rank, dataset
    and machine. Do not write into them.
    """
    import numpy

    seed = hashlib.sha256(f"{base_model}\0{layer}".encode()).digest()[:16]
    drawn = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(seed, "little")))
    both = torch.from_numpy(drawn.standard_normal((outputs + inputs, SKETCH_SIDE))) / SKETCH_SIDE**0.5
    return both[:outputs].float(), both[outputs:].float()


def sketched(a: torch.Tensor, b: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """vec(Pᵀ·B·A·Q) per step, steps x 1024: inner products of updates are kept in expectation."""
    left = torch.bmm(b.mT, p.expand(len(b), *p.shape))  # r x 32
    right = torch.bmm(a, q.expand(len(a), *q.shape))
    return torch.bmm(left.mT, right).flatten(1)


def start_layer(
    config: dict[str, Any], base_model: str, layer: str, outputs: int, inputs: int, device: torch.device
) -> Running:
    """A layer's running sums before its first step; `config` is the content of adapter_config.json."""
    p, q = projections(base_model, layer, outputs, inputs)
    return Running(lora_config.scaling_of(config, layer), (p.to(device), q.to(device)), (None, None))


def add_steps(running: Running, a: torch.Tensor, b: torch.Tensor) -> tuple[Running, dict[str, torch.Tensor]]:
    """Add the next steps of a layer.

    Returns (the running sums, the figures of these steps, float64, on the CPU). The figures are `norm`, `change` and
    `effective_rank` of the scaled update, one number per step; its `sketch`, steps x 1024; `factor_norm` and
    `factor_change` of A and B, 2 x steps. A step with a value that is not finite has a factor norm that is not finite.
    """
    of_a, of_b = add_factor(running.factors[0], a, a), add_factor(running.factors[1], b, b.mT)
    values = singular_values(of_a.gram.cpu(), of_b.gram.cpu())
    size = abs(running.scaling)  # negative with a negative lora_alpha
    figures = {
        "norm": size * values.norm(dim=1),
        "change": size * difference_norms(of_a, of_b),
        "effective_rank": effective_ranks(values),
        "sketch": running.scaling * sketched(a, b, *running.projections),
        "factor_norm": torch.stack([norms_of(of_a.gram), norms_of(of_b.gram)]),
        "factor_change": torch.stack([norms_of(of_a.change_gram), norms_of(of_b.change_gram)]),
    }
    after = running._replace(factors=(of_a.sums, of_b.sums))
    return after, {name: value.double().cpu() for name, value in figures.items()}


def add_factor(sums: FactorSums | None, values: torch.Tensor, rows: torch.Tensor) -> FactorFigures:
    """Add the next steps of a factor.

    Args:
        sums: those of the steps so far; None at the start.
        values: the factor as it is stored, steps x rows x columns.
        rows: the same as steps x r x columns.
    """
    wide = rows.double()
    gram = wide @ wide.mT
    mean = wide.sum((1, 2)) / rows[0].numel()
    del wide
    change = torch.empty_like(rows)
    torch.sub(rows[1:], rows[:-1], out=change[1:])
    torch.sub(rows[0], rows[0] if sums is None else sums.last, out=change[0])
    cross, change_gram = (change @ rows.mT).double(), (change @ change.mT).double()
    before = torch.cat([gram[:1] if sums is None else sums.last_gram[None], gram[:-1]])
    after = add_moments(sums, values.flatten(1), mean, spread_of(gram, mean, rows[0].numel()))
    after = after._replace(last=rows[-1].clone(), last_gram=gram[-1].clone())
    return FactorFigures(after, gram, before, cross, change_gram)


def spread_of(gram: torch.Tensor, mean: torch.Tensor, size: int) -> torch.Tensor:
    """The population standard deviation over a step's `size` entries; 0 where it is a constant's rounding error."""
    square = gram.diagonal(dim1=1, dim2=2).sum(1) / size
    spread = (square - mean**2).clamp(min=0).sqrt()
    return torch.where(spread > SPREAD + canonical.NOISE * square.sqrt(), spread, 0.0)


def add_moments(sums: FactorSums | None, values: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor) -> FactorSums:
    """Add the next steps to the sums of which `deviations` are made.

    Args:
        sums: those of the steps so far; None at the start.
        values: the steps, steps x n.
        mean: of each step's entries.
        spread: their standard deviation; 0 for a constant step, which is 0 when standardised.
    """
    weight = torch.where(spread > 0, 1 / spread, 0.0)
    if sums is None:
        none = values.new_empty(0)
        linear, squares = values.new_zeros(4, values.shape[1]), values.new_zeros(2, values.shape[1])
        start = (none, none, mean[0], weight[0], mean.new_zeros(()), linear, squares, mean.new_zeros(5))
        sums = FactorSums(0, values[0].clone(), *start)
    u, v = weight - sums.first_weight, weight * (mean - sums.first_mean)
    apart = values - sums.first
    sums.linear.addmm_(torch.stack([torch.ones_like(u), weight, weight * u, weight * v]).to(values.dtype), apart)
    sums.squares.addmm_(torch.stack([torch.ones_like(u), weight**2]).to(values.dtype), apart.square_())
    added = torch.stack([u.sum(), v.sum(), (u * u).sum(), (u * v).sum(), (v * v).sum()])
    return sums._replace(steps=sums.steps + len(values), means=sums.means + mean.sum(), scalars=sums.scalars + added)


def deviations(sums: FactorSums) -> tuple[torch.Tensor, torch.Tensor]:
    """The population standard deviation of each entry over the steps: (of the entries, of the standardised ones)."""
    first, linear, squares = (part.double() for part in (sums.first, sums.linear, sums.squares))
    u, v, uu, uv, vv = sums.scalars
    of_raw = squares[0] - linear[0] ** 2 / sums.steps
    apart = first - sums.first_mean
    total = linear[1] + u * apart - v
    square = squares[1] + uu * apart**2 + vv + 2 * (apart * linear[2] - linear[3] - uv * apart)
    of_standardised = square - total**2 / sums.steps
    of_both = [(part.clamp(min=0) / sums.steps).sqrt() for part in (of_raw, of_standardised)]
    return of_both[0], of_both[1]


def totals(running: Running) -> dict[str, torch.Tensor]:
    """The statistics of a layer after all steps, for A and B each: the mean over the entries of their mean (`mean`), of
    their deviation (`std`), and of their deviation when standardised within each step (`standardised_std`)."""
    seen = [sums for sums in running.factors if sums is not None]  # after a step, both
    both = [deviations(sums) for sums in seen]
    return {
        "mean": torch.stack([sums.means / sums.steps for sums in seen]).cpu(),
        "std": torch.stack([raw.mean() for raw, _ in both]).cpu(),
        "standardised_std": torch.stack([standardised.mean() for _, standardised in both]).cpu(),
    }


def norms_of(gram: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm of each step's factor, from its Gram matrix."""
    return gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0).sqrt()


def difference_norms(of_a: FactorFigures, of_b: FactorFigures) -> torch.Tensor:
    """The Frobenius norm of B·A - B'·A' per step, with B' and A' the step before, without forming outputs x inputs.

    The difference is B·dA + dB·A', so its square is a sum over products of r x r Gram matrices. Since the changes
    are those of the factors, it has no cancellation such as that of |BA|² + |B'A'|² - 2<BA, B'A'>.
    """
    square = of_b.gram * of_a.change_gram + of_b.change_gram * of_a.gram_before
    square += 2 * of_b.cross.mT * (of_a.cross - of_a.change_gram)
    return square.sum((1, 2)).clamp(min=0).sqrt()


def singular_values(of_a: torch.Tensor, of_b: torch.Tensor) -> torch.Tensor:
    """The singular values of B·A, steps x r, descending, without noise; 0 for a step that is not finite.

    Their squares are the eigenvalues of Lᵀ·(A·Aᵀ)·L with L the Cholesky factor of Bᵀ·B. In float64, the values are
    exact to about 1e-8 of |A|·|B|, below the rounding of the factors themselves.

    Args:
        of_a, of_b: A·Aᵀ and Bᵀ·B, steps x r x r, float64, on the CPU: LAPACK is the fastest there is for many small
            matrices.
    """
    rank = of_a.shape[-1]
    of_a, of_b = (torch.nan_to_num(gram, nan=0.0, posinf=0.0, neginf=0.0) for gram in (of_a, of_b))
    size = of_b.diagonal(dim1=1, dim2=2).sum(1)
    apart = torch.diag_embed((4 * ROUNDING * size + torch.finfo(torch.float64).tiny)[:, None].expand(-1, rank))
    factor = torch.linalg.cholesky_ex(of_b + apart).L
    squares = torch.linalg.eigvalsh(factor.mT @ of_a @ factor)
    values = canonical.without_noise(squares.flip(1).clamp(min=0).sqrt(), rank)
    return torch.where(size[:, None] > 0, values, 0.0)


def effective_ranks(values: torch.Tensor) -> torch.Tensor:
    """exp(-sum p ln p) with p the singular values divided by their sum (Roy and Vetterli 2007); 0 for a zero matrix.

    Args:
        values: singular values, steps x k.

    Returns one number per step, from 1 (a single direction) to k (all singular values equal).
    """
    total = values.sum(1, keepdim=True)
    shares = values / torch.where(total > 0, total, 1.0)
    return torch.where(total[:, 0] > 0, torch.special.entr(shares).sum(1).exp(), 0.0)
