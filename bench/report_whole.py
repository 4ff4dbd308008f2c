"""How long `make report` takes, with many made-up collections whose statistics exist.

    python bench/report_whole.py [--collections 210] [--steps 100] [--layers 210] [--top FOLDER]

Writes collections of this repository's cells (tiny checkpoints, and statistics as of `--layers` layers) to a temporary
folder, or to FOLDER, where a second run finds them again, and makes the report twice: the first time with the index.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from shapes import ROOT

sys.path.insert(0, str(ROOT / "utils"))

import torch
from safetensors.torch import save

from paragen.analysis import measures, stats_files
from paragen.collection import derived, index
from paragen.collection.manifest import IDENTITY, CheckpointEntry, new_manifest, write_manifest
from paragen.common import cli, files, settings
from paragen.common.cli import say
from paragen.recipes import lookup
from paragen.recipes.run import Cell


def main() -> None:
    parser = cli.ArgumentParser("Measure make report.")
    parser.add_argument("--collections", type=int, default=210)
    parser.add_argument("--steps", type=int, default=100, help="checkpoints of a collection")
    parser.add_argument("--layers", type=int, default=210)
    parser.add_argument("--top", type=Path, help="make the collections here, and keep them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        top = (args.top or Path(folder)).absolute()
        saves = top / "saves"
        saves.mkdir(parents=True, exist_ok=True)
        for name in ("collect_scripts", "data", "models"):
            if not (top / name).exists():
                (top / name).symlink_to(ROOT / name)
        cells = itertools.product(lookup.pairs_in("").items(), settings.SWEEP_RANKS)
        for ((dataset, model), recipes), rank in itertools.islice(cells, args.collections):
            made = Cell(dataset, model, rank, recipes).finetune
            run = saves / made.folder.relative_to(ROOT / "saves")
            if not (run / "manifest.json").exists():
                collect(saves, run, made.base.name, rank, args)
        found = len(list(saves.rglob("manifest.json")))
        for what in ("first", "again"):
            started = time.perf_counter()
            report = [sys.executable, ROOT / "utils" / "report.py"]
            subprocess.run(report, env={**os.environ, "PARAGEN_TOP": str(top)}, check=True)
            say(f"{found} collections of {args.steps} steps, {what}: {time.perf_counter() - started:.1f} s")


def collect(saves: Path, run: Path, base: str, rank: int, args: argparse.Namespace) -> None:
    """Write a collection of one small layer, and statistics as of many."""
    run.mkdir(parents=True)
    drawn = torch.Generator().manual_seed(rank)
    entries, log = [], []
    for step in range(701, 701 + args.steps):
        path = run / f"checkpoint-{step}.safetensors"
        factors = {"l.lora_A.weight": torch.randn(1, 2, generator=drawn), "l.lora_B.weight": torch.ones(2, 1)}
        path.write_bytes(save(factors))
        entries.append(CheckpointEntry(step, 0.5, 1e-4, path.stat().st_size, files.sha256_of(path)))
        log.append(f'{{"current_steps": {step}, "loss": {1 / step}, "lr": 1e-4}}\n')
    (run / "trainer_log.jsonl").write_text("".join(log))
    files.write_json(run / "adapter_config.json", {"base_model_name_or_path": base, "r": rank, "lora_alpha": rank})
    facts = {"adapter_config_sha256": files.sha256_of(run / "adapter_config.json")}
    manifest = new_manifest(run, "finetune", rank, dict.fromkeys(IDENTITY), entries, facts)
    write_manifest(run, manifest)
    one = index.Chosen(run.relative_to(saves).as_posix(), run, manifest)
    write = partial(measures.write, one, made_up(args.layers, args.steps, drawn))
    derived.make_part(saves / "stats", one.name, stats_files.source_of(one), write, done="made up")


def made_up(layers: int, steps: int, drawn: torch.Generator) -> measures.Measured:
    """Random statistics."""
    sizes = {"sketch": (steps, 1024)} | dict.fromkeys(measures.PER_LAYER, (layers, steps))
    sizes |= dict.fromkeys(measures.PER_FACTOR, (layers, 2, steps)) | dict.fromkeys(measures.TOTALS, (layers, 2))
    values = {name: torch.rand(size, generator=drawn, dtype=torch.float64) for name, size in sizes.items()}
    names = [f"base_model.model.model.layers.{number // 7}.kind{number % 7}" for number in range(layers)]
    return measures.Measured(names, [(576, 576, 8)] * layers, **values)


if __name__ == "__main__":
    cli.run(main)
