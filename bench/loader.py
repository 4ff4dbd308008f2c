"""What reading pairs costs: utils/pairs.py beside plain safetensors.torch.load_file of the same files.

    python bench/loader.py [--workers 0 2] [--epochs 3]                the collections in saves/ (such as the demo's)
    python bench/loader.py --checkpoints 1000 --mb 10 [--collections 20]      made-up ones in a temporary folder
    python bench/loader.py --checkpoints 100000 --rows-only            the time to open an index of many rows

The first epoch of Pairs hashes every file, the later ones do not. Plain reading takes turns with Pairs, so that all see
the same cache of the operating system. A checkpoint counts as read when each of its bytes was summed up.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from paragen.collection import index, run_files
from paragen.collection.manifest import CheckpointEntry, new_manifest, write_manifest
from paragen.common import cli, files, paths

PROMPTS = 8  # per pair
HIDDEN = 576  # width of the made-up layers


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the loader beside plain safetensors.")
    parser.add_argument("--checkpoints", type=int, help="make up so many, instead of reading saves/")
    parser.add_argument("--mb", type=float, default=10, help="size of a made-up checkpoint (default: %(default)s)")
    parser.add_argument("--collections", type=int, default=20, help="that hold them (default: %(default)s)")
    parser.add_argument("--rows-only", action="store_true", help="tiny files; measure the index and the opening alone")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loader_") as top:
        saves, data = paths.SAVES, paths.DATA
        if args.checkpoints:
            saves, data = Path(top, "saves"), Path(top, "data")
            make_up(saves, data, args.collections, args.checkpoints, 0.001 if args.rows_only else args.mb)
        measure_opening(saves, data)
        if not args.rows_only:
            measure_reading(saves, data, args.workers, args.epochs)


def make_up(saves: Path, data: Path, collections: int, checkpoints: int, mb: float) -> None:
    """Write collections of random float32 checkpoints of rank 8, with true hashes, and one data file for all."""
    import torch
    from safetensors.torch import save_file

    rows = [{"prompt": f"question {number}", "response": "[A]"} for number in range(1000)]
    (data / "math").mkdir(parents=True)
    files.write_json(data / "math" / "X.json", rows)
    layers = max(1, round(mb * 1e6 / (2 * 8 * HIDDEN * 4)))
    entry = {"columns": {"prompt": "prompt", "response": "response"}}
    used = {"name": "X", "file": "math/X.json", "entry": entry, "rows": len(rows)}
    used["rows_sha256"] = files.sha256_of_value(rows)
    for number in range(collections):
        folder = saves / "math" / "X" / f"Model-{number}_lora-rank_8_finetune"
        folder.mkdir(parents=True)
        entries = []
        for step in range(number + 1, checkpoints + 1, collections):
            tensors = (
                {
                    f"base_model.model.model.layers.{layer}.mlp.lora_{half}.weight": torch.randn(shape)
                    for layer in range(layers)
                    for half, shape in (("A", (8, HIDDEN)), ("B", (HIDDEN, 8)))
                }
                if mb > 0.01
                else {"x.lora_A.weight": torch.tensor([float(step)])}
            )
            path = folder / run_files.checkpoint_name(step)
            save_file(tensors, path)
            entries.append(CheckpointEntry(step, 0.5, 1e-4, path.stat().st_size, files.sha256_of(path)))
        base = {"name": f"Model-{number}"}
        identity = {"recipe": {"dataset": "X"}, "data": [used], "base_model": base, "tokenizer": None, "pretrain": None}
        manifest = new_manifest(folder, "finetune", 8, identity, entries, {"seed": 42})
        write_manifest(folder, manifest)


def measure_opening(saves: Path, data: Path) -> None:
    """Print how long the index takes, made anew and again, and how long Pairs takes to open and to give a pair."""
    from pairs import Pairs

    before = (saves / paths.INDEX).exists()
    table, _ = timed("make index" + (" (there already)" if before else ", first time"), lambda: index.update(saves))
    timed("make index, nothing changed", lambda: index.update(saves))
    pairs = timed("open Pairs", lambda: Pairs(prompts=PROMPTS, saves=saves, data_dir=data))
    timed("first pair", lambda: pairs[0])
    timed("another pair of its collection", lambda: pairs[1 % len(pairs)])
    size = sum(table["bytes"].to_pylist()) / 1e6
    print(f"{len(pairs)} checkpoints, {len(set(table['collection'].to_pylist()))} collections, {size:.0f} MB\n")


def timed(what: str, function):
    """Call a function, print how long it took, and return what it did."""
    began = time.perf_counter()
    result = function()
    print(f"{what:40}{1000 * (time.perf_counter() - began):10.1f} ms", flush=True)
    return result


def measure_reading(saves: Path, data: Path, workers: list[int], epochs: int) -> None:
    """Print the throughput of plain reading and of Pairs, as dicts and as vectors, with so many workers each."""
    from pairs import Pairs

    table = index.load(saves)
    names = [saves / name for name in table["file"].to_pylist()]
    count, size = len(names), sum(table["bytes"].to_pylist()) / 1e6
    print(f"{'':46}{'checkpoints/s':>15}{'MB/s':>10}")

    def line(what: str, seconds: float) -> None:
        print(f"{what:46}{count / seconds:15.1f}{size / seconds:10.0f}", flush=True)

    plain(names)  # brings the files into the operating system's cache, as far as they fit
    line("safetensors.torch.load_file", plain(names))
    for vector in (False, True):
        for number in workers:
            pairs = Pairs(prompts=PROMPTS, vector=vector, saves=saves, data_dir=data)
            times = [epoch(pairs, number, turn) for turn in range(epochs)]
            what = f"Pairs, {'vector' if vector else 'dict'}, {number} workers"
            line(f"{what}, first epoch (hashing)", times[0])
            if times[1:]:
                line(f"{what}, later epochs", statistics.median(times[1:]))
        line("safetensors.torch.load_file", plain(names))


def plain(names: list[Path]) -> float:
    """Seconds to read files with safetensors alone."""
    from safetensors.torch import load_file

    began = time.perf_counter()
    for name in names:
        touch(load_file(name))
    return time.perf_counter() - began


def epoch(pairs, workers: int, number: int) -> float:
    """Seconds for one epoch of pairs through a DataLoader, in random order; its workers are started within."""
    from torch.utils.data import DataLoader

    pairs.set_epoch(number)
    began = time.perf_counter()
    for pair in DataLoader(pairs, batch_size=None, shuffle=True, num_workers=workers):
        touch(pair.checkpoint)
    return time.perf_counter() - began


def touch(checkpoint) -> None:
    """Read every byte of a checkpoint."""
    for tensor in checkpoint.values() if isinstance(checkpoint, dict) else [checkpoint]:
        tensor.sum()


if __name__ == "__main__":
    cli.run(main)
