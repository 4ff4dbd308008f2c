"""The rule of formats that hold one model: one base, rank and seed, and one collection of each dataset."""

import re
from typing import Any

from paragen.collection.index import Chosen
from paragen.common.cli import UserError


def check(chosen: list[Chosen], format_name: str) -> None:
    """Raise UserError for collections of several models, ranks or seeds, and for two of one dataset."""
    found = sorted({(name_of(one), one.manifest.rank) for one in chosen})
    if len(found) > 1:
        several = listed(f"{name} rank {rank}" for name, rank in found)
        raise UserError(
            f"FORMAT={format_name} holds one model and rank, not {several}; choose with MODEL=.. RANK=.., and an OUT "
            "for each"
        )
    seeds = sorted({one.manifest.seed for one in chosen if one.manifest.seed is not None})
    if len(seeds) > 1:
        raise UserError(
            f"FORMAT={format_name} holds one seed, not {listed(seeds)}; choose with SEED=.., and an OUT for each"
        )
    bases = {one.manifest.base_model and one.manifest.base_model.sha256: one.name for one in chosen}
    if len(bases.keys() - {None}) > 1:
        raise UserError(f"{listed(bases.values())}: were trained on different {found[0][0]}; choose with DATASET=..")
    by_dataset: dict[str, str] = {}
    for one in chosen:
        other = by_dataset.setdefault(one.manifest.dataset, one.name)
        if other != one.name:
            raise UserError(
                f"{other} and {one.name}: are both of {one.manifest.dataset}; choose with CATEGORY=.. SEED=.."
            )


def listed(values: Any) -> str:
    """Values for a message: the first four, and how many more."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:4]) + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")


def name_of(chosen: Chosen) -> str:
    """The folder name of a collection's base model; where the manifest lacks it, the start of the run folder's name."""
    return chosen.manifest.base_name or re.split(r"_lora-rank_", chosen.folder.name)[0]
