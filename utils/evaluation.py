"""What evaluation.json says of a collection: how good its base model and its checkpoints are on held-out prompts.

Imported by evaluate.py, which writes it, and by verify.py, index.py, report.py and card.py, which read it. The file
lies beside the manifest; it belongs to the checkpoints of that manifest alone, and is sealed by its own hash like it.
"""

import json
from pathlib import Path
from typing import Any

import files
import paths
from cli import UserError

FILE = "evaluation.json"
FORMAT = 1
METRICS = {
    "choice": "share of right choices, as generated",
    "math": "share of right results, as generated",
    "loss": "mean loss per token of the responses",
}
BASE = 0  # the step that stands for the base model
MOST = {"choice": 32, "math": 512}  # tokens that a generated answer may have
# What an evaluation says, beside `base` and `checkpoints` (see `read`).
KEYS = {
    "split", "paired", "limit", "metric", "rows", "prompts_sha256", "settings", "engine", "dtype", "device", "versions",
    "base", "checkpoints",
}  # fmt: skip


def read(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of a collection, one per split and limit; none where it was not evaluated.

    Each is a dict:
        split: the registered dataset whose rows are scored (`Demo_test`), or a part of one (`Demo[1000:1119]`).
        paired: whether these are the rows that belong to the collection's dataset; `limit`: None, or how many of them.
        metric: a key of METRICS. rows: how many; prompts_sha256: their hash. settings: of generating.
        engine, dtype, device, versions: what computed it.
        base: a score (below), or None while it is not there yet.
        checkpoints: a score each, with its `step`, in the order of steps; those that were evaluated.

    A score is a dict: `score` (0 to 1, None where the metric is the loss), `interval` (its 95 % confidence interval,
    [low, high], or None), `unparsed` (rows whose generated answer could not be read; they count as wrong),
    `loss` (mean over the responses' tokens) with `loss_interval`; of choices also `likelihood_score` and
    `likelihood_interval`, by comparing the options' log-likelihoods.

    Raises UserError when the file is broken, was edited, or is of other checkpoints.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise _unsound(path, f"broken ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _unsound(path, f"not of format {FORMAT}")
    if content.get("sha256") != _seal(content):
        raise _unsound(path, "was edited after it was written")
    if content["manifest_sha256"] != manifest["sha256"]:
        raise _unsound(path, "is of other checkpoints than its manifest.json")
    return content["evaluations"]


def write(folder: Path, manifest: dict[str, Any], evaluations: list[dict[str, Any]]) -> None:
    """Write a collection's evaluations, whole or not at all."""
    content = {"format": FORMAT, "manifest_sha256": manifest["sha256"], "evaluations": evaluations}
    files.write_json(folder / FILE, {**content, "sha256": _seal(content)})


def shown(evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation that tables and pictures show: of the paired rows before others, of many rows before few; None
    where no checkpoint was evaluated."""
    scored = [evaluation for evaluation in evaluations if evaluation["checkpoints"]]
    return max(scored, key=lambda evaluation: (evaluation["paired"], evaluation["rows"]), default=None)


def best(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The best checkpoint of an evaluation: of the highest score, among equals of the lowest loss."""
    return max(evaluation["checkpoints"], key=lambda one: (one["score"] or 0, -one["loss"]))


def text_of(score: dict[str, Any] | None) -> str:
    """A score as tables show it: with the half width of its interval, a share as per cent."""
    if score is None:
        return "-"
    low, high = score["loss_interval"] if score["score"] is None else score["interval"]
    if score["score"] is None:
        return f"loss {score['loss']:.4f} ± {(high - low) / 2:.4f}"
    return f"{100 * score['score']:.1f} % ± {50 * (high - low):.1f}"


def _seal(content: dict[str, Any]) -> str:
    return files.sha256_of_value({key: value for key, value in content.items() if key != "sha256"})


def _unsound(path: Path, why: str) -> UserError:
    return UserError(f"{paths.relative(path)}: {why}; remove it and run: make evaluate")
