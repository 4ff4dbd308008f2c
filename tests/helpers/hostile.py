"""Random hostile inputs for commands, and a process that gives them to the commands and watches what these do.

    python tests/helpers/hostile.py KIND|all COUNT SEED FOLDER     on a copy of tests/collected_before at FOLDER

Each input is one that works, changed at random places, with its hashes made right again: what a stranger can write. A
command may succeed or raise UserError, in SECONDS of a processor and with BYTES of memory. It may write below saves/
and data/ alone, start no process but the one that reads Parquet, and import no module that an input names. Prints a
line for each input that did more, and ends with 1.
"""

import contextlib
import copy
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS, BYTES = 10, 10**9
CATEGORY = "common-sense-reasoning"
RUN = "Tiny-Llama_lora-rank_1_finetune"
NAME = f"{CATEGORY}/Toy/{RUN}"
REPO = "user/toy"
READER = ["-m", "paragen.common.parquet_files"]  # the one process that a command may start
CANARIES = ("this", "antigravity", "__phello__")  # modules of Python that nothing imports
DEEP = json.loads("[" * 300 + "]" * 300)
VALUES = [
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 7919, 10**6, 2**31, 2**53, 2**63, 10**40, 1e308, float("nan"),
    float("inf"), "", " ", "this", "antigravity", "../../evil", "/etc/passwd", "/", "..", ".", "x" * 300, "x" * 10**5,
    "a\nb", "a\0b", "\ud800", "\u202e", "(a+)+$", "(a|a)*b", ".*" * 20 + "x", "[", "all-linear", "${oc.env:HOME}",
    "{{ 7 }}", "<script>", "pissa_niter_99999", "0" * 64, "-5", "1e400", [], {}, [[]], ["this"], [[0, 2]] * 3000, DEEP,
    {"this": "this"}, {"(a+)+": 3}, [None] * 1000, list(range(5000)), {"role_tag": 5}, "sharegpt", "finetune",
]  # fmt: skip
KEYS = [
    "megatron_config", "megatron_core", "layer_replication", "target_modules", "rank_pattern", "alpha_pattern",
    "auto_mapping", "eva_config", "loftq_config", "trust_remote_code", "template", "model_name_or_path",
    "adapter_name_or_path", "rope_scaling", "quantization_bit", "add_tokens", "tool_format", "default_system",
    "columns", "tags", "formatting", "held_out", "script_url", "hf_hub_url", "file_name", "prompts_only",
    "pretrain", "converted", "\u202e", "", "x" * 10**4, "output_dir", "cutoff_len", "max_steps", "seed",
    "resume_from_checkpoint", "dataset_dir", "save_total_limit",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- changed inputs


def places(value: Any, way: tuple = ()) -> Iterator[tuple]:
    """The way to each value inside a JSON value, by keys and numbers."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*way, key)
        yield from places(one, (*way, key))


def changed(value: Any, some: random.Random) -> Any:
    """A JSON value with one to three random changes."""
    value = copy.deepcopy(value)
    for _ in range(some.choice((1, 1, 1, 2, 3))):
        ways = [way for way in places(value) if len(way) < 20]
        if not ways or some.random() < 0.02:
            return copy.deepcopy(some.choice(VALUES))
        *way, last = some.choice(ways)
        holder = value
        for part in way:
            holder = holder[part]
        what = some.random()
        if what < 0.1:
            del holder[last]
        elif what < 0.3 and isinstance(holder, dict):
            holder[some.choice(KEYS)] = copy.deepcopy(some.choice(VALUES))
        elif what < 0.45 and type(holder[last]) in (int, float):
            holder[last] = some.choice((-1, 10, 1000, 10**9, 0.5)) * holder[last]
        elif what < 0.55 and isinstance(holder[last], str) and holder[last]:
            holder[last] = flipped(holder[last].encode("utf-8", "surrogatepass"), some).decode(
                "utf-8", "surrogateescape"
            )
        else:
            holder[last] = copy.deepcopy(some.choice(VALUES))
    return value


def flipped(data: bytes, some: random.Random) -> bytes:
    """Bytes with a random change: a bit, some bytes, the end cut off, a part twice."""
    place, what = some.randrange(max(1, len(data))), some.random()
    if what < 0.5 and data:
        return data[:place] + bytes([data[place] ^ (1 << some.randrange(8))]) + data[place + 1 :]
    if what < 0.7:
        return data[:place] + some.randbytes(some.choice((1, 4, 100))) + data[place + 4 :]
    if what < 0.85:
        return data[:place]
    return data[:place] + data[some.randrange(max(1, len(data))) :]


def text_of(value: Any) -> bytes:
    """A JSON value as bytes, half a surrogate pair as JSON writes it."""
    return json.dumps(value).encode()


def resealed(content: Any) -> Any:
    """A manifest with its own hash, where one can be computed."""
    from paragen.collection.manifest import sealed

    try:
        return sealed(content) if isinstance(content, dict) else content
    except (ValueError, RecursionError):
        return content


def archive_index(path: Path) -> tuple[bytes, dict]:
    """(The blocks, the index) of an archive."""
    from safetensors import safe_open

    from paragen.archives import read

    with safe_open(path, "np") as file:
        size = int(file.metadata()["index_bytes"])
        text = read.codec().decompress(file.get_tensor("index").tobytes(), size, asbytes=True)
        return file.get_tensor("blocks").tobytes(), json.loads(text)


def write_archive(path: Path, blocks: bytes, index: Any) -> None:
    """Write an archive of these blocks and this index, with a right seal."""
    from paragen.archives import read, write

    text = text_of(index)
    with open(path, "wb") as file:
        file.write(bytes(read.HEAD) + blocks)
        write._finish(file, read.codec().compress(text, asbytes=True), len(text))


def with_files(blocks: bytes, index: dict, small: dict[str, bytes], seal: Any) -> tuple[bytes, dict]:
    """(Blocks, index) of an archive without scores whose small files are replaced by others after the other blocks.

    What is replaced counts as headers that no checkpoint has, since blocks have to cover the whole file.
    """
    index = {**index, "manifest": seal, "files": dict(index["files"]), "headers": [*index["headers"]]}
    for name in ("evaluation.json", *small):
        index["headers"].append(index["files"].pop(name))
    for name, data in small.items():
        block = ["raw", len(blocks), len(data), hashlib.sha256(data).hexdigest()]
        index["files"][name] = {"block": block, "bytes": len(data)}
        blocks += data
    return blocks, index


# --------------------------------------------------------------------------------------------------------- the watching


class Watch:
    """Records what Python does that no input may cause, between `begin` and `faults`."""

    def __init__(self, allowed: list[Path]):
        self.allowed, self.found, self.on = [os.path.realpath(path) for path in allowed], [], False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
            if not (event == "subprocess.Popen" and list(arguments[1])[1:3] == READER):
                self.found.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.check(event, arguments[0])
        elif event in (
            "os.remove",
            "os.rename",
            "os.mkdir",
            "os.rmdir",
            "os.link",
            "os.symlink",
            "os.chmod",
            "shutil.rmtree",
        ):
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, str | os.PathLike) and os.path.isabs(path):  # others are relative to an open folder
                    self.check(event, os.fspath(path))

    def check(self, event: str, path: str) -> None:
        self.on = False
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        cached = os.path.basename(real).startswith((".hashes.json", "..hashes.json"))  # of the models' files
        if not cached and not any(
            real == top or real.startswith(f"{top}/") for top in [*self.allowed, "/dev", "/proc"]
        ):
            self.found.append(f"{event} {path!r}")
        self.on = True

    def begin(self) -> None:
        self.found, self.on = [], True
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the highest memory is that from now on
        self.memory, self.started = memory("VmRSS"), used_seconds()

    def faults(self) -> list[str]:
        self.on = False
        seconds, grown = used_seconds() - self.started, memory("VmHWM") - self.memory
        found = [*self.found, *(f"imported {name}" for name in CANARIES if name in sys.modules)]
        found += [f"took {seconds:.1f} s"] if seconds > SECONDS else []
        found += [f"took {grown / 1e6:.0f} MB"] if grown > BYTES else []
        for name in CANARIES:
            sys.modules.pop(name, None)
        return found


def used_seconds() -> float:
    """The processor time that this process and its children have taken: other programs do not make it longer."""
    return sum(os.times()[:4])


def memory(name: str) -> int:
    """A figure of this process's memory in /proc/self/status, bytes."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def called(watch: Watch, script: str, *arguments: object, **settings: str) -> tuple[str, str | None]:
    """(How a script's `main` ended in this process, what was wrong with that or None)."""
    module = importlib.import_module(script)
    sys.argv = [script, *map(str, arguments)]
    os.environ.update(settings)

    def late(*_: object) -> None:
        raise TimeoutError("hangs")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(6 * SECONDS)
    ended, fault = "done", None
    watch.begin()
    try:
        module.main()
    except BaseException as error:
        watch.on = False
        ended = f"{type(error).__name__}: {error}"
        if "UserError" not in {kind.__name__ for kind in type(error).__mro__}:
            fault = "".join(traceback.format_exception(error)[-6:])
        elif "\n" in str(error):
            fault = f"more than one line: {error}"
    finally:
        signal.alarm(0)
        for name in settings:
            os.environ.pop(name, None)
    if found := watch.faults():
        fault = "; ".join([*found, *([fault] if fault else [])])
    return ended, fault


# ---------------------------------------------------------------------------------------------------------------- kinds


class Stored:
    """What inputs are made from, read once from a copy of tests/collected_before at `top`."""

    def __init__(self, top: Path):
        self.top = top
        self.folder = top / "saves" / NAME
        (self.folder / "evaluation.json").unlink()  # or evaluate would have nothing to do
        self.manifest = json.loads((self.folder / "manifest.json").read_bytes())
        self.config = json.loads((self.folder / "adapter_config.json").read_bytes())
        self.archive = top / "x.archive"
        shutil.copy(top / "saves" / "exports" / "archive" / f"{NAME}.archive", self.archive)
        self.archived = self.archive.read_bytes()
        self.blocks, self.index = archive_index(self.archive)
        published = top / "saves" / "publish" / "user--toy-raw"
        self.published = {
            path.relative_to(published).as_posix(): path.read_bytes() for path in published.rglob("*") if path.is_file()
        }
        for name in ("exports", "publish", f"{CATEGORY}/Toy/{RUN.replace('rank_1', 'rank_2')}"):
            shutil.rmtree(top / "saves" / name)
        self.saves, self.data = tree(top / "saves"), tree(top / "data")

    def restore(self, with_saves: bool = True) -> None:
        """Bring saves/ and data/ back to what they were, or saves/ to nothing."""
        for name, files in (("saves", self.saves if with_saves else {}), ("data", self.data)):
            if tree(self.top / name) != files or not with_saves:
                shutil.rmtree(self.top / name)
                (self.top / name).mkdir()
                for path, data in files.items():
                    (self.top / name / path).parent.mkdir(parents=True, exist_ok=True)
                    (self.top / name / path).write_bytes(data)

    def empty(self) -> None:
        """Leave saves/ and data/ with nothing in them."""
        for name in ("saves", "data"):
            shutil.rmtree(self.top / name)
            (self.top / name).mkdir()

    def write(self, manifest: Any, config: bytes | None = None) -> None:
        """Write the collection's manifest, and its adapter_config.json where one is given."""
        if config is not None:
            (self.folder / "adapter_config.json").write_bytes(config)
        (self.folder / "manifest.json").write_bytes(text_of(manifest))

    def pull(self, watch: Watch, files: dict[str, bytes]) -> tuple[str, str | None]:
        """Pull a repository of these files into a project with nothing in it."""
        from huggingface_hub import constants

        from helpers.hub_server import Hub, Repository

        self.empty()
        with Hub({REPO: Repository(files)}) as hub:
            constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = hub.url, False, True
            constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            ended, fault = called(watch, "pull", REPO=REPO)
        left = [
            name for folder in ("saves", "data") for name in tree(self.top / folder) if "/publish/" not in f"/{name}"
        ]
        if ended != "done" and (left := [name for name in left if name.endswith((".json", ".safetensors"))]):
            fault = f"{fault or ''} left {left[0]} ({ended})"
        return ended, fault

    def imported(self, watch: Watch) -> tuple[str, str | None]:
        """Import the archive into a project with an empty saves/."""
        self.empty()
        ended, fault = called(watch, "import_archive", self.archive)
        left = [name for name in tree(self.top / "saves") if "staging" in name]
        return ended, fault or (f"left {left[0]}" if left else None)


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder with their content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def published(stored: Stored, change: Callable[[dict], None], more: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a repository some of which are replaced, its index's marks changed."""
    import pyarrow as pa
    import pyarrow.parquet

    from paragen.collection import index
    from paragen.publishing import published_tree

    table = pyarrow.parquet.read_table(pa.BufferReader(stored.published["index.parquet"]))
    marks = json.loads(table.schema.metadata[b"paragen"])
    change(marks)
    if "labels" not in marks["collections"][NAME]:
        for name in index.SCORES.keys() & set(table.column_names):
            nulls = pa.nulls(len(table), table.schema.field(name).type)
            table = table.set_column(table.column_names.index(name), name, nulls)
    return {**stored.published, "index.parquet": published_tree.index_of(table, marks), **more}


def repository_with(stored: Stored, manifest: Any, config: bytes | None = None) -> dict[str, bytes]:
    """A repository with this manifest and adapter_config.json and without scores, whose index names them."""
    small = {"manifest.json": text_of(manifest)} | ({} if config is None else {"adapter_config.json": config})

    def change(marks: dict) -> None:
        mark = marks["collections"][NAME]
        mark.pop("labels", None)
        mark["files"].pop(f"{NAME}/evaluation.json", None)
        mark["sha256"] = manifest.get("sha256") if isinstance(manifest, dict) else None
        mark["files"].update({f"{NAME}/{name}": len(data) for name, data in small.items()})

    return published(stored, change, {f"collections/{NAME}/{name}": data for name, data in small.items()})


def archive_with(stored: Stored, manifest: Any, config: bytes | None = None) -> None:
    """Write the archive with this manifest and adapter_config.json."""
    small = {"manifest.json": text_of(manifest)} | ({} if config is None else {"adapter_config.json": config})
    seal = manifest.get("sha256") if isinstance(manifest, dict) else None
    write_archive(stored.archive, *with_files(stored.blocks, stored.index, small, seal))


Outcome = tuple[str, str | None]


def through_all(watch: Watch, stored: Stored, manifest: Any, config: bytes | None = None) -> Iterator[Outcome]:
    """A collection with this manifest and adapter_config.json through verify, evaluate, import and pull."""
    stored.restore()
    stored.write(manifest, config)
    yield called(watch, "verify", stored.folder)
    yield called(watch, "evaluate", LIMIT="1", STEPS="last")
    archive_with(stored, manifest, config)
    yield stored.imported(watch)
    yield stored.pull(watch, repository_with(stored, manifest, config))


def manifests(watch: Watch, stored: Stored, some: random.Random) -> Iterator[Outcome]:
    content = changed(stored.manifest, some)
    yield from through_all(watch, stored, resealed(content) if some.random() < 0.95 else content)


def adapter_configs(watch: Watch, stored: Stored, some: random.Random) -> Iterator[Outcome]:
    config = text_of(changed(stored.config, some))
    config = flipped(config, some) if some.random() < 0.1 else config
    manifest = {**stored.manifest, "adapter_config_sha256": hashlib.sha256(config).hexdigest()}
    yield from through_all(watch, stored, resealed(manifest), config)


def archives(watch: Watch, stored: Stored, some: random.Random) -> Iterator[Outcome]:
    stored.restore()
    if some.random() < 0.4:
        stored.archive.write_bytes(flipped(stored.archived, some))
    else:
        blocks = flipped(stored.blocks, some) if some.random() < 0.2 else stored.blocks
        write_archive(stored.archive, blocks, changed(stored.index, some))
    yield stored.imported(watch)


def index_files(watch: Watch, stored: Stored, some: random.Random) -> Iterator[Outcome]:
    data = stored.published["index.parquet"]
    if some.random() < 0.4:
        yield stored.pull(watch, {**stored.published, "index.parquet": flipped(data, some)})
        return
    import pyarrow as pa
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(pa.BufferReader(data))
    marks = json.loads(table.schema.metadata[b"paragen"])
    rows = table.to_pylist()
    if some.random() < 0.5:
        marks = changed(marks, some)
    else:
        rows = changed(rows, some)
    try:
        table = pa.Table.from_pylist([{**row} for row in rows], schema=table.schema)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
        with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            table = pa.Table.from_pylist([{key: str(row[key]) for key in row} for row in rows])
    sink = pa.BufferOutputStream()
    metadata = {"paragen": text_of(marks)}
    pyarrow.parquet.write_table(
        table.replace_schema_metadata(metadata), sink, compression=some.choice(("snappy", "zstd"))
    )
    yield stored.pull(watch, {**stored.published, "index.parquet": sink.getvalue().to_pybytes()})


def recipes(watch: Watch, stored: Stored, some: random.Random) -> Iterator[Outcome]:
    import yaml

    stored.restore()
    path = stored.top / "collect_scripts" / CATEGORY / "Toy" / "tiny_Toy_finetune.yaml"
    before = path.read_bytes()
    try:
        if some.random() < 0.4:
            path.write_bytes(flipped(before, some))
        else:
            content = changed(yaml.safe_load(before), some)
            text = yaml.safe_dump(content, allow_unicode=True) if some.random() < 0.5 else text_of(content).decode()
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        yield called(watch, "verify", "--recipe", path, 1)
        yield called(watch, "check_recipes", path)
    finally:
        path.write_bytes(before)


def datasets(watch: Watch, stored: Stored, some: random.Random) -> Iterator[Outcome]:
    stored.restore()
    name = some.choice(("dataset_info.json", f"{CATEGORY}/Toy.json", f"{CATEGORY}/Toy_test.json"))
    before = stored.data[name]
    data = flipped(before, some) if some.random() < 0.3 else text_of(changed(json.loads(before), some))
    (stored.top / "data" / name).write_bytes(data)
    yield called(watch, "evaluate", LIMIT="1", STEPS="last")

    def change(marks: dict) -> None:
        if name in marks["data"]:
            marks["data"][name] = hashlib.sha256(data).hexdigest()

    yield stored.pull(watch, published(stored, change, {f"data/{name}": data}))


KINDS = {
    "manifests": manifests, "adapter configs": adapter_configs, "archives": archives, "index files": index_files,
    "recipes": recipes, "datasets": datasets,
}  # fmt: skip


def main() -> int:
    kind, count, seed, top = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ["TMPDIR"] = tempfile.tempdir = str(top / "tmp")
    (top / "tmp").mkdir()
    stored = Stored(top)
    watch = Watch([top / "saves", top / "data", top / "tmp", stored.archive])
    for ended, fault in through_all(watch, stored, stored.manifest):  # what works loads all modules, and has to work
        print("unchanged:", ended, fault or "", flush=True)
        if ended != "done":
            return 1
    return 1 if sum(tried(watch, stored, one, count, seed) for one in (KINDS if kind == "all" else [kind])) else 0


def tried(watch: Watch, stored: Stored, kind: str, count: int, seed: str) -> int:
    """Give so many inputs of a kind to the commands, and print what was wrong with each; returns how many were."""
    faults: int = 0
    ends: Counter[str] = Counter()
    for number in range(count):
        for place, (ended, fault) in enumerate(KINDS[kind](watch, stored, random.Random(f"{seed} {kind} {number}"))):
            ends[ended.split(":")[0]] += 1
            if fault:
                faults += 1
                print(f"FAULT {kind} {seed} {number} command {place}: {fault}", flush=True)
    print(f"{count} {kind}: {dict(ends)}, {faults} faults", flush=True)
    return faults
