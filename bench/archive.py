"""What archiving a collection saves and costs: ratio, writing, reading one step, beside plain safetensors.

    python bench/archive.py [COLLECTION] [--rounds 5]          default: the Demo's collection

Each collection is archived as it was collected and cast to bfloat16. One step is read by `archive.load_step`, and the
same file by safetensors' `load_file` with every tensor copied (it maps the file, so that nothing is read before); both
in turn, warm in the page cache, the median of some rounds per step. First is the first read of an archive by a process,
which reads its index, too. Prints a table, no pass or fail; writes to a temporary folder and removes it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from paragen.archives import archive, read
from paragen.collection import run_files
from paragen.collection.manifest import Manifest, require_manifest
from paragen.common import cli, paths
from paragen.common.cli import UserError, say


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure archives beside plain safetensors.")
    parser.add_argument("collections", nargs="*", type=Path, help="collection folders (default: the Demo's)")
    parser.add_argument("--rounds", type=int, default=5, help="reads of every step (default: %(default)s)")
    args = parser.parse_args()
    folders = args.collections or sorted(paths.SAVES.glob("*/Demo/*_finetune"))
    if not folders:
        raise UserError(f"{paths.relative(paths.SAVES)}: no Demo collection yet; make one with: make demo")
    for folder in folders:
        manifest = require_manifest(folder)
        say(f"\n{paths.relative(folder)}: {len(manifest.checkpoints)} checkpoints")
        rows = [measure(folder, manifest, dtype, args.rounds) for dtype in (None, "bfloat16")]
        head = ("", "MB raw", "ratio", "write MB/s", "verify MB/s", "read first", "worst", "mean", "raw mean")
        cli.print_table((*head, "worst/raw", "mean/raw"), rows)


def measure(folder: Path, manifest: Manifest, dtype: str | None, rounds: int) -> tuple[str, ...]:
    """The table's row for a collection as it is (dtype None) or cast; times in ms."""
    with tempfile.TemporaryDirectory(prefix="archive_bench_") as top:
        manifest = archive.converted(folder, manifest, dtype) if dtype else manifest
        path, plain = Path(top, "x.archive"), Path(top, "plain")
        writing, _ = timed(lambda: archive.write(folder, manifest, path))
        plain.mkdir()
        for step, data in archive.read_all(path):
            (plain / run_files.checkpoint_name(step)).write_bytes(data)
        checking, _ = timed(lambda: archive.verify(path))
        raw = sum(entry.bytes for entry in manifest.checkpoints)
        ratio = path.stat().st_size / raw
        first, ours, theirs = read_times(path, plain, rounds)
    worst, mean, theirs_mean = max(ours), statistics.mean(ours), statistics.mean(theirs)
    figures = (raw / 1e6, ratio, raw / 1e6 / writing, raw / 1e6 / checking)
    times = (f"{1000 * value:.1f} ms" for value in (first, worst, mean, theirs_mean))
    shown = (f"{value:.{digits}f}" for value, digits in zip(figures, (1, 3, 0, 0), strict=True))
    return (dtype or "as collected", *shown, *times, f"{worst / theirs_mean:.1f} x", f"{mean / theirs_mean:.1f} x")


def read_times(path: Path, plain: Path, rounds: int) -> tuple[float, list[float], list[float]]:
    """(First read of the archive, median per step of the archive, of the plain files); seconds."""
    from safetensors.torch import load_file

    steps = archive.steps_of(path)
    files = {step: plain / run_files.checkpoint_name(step) for step in steps}
    ours: dict[int, list[float]] = {step: [] for step in steps}
    theirs: dict[int, list[float]] = {step: [] for step in steps}
    copied(load_file(files[steps[0]]))
    read._opened.cache_clear()
    first, _ = timed(lambda: archive.load_step(path, steps[0]))
    for _ in range(rounds):
        for step in steps:
            took, restored = timed(lambda step=step: archive.load_step(path, step))
            ours[step].append(took)
            took, raw = timed(lambda step=step: copied(load_file(files[step])))
            theirs[step].append(took)
            if restored.keys() != raw.keys():
                raise UserError(f"step {step}: the archive does not give back what was put in")
    return first, [statistics.median(ours[step]) for step in steps], [statistics.median(theirs[step]) for step in steps]


def copied(tensors: dict) -> dict:
    """The same tensors in memory of their own: what was mapped has then been read."""
    return {key: tensor.clone() for key, tensor in tensors.items()}


def timed(function: Callable) -> tuple[float, object]:
    """(Seconds that a call took, what it gave)."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    cli.run(main)
