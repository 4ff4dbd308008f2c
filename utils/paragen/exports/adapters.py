"""The adapters that a table names, as PEFT folders: OUT/adapters/<collection>/checkpoint-<step>/."""

from functools import partial
from pathlib import Path
from typing import Any

from paragen.collection import derived, evaluation
from paragen.collection.index import Chosen
from paragen.collection.manifest import CheckpointEntry
from paragen.common import paths
from paragen.common.cli import UserError
from paragen.exports import checkpoint_copies, parts, peft
from paragen.exports.peft import Planned

FOLDER = "adapters"


def planned(chosen: Chosen, steps: str) -> Planned:
    """What the export of a collection needs, for the checkpoints that STEPS selects.

    Args:
        chosen: the collection.
        steps: as `peft.selected` takes it, or `best`: the one checkpoint of the best score that tables show.

    Raises UserError for another value, and for `best` of a collection without scores.
    """
    if steps != "best":
        return peft.planned(chosen, steps)
    shown = evaluation.shown(evaluation.read(chosen.folder, chosen.manifest))
    best = evaluation.best_of(shown) if shown else None
    if best is None:
        raise UserError(f"{chosen.name}: has no scores for STEPS=best to choose by; {way_to_score(chosen)}")
    entries = [entry for entry in chosen.manifest.checkpoints if entry.step == best["step"]]
    return peft.planned(chosen, "all")._replace(entries=entries)


def way_to_score(chosen: Chosen) -> str:
    """How a message ends that misses scores of a collection: the command that makes them."""
    manifest = chosen.manifest
    seed = "" if manifest.seed is None else f" SEED={manifest.seed}"
    model = "" if manifest.base_name is None else f" MODEL={manifest.base_name}"
    return f"score it: make evaluate DATASET={paths.typed(manifest.dataset)}{model} RANK={manifest.rank}{seed}"


def path_of(one: Planned, entry: CheckpointEntry) -> str:
    """The folder of an adapter, relative to OUT."""
    return f"{FOLDER}/{one.chosen.name}/checkpoint-{entry.step}"


def check(plan: list[Planned], out: Path, format_name: str, dtype: str | None) -> None:
    """Raise UserError where the adapters would replace files of others, or do not fit on the disk."""
    sizes = []
    for one in plan:
        name, source = part_of(one, format_name, dtype)
        if not derived.is_there(out, name, source):
            derived.check_replaceable(out, name, source)
            sizes += [checkpoint_copies.bytes_of(entry, one.stored, dtype) for entry in one.entries]
    derived.check_room(out, sum(sizes))


def write(plan: list[Planned], out: Path, format_name: str, dtype: str | None) -> None:
    """Write the adapters of some collections, a part each; with DRY_RUN=1, list them."""
    for one in plan:
        parts.make(out, *part_of(one, format_name, dtype), partial(peft.write_adapters, one, dtype))


def part_of(one: Planned, format_name: str, dtype: str | None) -> tuple[str, dict[str, Any]]:
    """(The name, the source) of the part with a collection's adapters."""
    return f"{FOLDER}/{one.chosen.name}", {**peft.source_of(one, dtype), "format": format_name}
