"""Brings prepared dataset files into data/<category>/, checks each by its git blob id, and registers it.

    python utils/fetch_data.py ARC-c [BoolQ ...] [--category math] [--source URL-or-folder]     or --all

Reads data/sources.yaml; writes data/<category>/<file>.json and data/dataset_info.json. The files come from the
repository that sources.yaml names, or from --source or PARAGEN_DATA_SOURCE: a mirror's address or a folder, where each
is looked for at its upstream path, in its category's folder and by its bare name. A file that is there already is not
fetched again; a download that was cut off is gone on with.
"""

import os
import queue
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from paragen.common import cli, files
from paragen.common.cli import UserError, say, storage_fault
from paragen.common.paths import relative
from paragen.dataset import dataset_info, registration, sources

UPSTREAM = "https://raw.githubusercontent.com/{repository}/{commit}"
SOURCE_VARIABLE = "PARAGEN_DATA_SOURCE"
AT_ONCE = 4
TRIES = 5  # without progress between them
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30  # each pause before another try is twice the one before
PLAIN_PROGRESS_S = 10  # between two lines of progress where there is no terminal for a bar
TIMEOUT_S = httpx.Timeout(30, connect=20)
PROGRESS_BYTES = 1 << 20  # a try that brought so much starts the counting anew
COPIED_AT_ONCE = 1 << 20
SHOWN = 5  # failed files that the last line names
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP states that may be over at the next try
LFS_MARK = b"version https://git-lfs.github.com/spec/"


class Dropped(Exception):
    """A transfer that ended early; its text says how. The next try goes on where it stopped."""


def bring_all(wanted: dict[str, dict], base: str, force: bool, tries: int, data_dir: Path) -> int:
    """Fetch and register the files `wanted`; a failure is told at once and the rest goes on.

    Raises UserError naming the files that failed, when some did.
    """
    source = source_of(base)
    (say if len(wanted) > 1 else lambda _: None)(f"{len(wanted)} files from {base}")
    failed, fresh, start = [], 0, time.monotonic()
    with progress_bar(wanted) as bar:
        for name, outcome in fetched(wanted, source, force, tries, data_dir, bar):
            with bar.external_write_mode():
                if isinstance(outcome, str):
                    try:
                        say(f"{name}: {outcome}")
                        register(name, wanted[name], force, data_dir)
                        fresh += outcome != "is there"
                        continue
                    except Exception as error:
                        outcome = error
                failed.append(name)
                for line in (told(outcome) or "").splitlines():
                    cli.complain(f"{name}: {line}")
    done, seconds = len(wanted) - len(failed), time.monotonic() - start
    say(f"{done} of {len(wanted)} files are there and registered ({fresh} fetched, {seconds:.0f} s)")
    if failed:
        names = ", ".join(failed[:SHOWN]) + (", ..." if len(failed) > SHOWN else "")
        raise UserError(f"{len(failed)} files are not in order: {names}; run it again when that is mended")
    return 0


def told(error: BaseException) -> str:
    """What a failure says to the user. Raises the error itself where it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    fault = storage_fault(error)
    if fault is None:
        raise error
    return fault


def progress_bar(wanted: dict[str, dict]) -> tqdm:
    """A bar over the bytes of all files, as far as their sizes are known; nothing where stderr is no terminal."""
    total = sum(entry.get("bytes") or 0 for entry in wanted.values())
    return tqdm(total=total or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)


def fetched(
    wanted: dict[str, dict], source: "Source", force: bool, tries: int, data_dir: Path, bar: tqdm
) -> Iterator[tuple[str, str | BaseException]]:
    """Fetch several files at once; yields (name, what was done or the failure) as each ends.

    The threads are daemons: Ctrl-C ends the process at once, and what has arrived stays for the next call.
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
                done.put((name, bring(name, entry, source, force, tries, data_dir, bar)))
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


def bring(name: str, entry: dict, source: "Source", force: bool, tries: int, data_dir: Path, bar: tqdm) -> str:
    """Bring one file to its place when it is not there. Returns what was done. Raises UserError or OSError."""
    target = data_dir / entry["category"] / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.lock(
        files.beside(target, "lock"), waiting=f"{name}: another process is bringing it; waiting for it ..."
    ):
        if target.is_dir():
            raise UserError(f"{relative(target)} is a folder; move it away")
        if target.exists():
            if files.git_blob_id(target) == entry["blob"]:
                bar.update(entry.get("bytes") or 0)
                return "is there"
            if not force:
                raise UserError(
                    f"{relative(target)} has other content than upstream's (blob {entry['blob'][:12]}); "
                    "it stays as it is; FORCE=1 replaces it"
                )
        part = part_of(name, entry, data_dir)
        start = time.monotonic()
        try:
            transfer(name, entry, source, part, tries, bar)
        except OSError:
            part.unlink(missing_ok=True)  # a full disk has no use for it
            raise
        size = part.stat().st_size
        os.replace(part, target)
        for left_over in target.parent.glob(f".{name}.*.part"):  # of what the table named before
            left_over.unlink()
        files.sync_folder(target.parent)
        seconds = max(time.monotonic() - start, 1e-3)
    return f"fetched, {size / 1e6:.1f} MB, {size / 1e6 / seconds:.1f} MB/s"


def part_of(name: str, entry: dict, data_dir: Path) -> Path:
    """Where a file lies while it arrives, by its blob id, so that the table's next commit does not go on with it."""
    return files.beside(data_dir / entry["category"] / name, f"{entry['blob'][:12]}.part")


def transfer(name: str, entry: dict, source: "Source", part: Path, tries: int, bar: tqdm) -> None:
    """Bring the whole of a file into `part`, with its blob id checked. Raises UserError; what is wrong is not kept."""
    from_start = not part.exists()
    receive(name, entry, source, part, tries, bar)
    if (
        files.git_blob_id(part) != entry["blob"] and not from_start
    ):  # what was left from before may have been the wrong half
        part.unlink()
        receive(name, entry, source, part, tries, bar)
    found = files.git_blob_id(part)
    if found == entry["blob"]:
        with open(part, "rb") as file:
            pointer = file.read(len(LFS_MARK)) == LFS_MARK
            os.fsync(file.fileno())
        if not pointer:
            return
        part.unlink()
        raise UserError("upstream holds a Git LFS pointer in its place, not the data; bring it by hand and register it")
    size = part.stat().st_size
    part.unlink()
    raise UserError(
        f"{source.label} holds another file: {size} bytes with blob id {found}, not {entry['blob']}; nothing is kept"
    )


def receive(name: str, entry: dict, source: "Source", part: Path, tries: int, bar: tqdm) -> None:
    """Bring all bytes that the source has for a file into `part`, going on after a dropped connection."""
    failures = 0
    while True:
        if source.unreachable:
            raise UserError(source.unreachable)
        before = part.stat().st_size if part.exists() else 0
        try:
            return source.receive(name, entry, part, bar)
        except Dropped as error:
            size = part.stat().st_size if part.exists() else 0
            failures = 1 if size - before >= PROGRESS_BYTES else failures + 1
            if failures >= tries:
                kept = f"; {size} bytes are kept for the next call" if size else ""
                source.give_up(str(error))
                raise UserError(f"{error}, {failures} times without progress{kept}") from None
            time.sleep(min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S))


def places(name: str, entry: dict) -> list[str]:
    """Where a file may lie in a source, in the order in which it is looked for."""
    return list(dict.fromkeys([entry["path"], f"{entry['category']}/{name}", name]))


def looked_for(name: str, entry: dict) -> str:
    """Where a file was looked for in vain, in words."""
    return "looked for " + ", ".join(places(name, entry))


def source_of(base: str) -> "Source":
    """The source at an address or in a folder. Raises UserError when it is neither."""
    if base.lower().startswith(("http://", "https://")):
        return Server(base.rstrip("/"))
    folder = Path(base.removeprefix("file://")).expanduser()
    if "://" in base.removeprefix("file://") or not folder.is_dir():
        raise UserError(f"{SOURCE_VARIABLE} {base!r}: is neither an http(s) address nor a folder that is there")
    return Folder(folder)


class Folder:
    """A folder on disk that holds the files already."""

    unreachable = None

    def __init__(self, folder: Path):
        self.folder, self.label = folder, str(folder)

    def receive(self, name: str, entry: dict, part: Path, bar: tqdm) -> None:
        """Copy the file into `part`; of several in the folder, the one with the right blob id."""
        found = [path for place in places(name, entry) if (path := self.folder / place).is_file()]
        if not found:
            raise UserError(f"{self.folder}: does not hold it; {looked_for(name, entry)}")
        right = next((path for path in found if files.git_blob_id(path) == entry["blob"]), found[0])
        with open(right, "rb") as file, open(part, "wb") as copy:
            while chunk := file.read(COPIED_AT_ONCE):
                copy.write(chunk)
                bar.update(len(chunk))


class Server:
    """An HTTP server below whose address the files lie."""

    def __init__(self, base: str):
        self.base, self.label = base, base
        # Identity: a range counts the bytes as they are sent, so they must be the file's own.
        headers = {"Accept-Encoding": "identity", "User-Agent": "ParaGen-Dataset"}
        try:
            self.client = httpx.Client(headers=headers, timeout=TIMEOUT_S, follow_redirects=True)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise UserError(f"the proxy that the environment names (HTTPS_PROXY, ALL_PROXY): {error}") from None
        self.found: dict[str, str] = {}  # where each file was, so that a resumed transfer asks there at once
        self.answered, self.unreachable = False, None

    def give_up(self, cause: str) -> None:
        """Spare the other files their tries when the server has never answered."""
        self.unreachable = None if self.answered else cause

    def receive(self, name: str, entry: dict, part: Path, bar: tqdm) -> None:
        """Bring what is missing in `part`. Raises Dropped when the rest may come at another try, else UserError."""
        for place in [self.found[name]] if name in self.found else places(name, entry):
            try:
                if self.receive_from(f"{self.base}/{place}", part, entry.get("bytes"), bar):
                    self.found[name] = place
                    return
            except httpx.InvalidURL as error:
                raise UserError(f"{self.base}: is no address: {error}") from None
            except httpx.RequestError as error:
                raise self.failure(error) from None
        raise UserError(f"{self.base}: not found (HTTP 404); {looked_for(name, entry)}")

    def failure(self, error: httpx.RequestError) -> Exception:
        """What a broken transfer means: another try, or for a wrong certificate or protocol the end."""
        link: BaseException | None = error
        while link is not None:
            if isinstance(link, ssl.SSLCertVerificationError):
                return UserError(f"{self.base}: its certificate is not trusted: {link.verify_message}")
            link = link.__cause__ or link.__context__
        if isinstance(error, (httpx.UnsupportedProtocol, httpx.ProxyError, httpx.TooManyRedirects)):
            return UserError(f"{self.base}: {error}")
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return Dropped(f"{self.base} cannot be reached ({error}); {SOURCE_VARIABLE} can name a mirror or a folder")
        return Dropped(f"{self.base} dropped the connection ({type(error).__name__}: {error})")

    def receive_from(self, url: str, part: Path, size: int | None, bar: tqdm) -> bool:
        """Append to `part` what is missing of the file at `url`; False when the server has no such file.

        A server that sends the whole file in answer to a range makes `part` start anew.
        """
        have = part.stat().st_size if part.exists() else 0
        with self.client.stream("GET", url, headers={"Range": f"bytes={have}-"} if have else {}) as response:
            state, self.answered = response.status_code, True
            if state == 404:
                return False
            if state == 416:  # nothing is missing, or `part` is no part of this file: the blob id will tell
                if have:
                    return True
                raise UserError(f"{url}: HTTP 416")
            if state in PASSING:
                raise Dropped(f"{url}: HTTP {state}")
            if state not in (200, 206):
                raise UserError(f"{url}: HTTP {state}")
            goes_on = state == 206 and range_start(response) == have
            if state == 206 and not goes_on:
                part.unlink(missing_ok=True)
                raise Dropped(f"{url}: sent another range than asked for")
            grow_total(bar, size, response)
            with open(part, "ab" if goes_on else "wb") as file:
                bar.update(have if goes_on else 0)
                for chunk in response.iter_raw():
                    file.write(chunk)
                    bar.update(len(chunk))
        if size and part.stat().st_size < size:  # a server that says no length ends so when it is cut off
            raise Dropped(f"{url}: ended after {part.stat().st_size} of {size} bytes")
        return True


Source = Folder | Server


def range_start(response: httpx.Response) -> int | None:
    """The first byte's number in a partial answer, or None where the server does not say."""
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def grow_total(bar: tqdm, size: int | None, response: httpx.Response) -> None:
    """Add to the bar's total what the table did not know."""
    length = response.headers.get("Content-Length", "")
    if size is None and length.isdigit():
        bar.total = (bar.total or 0) + int(length)


def register(name: str, entry: dict, force: bool, data_dir: Path) -> None:
    """Register a file whose content is upstream's, with what the table says of it. Raises UserError.

    Since the content is pinned, gaps in it are known ones: they are accepted row by row, and said.
    """
    file, dataset = data_dir / entry["category"] / name, entry["dataset"]
    rows = dataset_info.load_rows(file)
    old = dataset_info.read_info(data_dir).get(dataset, {})
    old_file = old.get("file_name") if isinstance(old, dict) else None
    if old and old_file != f"{entry['category']}/{name}" and not force:
        way_out = "FORCE=1 registers this one in its place"
        raise UserError(f"is at {relative(file)}, but {dataset!r} is registered for {old_file!r}; {way_out}")
    named = columns_kept(old) if old_file == f"{entry['category']}/{name}" else {}
    prompts_only = entry["kind"] == "prompts"
    try:
        found = dataset_info.infer_entry(rows, named, prompts_only)
    except UserError as error:
        if entry["kind"] != "test":
            raise UserError(f"is at {relative(file)}, but cannot be registered: {error}") from None
        prompts_only = True
        found = dataset_info.infer_entry(rows, named, prompts_only)
    gaps = dataset_info.gaps(rows, found)
    marks = {dataset_info.HELD_OUT: held_out(entry, len(rows)), dataset_info.ACCEPTED_ROWS: list(gaps)}
    registration.register(file, dataset, named, prompts_only, force, data_dir, marks)
    if marks[dataset_info.HELD_OUT]:
        first = len(rows) - marks[dataset_info.HELD_OUT] + 1
        say(f"note: held out: rows {first} to {len(rows)}, which no recipe trains on")
    for number, gap in list(gaps.items())[: registration.SHOWN]:
        say(f"note: row {number}: {gap}; upstream's file has it so, accepted")
    if entry.get("pictures"):
        say(f"note: its pictures are not brought; get them from {entry['pictures']} and put them below "
            f"{relative(data_dir)}/ at the paths that its rows name")  # fmt: skip


def columns_kept(old: dict[str, Any]) -> dict[str, str]:
    """The columns of a registration that stands already, so that a user's choice of them outlives another call."""
    if dataset_info.entry_faults(old):
        return {}
    mapped = dataset_info.columns_of(old)
    return {kind: mapped.get(kind, "") for kind in dataset_info.CANDIDATES[dataset_info.formatting_of(old)]}


def held_out(entry: dict, rows: int) -> int:
    """How many of a file's last rows are held out: as the table says, else by the rule for training sets."""
    if entry["kind"] != "train":
        return 0
    return sources.held_out(rows) if entry.get("held_out") is None else entry["held_out"]
