"""Where prepared dataset files come from: an HTTP server or a folder. Interrupted transfers are resumed."""

import os
import ssl
import time
from pathlib import Path
from typing import Any, Protocol

import httpx
from tqdm import tqdm

from paragen.common import files
from paragen.common.cli import UserError

UPSTREAM = "https://raw.githubusercontent.com/{repository}/{commit}"
SOURCE_VARIABLE = "PARAGEN_DATA_SOURCE"
TRIES = 5  # without progress between them
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30  # each pause before another try is twice the one before
TIMEOUT_S = httpx.Timeout(30, connect=20)
PROGRESS_BYTES = 1 << 20  # after a try that transferred this much, the tries are counted from 1 again
COPIED_AT_ONCE = 1 << 20
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP states that may be over at the next try


class Dropped(Exception):
    """A transfer that ended early; its text states how. The next try resumes it."""


def transfer(name: str, entry: dict[str, Any], source: "Source", part: Path, tries: int, bar: tqdm) -> None:
    """Transfer a whole file to `part` and check its blob id.

    Args:
        name: the file's name in data/sources.yaml.
        entry: its mapping there.
        source: where it comes from.
        part: where it goes; what is there already is resumed.
        tries: how many tries without progress are made.
        bar: advances by the transferred bytes.

    Raises UserError; a file with a wrong blob id is removed.
    """
    from_start = not part.exists()
    receive(name, entry, source, part, tries, bar)
    if files.git_blob_id(part) != entry["blob"] and not from_start:  # what was there before may have been wrong
        part.unlink()
        receive(name, entry, source, part, tries, bar)
    found = files.git_blob_id(part)
    if found == entry["blob"]:
        with open(part, "rb") as file:
            pointer = file.read(len(files.GIT_LFS_POINTER)) == files.GIT_LFS_POINTER
            os.fsync(file.fileno())
        if not pointer:
            return
        part.unlink()
        raise UserError("upstream has a Git LFS pointer in its place, not the data; get it by hand and register it")
    size = part.stat().st_size
    part.unlink()
    raise UserError(
        f"{source.label} holds another file: {size} bytes with blob id {found}, not {entry['blob']}; nothing is kept"
    )


def receive(name: str, entry: dict[str, Any], source: "Source", part: Path, tries: int, bar: tqdm) -> None:
    """Transfer all bytes that the source has for a file to `part`, resuming after a dropped connection."""
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


def places(name: str, entry: dict[str, Any]) -> list[str]:
    """The places of a file in a source, in the order in which they are tried."""
    return list(dict.fromkeys([entry["path"], f"{entry['category']}/{name}", name]))


def looked_for(name: str, entry: dict[str, Any]) -> str:
    """The places where a file was not found, in words."""
    return "looked for " + ", ".join(places(name, entry))


def source_of(base: str) -> "Source":
    """The source at an http(s) address or in a folder. Raises UserError for anything else."""
    if base.lower().startswith(("http://", "https://")):
        return Server(base.rstrip("/"))
    folder = Path(base.removeprefix("file://")).expanduser()
    if "://" in base.removeprefix("file://") or not folder.is_dir():
        raise UserError(f"{SOURCE_VARIABLE} {base!r}: is neither an http(s) address nor a folder that is there")
    return Folder(folder)


class Source(Protocol):
    """Where files come from."""

    label: str  # its address, for messages
    unreachable: str | None  # why no further file is tried

    def receive(self, name: str, entry: dict[str, Any], part: Path, bar: tqdm) -> None:
        """Transfer what is missing of a file in `part`.

        Raises Dropped when another try may get the rest, otherwise UserError.
        """

    def give_up(self, cause: str) -> None:
        """Take note that the tries for a file are used up; `cause` is the last failure."""


class Folder:
    """A folder on disk that has the files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.label = folder, str(folder)
        self.unreachable: str | None = None

    def give_up(self, cause: str) -> None:
        """Make the other files fail at once, too."""
        self.unreachable = cause

    def receive(self, name: str, entry: dict[str, Any], part: Path, bar: tqdm) -> None:
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
    """An HTTP server that has the files below its address."""

    def __init__(self, base: str) -> None:
        self.base, self.label = base, base
        # Identity: a range counts the bytes as they are sent, so they must be the file's own.
        headers = {"Accept-Encoding": "identity", "User-Agent": "ParaGen-Dataset"}
        try:
            self.client = httpx.Client(headers=headers, timeout=TIMEOUT_S, follow_redirects=True)
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise UserError(f"the proxy that the environment names (HTTPS_PROXY, ALL_PROXY): {error}") from None
        self.found: dict[str, str] = {}  # where each file was, so that a resumed transfer starts there
        self.answered = False
        self.unreachable: str | None = None

    def give_up(self, cause: str) -> None:
        """Make the other files fail at once when the server has never answered."""
        self.unreachable = None if self.answered else cause

    def receive(self, name: str, entry: dict[str, Any], part: Path, bar: tqdm) -> None:
        """Transfer what is missing in `part`. Raises Dropped when another try may get the rest, otherwise UserError."""
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
        """The exception for a broken transfer: Dropped, or UserError where another try cannot help (a certificate)."""
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

        When a server answers a range with the whole file, `part` starts anew.
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
            resumes = state == 206 and range_start(response) == have
            if state == 206 and not resumes:
                part.unlink(missing_ok=True)
                raise Dropped(f"{url}: sent another range than the requested one")
            grow_total(bar, size, response)
            with open(part, "ab" if resumes else "wb") as file:
                bar.update(have if resumes else 0)
                for chunk in response.iter_raw():
                    file.write(chunk)
                    bar.update(len(chunk))
        if size and part.stat().st_size < size:  # how a server that states no length ends when it is cut off
            raise Dropped(f"{url}: ended after {part.stat().st_size} of {size} bytes")
        return True


def range_start(response: httpx.Response) -> int | None:
    """The first byte's number in a partial answer, or None where the server does not state it."""
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isdigit() else None


def grow_total(bar: tqdm, size: int | None, response: httpx.Response) -> None:
    """Add the length that the server states to the bar's total where sources.yaml has no size."""
    length = response.headers.get("Content-Length", "")
    if size is None and length.isdigit():
        bar.total = (bar.total or 0) + int(length)
