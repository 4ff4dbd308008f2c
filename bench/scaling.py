"""A sweep of many cells on 1, 2, 4 and 8 devices of this machine: what each more device gives.

    python bench/scaling.py [--devices 1 2 4 8] [--datasets 10] [--ranks 4 8] [--seeds 1 2 3 4] [--keep 20] [--evaluate]

In a copy of what git holds, in a temporary folder: `make model` (the embedded SmolLM2-135M), `make made-tasks`, then
`make collect-all CATEGORY=made` of the first made tasks, into an empty saves/ for each number of devices. With
--evaluate, `make evaluate` scores each of these sweeps on the same devices. On GPUs, nvidia-smi tells how busy each was
from the first step on. Without them, a device is a core, and the sweep itself tells how long each had work.

--tiny rehearses it with a tiny model and few rows. PY=python3 in the environment has the targets run that Python.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from every_target import NOT_INHERITED, copy_repository
from scratch import write_json
from shapes import ROOT

from paragen.common import cli, devices, paths
from paragen.model import base_models

MODEL = "smollm2-135m"
HEADS = (
    "devices",
    "seconds",
    "to the first",
    "busy %",
    "each",
    "per hour",
    "MB/s",
    "driver CPU s",
    "efficiency",
    "steady",
)
SCRIPTS = {"collect-all": "collect_all.py", "evaluate": "evaluate.py"}
LOOKS = 0.5  # seconds between two looks at a run


class Measured(NamedTuple):
    """What was seen of one run of a target."""

    devices: int
    seconds: float  # from the start of make to its end
    first: float  # seconds until the first step is logged, or the first score is written
    busy: list[float]  # per cent of the time from then on, by device; empty where it is not known
    checkpoints: int  # written, or scored
    bytes: int
    driver: float  # processor seconds of the script that schedules, without its children

    def rate(self, steady: bool) -> float:
        """Checkpoints per second; `steady` counts from the first one on."""
        return self.checkpoints / (self.seconds - steady * self.first)


def main() -> None:
    args = parse_arguments()
    environment = {
        name: value for name, value in os.environ.items() if name not in (*NOT_INHERITED, "CATEGORY", "SEED")
    }
    with tempfile.TemporaryDirectory(prefix="scaling ") as folder:
        top = (args.folder or Path(folder)).absolute() / "copy"
        copy_repository(top)
        tasks = prepare(top, args, environment)
        chosen = {"DATASET": " ".join(tasks), "MODEL": MODEL, "RANK": " ".join(args.ranks)}
        chosen |= {"SEED": " ".join(args.seeds), "CATEGORY": paths.MADE}
        cells = len(tasks) * len(args.ranks) * len(args.seeds)
        found: dict[str, list[Measured]] = {target: [] for target in SCRIPTS}
        for count in args.devices:
            swept = run(top, "collect-all", count, {**chosen, "KEEP": args.keep}, environment, args.log)
            found["collect-all"].append(swept)
            if args.evaluate:
                given = {**chosen, "LIMIT": args.limit, "STEPS": args.steps}
                found["evaluate"].append(run(top, "evaluate", count, given, environment, args.log))
            (top / "saves").rename(top / f"saves of {count}")
            (top / "saves").mkdir()
    for target, rows in found.items():
        if rows:
            cli.say(f"make {target}: {cells} cells")
            cli.print_table(HEADS, [row_of(one, rows[0]) for one in rows])
    write_json(args.out, {target: [one._asdict() for one in rows] for target, rows in found.items()})


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8], help="the first is compared with")
    parser.add_argument("--datasets", type=int, default=10, help="how many made tasks")
    parser.add_argument("--ranks", nargs="+", default=["4", "8"])
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3", "4"])
    parser.add_argument("--rows", help="of each made task; they decide the number of steps")
    parser.add_argument("--keep", default="20", help="checkpoints of a collection")
    parser.add_argument("--evaluate", action="store_true", help="also score each sweep")
    parser.add_argument("--limit", default="", help="rows to score on")
    parser.add_argument("--steps", default="all", help="checkpoints to score, as STEPS")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few rows")
    parser.add_argument("--folder", type=Path, help="where the copy stays")
    parser.add_argument("--log", type=Path, default=Path("scaling.log"), help="what make prints")
    parser.add_argument("--out", type=Path, help="raw numbers, as JSON")
    args = parser.parse_args()
    args.log, args.rows = args.log.absolute(), args.rows or ("40" if args.tiny else "2000")
    there = len(devices_here())
    if max(args.devices) > there:
        parser.error(f"--devices {max(args.devices)}: there are {there} here")
    return args


def devices_here() -> list[str]:
    """The numbers of this machine's GPUs; of the cores that this process may use where there is none."""
    if not devices.nvidia_driver():
        return [str(core) for core in sorted(os.sched_getaffinity(0))]
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    return [str(number) for number in range(len(listed.stdout.splitlines()))]


def prepare(top: Path, args: argparse.Namespace, environment: dict[str, str]) -> list[str]:
    """Make tasks and model in the copy; returns the names of the tasks that are swept."""
    with open(args.log, "a") as log:
        if args.tiny:
            script = ROOT / "tests" / "helpers" / "tiny.py"
            folder = top / "models" / base_models.table()[MODEL]["folder"]
            subprocess.run([sys.executable, script, folder], stdout=log, stderr=log, check=True)
        else:
            make(top, ["model", f"MODEL={MODEL}"], environment, log)
        make(top, ["made-tasks", f"MODEL={MODEL}", f"ROWS={args.rows}"], environment, log)
    return sorted(folder.name for folder in (top / "collect_scripts" / paths.MADE).iterdir())[: args.datasets]


def make(top: Path, words: list[str], environment: dict[str, str], log) -> None:
    """Run a target; leaves when it fails."""
    if subprocess.run(["make", *words], cwd=top, env=environment, stdout=log, stderr=log).returncode:
        cli.fail(f"make {' '.join(words)} failed; see {log.name}")


def run(top: Path, target: str, count: int, given: dict[str, str], environment: dict[str, str], path: Path) -> Measured:
    """Run a target on so many devices, and look at it meanwhile."""
    chosen, on_gpus = devices_here()[:count], devices.nvidia_driver()
    command = ["make", target, *(f"{name}={value}" for name, value in given.items() if value)]
    if on_gpus:
        environment = {**environment, "DEVICES": ",".join(chosen)}
    else:
        command = ["taskset", "--cpu-list", ",".join(chosen), *command]
        environment = {**environment, "DEVICES": "cpu"}
    offset = path.stat().st_size
    with open(path, "a") as log:
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=top, env=environment, stdout=log, stderr=log)
        watch = Watch(process.pid, top, target, chosen if on_gpus else [])
        while process.poll() is None:
            watch.look(time.monotonic() - began)
            time.sleep(LOOKS)
        seconds = time.monotonic() - began
    busy = watch.end()
    if process.returncode:
        cli.fail(f"make {target} on {count} devices failed; see {path}")
    text = path.read_bytes()[offset:].decode(errors="replace")
    checkpoints, written = done_by(top, target)
    measured = Measured(
        count, seconds, watch.first or 0.0, busy or told_shares(text), checkpoints, written, watch.driver
    )
    cli.say(f"make {target} on {count}: {seconds:.1f} s")
    return measured


class Watch:
    """Looks at a run: when its first step is logged, its driver's processor time, and how busy GPUs are.

    Args:
        pid: make's process.
        top: the repository.
        target: the target.
        gpus: the numbers of the GPUs that it uses.
    """

    def __init__(self, pid: int, top: Path, target: str, gpus: list[str]):
        self.make, self.top, self.script = psutil.Process(pid), top, SCRIPTS[target]
        self.signs = ".*staging-*/trainer_log.jsonl" if target == "collect-all" else "*_finetune/evaluation.json"
        self.first, self.driver = 0.0, 0.0
        self.process: psutil.Process | None = None
        self.used: dict[str, list[float]] = {gpu: [] for gpu in gpus}
        self.sampler: subprocess.Popen | None = None
        if gpus:
            fields = ["--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits", "--loop=1"]
            command = ["nvidia-smi", f"--id={','.join(gpus)}", *fields]
            self.sampler = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self.reader = threading.Thread(target=self.sample, daemon=True)
            self.reader.start()

    def sample(self) -> None:
        """Note what nvidia-smi prints from the first step on."""
        assert self.sampler is not None and self.sampler.stdout is not None
        for line in self.sampler.stdout:
            gpu, used = (word.strip() for word in line.split(","))
            if self.first:
                self.used[gpu].append(float(used))

    def look(self, seconds: float) -> None:
        """Look, so many seconds after the start."""
        with contextlib.suppress(psutil.Error):  # it has just ended
            self.process = self.process or self.find_driver()
            if self.process:
                used = self.process.cpu_times()
                self.driver = used.user + used.system
        if not self.first and any(self.has_content(path) for path in self.top.glob(f"saves/*/*/{self.signs}")):
            self.first = seconds

    def find_driver(self) -> psutil.Process | None:
        """The process of the script, once make has started it."""
        below = [self.make, *self.make.children(recursive=True)]
        named = (one for one in below if one.name().startswith("python"))
        return next((one for one in named if any(word.endswith(self.script) for word in one.cmdline())), None)

    @staticmethod
    def has_content(path: Path) -> bool:
        try:
            return path.stat().st_size > 0
        except FileNotFoundError:  # published meanwhile
            return False

    def end(self) -> list[float]:
        """End the sampler; per cent of the time that each GPU was busy."""
        if self.sampler is not None:
            self.sampler.terminate()
            self.sampler.wait()
            self.reader.join()
        return [statistics.fmean(used) if used else 0.0 for used in self.used.values()]


def told_shares(text: str) -> list[float]:
    """The shares of time, in per cent, that a sweep itself prints for its devices; empty where it prints none."""
    several = re.search(r"^devices: \d+, had work \d+ % on average \(([\d, ]+)\)", text, re.MULTILINE)
    alone = re.search(r"^devices: 1, had work (\d+) %", text, re.MULTILINE)
    if several:
        return [float(word) for word in several[1].split(",")]
    return [float(alone[1])] if alone else []


def done_by(top: Path, target: str) -> tuple[int, int]:
    """(checkpoints written or scored, bytes written) in saves/."""
    if target == "collect-all":
        kept = list(top.glob("saves/*/*/*_finetune/checkpoint-*.safetensors"))
        return len(kept), sum(path.stat().st_size for path in top.glob("saves/*/*/*/**/*") if path.is_file())
    found = list(top.glob("saves/*/*/*_finetune/evaluation.json"))
    evaluations = [one for path in found for one in json.loads(path.read_text())["evaluations"]]
    return sum(len(one["checkpoints"]) for one in evaluations), sum(path.stat().st_size for path in found)


def row_of(one: Measured, base: Measured) -> tuple[str, ...]:
    """A row of the table, compared with the first number of devices."""
    whole, steady = (
        f"{100 * one.rate(part) / base.rate(part) * base.devices / one.devices:.0f} %" for part in (False, True)
    )
    return (
        str(one.devices),
        f"{one.seconds:.1f}",
        f"{one.first:.1f}",
        f"{statistics.fmean(one.busy):.0f}" if one.busy else "?",
        " ".join(f"{share:.0f}" for share in one.busy),
        f"{3600 * one.rate(False) / one.devices:,.0f}",
        f"{one.bytes / one.seconds / 1e6:.1f}",
        f"{one.driver:.1f}",
        whole,
        steady,
    )


if __name__ == "__main__":
    cli.run(main)
