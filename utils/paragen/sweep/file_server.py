"""The driver's side of a sweep over machines that do not share storage: sends files to nodes, receives finished runs.

stage.py describes the whole. Only this server publishes a run: after its files were hashed again, where it is of the
latest attempt, and where it was trained on what the driver has.
"""

import contextlib
import hashlib
import os
import secrets
import threading
from pathlib import Path
from typing import NamedTuple

from paragen.collection import replacing, run_files, run_identity
from paragen.common import files, locks, paths, settings
from paragen.common.cli import UserError
from paragen.model import model_files
from paragen.recipes.run import Cell, Run
from paragen.sweep import cell_worker, plan, received_run, staged_files
from paragen.sweep.received_run import SentFile
from paragen.training import attempts

CHUNK_BYTES = 16 * 2**20  # of a file, sent in one message
UTILS = paths.UTILS


class FileInfo(NamedTuple):
    """A file of the driver's repository."""

    name: str  # relative to the repository
    bytes: int
    sha256: str


class FileManifest(NamedTuple):
    """What a worker on another node needs to train a cell."""

    files: list[FileInfo]
    recipes: tuple[str, str]  # pretrain and finetune, relative to the repository
    has_pretrain: bool  # whether the pretrain run is among the files
    run_bytes: int  # estimated size of the cell's runs
    is_complete: bool  # the driver has the collection, so nothing is needed


class OpenCell(NamedTuple):
    """A cell that another node trains."""

    cell: Cell
    locks: contextlib.ExitStack  # of its run folders

    def run(self, phase: str) -> Run:
        """The cell's run of a phase."""
        return self.cell.finetune if phase == "finetune" else self.cell.pretrain


def code_hash() -> str:
    """One hash over the scripts and rooms of this machine's copy of the repository."""
    return files.sha256_of_value({str(path.relative_to(UTILS)): files.sha256_of(path) for path in UTILS.rglob("*.py")})


class FileServer:
    """Sends files and receives runs. It is a Ray actor on the driver's machine, which workers call from any node.

    Args:
        node: the id of the Ray node on which it runs.
    """

    def __init__(self, node: str):
        self.node = node
        self.sweep = secrets.token_hex(8)
        self.code = code_hash()
        self.offered: dict[str, Path] = {}  # the files that may be read, by name
        self.hashes: dict[Path, tuple[tuple, str]] = {}  # stamp and SHA-256
        self.open_cells: dict[str, OpenCell] = {}  # by attempt
        self.identity_lock = threading.Lock()

    def facts(self) -> dict[str, str]:
        """The server's node, an id of this sweep, a name for the repository on a node's disk, the hash of the code."""
        where = hashlib.sha256(f"{os.uname().nodename}:{paths.ROOT}".encode()).hexdigest()[:12]
        return {"node": self.node, "sweep": self.sweep, "key": f"{paths.ROOT.name}-{where}", "code": self.code}

    def open_cell(self, cell: Cell, attempt: str) -> FileManifest | None:
        """Lock a cell's run folders for an attempt on another node.

        Returns what it needs; None where another process on this machine trains the cell. Raises UserError for a cell
        that cannot be trained.
        """
        for run in cell.runs:
            attempts.check_claim(run.folder, attempt)
        self.close_attempts_at(cell)
        with contextlib.ExitStack() as held:
            for run in cell.runs:
                try:
                    held.enter_context(locks.lock(files.beside(run.folder, "lock")))
                except locks.Busy:
                    return None
                files.recover_folder(run.folder)
            with self.identity_lock:
                needed = self._files_for(cell)
            cell_worker.log_of(cell).write_bytes(b"")
            self.open_cells[attempt] = OpenCell(cell, held.pop_all())
        return needed

    def _files_for(self, cell: Cell) -> FileManifest:
        complete = {}
        for run in cell.runs:
            staged_files.check_paths(run)
            complete[run.phase] = attempts.is_complete(run, run_identity.quick_identity_of(run))
        pretrain, finetune = (staged_files.name_of(run, run.recipe) for run in cell.runs)
        if complete["finetune"]:
            return FileManifest([], (pretrain, finetune), complete["pretrain"], 0, True)
        wanted = staged_files.files_of_cell(cell)
        if complete["pretrain"]:
            wanted |= staged_files.files_of_run(cell.pretrain)
        self.offered |= wanted
        infos = [FileInfo(name, path.stat().st_size, self._hash_of(path)) for name, path in sorted(wanted.items())]
        return FileManifest(infos, (pretrain, finetune), complete["pretrain"], plan.bytes_of(cell) or 0, False)

    def _hash_of(self, path: Path) -> str:
        if path.name.endswith(".safetensors") and path.parent.parent == paths.MODELS:
            return model_files.hashes_of(path.parent, [path])[path.name]  # stored on disk between sweeps
        stamp = files.stamp_of(path.stat())
        if self.hashes.get(path, ((), ""))[0] != stamp:
            self.hashes[path] = stamp, files.sha256_of(path)
        return self.hashes[path][1]

    def read(self, name: str, offset: int) -> bytes:
        """A chunk of a file that a FileManifest named."""
        with open(self.offered[name], "rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)

    def report(self, attempt: str, output: bytes, phase: str, progress: bytes) -> None:
        """Receive what a cell wrote to its log since the last report, and the whole trainer log of its present run."""
        opened = self._opened(attempt)
        with open(cell_worker.log_of(opened.cell), "ab") as log:
            log.write(output)
        if progress:
            shown = files.beside(opened.run(phase).folder, f"staging-{attempt}")  # `make status` reads it there
            shown.mkdir(exist_ok=True)
            (shown / run_files.LOG).write_bytes(progress)

    def write(self, attempt: str, phase: str, name: str, offset: int, data: bytes) -> None:
        """Receive a chunk of a file of a finished run."""
        self._opened(attempt)
        staging = self._staging(attempt, phase)
        path = staging / name
        if not path.resolve().is_relative_to(staging.resolve()):
            raise UserError(f"{name!r} leads out of the run folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        with open(handle, "wb", buffering=0) as file:
            file.seek(offset)
            while data:
                data = data[file.write(data) :]

    def publish(self, attempt: str, phase: str, sent: dict[str, SentFile]) -> None:
        """Publish a received run under its run folder's name.

        Raises UserError where it is incomplete, or was trained from something else than the driver has now.
        """
        opened = self._opened(attempt)
        run, staging = opened.run(phase), self._staging(attempt, phase)
        folder = run.folder
        received_run.check_arrived(staging, folder, sent)
        manifest = received_run.check_manifest(staging, folder)
        with self.identity_lock:
            changed = run_identity.changes(manifest.identity, run_identity.identity_of(run))
        if changed:
            raise UserError(f"{'; '.join(changed)}: changed while it was trained on; run it again")
        attempts.check_claim(folder, attempt)
        replacing.publish(staging, folder)
        if phase == "finetune" and settings.switch("PRUNE_PRETRAIN"):
            replacing.remove(opened.cell.pretrain.folder)

    def close_cell(self, attempt: str) -> None:
        """Unlock a cell's run folders, and remove what was received of an unfinished run."""
        opened = self.open_cells.pop(attempt, None)
        if opened is not None:
            for run in opened.cell.runs:
                files.recover_folder(run.folder)
            opened.locks.close()

    def close_attempts_at(self, cell: Cell) -> None:
        """Close a cell for the attempts that died without closing it."""
        for attempt in [attempt for attempt, opened in list(self.open_cells.items()) if opened.cell == cell]:
            self.close_cell(attempt)

    def close(self) -> None:
        """Close all cells."""
        for attempt in list(self.open_cells):
            self.close_cell(attempt)

    def _opened(self, attempt: str) -> OpenCell:
        if attempt not in self.open_cells:
            raise UserError("another attempt took this cell over; nothing of this one is kept")
        return self.open_cells[attempt]

    def _staging(self, attempt: str, phase: str) -> Path:
        return files.beside(self.open_cells[attempt].run(phase).folder, f"staging-{attempt}-back")
