"""Quality warnings: a collection's files are right, but a generator may not want to learn from them.

A warning is not a fault: no collection is refused or removed for it, and no exit status changes. Each rule needs strong
evidence, so that chance alone raises hardly any warning.
"""

import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from paragen.collection import evaluation, prompts
from paragen.collection.manifest import CheckpointEntry, Manifest
from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import data_warnings

LEVEL = 0.001  # significance level of a rising training loss: one false alarm in a thousand collections
FEWEST = 7  # losses in each half; with six in each, even a strict rise has a p-value of 1/924, above LEVEL
RISE = 1.05  # the least ratio of the medians; with many steps, the test alone finds rises too small to matter
SHOWN = 3  # how many groups of equal checkpoints are named at most


def find_warnings(folder: Path, manifest: Manifest) -> list[str]:
    """All warnings about a collection, a phrase each. Raises UserError where its evaluation.json is not sound."""
    shown = evaluation.shown(evaluation.read(folder, manifest))
    found = [below_base(shown), rising_loss(manifest.checkpoints), rising_test_loss(shown)]
    return [warning for warning in found if warning] + equal_checkpoints(manifest.checkpoints)


def about_data(manifest: Manifest, data_dir: Path | None = None) -> list[str]:
    """What is odd about the data of a collection, `<dataset>: <warning>` each, see dataset/data_warnings.py.

    That is what its manifest recorded and, while the rows are there, what they show now: a test split may have been
    registered since.
    """
    folder, found = Path(data_dir or paths.DATA).absolute(), list(manifest.data_warnings or ())
    for data in manifest.data or ():
        try:
            prompts.trained(data, folder)
            found += data_warnings.of_trained(data.name, data.file, data.entry, data.rows, folder)
        except (
            UserError
        ):  # the rows are gone or changed, which is for `make publish` to say; the manifest is all there is
            continue
    return list(dict.fromkeys(found))


def below_base(shown: dict[str, Any] | None) -> str | None:
    """Warns when the last evaluated checkpoint is worse than the base model: the training did harm.

    The checkpoint's whole 95 % confidence interval has to lie on the worse side of the base's score (with the metric
    `loss`: of the base's loss). Only rows of the collection's own dataset count, since an adapter may be worse at other
    tasks.
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
    """Warns when the training loss rose over the kept steps: the training diverged, or its learning rate is too high.

    Compares the losses of the second half of the kept steps with those of the first by a one-sided Mann-Whitney U test
    at LEVEL. The loss of one step is that of a few rows, so losses are skewed and have spikes: a rank test is robust to
    them, a test of means is not. The median also has to rise by the factor RISE, and fewer than FEWEST losses in a half
    raise no warning.
    """
    losses = [entry.loss for entry in entries if entry.loss is not None]
    half = len(losses) // 2
    first, second = losses[:half], losses[len(losses) - half :]
    if half < FEWEST or not statistics.median(second) > RISE * statistics.median(first):
        return None
    from scipy.stats import mannwhitneyu  # takes a second to import, and few collections come this far

    chance = float(mannwhitneyu(second, first, alternative="greater").pvalue)
    if chance >= LEVEL:
        return None
    return (
        f"the training loss rose through the kept steps, from {statistics.median(first):.4g} to "
        f"{statistics.median(second):.4g} (medians of their halves, p {chance:.1g})"
    )


def rising_test_loss(shown: dict[str, Any] | None) -> str | None:
    """Warns when the held-out loss rose from the first evaluated checkpoint to the last: the kept steps overfit.

    Their 95 % confidence intervals must not overlap. Both are measured on the same rows, so this is a strict rule.
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
    """Warns about checkpoints with the same bytes: the adapter was not trained between them (a learning rate of 0, or
    one so small that it changes no bit), so that they count as one sample."""
    ordered = sorted(entries, key=lambda entry: (entry.sha256, entry.step))
    groups = [[entry.step for entry in same] for _, same in groupby(ordered, key=lambda entry: entry.sha256)]
    equal = sorted(steps for steps in groups if len(steps) > 1)
    if not equal:
        return []
    texts = [spans_of(steps) for steps in equal[:SHOWN]]
    more = f", and {len(equal) - SHOWN} more groups" if len(equal) > SHOWN else ""
    return [f"the checkpoints of steps {'; of '.join(texts)} are equal to each other{more}"]


def spans_of(steps: list[int]) -> str:
    """Ascending steps as a text, consecutive ones as a span: `5-7, 9`."""
    spans = [[step for _, step in run] for _, run in groupby(enumerate(steps), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in spans)
