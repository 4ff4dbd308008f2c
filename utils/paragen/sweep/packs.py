"""Which cells of a sweep the packed engine trains together, and how many at once.

Imported by sweep.py and plan.py. Cells that share a base model are dealt out evenly over the slots, so that every
device has work; what the packed engine cannot train is given out cell by cell.
"""

import os
from collections.abc import Iterable

from paragen.common.cli import UserError
from paragen.packed import packed_train
from paragen.recipes.run import Cell
from paragen.training import engines

MOST = 32  # cells in a pack; memory may allow fewer, which packed_train.py finds out


def gpus_per_cell() -> int:
    """How many GPUs train one cell (GPUS_PER_CELL, default 1)."""
    asked = os.environ.get("GPUS_PER_CELL") or "1"
    if not asked.isdigit() or asked == "0":
        raise UserError(f"GPUS_PER_CELL={asked}: is not a positive whole number")
    return int(asked)


def kind_of(cell: Cell) -> tuple | None:
    """Cells of the same kind can be packed; None: this one is trained the ordinary way.

    A cell that ENGINE=packed forces on the engine, but that is not for it, is a kind of its own: the engine says why.
    """
    if engines.requested_engine() == "stock":
        return None
    why, kind = judge(cell)
    if why is None:
        return kind
    return ("refused", str(cell)) if engines.requested_engine() == "packed" else None


def judge(cell: Cell) -> tuple[str | None, tuple]:
    """(why a cell cannot be packed or None, what it must have in common with others to be packed with them)."""
    try:
        for run in cell.runs:
            if why := engines.why_not_packed(run, ["a device"] * gpus_per_cell()):
                return why, ()
        return None, packed_train.base_key(cell.pretrain)
    except (UserError, KeyError):
        return "its recipe is broken", ()


def share(count: int, slots: int) -> int:
    """How many of `count` cells of a kind go to a slot at once: as few rounds as MOST allows, all packs alike."""
    slots = max(1, slots)
    rounds = -(-count // (slots * MOST))
    return max(1, -(-count // (slots * rounds))) if rounds else 1


def say_line(cells: Iterable[Cell]) -> str:
    """What is trained together and what alone, in one line."""
    if engines.requested_engine() == "stock":
        return "engine: the ordinary way, a cell at a time, as ENGINE=stock asks"
    judged = [judge(cell) for cell in cells]
    together = [kind for why, kind in judged if why is None]
    alone = [why for why, _ in judged if why is not None]
    parts = [f"{len(together)} cells packed, of {len(set(together))} base models"] if together else []
    reasons = "; ".join(dict.fromkeys(alone))
    parts += [f"{len(alone)} a cell at a time ({reasons})"] if alone else []
    return f"engine: {', '.join(parts)}"
