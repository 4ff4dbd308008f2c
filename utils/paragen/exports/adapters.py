"""What tables of checkpoints share: the adapters that they name, as PEFT folders, and the source of the table itself.

The folders are OUT/adapters/<collection>/checkpoint-<step>/.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from paragen.collection import derived
from paragen.collection.index import Chosen
from paragen.collection.manifest import CheckpointEntry
from paragen.common import files
from paragen.exports import best_step, checkpoint_copies, parts, peft, verified
from paragen.exports.peft import Planned

FOLDER = "adapters"


def planned(chosen: Chosen, steps: str) -> Planned:
    """What the export of a collection needs, for the checkpoints that STEPS selects.

    Args:
        chosen: the collection.
        steps: as `peft.selected` takes it, or `best`: the one checkpoint that `best_step.best_entry` gives.

    Raises UserError for another value, and for `best` of a collection without scores to choose by.
    """
    if steps != "best":
        return peft.planned(chosen, steps)
    return peft.planned(chosen, "all")._replace(entries=[best_step.best_entry(chosen)])


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


def table_source(format_name: str, chosen: Sequence[Chosen], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What decides the content of a table of `rows`, and which collections were read for it."""
    return {
        "format": format_name, "rows": len(rows), "sha256": files.sha256_of_value(rows),
        verified.READ: verified.stamps(chosen),
    }  # fmt: skip
