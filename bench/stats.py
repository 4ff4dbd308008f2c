"""How long `make stats` takes, with many made-up collections, against sha256sum on the same files.

    python bench/stats.py [--shape smollm2-135m] [--collections 20] [--ranks 2 4 8 16 64] [--steps 100] [--top FOLDER]

Writes collections (random factors that change a little at each step; 20 of them take 46 GB) to a temporary folder, or
to FOLDER, where a second run finds them again. Then it hashes the files with sha256sum, one process per core, and
measures the statistics, from the start of the process to its exit: on the GPU where there is one (--only gpu), and on
the CPU (--only cpu).
"""

import hashlib
import itertools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shapes import ROOT, SHAPES, layer_sizes

sys.path.insert(0, str(ROOT / "utils"))

import numpy as np
import torch
from safetensors.numpy import save

from paragen.collection.manifest import IDENTITY, CheckpointEntry, new_manifest, write_manifest
from paragen.common import cli, devices, files
from paragen.common.cli import say

NOISE, PLACES = 1 << 22, 1 << 16  # random numbers that are drawn, and the places in them where a step begins
DATASETS = ("ARC-c", "ARC-e", "OBQA", "BoolQ")
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


def main() -> None:
    parser = cli.ArgumentParser("Measure make stats.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--collections", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--top", type=Path, help="make the collections here, and keep them")
    parser.add_argument("--only", choices=("gpu", "cpu"), help="measure on this alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        top = (args.top or Path(folder)).absolute()
        started = time.perf_counter()
        cells = itertools.islice(itertools.product(DATASETS, args.ranks), args.collections)
        with ThreadPoolExecutor(min(8, devices.cpu_cores())) as pool:
            list(pool.map(lambda cell: collect(top, *cell, args.shape, args.steps), list(cells)))
        found = sorted((top / "saves").rglob("checkpoint-*.safetensors"))
        size = sum(path.stat().st_size for path in found)
        say(f"{len(found)} checkpoints, {size / 1e9:.1f} GB, made in {time.perf_counter() - started:.0f} s")
        compare(top, found, size, args.only)


def collect(top: Path, dataset: str, rank: int, shape: str, steps: int) -> None:
    """Write a collection, unless it is there, whose factors walk at random from a place of a trained one's size."""
    run = top / "saves" / "common-sense-reasoning" / dataset / f"Made-Up_lora-rank_{rank}_finetune"
    if (run / "manifest.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng([DATASETS.index(dataset), rank])
    content = bytearray(save(first_step(shape, rank, drawn)))
    numbers = np.frombuffer(content, np.float32, offset=8 + int.from_bytes(content[:8], "little"))
    noise = 1e-5 * drawn.standard_normal(NOISE + PLACES, np.float32)
    entries = []
    for step in range(701, 701 + steps):
        for start in range(0, len(numbers), NOISE):
            part, place = numbers[start : start + NOISE], drawn.integers(PLACES)
            part += noise[place : place + len(part)]
        path = run / f"checkpoint-{step}.safetensors"
        path.write_bytes(content)
        entries.append(CheckpointEntry(step, 0.5, 1e-4, len(content), hashlib.sha256(content).hexdigest()))
    config = {"base_model_name_or_path": "Made-Up", "r": rank, "lora_alpha": 2 * rank}
    files.write_json(run / "adapter_config.json", config)
    facts = {"adapter_config_sha256": files.sha256_of(run / "adapter_config.json")}
    write_manifest(run, new_manifest(run, "finetune", rank, dict.fromkeys(IDENTITY), entries, facts))


def first_step(shape: str, rank: int, drawn: np.random.Generator) -> dict[str, np.ndarray]:
    """Random factors of all linear layers, by PEFT's keys."""
    tensors = {}
    for block in range(SHAPES[shape]["num_hidden_layers"]):
        for name, (inputs, outputs) in zip(NAMES, layer_sizes(shape), strict=True):
            layer = f"base_model.model.model.layers.{block}.{name}"
            for end, form, scale in (("A", (rank, inputs), 2e-2), ("B", (outputs, rank), 2e-3)):
                tensors[f"{layer}.lora_{end}.weight"] = scale * drawn.standard_normal(form, np.float32)
    return tensors


def compare(top: Path, found: Sequence[Path], size: int, only: str | None) -> None:
    """Measure and print the table: seconds, gigabytes per second, processor seconds, and seconds of sha256sum's."""
    cores = devices.cpu_cores()
    listed = b"".join(bytes(path) + b"\0" for path in found)
    sums = ["xargs", "-0", "-n", "4", "-P", str(cores), "sha256sum"]
    timed(sums, listed)  # the files are in memory from here on, if they fit
    rows = [(f"sha256sum, {cores} processes", *timed(sums, listed))]
    stats = [sys.executable, str(ROOT / "utils" / "stats.py")]
    if torch.cuda.is_available() and only != "cpu":
        rows.append((f"make stats, {torch.cuda.get_device_name()}", *timed_stats(top, stats, {})))
    if only != "gpu":
        rows.append((f"make stats, {cores} cores", *timed_stats(top, stats, {"DEVICES": "cpu"})))
    base = rows[0][1]
    head = ("what", "seconds", "GB/s", "processor seconds", "of sha256sum's time")
    cli.print_table(
        head,
        [
            (name, f"{wall:.1f}", f"{size / 1e9 / wall:.2f}", f"{used:.1f}", f"{wall / base:.2f}")
            for name, wall, used in rows
        ],
    )


def timed_stats(top: Path, command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """`timed` for the statistics of all collections below `top`, none of which are there yet."""
    shutil.rmtree(top / "saves" / "stats", ignore_errors=True)
    return timed(command, b"", {"PARAGEN_TOP": str(top), **environment})


def timed(command: list[str], given: bytes, environment: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a program: (seconds, processor seconds of it and its children). Leaves when it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, input=given, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - started
    if done.returncode:
        cli.fail(f"{' '.join(command)}: failed with status {done.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    cli.run(main)
