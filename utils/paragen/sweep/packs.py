"""Which cells of a sweep the packed engine trains together, and how many in one pack.

Cells that share a base model are spread evenly over the slots, so that every device has work. Cells that cannot be
packed are trained one by one.
"""

from collections.abc import Iterable

from paragen.common import settings
from paragen.common.cli import UserError
from paragen.packed import packed_train
from paragen.recipes.run import Cell
from paragen.training import engines

MOST = 32  # cells in a pack; the packed engine makes it smaller where memory requires that


def gpus_per_cell() -> int:
    """How many GPUs train one cell (GPUS_PER_CELL, default 1)."""
    return settings.number("GPUS_PER_CELL") or 1


def pack_key(cell: Cell) -> tuple | None:
    """A key that is equal for cells that can be packed together; None for a cell that is trained the ordinary way.

    A cell that cannot be packed while ENGINE=packed requests it has a key of its own: the packed engine refuses it and
    names the reason.
    """
    if engines.requested_engine() == "stock":
        return None
    reason, key = packability(cell)
    if reason is None:
        return key
    return ("refused", str(cell)) if engines.requested_engine() == "packed" else None


def packability(cell: Cell) -> tuple[str | None, tuple]:
    """(why a cell cannot be packed, or None; the key that it shares with the cells of its pack)."""
    try:
        for run in cell.runs:
            if reason := engines.why_not_packed(run, ["a device"] * gpus_per_cell()):
                return reason, ()
        return None, packed_train.base_key(cell.pretrain)
    except (UserError, KeyError):
        return "its recipe is broken", ()


def is_model_there(cell: Cell) -> bool:
    """Whether the base model of a cell is there, so that it is known whether the cell can be packed."""
    try:
        return (cell.finetune.base / "config.json").is_file()
    except UserError:  # `packability` says that the recipe is broken
        return True


def share(count: int, slots: int) -> int:
    """How many of `count` cells with one key go into a pack: as few rounds as MOST allows, all packs of equal size."""
    slots = max(1, slots)
    rounds = -(-count // (slots * MOST))
    return max(1, -(-count // (slots * rounds))) if rounds else 1


def engine_line(cells: Iterable[Cell]) -> str:
    """One line that states how many cells are packed and how many are trained one by one."""
    if engines.requested_engine() == "stock":
        return "engine: the ordinary way, a cell at a time, as ENGINE=stock requests"
    cells = list(cells)
    found = [packability(cell) for cell in cells if is_model_there(cell)]
    packed = [key for reason, key in found if reason is None]
    alone = [reason for reason, _ in found if reason is not None]
    parts = [f"{len(packed)} cells packed, of {len(set(packed))} base models"] if packed else []
    reasons = "; ".join(dict.fromkeys(alone))
    parts += [f"{len(alone)} a cell at a time ({reasons})"] if alone else []
    parts += [f"not known for {len(cells) - len(found)} until their model is there"] if len(cells) > len(found) else []
    return f"engine: {', '.join(parts)}"


def engine_content(cell: Cell) -> dict[str, str | None]:
    """The same for one cell as JSON: `engine` (null: not known until its model is there), `why_stock` where it is."""
    if engines.requested_engine() == "stock":
        return {"engine": "stock", "why_stock": "ENGINE=stock"}
    if not is_model_there(cell):
        return {"engine": None, "why_stock": None}
    reason = packability(cell)[0]
    return {"engine": "stock" if reason else "packed", "why_stock": reason}
