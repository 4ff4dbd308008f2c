"""A node's side of a sweep with STAGE=1: downloads files from the file server, and sends it finished runs."""

import contextlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paragen.common import cli, files, locks
from paragen.common.cli import UserError
from paragen.sweep.file_server import CHUNK_BYTES, FileInfo
from paragen.sweep.received_run import SentFile

CHUNKS_IN_FLIGHT = 4  # per worker
NOTES = ".staged"  # a folder below the node's repository: what is known of each downloaded file


class SweepStopped(Exception):
    """The sweep was told to stop."""


class FileClient:
    """Calls the file server.

    Args:
        server: its Ray actor handle.
    """

    def __init__(self, server: Any):
        self.server = server

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method and wait for its result.

        Raises UserError with the text of the server's UserError, or for a storage error on the driver's machine.
        """
        return self.result_of(getattr(self.server, method).remote(*arguments))

    def result_of(self, future: Any) -> Any:
        """The result of a call in progress. Raises as `call`."""
        import ray

        try:
            return ray.get(future)
        except ray.exceptions.RayTaskError as error:
            fault = str(error.cause) if isinstance(error.cause, UserError) else cli.storage_fault(error.cause)
            if fault is None:
                raise
            raise UserError(fault) from None


class Downloads:
    """The files that a sweep's workers downloaded below a node's copy of the repository, each once.

    Args:
        client: the connection to the file server.
        top: the node's copy of the repository.
        sweep: an id of the sweep.
        stopping: set when the sweep is told to stop.
    """

    def __init__(self, client: FileClient, top: Path, sweep: str, stopping: threading.Event):
        self.client, self.top, self.sweep, self.stopping = client, top, sweep, stopping

    def fetch(self, infos: list[FileInfo], reserved: int) -> None:
        """Download the files that are not present with the driver's content.

        Raises UserError where the disk has too little space for them and for `reserved` more bytes.
        """
        missing = sum(info.bytes for info in infos if not self.is_present(info))
        free = shutil.disk_usage(self.top).free
        if missing + reserved > free:
            raise UserError(
                f"{self.top}: {(missing + reserved) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; free some "
                "space, or choose another disk with STAGE_DIR"
            )
        for info in infos:
            note = self.top / NOTES / info.name
            note.parent.mkdir(parents=True, exist_ok=True)
            waiting = f"another worker is downloading {info.name}"
            with locks.lock(note.with_name(f"{note.name}.lock"), waiting=waiting):
                for _ in range(2):
                    if self.is_present(info):
                        break
                    self._download(info, note.with_name(f"{note.name}.part"))
                else:
                    raise UserError(f"{info.name}: arrives with other bytes than the driver has, twice")

    def is_present(self, info: FileInfo) -> bool:
        """Whether a file is present with the driver's content. It is hashed once a sweep, and when it was touched."""
        path, note = self.top / info.name, self.top / NOTES / info.name
        try:
            stamp = list(files.stamp_of(path.stat()))
            with contextlib.suppress(OSError, ValueError):
                if json.loads(note.read_bytes()) == [self.sweep, info.sha256, stamp]:
                    return True
            if stamp[0] != info.bytes or files.sha256_of(path) != info.sha256:
                return False
        except FileNotFoundError:
            return False
        note.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(note, json.dumps([self.sweep, info.sha256, stamp]).encode())
        return True

    def _download(self, info: FileInfo, part: Path) -> None:
        """Download a file to `part`, and rename it when its hash is right. The caller holds the file's lock."""
        offsets, in_flight = deque(range(0, info.bytes, CHUNK_BYTES)), deque[Any]()
        try:
            with open(part, "wb") as file:
                while offsets or in_flight:
                    while offsets and len(in_flight) < CHUNKS_IN_FLIGHT:
                        in_flight.append(self.client.server.read.remote(info.name, offsets.popleft()))
                    if self.stopping.is_set():
                        raise SweepStopped
                    file.write(self.client.result_of(in_flight.popleft()))
            if files.sha256_of(part) == info.sha256:
                path = self.top / info.name
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def send_run(client: FileClient, folder: Path, attempt: str, phase: str) -> None:
    """Send a finished run folder to the driver, which checks and publishes it."""
    sent: dict[str, SentFile] = {}
    in_flight: deque[Any] = deque()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        sent[name] = SentFile(path.stat().st_size, files.sha256_of(path))
        for offset, data in chunks_of(path):
            in_flight.append(client.server.write.remote(attempt, phase, name, offset, data))
            if len(in_flight) >= CHUNKS_IN_FLIGHT:
                client.result_of(in_flight.popleft())
    while in_flight:
        client.result_of(in_flight.popleft())
    client.call("publish", attempt, phase, sent)


def chunks_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file's chunks with their offsets; an empty file has one."""
    with open(path, "rb") as file:
        data = file.read(CHUNK_BYTES)
        yield 0, data
        while data := file.read(CHUNK_BYTES):
            yield file.tell() - len(data), data
