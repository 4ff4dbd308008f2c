"""What many cells cost the programs that see all of them: the scheduler, plan, status and index.

    .venv/bin/python bench/many_cells.py [--made 1000] [--cells 1000 10000] [--slots 8 1000] [--top FOLDER]

Writes made-up complete collections (--made) to a temporary folder, or to FOLDER, where a second run finds them, and
prints the wall time, the processor time and the largest memory of each script over them. Then the scheduler of a sweep
hands --cells that are not there out to --slots pretended devices, on which a cell takes no time: processor time per
cell, and memory per cell. Recipes are rendered and claims are written as in a real sweep.
"""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

import psutil
from helpers import many

from paragen.common import cli, paths
from paragen.recipes.run import Cell
from paragen.sweep.display import Display
from paragen.sweep.sweep import Sweep
from paragen.sweep.workers import Ended
from paragen.training.outcome import DONE

UTILS = Path(__file__).resolve().parent.parent / "utils"
SCRIPTS = ("plan", "status", "index", "index")  # the second index finds nothing to do


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--made", type=int, default=1000, help="collections for the scripts; 0 leaves them out")
    parser.add_argument("--cells", type=int, nargs="+", default=[1000, 10_000], help="cells for the scheduler")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 1000], help="pretended devices")
    parser.add_argument("--top", type=Path, help="make the collections here, and keep them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="many cells ") as folder:
        top = (args.top or Path(folder)).absolute()
        if not (top / "data").exists():
            many.make(top, max(1, args.made // len(many.RANKS)))
        if args.made:
            measure_scripts(top)
        os.environ["ENGINE"] = ""
        paths.SAVES = top / "saves"
        rows = [measure_scheduler(top, count, slots) for count in args.cells for slots in args.slots]
        cli.print_table(("cells", "devices", "CPU s", "ms per cell", "kB per cell", "packs"), rows)


def measure_scripts(top: Path) -> None:
    """Print what each script takes over the collections of `top`."""
    made = len(list((top / "saves").glob("*/*/*_finetune")))
    rows = []
    for name in SCRIPTS:
        command = [sys.executable, str(UTILS / f"{name}.py")]
        began = time.monotonic()
        script = subprocess.Popen(command, env={**os.environ, "PARAGEN_TOP": str(top)}, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(script.pid, 0)
        script.returncode = os.waitstatus_to_exitcode(status)
        if script.returncode:
            cli.fail(f"{name} failed with status {script.returncode}")
        seconds, processor = time.monotonic() - began, used.ru_utime + used.ru_stime
        rows.append((name, str(made), f"{seconds:.1f}", f"{processor:.1f}", f"{used.ru_maxrss / 1e3:.0f}"))
    cli.print_table(("make", "collections", "seconds", "CPU s", "MB"), rows)


class PretendedWorkers:
    """In the place of a sweep's workers: devices whose packs take no time, and end in the order in which they began."""

    def __init__(self, slots: int):
        self.slots, self.idle = slots, list(range(slots))
        self.running: dict[int, tuple[int, Any]] = {}
        self.session = SimpleNamespace(is_dead=lambda: False)
        self.packs = 0

    def start_missing(self, waiting: int) -> bool:
        return False

    def give(self, pack: Any, call: Callable[[Any], Any]) -> None:
        """An idle device begins a pack."""
        self.packs += 1
        worker = self.idle.pop()
        self.running[self.packs] = worker, pack

    def wait(self) -> list[Ended]:
        """The pack that began first ends."""
        worker, pack = self.running.pop(next(iter(self.running)))
        self.idle.append(worker)
        return [Ended(pack, worker, [DONE] * len(pack))]

    def is_stuck(self, waiting: int) -> bool:
        return False


def measure_scheduler(top: Path, count: int, slots: int) -> tuple[str, ...]:
    """A row of the table: what a sweep's scheduler takes for so many cells on so many devices."""
    recipes = sorted((top / "collect_scripts" / many.CATEGORY).iterdir())
    cells = []
    for number in range(count):
        folder, seed = recipes[number % len(recipes)], number // len(recipes)
        pair = [folder / f"{many.MODEL}_{folder.name}_{phase}.yaml" for phase in paths.PHASES]
        cells.append(Cell(folder.name, many.MODEL, 4, (pair[0], pair[1]), (f"seed={1000 + seed}",)))
    process, workers = psutil.Process(), PretendedWorkers(slots)
    before, began = process.memory_info().rss, time.process_time()
    with redirect_stdout(io.StringIO()), Display(count) as display:
        sweep = Sweep(workers, cells, display.report, "abcd")  # type: ignore[arg-type]
        while sweep.waiting or workers.running:
            sweep.step()
    seconds, grown = time.process_time() - began, process.memory_info().rss - before
    assert len(sweep.outcomes) == count and all(outcome.is_done for outcome in sweep.outcomes.values())
    return tuple(
        map(
            str,
            (
                count,
                slots,
                f"{seconds:.1f}",
                f"{1e3 * seconds / count:.2f}",
                f"{grown / count / 1e3:.1f}",
                workers.packs,
            ),
        )
    )


if __name__ == "__main__":
    cli.run(main)
