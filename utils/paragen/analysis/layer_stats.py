"""The mathematics of `make stats`: running moments, norms of updates from their factors, effective rank, the sketch.

Plain functions on float64 tensors. A is steps x r x inputs, B is steps x outputs x r.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from paragen.analysis import canonical
from paragen.collection import lora_config

SKETCH_SIDE = 32  # a sketch has SKETCH_SIDE x SKETCH_SIDE numbers


@dataclass(frozen=True)
class Moments:
    """Mean and sum of squared deviations of each entry over the steps seen so far."""

    count: int
    mean: torch.Tensor
    squares: torch.Tensor


def merged(before: Moments | None, values: torch.Tensor) -> Moments:
    """The moments with further steps added (Chan, Golub and LeVeque 1979: pairwise merging).

    Args:
        before: those of the steps so far; None at the start.
        values: the further ones, steps x ..., float64.
    """
    mean = values.mean(0)
    new = Moments(len(values), mean, (values - mean).square_().sum(0))
    if before is None:
        return new
    count = before.count + new.count
    apart = new.mean - before.mean
    return Moments(
        count,
        before.mean + apart * (new.count / count),
        before.squares + new.squares + apart**2 * (before.count * new.count / count),
    )


def deviation(moments: Moments) -> torch.Tensor:
    """The population standard deviation of each entry over the steps."""
    return (moments.squares / moments.count).sqrt()


def standardised(values: torch.Tensor) -> torch.Tensor:
    """Each step's tensor with mean 0 and population standard deviation 1 over its entries; a constant one becomes 0."""
    centred = values - values.mean((1, 2), keepdim=True)
    spread = norms(centred)[:, None, None] / centred[0].numel() ** 0.5
    return centred.div_(torch.where(spread > 0, spread, 1.0))


def with_before(before: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """The step before each of `values`, whose first is `before`; at the very start (None) the first step itself."""
    return torch.cat([values[:1] if before is None else before[None], values[:-1]])


def norms(values: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm of each step's matrix."""
    return values.flatten(1).norm(dim=1)


def difference_norms(
    b: torch.Tensor, a_before: torch.Tensor, a_change: torch.Tensor, b_change: torch.Tensor
) -> torch.Tensor:
    """The Frobenius norm of B·A - B'·A' per step, exact to rounding, without forming outputs x inputs.

    The difference is B·dA + dB·A', so its square is a sum over products of r x r Gram matrices. Since the changes
    are those of the factors, it has no cancellation such as that of |BA|² + |B'A'|² - 2<BA, B'A'>.

    Args:
        b: B.
        a_before: A', that of the step before.
        a_change, b_change: dA = A - A' and dB = B - B'.
    """
    square = (b.mT @ b) * (a_change @ a_change.mT)
    square += (b_change.mT @ b_change) * (a_before @ a_before.mT)
    square += (b.mT @ b_change) * (a_change @ a_before.mT) * 2
    return square.sum((1, 2)).clamp(min=0).sqrt()


def effective_ranks(values: torch.Tensor) -> torch.Tensor:
    """exp(-sum p ln p) with p the singular values divided by their sum (Roy and Vetterli 2007); 0 for a zero matrix.

    Args:
        values: singular values, steps x k.

    Returns one number per step, from 1 (a single direction) to k (all singular values equal).
    """
    total = values.sum(1, keepdim=True)
    shares = values / torch.where(total > 0, total, 1.0)
    return torch.where(total[:, 0] > 0, torch.special.entr(shares).sum(1).exp(), 0.0)


def projections(base_model: str, layer: str, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two random matrices that a layer's updates are sketched with: (P, outputs x 32; Q, inputs x 32), float64.

    Independent normal entries of variance 1/32, drawn from a hash of the two names: the same for every rank, dataset
    and machine.
    """
    import numpy

    seed = hashlib.sha256(f"{base_model}\0{layer}".encode()).digest()[:16]
    drawn = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(seed, "little")))
    both = torch.from_numpy(drawn.standard_normal((outputs + inputs, SKETCH_SIDE))) / SKETCH_SIDE**0.5
    return both[:outputs], both[outputs:]


def sketched(a: torch.Tensor, b: torch.Tensor, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """vec(Pᵀ·B·A·Q) per step, steps x 1024: inner products of updates are kept in expectation."""
    return ((p.T @ b) @ (a @ q)).flatten(1)


class Running(NamedTuple):
    """The running sums of a layer between two chunks of its steps."""

    scaling: float
    projections: tuple[torch.Tensor, torch.Tensor]
    moments: tuple[Moments | None, ...]  # of A, B, A standardised, B standardised
    before: tuple[torch.Tensor | None, torch.Tensor | None]  # A and B of the last step seen


def start_layer(config: dict[str, Any], base_model: str, layer: str, outputs: int, inputs: int) -> Running:
    """A layer's running sums before its first step; `config` is the content of adapter_config.json."""
    drawn = projections(base_model, layer, outputs, inputs)
    return Running(lora_config.scaling_of(config, layer), drawn, (None,) * 4, (None, None))


def add_steps(running: Running, a: torch.Tensor, b: torch.Tensor) -> tuple[Running, dict[str, torch.Tensor]]:
    """Add the next steps of a layer.

    Returns (the running sums, the figures of these steps). The figures are `norm`, `change` and `effective_rank` of the
    scaled update, one number per step; its `sketch`, steps x 1024; `factor_norm` and `factor_change` of A and B,
    2 x steps.
    """
    scaling = running.scaling
    a_before = with_before(running.before[0], a)
    a_change, b_change = a - a_before, b - with_before(running.before[1], b)
    values = canonical.singular_values(a, b)
    figures = {
        "norm": scaling * values.norm(dim=1),
        "change": scaling * difference_norms(b, a_before, a_change, b_change),
        "effective_rank": effective_ranks(values),
        "sketch": scaling * sketched(a, b, *running.projections),
        "factor_norm": torch.stack([norms(a), norms(b)]),
        "factor_change": torch.stack([norms(a_change), norms(b_change)]),
    }
    moments = tuple(map(merged, running.moments, (a, b, standardised(a), standardised(b))))
    return running._replace(moments=moments, before=(a[-1].clone(), b[-1].clone())), figures


def totals(running: Running) -> dict[str, torch.Tensor]:
    """The statistics of a layer after all steps, for A and B each: the mean over the entries of their mean (`mean`), of
    their deviation (`std`), and of their deviation when standardised within each step (`standardised_std`)."""
    seen = [moments for moments in running.moments if moments is not None]  # after a step, all of them
    raw, standard = seen[:2], seen[2:]
    return {
        "mean": torch.stack([one.mean.mean() for one in raw]),
        "std": torch.stack([deviation(one).mean() for one in raw]),
        "standardised_std": torch.stack([deviation(one).mean() for one in standard]),
    }
