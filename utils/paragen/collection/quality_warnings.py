"""What is doubtful about a whole collection: its files are right, but may not be what a generator should learn from.

Imported by verify.py, which prints a line for each. A doubt is no fault: nothing is refused or removed for it, and no
exit status changes. Each rule is meant to be silent about what may be chance.
"""

import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from paragen.collection import evaluation
from paragen.collection.manifest import CheckpointEntry, Manifest

LEVEL = 0.001  # how likely a rise of the training loss may be chance: one false alarm in a thousand collections
FEWEST = 7  # losses in each half; with six and six even a clean rise has a chance of 1 in 924
RISE = 1.05  # how much a loss must rise to be worth a word, also where so many steps were kept that any rise is certain
SHOWN = 3  # groups of equal checkpoints that are named, at most


def of(folder: Path, manifest: Manifest) -> list[str]:
    """All doubts about a collection, a phrase each. Raises UserError where its evaluation.json is not sound."""
    shown = evaluation.shown(evaluation.read(folder, manifest))
    found = [below_base(shown), rising_loss(manifest.checkpoints), rising_test_loss(shown)]
    return [doubt for doubt in found if doubt] + equal_checkpoints(manifest.checkpoints)


def below_base(shown: dict[str, Any] | None) -> str | None:
    """The last evaluated checkpoint is worse than the base model: the training did harm.

    Its whole 95 % confidence interval has to lie on the worse side of the base's score (the metric `loss`: of the
    base's loss). Only rows of the collection's own dataset count: an adapter may well be worse at another task.
    """
    if shown is None or not shown["paired"]:
        return None
    last, is_loss = shown["checkpoints"][-1], shown["metric"] == "loss"
    (value, span), (base, _) = (evaluation.figure_of(shown, score) for score in (last, shown["base"]))
    if span is None or base is None or not (span[0] > base if is_loss else span[1] < base):
        return None
    return (
        f"checkpoint {last['step']} is worse than the base model on {shown['split']}: "
        f"{'loss' if is_loss else 'score'} {value:.4g} ({span[0]:.4g} to {span[1]:.4g}), the base {base:.4g}"
    )


def rising_loss(entries: Sequence[CheckpointEntry]) -> str | None:
    """The training loss rose through the kept window: the training came apart, or its learning rate is too high.

    The losses of the second half of the kept steps against those of the first, by Mann and Whitney's rank test at
    LEVEL, one-sided. Losses of single steps are of a few rows each, skewed and with spikes; ranks take them as they
    are, where a test of means would be misled or blinded by one spike. Besides, the median has to rise to RISE times
    itself, and a window too short to tell (FEWEST) raises no doubt.
    """
    from scipy.stats import mannwhitneyu

    losses = [entry.loss for entry in entries if entry.loss is not None]
    half = len(losses) // 2
    first, second = losses[:half], losses[len(losses) - half :]
    if half < FEWEST or not statistics.median(second) > RISE * statistics.median(first):
        return None
    chance = float(mannwhitneyu(second, first, alternative="greater").pvalue)
    if chance >= LEVEL:
        return None
    return (
        f"the training loss rose through the kept steps, from {statistics.median(first):.4g} to "
        f"{statistics.median(second):.4g} (medians of their halves, p {chance:.1g})"
    )


def rising_test_loss(shown: dict[str, Any] | None) -> str | None:
    """The loss on held-out rows rose from the first evaluated checkpoint to the last: the kept steps overfit.

    Their 95 % confidence intervals must not overlap; as both are of the same rows, that is a strict rule.
    """
    if shown is None or not shown["paired"]:
        return None
    first, last = shown["checkpoints"][0], shown["checkpoints"][-1]
    (before, low), (after, high) = (evaluation.figure_of({"metric": "loss"}, score) for score in (first, last))
    if low is None or high is None or high[0] <= low[1]:
        return None
    return (
        f"the test loss on {shown['split']} rose from {before:.4g} at checkpoint {first['step']} to "
        f"{after:.4g} at checkpoint {last['step']}, beyond both confidence intervals"
    )


def equal_checkpoints(entries: Sequence[CheckpointEntry]) -> list[str]:
    """Checkpoints of the same bytes: the adapter was not trained between them (a learning rate of 0, or one so small
    that it changes no bit), so that they are one sample and not several."""
    ordered = sorted(entries, key=lambda entry: (entry.sha256, entry.step))
    groups = [[entry.step for entry in same] for _, same in groupby(ordered, key=lambda entry: entry.sha256)]
    equal = sorted(steps for steps in groups if len(steps) > 1)
    if not equal:
        return []
    texts = [spans_of(steps) for steps in equal[:SHOWN]]
    more = f", and {len(equal) - SHOWN} more groups" if len(equal) > SHOWN else ""
    return [f"the checkpoints of steps {'; of '.join(texts)} are equal to each other{more}"]


def spans_of(steps: list[int]) -> str:
    """Ascending steps as a text in which those that follow each other are one span: `5-7, 9`."""
    spans = [[step for _, step in run] for _, run in groupby(enumerate(steps), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in spans)
