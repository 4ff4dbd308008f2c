"""What the benchmark measures: which datasets each fold holds out, and which it trains a generator on."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from paragen.analysis import benchmark_page
from paragen.collection.index import Chosen
from paragen.common import files, paths, settings
from paragen.common.cli import UserError
from paragen.dataset import names
from paragen.exports import parts
from paragen.generator import sources
from paragen.model import base_models

FEWEST_TRAINED = 2  # datasets of a fold that a generator is trained on


@dataclass(frozen=True)
class Wanted:
    """What the settings request."""

    by: str = "family"  # what a fold holds out: a family of datasets, or one dataset
    variants: tuple[int, ...] = ()  # so many datasets of each family to train on, in place of `by`
    hold: int = settings.BENCHMARK_HOLD  # datasets of each family that `variants` holds out
    repeats: int = settings.BENCHMARK_REPEATS  # seeds of a fold's generator, or subsets of so many variants
    prompts: int = settings.BENCHMARK_PROMPTS  # rows behind a generated adapter, the few-shot one and the context
    samples: int = settings.BENCHMARK_SAMPLES  # adapters that are generated for a dataset, each from its own prompts
    limit: int | None = None  # rows that a dataset is scored on; None: all
    loss_only: tuple[str, ...] = ()  # metrics in place of which the loss alone is measured
    baselines: tuple[str, ...] = settings.BASELINES


def of_settings() -> Wanted:
    """What the settings of the environment request. Raises UserError for values that cannot be."""
    typed, by = settings.values("VARIANTS"), settings.text("BY")
    if wrong := [text for text in typed if not re.fullmatch("[1-9][0-9]{0,8}", text)]:
        raise UserError(f"VARIANTS={' '.join(typed)}: {wrong[0]!r} is no number of datasets from 1 on")
    variants = tuple(sorted(map(int, typed)))
    if variants and by:
        raise UserError(f"BY={by}: VARIANTS holds out datasets of every family; give one of the two")
    hold = settings.number("HOLD")
    if hold and not variants:
        raise UserError(f"HOLD={hold}: says how many datasets of each family VARIANTS holds out; set VARIANTS, too")
    baselines = settings.values("BASELINES")
    if "none" in baselines and len(baselines) > 1:
        raise UserError(f"BASELINES={' '.join(baselines)}: none stands alone")
    return Wanted(
        by=by or Wanted.by,
        variants=variants,
        hold=hold or Wanted.hold,
        repeats=settings.number("REPEATS") or Wanted.repeats,
        prompts=settings.number("PROMPTS") or Wanted.prompts,
        samples=settings.number("SAMPLES") or Wanted.samples,
        limit=settings.number("LIMIT"),
        loss_only=tuple(settings.values("LOSS_ONLY")),
        baselines=tuple(name for name in settings.BASELINES if name in (baselines or settings.BASELINES)),
    )


class Fold(NamedTuple):
    """One measurement: the datasets that are held out, and those that generators are trained on."""

    name: str
    group: str  # the table that it belongs to
    held: tuple[str, ...]
    trained: tuple[str, ...]
    seeds: tuple[int, ...]  # a generator is trained with each


class Plan(NamedTuple):
    """The whole benchmark."""

    folder: Path
    wanted: Wanted
    chosen: dict[str, Chosen]  # the collections, by dataset
    families: dict[str, str]  # by dataset
    folds: list[Fold]

    @property
    def held(self) -> list[str]:
        """All datasets that some fold holds out."""
        return list(dict.fromkeys(name for fold in self.folds for name in fold.held))

    def others_of(self, dataset: str, trained: Sequence[str]) -> list[str]:
        """The datasets that are left where a training dataset is held out like those of a fold.

        Args:
            dataset: one of `trained`.
            trained: the datasets that a fold trains on. Where all are of one family, `dataset` alone is left out.
        """
        others = [name for name in trained if name != dataset]
        if self.wanted.variants or self.wanted.by == "dataset":
            return others
        return [name for name in others if self.families[name] != self.families[dataset]] or others

    @property
    def scoring(self) -> dict[str, Any]:
        """The settings that decide the results of every part, as a JSON object."""
        return {"limit": self.wanted.limit, "loss_only": list(self.wanted.loss_only)}


def collections_by_dataset(chosen: list[Chosen]) -> dict[str, Chosen]:
    """The collections by their datasets. Raises UserError where a dataset has several, or a collection has."""
    found: dict[str, Chosen] = {}
    for one in chosen:
        dataset = one.manifest.dataset
        if len(sources.datasets_of(one)) > 1:
            raise UserError(
                f"{one.name}: was trained on several datasets ({dataset}), so that a fold which holds one of them out "
                "would still train on it; select collections of one dataset each with DATASET="
            )
        if dataset in found:
            raise UserError(
                f"{found[dataset].name} and {one.name}: the benchmark takes one collection of a dataset; choose by "
                "MODEL, RANK or SEED"
            )
        found[dataset] = one
    return found


def folds_of(wanted: Wanted, families: Mapping[str, str]) -> list[Fold]:
    """The folds that are measured.

    Args:
        wanted: the settings.
        families: the family of each dataset.

    Raises UserError where there are too few datasets for them.
    """
    if wanted.variants:
        numbers = range(wanted.repeats)
        return [_variants_fold(wanted, families, count, number) for count in wanted.variants for number in numbers]
    groups = {name: [name] for name in sorted(families)}
    if wanted.by == "family":
        groups = {family: sorted(name for name in families if families[name] == family) for family in families.values()}
    folds = []
    for name, held in sorted(groups.items()):
        trained = tuple(sorted(families.keys() - set(held)))
        if len(trained) < FEWEST_TRAINED:
            raise UserError(
                f"{name}: leaves {len(trained)} datasets to train a generator on; collect others, or set BY=dataset"
            )
        group, seeds = f"one {wanted.by} held out", tuple(range(wanted.repeats))
        folds.append(Fold(_file_name(name), group, tuple(held), trained, seeds))
    return folds


def _file_name(text: str) -> str:
    """A family as a fold's files are called: with a hash where it has other characters than datasets have."""
    return text if names.DATASET.fullmatch(text) else f"family-{files.sha256_of_value(text)[:12]}"


def _variants_fold(wanted: Wanted, families: Mapping[str, str], count: int, number: int) -> Fold:
    """The fold of one random subset of `count` datasets of each family. The same ones are held out in all folds."""
    held: list[str] = []
    trained: list[str] = []
    for family in sorted(set(families.values())):
        members = sorted(name for name in families if families[name] == family)
        if len(members) < wanted.hold + count:
            raise UserError(
                f"VARIANTS={count}: family {family} has {len(members)} datasets, {wanted.hold} of which are held out "
                f"(HOLD={wanted.hold})"
            )
        random.Random(f"hold {family}").shuffle(members)
        held += members[: wanted.hold]
        rest = sorted(members[wanted.hold :])
        trained += sorted(random.Random(f"{family} {number}").sample(rest, len(rest))[:count])
    plural = "s" if count > 1 else ""
    group = f"{count} variant{plural} of each family"
    if len(trained) < FEWEST_TRAINED:
        raise UserError(f"VARIANTS={count}: leaves {len(trained)} datasets to train a generator on; collect others")
    return Fold(f"variants-{count}_{number + 1}", group, tuple(held), tuple(trained), (number,))


def drawn_rows(dataset: str, count: int, rows: int, number: int) -> list[int]:
    """Which training rows of a dataset stand behind its generated adapter `number`, from 0 on.

    Number 0 has the rows of the few-shot adapter and of the context, too.

    Args:
        dataset: its name.
        count: how many.
        rows: how many the dataset has.
        number: of the sample.
    """
    return random.Random(f"{dataset} {number}").sample(range(rows), min(count, rows))


def folder_of(wanted: Wanted, chosen: Mapping[str, Chosen]) -> Path:
    """The benchmark's folder: OUT, or saves/benchmarks/<model>_rank-<rank>[_made]_<what is held out>.

    Raises UserError for an OUT among the collections.
    """
    if out := settings.text("OUT"):
        return parts.out_folder(out)
    some = next(iter(chosen.values())).manifest
    made = "_made" if all(one.manifest.category == paths.MADE for one in chosen.values()) else ""
    held = "variants" if wanted.variants else f"by-{wanted.by}"
    model = base_models.short_name(Path(some.base_name or "model"))
    return paths.SAVES / benchmark_page.FOLDER / f"{model}_rank-{some.rank}{made}_{held}"
