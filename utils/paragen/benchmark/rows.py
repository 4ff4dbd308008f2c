"""The rows that the benchmark scores a dataset on, and what each method's answers to them are worth."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paragen.benchmark.plan import Plan
from paragen.collection import manifest_kinds, prompts, sealed_json
from paragen.collection.manifest import sealed
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.dataset import row_texts
from paragen.scoring import questions
from paragen.scoring.questions import Split

FORMAT = "paragen-benchmark-part-1"
# Inputs that BASELINES or REPEATS decide: a part with others is measured again, with the generators that are there.
COMPARED = ("trained", "context", "union", "seeds")


class Scored(NamedTuple):
    """The rows of one dataset."""

    split: Split
    metric: str  # a key of evaluation.METRICS
    clusters: list[int]  # of each row, the number of its prompt: rows of one prompt are drawn together
    left_out: int  # rows whose prompt was trained on


def scored_rows(plan: Plan, dataset: str) -> Scored:
    """The held-out rows of a dataset, without those whose prompt stands among the rows that its collection saw.

    Raises UserError where none is left, or where `make evaluate` could not score them.
    """
    manifest = plan.chosen[dataset].manifest
    split = questions.split_for(manifest, "")
    seen = {_prompt(text) for text in prompts.of_collection(manifest)}
    parts = [
        (entry, [row for row in rows if _prompt(row_texts.texts_of(row, entry)) not in seen])
        for entry, rows in split.parts
    ]
    kept = split._replace(parts=[part for part in parts if part[1]], all_parts=split.parts)
    if not kept.parts:
        raise UserError(f"{split.name}: all its prompts stand among the rows that {dataset} was trained on")
    left_out = len(split.rows) - len(kept.rows)
    metric = "loss" if split.metric in plan.wanted.loss_only else split.metric
    limited = questions.first_rows(kept, plan.wanted.limit)
    numbers: dict[tuple, int] = {}
    clusters = [numbers.setdefault(_prompt(text), len(numbers)) for text in limited.texts]
    return Scored(limited, metric, clusters, left_out)


def _prompt(text: dict[str, Any]) -> tuple:
    """What makes a prompt another one."""
    turns = [(message["role"], message["content"]) for message in text.get("messages", [])[:-1]]
    return text["system"], text["prompt"], *turns


def inputs_of(plan: Plan, held: Sequence[str], trained: Sequence[str], more: dict[str, Any]) -> dict[str, Any]:
    """What decides a part's result.

    Args:
        plan: the benchmark, of which the settings of scoring count.
        held: the datasets that are scored, of which the rows, the metric and the collections count.
        trained: other datasets, of which the collections count.
        more: further inputs.
    """
    hashes = {name: plan.chosen[name].manifest.sha256 for name in (*held, *trained)}
    scored = {name: scored_rows(plan, name) for name in held}
    texts = {name: files.sha256_of_value(one.split.texts) for name, one in scored.items()}
    metrics = {name: [one.metric, _options_sha256(one)] for name, one in scored.items()}
    return {**plan.scoring, "collections": hashes, "rows": texts, "metric": metrics, **more}


def _options_sha256(scored: Scored) -> str | None:
    """The hash of what a choice's options are taken from, rows that are not scored among it; None for others."""
    return files.sha256_of_value(scored.split.responses) if scored.metric == "choice" else None


def read_part(path: Path, inputs: dict[str, Any] | None, force: bool) -> dict[str, Any] | None:
    """A part of the benchmark that was measured before: its content; None where it is not there, where it was compared
    with other adapters of the benchmark's own or has other seeds, or with `force`.

    Args:
        path: of the part.
        inputs: what decides it now; None: not compared.
        force: whether it is to be measured again.

    Raises UserError where it is broken, or was measured with other inputs.
    """
    content = sealed_json.read(path, FORMAT, {"inputs": manifest_kinds.OBJECT}, "remove it, and it is measured again")
    if content is None or force:
        return None
    now, before = json.loads(json.dumps(inputs)) or content["inputs"], content["inputs"]
    changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    if changed and set(changed) <= set(COMPARED):
        return None
    if changed:
        raise UserError(
            f"{paths.relative(path)}: was measured with other inputs ({', '.join(changed)}); FORCE=1 measures again, "
            "OUT= into another folder"
        )
    return content


def write_part(path: Path, inputs: dict[str, Any], result: dict[str, Any]) -> None:
    """Write a part, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, sealed({"format": FORMAT, "inputs": inputs, **result}))
