"""Runs the benchmark: what it trains itself, then a process per part on the devices there are, then the table.

<benchmark>/identity.json      what it is measured of and with: another benchmark is refused in its folder
<benchmark>/trained/           adapters to compare with, in a project of their own (trainings.py)
<benchmark>/generators/<fold>_<seed>/
<benchmark>/datasets/<dataset>.json, folds/<fold>.json     parts, each whole; used again by the next call
<benchmark>/benchmark.json, benchmark.png                  the table, and its picture
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

from paragen.analysis import benchmark_page
from paragen.benchmark import picture, plan, results, rows, trainings
from paragen.benchmark.plan import Fold, Plan, Wanted
from paragen.collection import run_identity, sealed_json
from paragen.collection.manifest import sealed
from paragen.common import cli, devices, files, locks, paths, settings
from paragen.common.cli import UserError, complain, say
from paragen.dataset import families
from paragen.generator import sources
from paragen.generator.options import Options, deciding
from paragen.sweep import forked, ray_cluster
from paragen.training import deterministic, llamafactory_output

IDENTITY, IDENTITY_FORMAT = "identity.json", "paragen-benchmark-identity-1"
MADE = ("trained", "generators", "datasets", "folds", benchmark_page.FILE)  # what a benchmark's folder holds of it
LOOK_SECONDS = 0.2
END_SECONDS = 20  # that a stopped process has to clean up


class Job(NamedTuple):
    """What one process measures, one after the other."""

    name: str  # of its log
    datasets: list[str]
    folds: list[Fold]


def make(wanted: Wanted) -> Path:
    """Measure what is not measured yet, write the table and print it; returns benchmark.json.

    Raises UserError where the collections do not fit, where another process is at work on the same benchmark, and where
    a part could not be measured; the others are kept.
    """
    found = planned(wanted)
    options = Options.of_settings()
    say(
        f"{paths.relative(found.folder)}: {len(found.folds)} folds of {len(found.chosen)} datasets, "
        f"{sum(len(fold.seeds) for fold in found.folds)} generators"
    )
    found.folder.mkdir(parents=True, exist_ok=True)
    try:
        with locks.lock(files.beside(found.folder, "lock")):
            started = time.monotonic()
            check_same(found, options)
            jobs = jobs_of(found, len(slots()))
            files.write_json(
                found.folder / IDENTITY, sealed({"format": IDENTITY_FORMAT, **identity_of(found, options)})
            )
            trainings.run(found)
            run_jobs(found, options, jobs)
            path = write(found, options)
            say(f"measured in {time.monotonic() - started:.0f} s: {paths.relative(path)}")
            return path
    except locks.Busy:
        raise UserError(f"{paths.relative(found.folder)}: another process is at work on it; wait for it") from None


def identity_of(found: Plan, options: Options) -> dict[str, Any]:
    """What a benchmark's figures depend on."""
    return results.identity_of(found, asdict(options))


def check_same(found: Plan, options: Options) -> None:
    """Raise UserError where the folder holds something of a benchmark of other collections or settings, unless FORCE=1.

    More or fewer BASELINES, REPEATS and VARIANTS are the same benchmark.
    """
    if run_identity.force_requested() or not any((found.folder / name).exists() for name in MADE):
        return
    known = sealed_json.read(found.folder / IDENTITY, IDENTITY_FORMAT, {}, benchmark_page.WAY_OUT)
    if known is None and (path := found.folder / benchmark_page.FILE).exists():
        known = benchmark_page.read(path)  # of a benchmark that was measured before there was the other file
    if known is None:
        return
    old, new = _compared(known), _compared(identity_of(found, options))
    if changed := [key for key, value in new.items() if old.get(key) != value]:
        raise UserError(
            f"{paths.relative(found.folder)}: is of another benchmark ({', '.join(changed)} differ); take another OUT, "
            "or FORCE=1 replaces it"
        )


def _compared(content: dict[str, Any]) -> dict[str, Any]:
    """What of an identity tells one benchmark from another: all but how much of it is measured."""
    known = json.loads(json.dumps(content))
    given, trained = (known[key] if isinstance(known.get(key), dict) else {} for key in ("settings", "generator"))
    wanted = {key: value for key, value in given.items() if key != "repeats"}
    wanted["variants"] = bool(given.get("variants"))
    others = {key: value for key, value in known.items() if key != "baselines"}
    return {**others, "settings": wanted, "generator": deciding(trained)}


def planned(wanted: Wanted) -> Plan:
    """What is measured of the collections that the settings select."""
    chosen = plan.collections_by_dataset(sources.selected())
    sources.check_alike(list(chosen.values()))
    known = families.families_of(chosen, paths.DATA)
    return Plan(plan.folder_of(wanted, chosen), wanted, chosen, known, plan.folds_of(wanted, known))


def slots() -> list[str]:
    """The device of each process that runs at a time: PER_DEVICE of them on each device.

    Raises UserError where there is no device.
    """
    own = ["cpu"] if ray_cluster.trains_on_cpu() else ray_cluster.gpus_here()
    if not own:
        raise UserError("no device: this machine has a driver, but shows no GPU; set DEVICES=cpu")
    return own * (settings.number("PER_DEVICE") or 1)


def jobs_of(found: Plan, count: int) -> list[Job]:
    """What `count` processes measure: some datasets and some folds each. A process keeps what it has loaded."""
    jobs = [Job(f"job-{at + 1}", found.held[at::count], found.folds[at::count]) for at in range(count)]
    return [job for job in jobs if job.datasets or job.folds]


def parts_of(found: Plan) -> list[Path]:
    """The files of all parts."""
    folds = [found.folder / "folds" / f"{fold.name}.json" for fold in found.folds]
    return [found.folder / "datasets" / f"{name}.json" for name in found.held] + folds


def work_on(found: Plan, options: Options, job: Job) -> None:
    """Measure a job in this process, whose device is pinned. Raises as `measure_each`."""
    llamafactory_output.reduce()
    deterministic.choose_workspace()
    from paragen.benchmark.work import Worker  # imports torch

    worker = Worker(found, options)
    parts = [(name, functools.partial(worker.measure_dataset, name)) for name in job.datasets]
    measure_each([*parts, *((fold.name, functools.partial(worker.measure_fold, fold)) for fold in job.folds)])


def measure_each(parts: Sequence[tuple[str, Callable[[], None]]]) -> None:
    """Measure parts, named, one after the other; one that cannot be measured is named, and the others still are.

    Raises UserError at the end where there was such a part.
    """
    failed = 0
    for name, measure in parts:
        try:
            measure()
        except UserError as error:
            failed += 1
            complain(f"{name}: {error}")
    if failed:
        raise UserError(f"{failed} of {len(parts)} parts could not be measured (see above); the next call goes on")


def pinned_work(found: Plan, options: Options, job: Job, device: str, threads: int) -> None:
    """A task of a forked process: pin its device, take its share of the CPU threads, and measure a job."""
    devices.pin([device])
    devices.set_threads(threads)
    work_on(found, options, job)


def run_jobs(found: Plan, options: Options, jobs: list[Job]) -> None:
    """Measure jobs, each in a process on a slot of its own; a single one in this process.

    Raises UserError where some could not be measured, once all others are.
    """
    all_slots = slots()
    threads, devices_of = devices.threads(len(all_slots)), all_slots[: len(jobs)]
    if len(jobs) == 1:
        devices.pin(devices_of)
        work_on(found, options, jobs[0])
        return
    forked.preload()
    running: dict[ForkServerProcess, Job] = {}
    failed: dict[str, int] = {}
    before = -1
    try:
        for job, device in zip(jobs, devices_of, strict=True):
            running[start(found, options, job, device, threads, devices_of)] = job
        while running:
            for process in [process for process in running if not process.is_alive()]:
                job = running.pop(process)
                failed |= {job.name: process.exitcode} if process.exitcode else {}
            there, wanted = sum(path.is_file() for path in parts_of(found)), len(parts_of(found))
            if there != before:
                before = there
                say(f"{there} of {wanted} parts are there, {len(running)} processes at work")
            time.sleep(LOOK_SECONDS)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join(END_SECONDS)
    if failed:
        raise UserError(f"{faults_of(found, failed)}; the next call goes on")


def faults_of(found: Plan, failed: dict[str, int]) -> str:
    """Why jobs have failed, as a message says it: a process that was killed left nothing in its log.

    Args:
        found: the benchmark.
        failed: the exit code of each job's process, by the job's name.
    """
    lost = forked.LOST_EXIT_CODE
    faults = [f"{name}: its process {cli.killed_text(code)}" for name, code in failed.items() if code < 0]
    faults += [f"{name}: the process that it was forked from died" for name, code in failed.items() if code == lost]
    if others := [name for name, code in failed.items() if 0 < code != lost]:
        log = paths.relative(log_of(found, others[0]))
        faults.append(f"{', '.join(others)}: could not measure all of its parts, {log} says why")
    return "; ".join(faults)


def start(
    found: Plan, options: Options, job: Job, device: str, threads: int, devices_of: list[str]
) -> ForkServerProcess:
    """Start the process of a job on a device, with so many CPU threads.

    Args:
        found: the benchmark.
        options: those of the generators.
        job: what the process measures.
        device: its own.
        threads: of the CPU.
        devices_of: the device of each process, with which it shares memory.
    """
    log = log_of(found, job.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = (found, options, job, device, threads)
    return forked.start(pinned_work, arguments, environment_of(device, devices_of), log)


def environment_of(device: str, devices_of: list[str]) -> dict[str, str]:
    """The variables of a process on a device, of processes on all of these: its share of memory depends on the others
    (devices.free_bytes)."""
    return {
        "DEVICES": device,
        "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device,
        "PARAGEN_CPU_SLOTS": str(len(devices_of)),
        "PARAGEN_GPU_SLOTS": str(devices_of.count(device)),
    }


def log_of(found: Plan, name: str) -> Path:
    """The log of a job."""
    return found.folder / "logs" / f"{name}.log"


def write(found: Plan, options: Options) -> Path:
    """Write benchmark.json and its picture from the parts, and print the tables; returns the file."""
    measured = [part(path) for path in parts_of(found)]
    parts = dict(zip(found.held, measured, strict=False))
    folds = measured[len(parts) :]
    content = results.content_of(found, asdict(options), parts, folds)
    path = found.folder / benchmark_page.FILE
    picture.draw(content, path.with_name(benchmark_page.PICTURE))
    files.write_json(path, content)
    show(content)
    return path


def part(path: Path) -> dict[str, Any]:
    """A part that was just measured."""
    content = rows.read_part(path, None, False)
    if content is None:
        raise UserError(f"{paths.relative(path)}: is gone; measure again")
    return content


def show(content: dict[str, Any]) -> None:
    """Print the tables and what they show."""
    for group in content["groups"]:
        say(f"\n{group['name']}")
        cli.print_table(benchmark_page.head_of(group), benchmark_page.lines_of(group))
        for sentence in benchmark_page.sentences_of(group):
            say(sentence)
