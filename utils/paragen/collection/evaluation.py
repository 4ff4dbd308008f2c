"""evaluation.json of a collection: the scores of its base model and its checkpoints on held-out prompts.

The file lies beside manifest.json, names that manifest's hash, and carries the hash of its own content.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from paragen.collection import run_files, run_identity
from paragen.collection.manifest import Manifest, sealed
from paragen.collection.manifest_kinds import is_flat
from paragen.common import files, paths
from paragen.common.cli import UserError, say

FILE = run_files.EVALUATION
FORMAT = 1
LARGEST_FILE = 2**26  # bytes; the scores of a checkpoint take about 300
DEEPEST = 16  # levels of lists and objects
METRICS = {
    "choice": "share of right choices, as generated",
    "math": "share of right results, as generated",
    "exact": "share of answers that are the response, as generated",
    "loss": "mean loss per token of the responses",
}
BASE = 0  # the step that stands for the base model
MOST = {"choice": 32, "math": 512, "exact": 64}  # tokens that a generated answer may have
# The keys of an evaluation (see `read`).
KEYS = {
    "split", "paired", "limit", "metric", "rows", "prompts_sha256", "settings", "engine", "dtype", "device", "versions",
    "base", "checkpoints",
}  # fmt: skip
SCORE_KEYS = {"score", "interval", "loss", "loss_interval"}  # every score has these; some values are null


def read(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The evaluations of a collection, one per split and limit; none where it was not evaluated.

    Each is a dict:
        split: the registered dataset whose rows are scored (`Demo_test`), or a part of one (`Demo[1000:1119]`).
        paired: whether these are the held-out rows of the collection's own dataset.
        limit: how many of the split's first rows were scored; None for all.
        metric: a key of METRICS.
        rows, prompts_sha256: how many rows were scored, and their hash.
        settings: how answers were generated.
        engine, dtype, device, versions: what computed the scores.
        base: the base model's score (below), None until it is computed.
        checkpoints: the scores of the evaluated checkpoints, each with its `step`, in ascending order.

    A score is a dict: `score` (0 to 1, None where the metric is the loss), `interval` (its 95 % confidence interval,
    [low, high], or None), `unparsed` (the number of rows whose generated answer has no readable choice or result; they
    count as wrong),
    `loss` (mean over the responses' tokens) with `loss_interval`; of choices also `likelihood_score` and
    `likelihood_interval`, by comparing the options' log-likelihoods.

    Raises UserError when the file is broken, was edited, or belongs to other checkpoints.
    """
    data = bytes_in(folder)
    return [] if data is None else parse(data, manifest, paths.relative(folder / FILE))


def bytes_in(folder: Path) -> bytes | None:
    """The bytes of a collection's evaluation.json, None where it was not evaluated."""
    try:
        return files.read_up_to(folder / FILE, LARGEST_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unsound(paths.relative(folder / FILE), f"cannot be read ({error.strerror})") from None


def sha256_in(folder: Path) -> str | None:
    """The SHA-256 of a collection's evaluation.json, None where it was not evaluated."""
    data = bytes_in(folder)
    return None if data is None else hashlib.sha256(data).hexdigest()


def scores_mark(folder: Path) -> dict[str, str]:
    """How derived files (exports, published trees) record which scores they used: the hash of evaluation.json as
    `labels`; empty for a collection without scores."""
    sha256 = sha256_in(folder)
    return {} if sha256 is None else {"labels": sha256}


def parse(data: bytes, manifest: Manifest, name: str) -> list[dict[str, Any]]:
    """The evaluations in the bytes of an evaluation.json, as `read` returns them; errors call the file `name`."""
    try:
        content = json.loads(data) if len(data) <= LARGEST_FILE else None
        if not isinstance(content, dict) or content.get("format") != FORMAT or not is_flat(content, DEEPEST):
            raise _unsound(name, f"not of format {FORMAT}")
        if content != sealed(content):
            raise _unsound(name, "was edited after it was written")
    except (ValueError, RecursionError) as error:
        raise _unsound(name, f"broken ({error})") from None
    if content.get("manifest_sha256") != manifest.sha256:
        raise _unsound(name, "is of other checkpoints than its manifest.json")
    if fault := _kind_fault(content.get("evaluations"), set(manifest.steps)):
        raise _unsound(name, fault)
    return content["evaluations"]


def _kind_fault(evaluations: Any, steps: set[int]) -> str | None:
    """What differs from the description in `read`, None for nothing. `steps` are those of the manifest."""
    if not isinstance(evaluations, list):
        return "holds no list of evaluations"
    for evaluation in evaluations:
        if fault := fault_of(evaluation, "checkpoints"):
            return fault
        scored = [score.get("step") for score in evaluation["checkpoints"]]
        if not all(type(step) is int for step in scored) or scored != sorted(set(scored)):
            return "does not have its checkpoints in the order of their steps"
        if strange := sorted(set(scored) - steps):
            return f"has a score of step {strange[0]}, which is none of its manifest.json"
    return None


def fault_of(evaluation: Any, scored: str) -> str | None:
    """What differs in an evaluation from the description in `read`, None for nothing.

    Args:
        evaluation: a JSON value.
        scored: the key of its scores other than the base model's, `checkpoints` in `read`.
    """
    kinds = {"split": str, "paired": bool, "rows": int, "metric": str, scored: list}
    if not isinstance(evaluation, dict):
        return "holds no list of evaluations"
    wanted = {*KEYS - {"checkpoints"}, scored}
    if not evaluation.keys() >= wanted or not all(type(evaluation[key]) is kind for key, kind in kinds.items()):
        return "holds an evaluation that lacks something, or has another kind of value"
    if not evaluation["split"].isprintable() or abs(evaluation["rows"]) >= 2**53:
        return "holds an evaluation of rows that cannot be"
    limit = evaluation["limit"]
    if limit is not None and (type(limit) is not int or not 0 < limit < 2**53):
        return f"holds the limit {repr(limit)[:80]}, which is no number of rows"
    if evaluation["metric"] not in METRICS:
        return f"holds the metric {evaluation['metric'][:80]!r}, which is not known"
    base, scores = evaluation["base"], evaluation[scored]
    if not all(map(_is_score, scores if base is None else [base, *scores])):
        return "holds a score that is none"
    return None


def _is_score(score: Any) -> bool:
    if not isinstance(score, dict) or not score.keys() >= SCORE_KEYS:
        return False
    values = [score["score"], score["loss"]]
    for span in (score["interval"], score["loss_interval"]):
        if span is not None and (not isinstance(span, list) or len(span) != 2 or None in span):
            return False
        values += span or []
    return all(value is None or type(value) is float or type(value) is int and abs(value) < 2**53 for value in values)


def adds_scores(incoming: bytes | None, here: bytes | None, manifest: Manifest, name: str, force: bool = False) -> bool:
    """Whether an incoming evaluation.json should replace the present one: it has all its scores, and more.

    Args:
        incoming, here: the bytes of two evaluation.json, None for none.
        manifest: the collection's, the same for both.
        name: what messages call the present file.
        force: replace it also where each has scores that the other lacks.

    Raises UserError where each has scores that the other lacks, and where one of them is not sound.
    """
    if incoming is None or incoming == here:
        return False
    theirs = parse(incoming, manifest, f"the incoming {name}")
    own = [] if here is None else parse(here, manifest, name)
    if here is not None and _holds(own, theirs):
        return False
    if force or _holds(theirs, own):
        return True
    raise UserError(f"{name}: holds other scores than the incoming one; move it away, or FORCE=1 replaces it")


def _holds(evaluations: list[dict], others: list[dict]) -> bool:
    """Whether all scores of the other evaluations are among these, measured in the same way."""
    return all(
        any(
            all(one.get(key) == other.get(key) for key in (one.keys() | other.keys()) - {"base", "checkpoints"})
            and other["base"] in (None, one["base"])
            and all(score in one["checkpoints"] for score in other["checkpoints"])
            for one in evaluations
        )
        for other in others
    )


def write(folder: Path, manifest: Manifest, evaluations: list[dict[str, Any]]) -> None:
    """Write a collection's evaluations, whole or not at all."""
    content = {"format": FORMAT, "manifest_sha256": manifest.sha256, "evaluations": evaluations}
    files.write_json(folder / FILE, sealed(content))


def import_scores(folder: Path, manifest: Manifest, incoming: bytes | None) -> None:
    """Write the evaluation.json of an imported copy of a collection into it. Call it with the folder's lock held.

    Raises UserError where that would lose scores that were measured here, unless FORCE=1.
    """
    path, here = folder / FILE, bytes_in(folder)
    if incoming is not None and adds_scores(
        incoming, here, manifest, paths.relative(path), run_identity.force_requested()
    ):
        files.write_atomically(path, incoming)
        say(f"scores imported: {paths.relative(path)}")


def shown(evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The evaluation that tables and pictures show: one of paired rows before others, then the one of most rows; None
    where no checkpoint was evaluated."""
    scored = [evaluation for evaluation in evaluations if evaluation["checkpoints"]]
    return max(scored, key=lambda evaluation: (evaluation["paired"], evaluation["rows"]), default=None)


def figure_of(shown: dict[str, Any], score: dict[str, Any] | None) -> tuple[float | None, list[float] | None]:
    """The figure of a score by its evaluation's metric: (the share, or the loss per token; its interval). Each is None
    where it is not known or not finite."""
    name, span = ("loss", "loss_interval") if shown["metric"] == "loss" else ("score", "interval")
    value, interval = (None, None) if score is None else (score[name], score[span])
    if value is None or not math.isfinite(value):
        return None, None
    return value, interval if interval and all(map(math.isfinite, interval)) else None


def best_of(shown: dict[str, Any]) -> dict[str, Any] | None:
    """The score of the best checkpoint, the earliest of equal ones; None where no figure is known."""
    figures = ((figure_of(shown, score)[0], score) for score in shown["checkpoints"])
    known = [(figure, score) for figure, score in figures if figure is not None]
    if not known:
        return None
    choose = min if shown["metric"] == "loss" else max
    return choose(known, key=lambda pair: pair[0])[1]


def text_of(shown: dict[str, Any], score: dict[str, Any] | None) -> str:
    """A score as texts show it, with its interval where it has one: `0.6120 (0.5830 to 0.6403)`; empty if not known."""
    value, span = figure_of(shown, score)
    if value is None:
        return ""
    return f"{value:.4f} ({span[0]:.4f} to {span[1]:.4f})" if span else f"{value:.4f}"


def rows_text(evaluation: dict[str, Any]) -> str:
    """Which rows were scored, as texts show it: `1172 rows of ARC-c_test`, marked where they are not all held-out ones
    of the collection's own dataset.

    Args:
        evaluation: one of `read`, or a part of it with `split`, `rows`, `limit` and `paired`.
    """
    first = "the first " if evaluation["limit"] is not None else ""
    foreign = "" if evaluation["paired"] else ", of another dataset"
    return f"{first}{evaluation['rows']} rows of {evaluation['split']}{foreign}"


def _unsound(name: str, why: str) -> UserError:
    return UserError(f"{name}: {why}; remove it and run: make evaluate")
