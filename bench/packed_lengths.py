"""packed.py lengths: what padding costs a pack of adapters whose rows differ in length.

Counts, and trains nothing: real rows, tokenised with LLaMA-Factory's template, in the order in which its trainer draws
them. A pack pads in three places. Groups of adapters are as long as the longest of them; steps are as large as the CUDA
graph that they are replayed as; and attention runs over the padding, too. Arithmetic is counted as shapes.flops says.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import generator
import numpy as np
import scratch
import shapes
from omegaconf import OmegaConf
from shapes import Work

from paragen.common import cli
from paragen.common.cli import UserError, say
from paragen.dataset import dataset_info
from paragen.packed.batches import IGNORED, Row, Shape, Step, lay_out
from paragen.packed.step_context import AdapterGroups
from paragen.packed.step_runners import buckets_of

TEMPLATE = "smollm2"
MODELS = ("smollm2-135m", "qwen2.5-7b")  # in whose shapes arithmetic is counted
AIM = 0.85  # of the executed arithmetic, what is needed


class Counts(NamedTuple):
    """What a pack computes over all steps; pairs are those of a token and one that it attends to."""

    tokens: int  # of the rows
    in_groups: int  # with each step's groups as long as their longest
    in_buckets: int  # as executed
    learned: int  # tokens with a loss
    learned_in_buckets: int
    pairs: int  # within rows
    pairs_of_sequences: int  # and within the padding's, as kernels for sequences of any length have them
    pairs_of_rows: int  # with all rows as long as the bucket's longest, as on GPUs in float32
    pairs_on_cpu: int  # with all rows as long as the step's longest, as there are no graphs


def run(args: argparse.Namespace, top: Path) -> int:
    """Count, print the tables and the verdict, write the raw numbers to args.out."""
    tokenizer, rows = tokenised(args.data)
    passes = args.epochs and {name: args.epochs * -(-len(each) // args.batch) for name, each in rows.items()}
    batches = {
        name: drawn(each, tokenizer, passes[name] if passes else args.steps, args.batch, top)
        for name, each in rows.items()
    }
    ranks = [int(rank) for rank in args.ranks.split()]
    members = [(each, rank) for each in batches.values() for rank in ranks]
    steps = [Step([rows or [] for rows in each]) for each in zip_longest(*(each for each, _ in members))]
    loads = [sum(len(row.tokens) for rows in each for row in rows) / len(steps) for each, _ in members]
    groups = AdapterGroups([rank for _, rank in members], loads)
    buckets = buckets_of([step.shape(groups) for step in steps])
    counts = count(steps, groups, buckets)
    shares = {model: shares_of(model, counts, groups, ranks) for model in MODELS}
    show_rows(batches)
    say(f"\n{len(members)} adapters, ranks {args.ranks}, groups: {groups.count}; {len(steps)} steps, as graphs of")
    cli.print_table(Shape._fields, [tuple(f"{value:,}" for value in bucket) for bucket in buckets])
    show_counts(counts)
    show_shares(shares)
    scratch.write_json(args.out, {"buckets": buckets, "counts": counts._asdict(), "shares": shares})
    return 0


def tokenised(folder: Path) -> tuple[Any, dict[str, list[Row]]]:
    """SmolLM2's tokenizer, and the rows of each of generator.py's datasets, cut as recipes cut them.

    Args:
        folder: where the prepared files are, at any depth.

    Raises UserError where a file or the tokenizer is not there.
    """
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from llamafactory.model import load_tokenizer

    model = shapes.tokenizer_source()
    if not model.is_dir():
        raise UserError(f"{model}: no such model; bring it with: make model MODEL=smollm2-135m")
    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=str(model)))["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template=TEMPLATE))
    figures: Any = OmegaConf.to_container(OmegaConf.load(shapes.ROOT / "collect_scripts" / "figures.yaml"))
    found = {}
    for task in generator.TASKS:
        own = {**figures["categories"][task.category], **figures["datasets"].get(task.dataset, {})}
        read = dataset_info.load_rows(generator.find(folder, task.train))[: own["max_samples"]]
        found[task.dataset] = rows_of(read, tokenizer, template, own["cutoff_len"])
    return tokenizer, found


def rows_of(read: list[dict[str, Any]], tokenizer: Any, template: Any, cutoff: int) -> list[Row]:
    """Prepared rows as LLaMA-Factory tokenises them; all texts at once, since its own way takes a minute."""
    from llamafactory.data.processor.processor_utils import infer_seqlen

    prompts, responses = zip(*(texts_of(row, template) for row in read), strict=True)
    encoded = [tokenizer(list(texts), add_special_tokens=False)["input_ids"] for texts in (prompts, responses)]
    rows = []
    for prompt, response in zip(*encoded, strict=True):
        before, after = infer_seqlen(len(prompt), len(response), cutoff)
        tokens = np.array(prompt[:before] + response[:after])
        rows.append(Row(tokens, np.where(np.arange(len(tokens)) < before, IGNORED, tokens)))
    return rows


def texts_of(row: dict[str, Any], template: Any) -> tuple[str, str]:
    """What a model reads of a row, and what it learns."""
    system = template.format_system.apply(content=row.get("system") or template.default_system)
    prompt = template.format_user.apply(content=row["prompt"], idx="0")
    return "".join([*system, *prompt]), "".join(template.format_assistant.apply(content=row["response"]))


def drawn(rows: list[Row], tokenizer: Any, steps: int, batch: int, top: Path) -> list[list[Row]]:
    """The rows of each step of a run, as the packed engine draws them."""
    from llamafactory.hparams import FinetuningArguments, TrainingArguments

    from paragen.packed.schedule import TrainingSchedule

    settings = TrainingArguments(
        output_dir=str(top / "saves"), per_device_train_batch_size=batch, max_steps=steps, use_cpu=True, report_to=[]
    )
    attempt: Any = SimpleNamespace(run=SimpleNamespace(config={}, collects=False))  # all that a schedule reads of one
    schedule = TrainingSchedule(attempt, (None, None, settings, FinetuningArguments(), None), tokenizer, rows)
    return list(schedule.step_batches())


def count(steps: Sequence[Step], groups: AdapterGroups, buckets: Sequence[Shape]) -> Counts:
    """Count over all steps, each in the first bucket that covers it."""
    totals = np.zeros(len(Counts._fields), np.int64)
    for step in steps:
        own = step.shape(groups)
        bucket = next(bucket for bucket in buckets if bucket.covers(own))
        lengths = [len(row.tokens) for rows in step.rows for row in rows]
        sequences = np.diff(lay_out(step, groups, bucket)["sequences"])
        totals += Counts(
            tokens=sum(lengths),
            in_groups=(own.tokens - 1) * groups.count,  # without a shape's token of padding
            in_buckets=bucket.tokens * groups.count,
            learned=own.learned,
            learned_in_buckets=bucket.learned,
            pairs=pairs_within(lengths),
            pairs_of_sequences=pairs_within(sequences),
            pairs_of_rows=pairs_within([bucket.row_length]) * bucket.rows,
            pairs_on_cpu=pairs_within([own.row_length]) * own.rows,
        )
    return Counts(*totals.tolist())


def pairs_within(lengths: Sequence[int] | np.ndarray) -> int:
    """The pairs of tokens of causal attention within sequences of some lengths."""
    each = np.asarray(lengths, np.int64)
    return int((each * (each + 1)).sum()) // 2


def shares_of(model: str, counts: Counts, groups: AdapterGroups, ranks: list[int]) -> dict[str, float]:
    """The needed share of the executed arithmetic, by what pads.

    Args:
        model: a name in shapes.SHAPES.
        counts: over all steps.
        groups: the adapters' groups. Beside padding, each token is multiplied with all ranks of its group, and the
            products with other adapters' ranks are set to zero.
        ranks: those that each dataset has an adapter of.
    """

    def flops(tokens: int, pairs: int, learned: int, widths: list[int] = ranks) -> float:
        work = Work(tokens, 2 * pairs, learned)
        return sum(shapes.flops(model, width, work) for width in widths) / len(widths)

    needed = flops(counts.tokens, counts.pairs, counts.learned)
    beside_groups = counts.tokens + counts.in_buckets - counts.in_groups
    executed = counts.in_buckets, counts.pairs_of_sequences, counts.learned_in_buckets
    padded_rows = counts.in_buckets, counts.pairs_of_rows, counts.learned_in_buckets
    return {
        "groups": needed / flops(counts.in_groups, counts.pairs, counts.learned),
        "buckets": needed / flops(beside_groups, counts.pairs, counts.learned_in_buckets),
        "attention": needed / flops(counts.tokens, counts.pairs_of_sequences, counts.learned),
        "together": needed / flops(*executed),
        "and products of zeros": needed / flops(*executed, widths=[groups.width]),
        "on GPUs in float32": needed / flops(*padded_rows),
        "on a CPU": needed / flops(counts.in_groups, counts.pairs_on_cpu, counts.learned),
    }


def show_rows(batches: dict[str, list[list[Row]]]) -> None:
    """A table of the datasets."""
    lines = []
    for name, steps in batches.items():
        rows = [row for step in steps for row in step]
        lengths = [len(row.tokens) for row in rows]
        learned = sum(int((row.labels != IGNORED).sum()) for row in rows)
        middle, longest = f"{np.mean(lengths):.0f}", str(max(lengths))
        lines.append((name, str(len(steps)), middle, longest, f"{learned / len(rows):.0f}"))
    cli.print_table(("dataset", "steps", "tokens of a row", "of the longest", "learned"), lines)


def show_counts(counts: Counts) -> None:
    """A table of what is needed and what is executed."""
    lines: Iterable[tuple[str, int, int]] = (
        ("tokens, groups alone", counts.tokens, counts.in_groups),
        ("tokens, in graphs", counts.tokens, counts.in_buckets),
        ("tokens with a loss, in graphs", counts.learned, counts.learned_in_buckets),
        ("pairs of attention, by sequence", counts.pairs, counts.pairs_of_sequences),
        ("the same on GPUs in float32", counts.pairs, counts.pairs_of_rows),
        ("the same on a CPU", counts.pairs, counts.pairs_on_cpu),
    )
    say("")
    cli.print_table(
        ("", "needed", "executed", "needed of executed"),
        [(what, f"{needed:,}", f"{executed:,}", percent(needed / executed)) for what, needed, executed in lines],
    )


def show_shares(shares: dict[str, dict[str, float]]) -> None:
    """A table of the needed share of the arithmetic by what pads, and the verdict."""
    say("\nneeded of the executed arithmetic, by what pads")
    parts = list(next(iter(shares.values())))
    cli.print_table(
        ("shape", *parts), [(model, *(percent(one[part]) for part in parts)) for model, one in shares.items()]
    )
    least = min(one["together"] for one in shares.values())
    say(f"together at least {percent(least)}; the aim is {percent(AIM)}: {'met' if least >= AIM else 'MISSED'}")


def percent(share: float) -> str:
    """A share as a text."""
    return f"{100 * share:.1f} %"
