"""Downloads prepared dataset files into data/<category>/, checks each by its git blob id, and registers it."""

import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from paragen.common import cli, files, locks
from paragen.common.cli import UserError, say, storage_fault
from paragen.common.paths import relative
from paragen.dataset import file_sources, prepared
from paragen.dataset.file_sources import Source

AT_ONCE = 4
PLAIN_PROGRESS_S = 10  # between two lines of progress where there is no terminal for a bar
PRESENT = "is there"


class Summary(NamedTuple):
    """What came of a call."""

    failed: list[str]  # the files that are not in order
    fetched: int  # files that were downloaded
    seconds: float


def download_all(wanted: dict[str, dict[str, Any]], base: str, force: bool, tries: int, data_dir: Path) -> Summary:
    """Download and register files, several at once; each is reported as it ends, and a failure does not stop the rest.

    Args:
        wanted: the files' mappings in data/sources.yaml, by name.
        base: an http(s) address or a folder.
        force: overwrite files that have other content, and registrations of other files.
        tries: how many tries without progress are made for a file.
        data_dir: the folder of dataset_info.json.

    Raises UserError when `base` is neither an address nor a folder.
    """
    source = file_sources.source_of(base)
    failed: list[str] = []
    fetched, start = 0, time.monotonic()
    with progress_bar(wanted) as bar:
        for name, outcome in outcomes(wanted, source, force, tries, data_dir, bar):
            with bar.external_write_mode():
                try:
                    if isinstance(outcome, BaseException):
                        raise outcome
                    say(f"{name}: {outcome}")
                    for line in prepared.register(name, wanted[name], force, data_dir):
                        say(line)
                    fetched += outcome != PRESENT
                except Exception as error:
                    failed.append(name)
                    for line in explained(error).splitlines():
                        cli.complain(f"{name}: {line}")
    return Summary(failed, fetched, time.monotonic() - start)


def explained(error: Exception) -> str:
    """A failure as one line per fault. Raises the error itself where it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    fault = storage_fault(error)
    if fault is None:
        raise error
    return fault


def progress_bar(wanted: dict[str, dict[str, Any]]) -> tqdm:
    """A bar over the bytes of all files whose sizes are known; invisible where stderr is no terminal."""
    total = sum(entry.get("bytes") or 0 for entry in wanted.values())
    return tqdm(total=total or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)


def outcomes(
    wanted: dict[str, dict[str, Any]], source: Source, force: bool, tries: int, data_dir: Path, bar: tqdm
) -> Iterator[tuple[str, str | BaseException]]:
    """Download several files at once; yields (name, what was done or the failure) as each ends.

    The threads are daemons: Ctrl-C ends the process at once, and the next call resumes what has arrived.
    """
    to_do: queue.SimpleQueue = queue.SimpleQueue()
    done: queue.SimpleQueue = queue.SimpleQueue()
    for item in wanted.items():
        to_do.put(item)

    def work() -> None:
        while True:
            try:
                name, entry = to_do.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((name, download(name, entry, source, force, tries, data_dir, bar)))
            except BaseException as error:
                done.put((name, error))

    for _ in range(min(AT_ONCE, len(wanted))):
        threading.Thread(target=work, daemon=True).start()
    left = len(wanted)
    while left:
        bar.set_description(f"{left} to go")
        try:
            yield done.get(timeout=PLAIN_PROGRESS_S if bar.disable else None)
            left -= 1
        except queue.Empty:
            size = files.size_of(part_of(name, entry, data_dir) for name, entry in wanted.items())
            say(f"... {left} of {len(wanted)} files to go, {size / 1e6:.1f} MB of those under way")


def download(
    name: str, entry: dict[str, Any], source: Source, force: bool, tries: int, data_dir: Path, bar: tqdm
) -> str:
    """Download one file unless it is there. Returns what was done. Raises UserError or OSError."""
    target = data_dir / entry["category"] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with locks.lock(
        files.beside(target, "lock"), waiting=f"{name}: another process is downloading it; waiting for it ..."
    ):
        if target.is_dir():
            raise UserError(f"{relative(target)} is a folder; move it away")
        if target.exists():
            if files.git_blob_id(target) == entry["blob"]:
                bar.update(entry.get("bytes") or 0)
                return PRESENT
            if not force:
                raise UserError(
                    f"{relative(target)} has other content than upstream's (blob {entry['blob'][:12]}); "
                    "it stays as it is; FORCE=1 replaces it"
                )
        part = part_of(name, entry, data_dir)
        start = time.monotonic()
        try:
            file_sources.transfer(name, entry, source, part, tries, bar)
        except OSError:
            part.unlink(missing_ok=True)  # it only fills a full disk
            raise
        size = part.stat().st_size
        os.replace(part, target)
        for left_over in target.parent.glob(f".{name}.*.part"):  # of another version that the table named before
            left_over.unlink()
        files.sync_folder(target.parent)
        seconds = max(time.monotonic() - start, 1e-3)
    return f"fetched, {size / 1e6:.1f} MB, {size / 1e6 / seconds:.1f} MB/s"


def part_of(name: str, entry: dict[str, Any], data_dir: Path) -> Path:
    """Where a file is while it arrives. The name holds its blob id, so that another version never continues it."""
    return files.beside(data_dir / entry["category"] / name, f"{entry['blob'][:12]}.part")
