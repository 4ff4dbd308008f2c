"""Reads Parquet files that are damaged or of a stranger, in a child process; and seals our own, so that none is needed.

A damaged file can make pyarrow end its process: an exception in C++ that Python never sees. It can also take all memory
or never come to an end. The child has bounds for both, and sends the rows as an Arrow stream.

    python -m paragen.common.parquet_files PATH OPTIONS        the child; OPTIONS are JSON, see `main`
"""

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paragen.common import cli, files, locks

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC, LENGTH = b"PAR1", 4  # a Parquet file ends with its footer, the footer's length, and this
SEAL = b"paragen-sha256:"  # between the last column and the footer, where readers do not look; the hash follows
SEAL_BYTES = len(SEAL) + hashlib.sha256().digest_size
MEMORY_BYTES = 4 << 30  # of the child's address space, of which its libraries take up to one half
CPU_SECONDS = 600  # of the child
ROWS_AT_ONCE = 4096
FAULTY = 3  # the child's status for a file that it refuses
# pyarrow's own pools and threads reserve address space by the number of processors.
CHILD_SETTINGS = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def sealed(data: bytes) -> bytes:
    """The bytes of a Parquet file with the hash of all its bytes in it; every reader takes them for the same file."""
    cut = _footer_at(data)
    return data[:cut] + SEAL + hashlib.sha256(data).digest() + data[cut:]


def is_sealed(data: bytes) -> bool:
    """Whether these are the bytes that `sealed` returned."""
    cut = _footer_at(data)
    start = cut - SEAL_BYTES
    if start < 0 or data[start : start + len(SEAL)] != SEAL:
        return False
    return hashlib.sha256(data[:start] + data[cut:]).digest() == data[start + len(SEAL) : cut]


def _footer_at(data: bytes) -> int:
    """Where the footer begins, by the length at the file's end; 0 where that cannot be."""
    end = len(data) - LENGTH - len(MAGIC)
    return max(0, end - int.from_bytes(data[end : end + LENGTH], "little")) if end > 0 else 0


def read_own(path: Path) -> "pa.Table":
    """A Parquet file that `sealed` made; one of an earlier version, which has no seal, is read in a child.

    Raises OSError for a file that cannot be opened, ValueError or what pyarrow raises for one that cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet

    data = files.read_up_to(path)
    if SEAL not in data:
        return read_in_child(path)
    if not is_sealed(data):
        raise ValueError(f"{path}: is damaged: it does not have the hash that was recorded in it")
    return pyarrow.parquet.read_table(pa.BufferReader(data))


def read_in_child(
    path: Path,
    dictionaries: Sequence[str] = (),
    most_rows: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    cpu_seconds: int = CPU_SECONDS,
) -> "pa.Table":
    """A Parquet file with the metadata of its schema, read as `batches_in_child` does; its values are checked to be
    within its arrays. Raises ValueError for a file that cannot be read."""
    import pyarrow as pa

    stream = batches_in_child(path, dictionaries, most_rows, memory_bytes, cpu_seconds)
    schema = next(stream)
    assert isinstance(schema, pa.Schema)
    table = pa.Table.from_batches(list(stream), schema)
    table.validate(full=True)
    return table


def batches_in_child(
    path: Path,
    dictionaries: Sequence[str] = (),
    most_rows: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    cpu_seconds: int = CPU_SECONDS,
) -> "Iterator[pa.Schema | pa.RecordBatch]":
    """The schema of a Parquet file, then its rows, ROWS_AT_ONCE at a time.

    Args:
        path: the file.
        dictionaries: columns of text to leave encoded as dictionaries, in which a few bytes can stand for gigabytes.
        most_rows: a file with more is refused; None for no limit.
        memory_bytes: of the child's address space.
        cpu_seconds: of the child.

    Raises ValueError, in one line, for a file that cannot be read, whatever it does to the process that reads it.
    """
    import pyarrow as pa

    options = {
        "dictionaries": list(dictionaries), "rows": most_rows, "bytes": memory_bytes, "seconds": cpu_seconds,
    }  # fmt: skip
    command = [sys.executable, "-m", "paragen.common.parquet_files", str(path.absolute()), json.dumps(options)]
    environment = {**cli.environment_for_modules(), **CHILD_SETTINGS}
    with tempfile.TemporaryFile(dir=locks.temporary_folder()) as complaints:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, env=environment)
        assert child.stdout is not None
        broken: Exception | None = None
        try:
            try:
                with pa.ipc.open_stream(child.stdout) as stream:
                    yield stream.schema
                    yield from stream
            except (pa.ArrowException, OSError) as error:  # the stream ended too early: the child says why
                broken = error
            child.stdout.close()
            status = child.wait()
        finally:
            child.kill()
            child.wait()
        complaints.seek(0)
        told = " ".join(complaints.read(4096).decode(errors="replace").split())[:300]
    if status == FAULTY:
        raise ValueError(told)
    if status < 0:
        raise ValueError(f"pyarrow, which read it, {cli.killed_text(status)}{f' ({told})' if told else ''}")
    if status or broken:
        raise ValueError(f"the process that read it ended with status {status} ({told or broken})")


def main() -> int:
    """The child: reads the file and writes its rows to stdout as an Arrow stream."""
    cli.end_with_parent()
    path, options = sys.argv[1], json.loads(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (options["seconds"], options["seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_AS, (options["bytes"], options["bytes"]))
    try:
        _send(path, options)
    except MemoryError:  # pyarrow's ArrowMemoryError is one, too
        print(f"reading it takes more than {options['bytes'] / 1e9:.1f} GB of memory", file=sys.stderr)
        return FAULTY
    except BrokenPipeError:  # the parent has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, LookupError, NotImplementedError, TypeError) as error:  # pyarrow's are among them
        print(str(error) or repr(error), file=sys.stderr)
        return FAULTY
    return 0


def _send(path: str, options: dict) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    limits = {"thrift_string_size_limit": 2**25, "thrift_container_size_limit": 2**20}
    with pyarrow.parquet.ParquetFile(path, **limits) as file:
        encoded = [name for name in file.schema.names if name in options["dictionaries"]]
    with pyarrow.parquet.ParquetFile(path, read_dictionary=encoded, pre_buffer=False, **limits) as file:
        if options["rows"] is not None and not 0 <= file.metadata.num_rows <= options["rows"]:
            raise ValueError(f"it has {file.metadata.num_rows} rows")
        sent = 0
        with pa.ipc.new_stream(sys.stdout.buffer, file.schema_arrow) as stream:
            for batch in file.iter_batches(ROWS_AT_ONCE, use_threads=False):
                sent += batch.num_rows
                if options["rows"] is not None and sent > options["rows"]:
                    raise ValueError(f"it has more than {options['rows']} rows")
                stream.write_batch(batch)


if __name__ == "__main__":
    ended = main()
    for written in (sys.stdout, sys.stderr):
        written.flush()
    os._exit(ended)  # taking pyarrow down would take a tenth of a second
