"""LoRA factors that walk from step to step, and their statistics: by layer_stats, and by plain float64 arithmetic."""

import torch

from paragen.analysis import canonical
from paragen.analysis import layer_stats as ls


def walk(
    rank: int, outputs: int, inputs: int, steps: int, change: float, decay: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A, steps x rank x inputs, and B, steps x outputs x rank, whose directions are of sizes from 1 to 10^-decay.

    `change`: that of a step, relative to the factors.
    """
    drawn = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -decay, rank)
    factors = []
    for shape, scale in (((rank, inputs), torch.tensor(2e-2)), ((outputs, rank), 2e-3 * sizes)):
        start = torch.randn(1, *shape, generator=drawn)
        factors.append(scale * (start + change * torch.randn(steps, *shape, generator=drawn).cumsum(0)))
    return factors[0], factors[1]


def measured(a: torch.Tensor, b: torch.Tensor, device: str, chunk: int = 7) -> dict[str, torch.Tensor]:
    """Their statistics as `make stats` takes them, `chunk` steps at a time."""
    (_, rank, inputs), outputs = a.shape, b.shape[1]
    running = ls.start_layer({"r": rank, "lora_alpha": rank}, "base", "layer", outputs, inputs, torch.device(device))
    parts = []
    for start in range(0, len(a), chunk):
        some = (values[start : start + chunk].to(device) for values in (a, b))
        running, figures = ls.add_steps(running, *some)
        parts.append(figures)
    joined = {name: torch.cat([part[name] for part in parts], -2 if name == "sketch" else -1) for name in parts[0]}
    return joined | ls.totals(running)


def exact(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same from the multiplied-out updates of all steps, in float64."""
    a, b = a.double(), b.double()
    updates = b @ a
    values = canonical.without_noise(torch.linalg.svdvals(updates)[:, : a.shape[1]], a.shape[1])
    p, q = (one.double() for one in ls.projections("base", "layer", b.shape[1], a.shape[2]))
    standardised = [
        (one - one.mean((1, 2), keepdim=True)) / one.std((1, 2), correction=0, keepdim=True) for one in (a, b)
    ]
    return {
        "norm": norms(updates),
        "change": change_norms(updates),
        "effective_rank": ls.effective_ranks(values),
        "sketch": (p.T @ updates @ q).flatten(1),
        "factor_norm": torch.stack([norms(a), norms(b)]),
        "factor_change": torch.stack([change_norms(a), change_norms(b)]),
        "mean": torch.stack([a.mean(), b.mean()]),
        "std": torch.stack([one.std(0, correction=0).mean() for one in (a, b)]),
        "standardised_std": torch.stack([one.std(0, correction=0).mean() for one in standardised]),
    }


def norms(values: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm of each step's matrix."""
    return values.flatten(1).norm(dim=1)


def change_norms(values: torch.Tensor) -> torch.Tensor:
    """The Frobenius norm of each step's difference to the step before; 0 at the first."""
    return torch.nn.functional.pad(norms(values[1:] - values[:-1]), (1, 0))
