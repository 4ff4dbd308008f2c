"""Sweeps over machines that do not share storage (STAGE=1): what a cell needs goes to its node, its runs come back.

Imported by sweep.py. The driver's machine holds data/, models/ and saves/; an actor there, the depot, hands files out
and takes runs in, through Ray's own connections. A worker on another node keeps what it was given below STAGE_DIR in
the repository's own layout (each file once, checked by SHA-256) and trains there as anywhere. A run gets its name on
the driver's side alone: hashed again, of the latest attempt, and trained on what the driver has.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cell_worker
import cli
import collection
import dataset_info
import files
import models
import paths
import plan
import rank_config
import run_identity
import status
import train
from cell_worker import CellWorker, Outcome
from cli import UserError
from status import Cell

NAME = "paragen-depot"  # as the workers of a sweep find the depot
CHUNK = 16 * 2**20  # bytes that travel at once
WINDOW = 4  # chunks on their way, per worker
RHYTHM = 2  # seconds between two reports of a run that goes on
NOTES = ".staged"  # below a node's folder: what is known of each file in it
# Recipe keys with paths. Below the stage folder they mean the same as in the repository only when they are relative.
PATH_KEYS = ("model_name_or_path", "dataset_dir", "media_dir", "output_dir", "resume_from_checkpoint")
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".ot")
UTILS = Path(__file__).resolve().parent


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
    folders: dict[str, Path]  # run folder by phase
    locks: contextlib.ExitStack


def asked() -> bool:
    """Whether the user said STAGE=1. Raises UserError where the driver is on no node of the cluster."""
    if os.environ.get("STAGE", "") in ("", "0"):
        return False
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise UserError(f"RAY_ADDRESS={address}: STAGE=1 must run on a node of the cluster: log in there, or use auto")
    return True


def open_depot(ray: Any) -> Any:
    """The depot's handle; it lives on this machine as long as the handle."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    kind = ray.remote(num_cpus=0, num_gpus=0, max_concurrency=16, scheduling_strategy=here, name=NAME)(Depot)
    depot = kind.remote(node)
    ray.get(depot.facts.remote())
    return depot


def close_depot(ray: Any, depot: Any) -> None:
    """Let go of all cells that nodes died over."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(depot.close.remote(), timeout=20)


def code_hash() -> str:
    """One hash over this repository's scripts as they are here."""
    return files.sha256_of_value({path.name: files.sha256_of(path) for path in UTILS.glob("*.py")})


class Stopped(Exception):
    """The sweep was told to stop."""


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
        folders = dict(zip(paths.PHASES, status.run_folders(cell), strict=True))
        for folder in folders.values():
            train.check_attempt(folder, attempt)
        self.forget(cell)
        with contextlib.ExitStack() as locks:
            for folder in folders.values():
                try:
                    locks.enter_context(files.lock(files.beside(folder, "lock")))
                except files.Busy:
                    return None
                files.recover_folder(folder)
            with self.planning:
                need = self._need(cell, folders)
            cell_worker.log_of(cell).write_bytes(b"")
            self.open[attempt] = Open(cell, folders, locks.pop_all())
        return need

    def _need(self, cell: Cell, folders: dict[str, Path]) -> Need:
        complete = {}
        for recipe, (phase, folder) in zip((cell.pretrain, cell.finetune), folders.items(), strict=True):
            config = rank_config.render(recipe, cell.rank)
            check_paths(recipe, config)
            complete[phase] = train.already_there(folder, run_identity.identity_of(recipe, config), phase)
        recipes = tuple(below_root(recipe, recipe) for recipe in (cell.pretrain, cell.finetune))
        if complete["finetune"]:
            return Need([], recipes, complete["pretrain"], 0, True)
        wanted = needed_files(cell)
        if complete["pretrain"]:
            # the folder by its name in the recipe: behind a link it may lie anywhere
            name = rank_config.render(cell.pretrain, cell.rank)["output_dir"]
            run = rank_config.resolve(cell.pretrain, name)
            wanted |= {below_root(cell.pretrain, path): path for path in run.rglob("*") if path.is_file()}
        self.offered |= wanted
        items = [Item(name, path.stat().st_size, self._hash_of(path)) for name, path in sorted(wanted.items())]
        return Need(items, recipes, complete["pretrain"], plan.bytes_of(cell), False)

    def _hash_of(self, path: Path) -> str:
        if path.name.endswith(".safetensors") and path.parent.parent == paths.MODELS:
            return models.hashes_of(path.parent, [path])[path.name]  # remembered from sweep to sweep
        stamp = stamp_of(path)
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
            seen = files.beside(taken.folders[phase], f"staging-{attempt}")  # where `make status` looks
            seen.mkdir(exist_ok=True)
            (seen / collection.LOG).write_bytes(progress)

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
        folder, staging = taken.folders[phase], self._staging(attempt, phase)
        recipe = taken.cell.pretrain if phase == "pretrain" else taken.cell.finetune
        check_arrived(staging, folder, listed)
        manifest = check_manifest(staging, folder)
        config = rank_config.render(recipe, taken.cell.rank)
        with self.planning:
            changed = run_identity.changes(manifest, run_identity.identity_of(recipe, config))
        if changed:
            raise UserError(f"{'; '.join(changed)}: changed while it was trained on; run it again")
        train.check_attempt(folder, attempt)
        files.publish_folder(staging, folder)
        if phase == "finetune" and os.environ.get("PRUNE_PRETRAIN", "") not in ("", "0"):
            files.remove_folder(taken.folders["pretrain"])

    def end(self, attempt: str) -> None:
        """Let go of a cell; what had come of an unfinished run is removed."""
        taken = self.open.pop(attempt, None)
        if taken is not None:
            for folder in taken.folders.values():
                files.recover_folder(folder)
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
        return files.beside(self.open[attempt].folders[phase], f"staging-{attempt}-back")


def check_paths(recipe: Path, config: dict) -> None:
    """Raise UserError for a path that would mean something else in another folder with this repository's layout."""
    for key in PATH_KEYS:
        value = config.get(key)
        if value and os.path.isabs(os.path.expanduser(value)):
            line = rank_config.line_of(recipe, key)
            raise UserError(f"{recipe}:{line}: {key} {value} is absolute; STAGE=1 needs a path relative to the recipe")
        if value:
            below_root(recipe, rank_config.resolve(recipe, value))


def below_root(recipe: Path, path: Path) -> str:
    """`path` relative to the repository. Raises UserError naming the recipe when it lies elsewhere."""
    path = path.absolute()
    if not path.is_relative_to(paths.ROOT):
        raise UserError(f"{recipe}: needs {path}, which lies outside {paths.ROOT}; STAGE=1 brings what is inside alone")
    return str(path.relative_to(paths.ROOT))


def needed_files(cell: Cell) -> dict[str, Path]:
    """What another node needs to train a cell from its beginning: the files, by name relative to the repository."""
    found = {cell.pretrain, cell.finetune, models.TABLE}
    for recipe in (cell.pretrain, cell.finetune):
        config = rank_config.render(recipe, cell.rank)
        found |= files_of_model(rank_config.resolve(recipe, config["model_name_or_path"]))
        folder = rank_config.resolve(recipe, config.get("dataset_dir", "data"))
        media = rank_config.resolve(recipe, config["media_dir"]) if config.get("media_dir") else folder
        found.add(folder / "dataset_info.json")
        for name in config["dataset"].split(","):
            found |= files_of_dataset(name.strip(), folder, media, config.get("max_samples"))
    return {below_root(cell.finetune, path): path for path in found}


def files_of_model(folder: Path) -> set[Path]:
    """The files of a model folder, without second copies of its weights in other formats."""
    weights = set(models.weight_files(folder))
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


def check_manifest(staging: Path, folder: Path) -> dict:
    """The manifest of a run that came back; raises UserError unless the files beside it are those that it lists."""
    manifest = collection.read_manifest(staging)
    if manifest is None:
        raise UserError(f"{paths.relative(folder)}: came back without manifest.json; run it again")
    entries, names = manifest["checkpoints"], {collection.MANIFEST, collection.LOG, collection.PICTURE}
    if manifest["phase"] == "finetune":
        names |= {"adapter_config.json", *(collection.checkpoint_name(entry["step"]) for entry in entries)}
        collection.read_back(staging, entries)
        whole = files.sha256_of(staging / "adapter_config.json") == manifest["adapter_config_sha256"]
    else:
        checkpoints = {entry["step"]: staging / f"checkpoint-{entry['step']}" for entry in entries}
        names |= {path.name for path in checkpoints.values()}
        found = {step: run_identity.pretrain_of(path) for step, path in checkpoints.items()}
        whole = all(found[entry["step"]] and found[entry["step"]]["sha256"] == entry["sha256"] for entry in entries)
    if not whole or not {path.name for path in staging.iterdir()} <= names or manifest["run"] != folder.name:
        raise UserError(f"{paths.relative(folder)}: came back otherwise than its manifest says; run it again")
    return manifest


class StagedWorker(CellWorker):
    """A CellWorker that, on another node than the driver's, works in that node's own folder."""

    def __init__(self, settings: dict[str, str], devices: str | None):
        import ray

        self.depot = ray.get_actor(NAME)
        self.facts = self.ask("facts")
        self.elsewhere = ray.get_runtime_context().get_node_id() != self.facts["node"]
        self.top = stage_folder(settings) / self.facts["key"]
        self.job: tuple[str, Need] | None = None  # the attempt at work and what it needs
        if self.elsewhere:
            settings |= {"PARAGEN_TOP": str(self.top), "PARAGEN_TOKENS": str(self.top / "saves" / ".tokens")}
        super().__init__(settings, devices)

    def collect(self, cell: Cell, attempt: str, smaller: bool) -> Outcome:
        """As CellWorker's; on another node, what the cell needs is brought first and its runs are sent back."""
        if not self.elsewhere:
            self.ask("forget", cell)
            return super().collect(cell, attempt, smaller)
        started = time.monotonic()
        try:
            outcome = self._collect_here(cell, attempt, smaller)
        except (Stopped, files.Busy):
            outcome = Outcome("stopped", None, 0.0)
        except (UserError, OSError) as error:
            fault = str(error) if isinstance(error, UserError) else cli.storage_fault(error)
            if fault is None:
                raise
            outcome = Outcome(f"failed: {fault} (on {os.uname().nodename})", None, 0.0)
        finally:
            self.ask("end", attempt)
        text = outcome.text.replace(f"{self.top}/", "")
        return outcome._replace(text=text, seconds=time.monotonic() - started)

    def _collect_here(self, cell: Cell, attempt: str, smaller: bool) -> Outcome:
        if code_hash() != self.facts["code"]:
            raise UserError(f"{UTILS}: is not the driver's version; bring this copy of the repository up to date")
        while (need := self.ask("begin", cell, attempt)) is None:  # another terminal's process is at work on it
            if self.stopping.wait(1):
                raise Stopped
        if need.done:
            return Outcome(cell_worker.COLLECTED, None, 0.0)
        here = cell._replace(pretrain=self.top / need.recipes[0], finetune=self.top / need.recipes[1])
        self._say(attempt, f"on {os.uname().nodename}, in {self.top}")
        make_private(self.top)
        bring(self, [item for item in need.items if item.name in need.recipes], 0)
        self.job = attempt, need
        with own_runs(here, attempt, self.stopping):
            bring(self, need.items, need.room)
            live_in(self.top)
            with self._reports(here, attempt):
                return super().collect(here, attempt, smaller)

    def finished(self, cell: Cell, phase: str) -> None:
        """Send a run back that is whole here."""
        if not self.elsewhere or (phase == "pretrain" and (self.job[1].has_pretrain or pruned())):
            return
        folder = dict(zip(paths.PHASES, status.run_folders(cell), strict=True))[phase]
        send(self, folder, self.job[0], phase)

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the depot and wait. Raises UserError with its text, or for a full disk on the driver's side."""
        return self.get(getattr(self.depot, method).remote(*arguments))

    def get(self, future: Any) -> Any:
        """What a call of the depot gave; raises as `ask`."""
        import ray

        try:
            return ray.get(future)
        except ray.exceptions.RayTaskError as error:
            fault = str(error.cause) if isinstance(error.cause, UserError) else cli.storage_fault(error.cause)
            if fault is None:
                raise
            raise UserError(fault) from None

    def _say(self, attempt: str, line: str) -> None:
        self.ask("report", attempt, f"{line}\n".encode(), "", b"")

    @contextlib.contextmanager
    def _reports(self, here: Cell, attempt: str) -> Iterator[None]:
        """Keep the driver's copies of the cell's log and of the run's own log up to date while the body runs."""
        ended, sent = threading.Event(), 0

        def report() -> None:
            nonlocal sent
            output = cell_worker.log_of(here).read_bytes()[sent:]
            sent += len(output)
            phase, progress = progress_of(here)
            if output or progress:
                self.ask("report", attempt, output.replace(f"{self.top}/".encode(), b""), phase, progress)

        def go_on() -> None:
            while not ended.wait(RHYTHM):
                with contextlib.suppress(OSError, UserError):
                    report()

        thread = threading.Thread(target=go_on, name="reports", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OSError, UserError):
                report()


def pruned() -> bool:
    """Whether pretrain folders are not kept."""
    return os.environ.get("PRUNE_PRETRAIN", "") not in ("", "0")


def stage_folder(settings: dict[str, str]) -> Path:
    """Where this node keeps what it is given: STAGE_DIR of the sweep, of the node, or below its temporary folder."""
    told = settings.get("STAGE_DIR") or os.environ.get("STAGE_DIR")
    return Path(told or Path(tempfile.gettempdir(), f"paragen-stage-{os.getuid()}")).expanduser().resolve()


def make_private(folder: Path) -> None:
    """Make a folder for this user alone; raises UserError where it, or the one above it, is somebody else's."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for part in (folder.parent, folder):
        if part.stat().st_uid != os.getuid():
            raise UserError(f"{part}: belongs to another user; choose a folder with STAGE_DIR")
    folder.chmod(0o700)


def live_in(top: Path) -> None:
    """Let this process, as those it starts with PARAGEN_TOP, take a stage folder for the repository."""
    paths.ROOT, models.TABLE = top, top / models.TABLE.relative_to(paths.ROOT)
    models.table.cache_clear()


def progress_of(here: Cell) -> tuple[str, bytes]:
    """The phase that is training here, and its trainer log so far."""
    for phase, folder in zip(paths.PHASES, status.run_folders(here), strict=True):
        for staging in files.companions(folder, "staging-"):
            with contextlib.suppress(OSError):
                return phase, (staging / collection.LOG).read_bytes()
    return "", b""


@contextlib.contextmanager
def own_runs(here: Cell, attempt: str, stopping: threading.Event) -> Iterator[None]:
    """Room for this attempt's runs alone: nothing of an earlier one is taken over, nothing is left afterwards."""
    folders = status.run_folders(here)
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(files.beside(folder, "attempt"), attempt.encode())
        clear(folder, stopping)
    try:
        yield
    finally:
        for folder in folders:
            with contextlib.suppress(files.Busy):
                clear(folder, None)
            files.beside(folder, "attempt").unlink(missing_ok=True)
        cell_worker.log_of(here).unlink(missing_ok=True)


def clear(folder: Path, stopping: threading.Event | None) -> None:
    """Remove a run folder and what belongs to it, as soon as no process is at work on it.

    Raises files.Busy when one is and `stopping` is None or gets set.
    """
    while True:
        try:
            with files.lock(files.beside(folder, "lock")):
                files.recover_folder(folder)
                files.remove_folder(folder)
                return
        except files.Busy:
            if stopping is None or stopping.wait(1):
                raise


def bring(worker: StagedWorker, items: list[Item], room: int) -> None:
    """Have each file whole below the worker's folder. Raises UserError when the disk is too small, also for `room`."""
    top, sweep = worker.top, worker.facts["sweep"]
    lacking = sum(item.bytes for item in items if not is_whole(top, item, sweep))
    free = shutil.disk_usage(top).free
    if lacking + room > free:
        raise UserError(
            f"{top}: {(lacking + room) / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; make room, or "
            "choose another disk with STAGE_DIR"
        )
    for item in items:
        note = top / NOTES / item.name
        note.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(note.with_name(f"{note.name}.lock"), waiting=f"another worker brings {item.name}"):
            for _ in range(2):
                if is_whole(top, item, sweep):
                    break
                fetch(worker, item, note.with_name(f"{note.name}.part"))
            else:
                raise UserError(f"{item.name}: arrives with other bytes than the driver has, twice")


def is_whole(top: Path, item: Item, sweep: str) -> bool:
    """Whether a file is here with the driver's bytes: read again once a sweep, and whenever it was touched."""
    path, note = top / item.name, top / NOTES / item.name
    try:
        stamp = list(stamp_of(path))
        with contextlib.suppress(OSError, ValueError):
            if json.loads(note.read_bytes()) == [sweep, item.sha256, stamp]:
                return True
        if stamp[0] != item.bytes or files.sha256_of(path) != item.sha256:
            return False
    except FileNotFoundError:
        return False
    note.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(note, json.dumps([sweep, item.sha256, stamp]).encode())
    return True


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is written to or replaced."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def fetch(worker: StagedWorker, item: Item, part: Path) -> None:
    """Bring one file, chunk by chunk; it gets its name when it is whole. Call it with the file's lock held."""
    offsets, coming = deque(range(0, item.bytes, CHUNK)), deque()
    try:
        with open(part, "wb") as file:
            while offsets or coming:
                while offsets and len(coming) < WINDOW:
                    coming.append(worker.depot.read.remote(item.name, offsets.popleft()))
                if worker.stopping.is_set():
                    raise Stopped
                file.write(worker.get(coming.popleft()))
        if files.sha256_of(part) == item.sha256:
            path = worker.top / item.name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def send(worker: StagedWorker, folder: Path, attempt: str, phase: str) -> None:
    """Send a finished run folder back and have it published."""
    listed, going = {}, deque()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        listed[name] = Listed(path.stat().st_size, files.sha256_of(path))
        for offset, data in chunks_of(path):
            going.append(worker.depot.write.remote(attempt, phase, name, offset, data))
            if len(going) >= WINDOW:
                worker.get(going.popleft())
    while going:
        worker.get(going.popleft())
    worker.ask("publish", attempt, phase, listed)


def chunks_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """A file's chunks with their offsets; an empty file has one."""
    with open(path, "rb") as file:
        data = file.read(CHUNK)
        yield 0, data
        while data := file.read(CHUNK):
            yield file.tell() - len(data), data
