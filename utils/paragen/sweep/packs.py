"""Which cells of a sweep the packed engine trains together, and which of them are in one pack.

Cells that share a base model are dealt out by their work (see estimate.py) as one pack per slot, so that a long
dataset's cells are spread over all devices. Cells that cannot be packed are trained one by one.
"""

import heapq
from collections.abc import Iterable, Sequence

from paragen.common import settings
from paragen.common.cli import UserError
from paragen.packed import packed_train
from paragen.recipes.run import Cell
from paragen.training import engines

MOST = 64  # cells in a pack; the packed engine makes it smaller where memory requires that


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


def count_packs(cells: int, slots: int) -> int:
    """How many packs are made of so many cells with one key: as few rounds as MOST allows, a pack per slot in each."""
    slots = max(1, slots)
    rounds = -(-cells // (slots * MOST))
    return min(cells, slots * rounds)


def deal(works: Sequence[float], count: int, most: int = MOST) -> list[list[int]]:
    """Deal cells out to packs of about the same work: the largest first, each to the pack with the least.

    Args:
        works: the work of each cell.
        count: the number of packs, enough for `most` cells in each.
        most: cells in a pack.

    Returns the places of each pack's cells in `works`, ascending; the pack with the most work comes first.
    """
    packs: list[list[int]] = [[] for _ in range(max(1, min(count, len(works))))]
    loads = [0.0] * len(packs)
    free = [(0.0, number) for number in range(len(packs))]  # a heap of the packs with room, by their work
    for cell in sorted(range(len(works)), key=lambda cell: -works[cell]):
        _, least = heapq.heappop(free)
        packs[least].append(cell)
        loads[least] += works[cell]
        if len(packs[least]) < most:
            heapq.heappush(free, (loads[least], least))
    order = sorted(range(len(packs)), key=lambda number: -loads[number])
    return [sorted(packs[number]) for number in order]


def expected_shares(works: dict[Cell, float], slots: int) -> list[float]:
    """Which share of a sweep's time each slot is expected to have work, if time goes by work; the largest first.

    Args:
        works: the work of each cell, in the order in which they start.
        slots: how many packs, or cells that are trained alone, can be at work at the same time.
    """
    by_key: dict[tuple, list[float]] = {}
    for cell, work in works.items():
        by_key.setdefault(pack_key(cell) or ("alone", cell), []).append(work)
    loads = [0.0] * max(1, slots)
    for together in by_key.values():
        for pack in deal(together, count_packs(len(together), slots)):
            heapq.heapreplace(loads, loads[0] + sum(together[place] for place in pack))
    loads.sort(reverse=True)
    return [load / loads[0] for load in loads] if any(loads) else loads


def busy_text(shares: list[float]) -> str:
    """Shares of time as text: the mean, and each."""
    each = ", ".join(f"{100 * share:.0f}" for share in shares)
    return f"{100 * sum(shares) / len(shares):.0f} % on average ({each})" if len(shares) > 1 else f"{each} %"


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
