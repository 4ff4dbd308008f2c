"""Scores for the tests' collections: evaluation.json as `make evaluate` writes it, with a test's own figures."""

from pathlib import Path
from typing import Any

from paragen.collection import evaluation
from paragen.collection.manifest import read_manifest

RISING = {"base": 0.4, 5: 0.5, 6: 0.7, 7: 0.6}


def score(value: float | None, loss: float = 0.5, width: float = 0.1) -> dict[str, Any]:
    """A score with an interval of `width` on either side. Without `value`, the metric is the loss."""
    interval = None if value is None else [max(0.0, value - width), min(1.0, value + width)]
    return {
        "score": value, "interval": interval, "unparsed": 0, "loss": loss,
        "loss_interval": [loss - width, loss + width],
    }  # fmt: skip


def evaluated(figures: dict, metric: str = "choice", losses: dict | None = None, **changed) -> dict[str, Any]:
    """An evaluation from figures by step and for `base`. For the metric `loss` they are losses."""
    is_loss, losses = metric == "loss", losses or {}
    made = {
        key: score(None, value) if is_loss else score(value, losses.get(key, 0.5)) for key, value in figures.items()
    }
    return {
        "split": "Toy_test", "paired": True, "limit": None, "metric": metric, "rows": 100, "prompts_sha256": "0" * 64,
        "settings": {}, "engine": "transformers", "dtype": "float32", "device": "cpu", "versions": {},
        "base": made.pop("base", None),
        "checkpoints": [{"step": step, **made[step]} for step in sorted(made)],
    } | changed  # fmt: skip


def write(folder: Path, *evaluations: dict[str, Any]) -> Path:
    """Write the evaluations of a collection; returns the file."""
    evaluation.write(folder, read_manifest(folder), list(evaluations))
    return folder / evaluation.FILE
