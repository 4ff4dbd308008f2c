"""Means over rows with their paired confidence intervals, by drawing prompts anew.

Rows of one prompt are drawn together, and all methods get the same draws: an interval of a difference is that of the
paired difference. Losses are ratios of sums, all nats over all tokens.
"""

from typing import Any

import numpy as np

from paragen.scoring.answers import CONFIDENCE

DRAWS = 2000

Figure = dict[str, Any]  # `value` and `interval` ([low, high]); None where there is none


def draws_of(clusters: list[int], seed: int) -> np.ndarray:
    """How often each row is drawn, [DRAWS + 1, rows] float64; the first draw has each row once.

    Args:
        clusters: of each row, the number of its prompt.
        seed: of the draws.
    """
    numbers = np.asarray(clusters)
    count = int(numbers.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)
    return np.concatenate([np.ones((1, len(numbers))), drawn[:, numbers]])


def ratio(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ratio of two sums over rows in each draw: [draws] float64.

    Args:
        weights: [draws, rows], how often each row is drawn.
        sums, counts: [rows].
    """
    return (weights @ sums) / (weights @ counts)


def figure(values: np.ndarray) -> Figure:
    """A number with its interval from its draws, of which the first is the number itself; draws that are not finite
    (a share of nothing) are left out."""
    finite = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(finite):
        return {"value": None, "interval": None}
    edges = [(1 - CONFIDENCE) / 2 * 100, (1 + CONFIDENCE) / 2 * 100]
    low, high = np.percentile(finite, edges)
    return {"value": float(values[0]), "interval": [float(low), float(high)]}


def is_below_zero(one: Figure) -> bool:
    """Whether a figure's whole interval lies below zero."""
    return one["interval"] is not None and one["interval"][1] < 0
