"""The numbers of a new pair of recipes: batch, steps, learning rate, context window.

They come from collect_scripts/figures.yaml, or from another pair that the user names with FROM=.
"""

import json
import math
from pathlib import Path
from typing import Any

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.recipes import batches, keys, lookup, render, vocabulary
from paragen.recipes.figures_table import read_figures
from paragen.recipes.new_pair import NewPair

SMALL = 2_000_000_000  # parameters of a model that takes short rows without gradient checkpointing


def figures_for(pair: NewPair) -> dict[str, Any]:
    """The figures of collect_scripts/figures.yaml for a pair, with a `note` on where they come from."""
    table = read_figures()
    dataset = table["datasets"].get(pair.dataset, {})
    figures = dict(table["categories"][pair.category])
    figures.update({key: value for key, value in dataset.items() if key not in ("models", "rows")})
    figures.update(dataset.get("models", {}).get(pair.short, {}))
    first = next(iter(dataset.get("models", {})), None)
    if "note" not in figures and first:
        figures.update({**dataset["models"][first], "note": f"a choice, no source has them: those of {first}"})
    figures.setdefault("note", f"a choice, no source has them: what is usual in {pair.category}")
    return finish(figures, pair)


def figures_from(typed: str, pair: NewPair) -> dict[str, Any]:
    """The figures of another pair, adapted to a new one.

    Args:
        typed: a model, a dataset, or DATASET/MODEL.
        pair: the new one.

    Another dataset's steps become as many epochs of this one, where the rows of both are known. Raises UserError
    when there is no such pair, or when it does not resume from a checkpoint.
    """
    dataset, model = find_pair(typed, pair)
    recipes = lookup.recipes()
    pretrain, finetune = (render.load(recipes[dataset, model, phase]) for phase in paths.PHASES)
    figures: dict[str, Any] = {"note": f"those of {model} on {dataset}", "keep": finetune.get("save_total_limit", 100)}
    for key in keys.COPIED_FIGURES:
        if key in pretrain:
            figures[key] = pretrain[key]
    for phase, config in (("pretrain", pretrain), ("finetune", finetune)):
        figures[f"{phase}_batch"] = list(batches.rows_and_accumulation(config))
        figures[f"{phase}_taken"] = config
    resumed = paths.CHECKPOINT.search(str(finetune.get("resume_from_checkpoint")))
    if not resumed:
        raise UserError(
            f"{paths.relative(recipes[dataset, model, 'finetune'])}: resume_from_checkpoint names no "
            "checkpoint-<step>, so there are no steps to take from it; see: make check-recipes"
        )
    figures["resume_step"] = int(resumed[1])
    if dataset != pair.dataset:
        figures.pop("save_steps", None)
        rows = vocabulary.trainable_rows(dataset, rows=read_figures()["datasets"].get(dataset, {}).get("rows"))
        if rows and pair.usable:
            per_epoch = steps_per_epoch(min(rows, figures.get("max_samples", rows)), figures["pretrain_batch"])
            figures["epochs"] = round(figures.pop("resume_step") / per_epoch, 2)
    return finish({**read_figures()["categories"][pair.category], **figures}, pair)


def find_pair(typed: str, pair: NewPair) -> tuple[str, str]:
    """The (dataset, model) whose whole pair FROM means. Raises UserError naming the pairs there are."""
    known = lookup.recipes()
    pairs = sorted({(d, m) for d, m, _ in known if all((d, m, phase) in known for phase in paths.PHASES)})
    wanted = [paths.loose(part) for part in typed.split("/")]
    if len(wanted) == 2:
        found = [each for each in pairs if sorted(map(paths.loose, each)) == sorted(wanted)]
    else:
        of_dataset = [(d, m) for d, m in pairs if d == pair.dataset and paths.loose(m) in wanted]
        of_model = [(d, m) for d, m in pairs if m == pair.short and paths.loose(d) in wanted]
        found = of_dataset + of_model
    if len(found) == 1:
        return found[0]
    near = [f"{d}/{m}" for d, m in pairs if {paths.loose(d), paths.loose(m)} & {*wanted, paths.loose(pair.dataset)}]
    raise UserError(
        f"FROM={typed}: no such pair for {pair.dataset} and {pair.short}; say a model of {pair.dataset}, "
        f"a dataset with {pair.short}, or one of: {', '.join(near or [f'{d}/{m}' for d, m in pairs])}"
    )


def finish(figures: dict[str, Any], pair: NewPair) -> dict[str, Any]:
    """Figures completed by what follows from them: the context window, the rows, the steps.

    Raises UserError when the rows of the dataset are not known, so that its epochs have no number of steps.
    """
    figures = dict(figures)
    context = read_figures()["models"].get(pair.short, {}).get("context") or context_of(paths.MODELS / pair.folder)
    figures["cutoff_len"] = min(figures["cutoff_len"], context)
    if pair.usable is not None and pair.usable != pair.rows:
        figures["max_samples"] = min(figures["max_samples"], pair.usable)
    if "resume_step" not in figures:
        if pair.usable is None:
            raise UserError(
                f"dataset {pair.dataset!r}: its rows are not known, so neither are the steps of an epoch; "
                f"download it first: make data DATASET={paths.typed(pair.dataset)}"
            )
        per_epoch = steps_per_epoch(min(pair.usable, figures["max_samples"]), figures["pretrain_batch"])
        figures["resume_step"] = max(1, math.ceil(round(figures["epochs"] * per_epoch, 6)))
    step, every = figures["resume_step"], figures.get("save_steps")
    if not every or step % every:
        figures["save_steps"] = next((step // parts for parts in (2, 3, 5, 7) if step % parts == 0), step)
    return figures


def steps_per_epoch(rows: int, batch: list[int]) -> int:
    """The optimizer steps of an epoch; `batch`: (rows in a micro-batch, micro-batches in a step)."""
    return math.ceil(rows / (batch[0] * batch[1]))


def context_of(folder: Path) -> int:
    """The tokens that a model on disk has positions for; 2^40 where its config is missing or does not state it."""
    config = folder / "config.json"
    stated = json.loads(config.read_bytes()) if config.is_file() else {}
    stated = {**stated, **stated.get("text_config", {})}
    return stated.get("max_position_embeddings") or stated.get("n_positions") or 1 << 40


def split_batch(batch: list[int], pair: NewPair, cutoff_len: int) -> tuple[int, int, bool]:
    """How the rows of an optimizer step are split into micro-batches that fit a 24 GB card.

    For a model with a processor the figures' split stays: its loss is a mean of micro-batch means. For other models
    every split of the same rows has the same mean over tokens. A small model with short rows takes all rows at once,
    without gradient checkpointing. Others compute activations twice and take about 8,800 tokens at once (logits over
    150,000 words fill the card), a large model half as many, but at least one row.

    Args:
        batch: (rows in a micro-batch, micro-batches in a step) of the figures.
        pair: what the recipes are for.
        cutoff_len: tokens in the longest row.

    Returns:
        (rows in a micro-batch, micro-batches in a step, whether gradient checkpointing is disabled).
    """
    rows = batch[0] * batch[1]
    if pair.processor:
        return batch[0], batch[1], False
    if pair.parameters <= SMALL and cutoff_len <= 2048:
        return rows, 1, True
    tokens = 8800 if pair.parameters <= SMALL else 4400
    micro = next(part for part in range(rows, 0, -1) if rows % part == 0 and (part * cutoff_len <= tokens or part == 1))
    return micro, rows // micro, False
