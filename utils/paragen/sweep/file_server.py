"""The driver's side of a sweep over machines that do not share storage: hands out files, takes in finished runs.

Imported by stage.py, which says how it all goes together. A run gets its name here alone: hashed again, of the latest
attempt, and trained on what the driver has.
"""

import contextlib
import hashlib
import os
import secrets
import threading
from pathlib import Path
from typing import NamedTuple

from paragen.collection import finishing, run_files, run_identity
from paragen.collection.manifest import Manifest, read_manifest
from paragen.common import cli, files, paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info
from paragen.model import base_models, model_files
from paragen.recipes import keys, render
from paragen.recipes.run import Cell, Run
from paragen.sweep import cell_worker, plan
from paragen.training import attempts

CHUNK = 16 * 2**20  # bytes that travel at once
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".ot")
UTILS = paths.UTILS


class Item(NamedTuple):
    """A file of the driver's machine."""

    name: str  # relative to the repository
    bytes: int
    sha256: str


class Need(NamedTuple):
    """What a worker on another node needs for one cell."""

    items: list[Item]
    recipes: tuple[str, str]  # pretrain and finetune, relative to the repository
    has_pretrain: bool  # the pretrain run is among the items
    room: int  # bytes that its runs take
    done: bool  # nothing: the collection is there already


class Listed(NamedTuple):
    """A file of a finished run, as its node read it."""

    bytes: int
    sha256: str


class Open(NamedTuple):
    """A cell that another node is at work on."""

    cell: Cell
    locks: contextlib.ExitStack

    def run(self, phase: str) -> Run:
        """The cell's run of a phase."""
        return self.cell.finetune if phase == "finetune" else self.cell.pretrain


def code_hash() -> str:
    """One hash over this repository's scripts as they are here."""
    return files.sha256_of_value({str(path.relative_to(UTILS)): files.sha256_of(path) for path in UTILS.rglob("*.py")})


class Depot:
    """The driver's side: hands out files, takes in runs.

    Args:
        node: the id of the cluster's node that it is on.
    """

    def __init__(self, node: str):
        self.node = node
        self.sweep = secrets.token_hex(8)
        self.code = code_hash()
        self.offered: dict[str, Path] = {}
        self.hashes: dict[Path, tuple[tuple, str]] = {}
        self.open: dict[str, Open] = {}  # by attempt
        self.planning = threading.Lock()

    def facts(self) -> dict[str, str]:
        """This node, this sweep, the repository by a name of its own, and its scripts."""
        where = hashlib.sha256(f"{os.uname().nodename}:{paths.ROOT}".encode()).hexdigest()[:12]
        return {"node": self.node, "sweep": self.sweep, "key": f"{paths.ROOT.name}-{where}", "code": self.code}

    def begin(self, cell: Cell, attempt: str) -> Need | None:
        """Take a cell's run folders for an attempt on another node and say what it needs.

        None: another process on this machine is at work on the cell. Raises UserError for what cannot be trained.
        """
        for run in cell.runs:
            attempts.check_claim(run.folder, attempt)
        self.forget(cell)
        with contextlib.ExitStack() as locks:
            for run in cell.runs:
                try:
                    locks.enter_context(files.lock(files.beside(run.folder, "lock")))
                except files.Busy:
                    return None
                files.recover_folder(run.folder)
            with self.planning:
                need = self._need(cell)
            cell_worker.log_of(cell).write_bytes(b"")
            self.open[attempt] = Open(cell, locks.pop_all())
        return need

    def _need(self, cell: Cell) -> Need:
        complete = {}
        for run in cell.runs:
            check_paths(run)
            complete[run.phase] = attempts.is_complete(run, run_identity.identity_of(run))
        recipes = tuple(below_root(run, run.recipe) for run in cell.runs)
        if complete["finetune"]:
            return Need([], recipes, complete["pretrain"], 0, True)
        wanted = needed_files(cell)
        if complete["pretrain"]:
            # the folder by its name in the recipe: behind a link it may lie anywhere
            folder = cell.pretrain.resolve(cell.pretrain.config["output_dir"])
            wanted |= {below_root(cell.pretrain, path): path for path in folder.rglob("*") if path.is_file()}
        self.offered |= wanted
        items = [Item(name, path.stat().st_size, self._hash_of(path)) for name, path in sorted(wanted.items())]
        return Need(items, recipes, complete["pretrain"], plan.bytes_of(cell), False)

    def _hash_of(self, path: Path) -> str:
        if path.name.endswith(".safetensors") and path.parent.parent == paths.MODELS:
            return model_files.hashes_of(path.parent, [path])[path.name]  # remembered from sweep to sweep
        stamp = files.stamp_of(path.stat())
        if self.hashes.get(path, ((), ""))[0] != stamp:
            self.hashes[path] = stamp, files.sha256_of(path)
        return self.hashes[path][1]

    def read(self, name: str, offset: int) -> bytes:
        """A chunk of a file that was offered."""
        with open(self.offered[name], "rb") as file:
            file.seek(offset)
            return file.read(CHUNK)

    def report(self, attempt: str, output: bytes, phase: str, progress: bytes) -> None:
        """Take what a run wrote to its log since the last report, and its trainer log as it is."""
        taken = self._taken(attempt)
        with open(cell_worker.log_of(taken.cell), "ab") as log:
            log.write(output)
        if progress:
            seen = files.beside(taken.run(phase).folder, f"staging-{attempt}")  # where `make status` looks
            seen.mkdir(exist_ok=True)
            (seen / run_files.LOG).write_bytes(progress)

    def write(self, attempt: str, phase: str, name: str, offset: int, data: bytes) -> None:
        """Take a chunk of a file of a finished run."""
        self._taken(attempt)
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

    def publish(self, attempt: str, phase: str, listed: dict[str, Listed]) -> None:
        """Give a run that came back its name. Raises UserError where it is not whole, or not what is asked for."""
        taken = self._taken(attempt)
        run, staging = taken.run(phase), self._staging(attempt, phase)
        folder = run.folder
        check_arrived(staging, folder, listed)
        manifest = check_manifest(staging, folder)
        with self.planning:
            changed = run_identity.changes(manifest.identity, run_identity.identity_of(run))
        if changed:
            raise UserError(f"{'; '.join(changed)}: changed while it was trained on; run it again")
        attempts.check_claim(folder, attempt)
        files.publish_folder(staging, folder)
        if phase == "finetune" and cli.is_on("PRUNE_PRETRAIN"):
            files.remove_folder(taken.cell.pretrain.folder)

    def end(self, attempt: str) -> None:
        """Let go of a cell; what had come of an unfinished run is removed."""
        taken = self.open.pop(attempt, None)
        if taken is not None:
            for run in taken.cell.runs:
                files.recover_folder(run.folder)
            taken.locks.close()

    def forget(self, cell: Cell) -> None:
        """Let go of a cell that an attempt died over."""
        for attempt in [attempt for attempt, taken in list(self.open.items()) if taken.cell == cell]:
            self.end(attempt)

    def close(self) -> None:
        """Let go of all cells."""
        for attempt in list(self.open):
            self.end(attempt)

    def _taken(self, attempt: str) -> Open:
        if attempt not in self.open:
            raise UserError("another attempt took this cell over; nothing of this one is kept")
        return self.open[attempt]

    def _staging(self, attempt: str, phase: str) -> Path:
        return files.beside(self.open[attempt].run(phase).folder, f"staging-{attempt}-back")


def check_paths(run: Run) -> None:
    """Raise UserError for a path that would mean something else in another folder with this repository's layout."""
    for key in keys.PATHS:
        value = run.config.get(key)
        if value and os.path.isabs(os.path.expanduser(value)):
            place = f"{run.recipe}:{render.line_of(run.recipe, key)}"
            raise UserError(f"{place}: {key} {value} is absolute; STAGE=1 needs a path relative to the recipe")
        if value:
            below_root(run, run.resolve(value))


def below_root(run: Run, path: Path) -> str:
    """`path` relative to the repository. Raises UserError naming the run's recipe when it lies elsewhere."""
    path = path.absolute()
    if not path.is_relative_to(paths.ROOT):
        raise UserError(
            f"{run.recipe}: needs {path}, which lies outside {paths.ROOT}; STAGE=1 brings what is inside alone"
        )
    return str(path.relative_to(paths.ROOT))


def needed_files(cell: Cell) -> dict[str, Path]:
    """What another node needs to train a cell from its beginning: the files, by name relative to the repository."""
    found = {*cell.recipes, base_models.TABLE}
    for run in cell.runs:
        found |= files_of_model(run.base)
        folder = run.resolve(run.config.get("dataset_dir", "data"))
        media = run.resolve(run.config["media_dir"]) if run.config.get("media_dir") else folder
        found.add(folder / "dataset_info.json")
        for name in run.config["dataset"].split(","):
            found |= files_of_dataset(name.strip(), folder, media, run.config.get("max_samples"))
    return {below_root(cell.finetune, path): path for path in found}


def files_of_model(folder: Path) -> set[Path]:
    """The files of a model folder, without second copies of its weights in other formats."""
    weights = set(model_files.weight_files(folder))
    there = {path for path in folder.rglob("*") if path.is_file() and not path.name.endswith((".lock", ".incomplete"))}
    return {path for path in there if path in weights or path.suffix not in OTHER_WEIGHTS}


def files_of_dataset(name: str, folder: Path, media: Path, count: int | None) -> set[Path]:
    """The data file of a dataset and the pictures that its first `count` rows show."""
    path = dataset_info.data_file(name, folder)
    columns = dataset_info.columns_of(dataset_info.entry_of(name, folder))
    if "images" not in columns:
        return {path}
    rows = dataset_info.load_rows(path)[:count]
    return {path} | {media / shown for row in rows for shown in dataset_info.pictures_of(row, columns["images"])}


def check_arrived(staging: Path, folder: Path, listed: dict[str, Listed]) -> None:
    """Read a run that came back from disk and raise UserError unless each file is what its node sent, and no other."""
    there = {str(path.relative_to(staging)): path for path in staging.rglob("*") if path.is_file()}
    for name in sorted(there.keys() | listed.keys()):
        if name in there and name in listed:
            with open(there[name], "rb") as file:
                os.fsync(file.fileno())
            if Listed(there[name].stat().st_size, files.sha256_of(there[name])) == listed[name]:
                continue
        raise UserError(f"{paths.relative(folder / name)}: came back with other bytes than it was sent; run it again")


def check_manifest(staging: Path, folder: Path) -> Manifest:
    """The manifest of a run that came back; raises UserError unless the files beside it are those that it lists."""
    manifest = read_manifest(staging)
    if manifest is None:
        raise UserError(f"{paths.relative(folder)}: came back without manifest.json; run it again")
    entries, names = manifest.checkpoints, {paths.MANIFEST, run_files.LOG, run_files.PICTURE}
    if manifest.phase == "finetune":
        names |= {paths.ADAPTER_CONFIG, *(entry.file_name for entry in entries)}
        finishing.read_back(staging, entries)
        whole = files.sha256_of(staging / paths.ADAPTER_CONFIG) == manifest.adapter_config_sha256
    else:
        checkpoints = {entry.step: staging / f"checkpoint-{entry.step}" for entry in entries}
        names |= {path.name for path in checkpoints.values()}
        found = {step: run_identity.pretrain_of(path) for step, path in checkpoints.items()}
        whole = all(found[entry.step] and found[entry.step]["sha256"] == entry.sha256 for entry in entries)
    if not whole or not {path.name for path in staging.iterdir()} <= names or manifest.run != folder.name:
        raise UserError(f"{paths.relative(folder)}: came back otherwise than its manifest says; run it again")
    return manifest
