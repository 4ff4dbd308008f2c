"""Parquet files that are damaged or of a stranger: read in a child process, or refused by their hash before that."""

import os
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest

from paragen.common import parquet_files

ROWS = pa.table({"name": ["a", "b", "a"], "size": [1, None, 3]}).replace_schema_metadata({"paragen": '{"x": 1}'})


@pytest.fixture
def path(tmp_path) -> Path:
    pyarrow.parquet.write_table(ROWS, tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_every_reader_takes_a_sealed_file_for_the_same_and_each_flipped_bit_is_noticed(path):
    data = parquet_files.sealed(path.read_bytes())
    assert pyarrow.parquet.read_table(pa.BufferReader(data)).equals(ROWS, check_metadata=True)
    assert parquet_files.is_sealed(data) and not parquet_files.is_sealed(path.read_bytes())
    for place in range(len(data)):
        damaged = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        assert not parquet_files.is_sealed(damaged), place
    for short in (b"", b"PAR1", data[:10], data[-8:], data[-60:]):
        assert not parquet_files.is_sealed(short)


def test_a_sealed_file_is_read_here_and_a_damaged_one_is_not_parsed(path, monkeypatch):
    path.write_bytes(parquet_files.sealed(path.read_bytes()))
    monkeypatch.setattr(parquet_files, "read_in_child", lambda *_: pytest.fail("no child is needed"))
    assert parquet_files.read_own(path).equals(ROWS, check_metadata=True)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        parquet_files.read_own(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no regular file"):
        parquet_files.read_own(path)


def test_a_child_reads_the_same_rows_with_their_metadata(path):
    assert parquet_files.read_own(path).equals(ROWS, check_metadata=True)
    encoded = parquet_files.read_in_child(path, ["name", "no such column"], 3)
    assert pa.types.is_dictionary(encoded.schema.field("name").type)
    assert encoded.schema.metadata == ROWS.schema.metadata


@pytest.mark.parametrize(
    ("change", "limits", "told"),
    [
        (lambda path: None, {"most_rows": 2}, "it has 3 rows"),
        (lambda path: path.write_bytes(b"PAR1"), {}, "Parquet"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), {}, "Parquet"),
        (lambda path: path.unlink(), {}, "No such file"),
        (lambda path: None, {"cpu_seconds": 0}, "killed by SIG"),
        (lambda path: None, {"memory_bytes": 2**26}, "memory|MemoryError|allocate|killed|ended with status"),
    ],
    ids=["many rows", "short", "cut off", "gone", "no time", "no memory"],
)
def test_what_cannot_be_read_within_bounds_is_one_line(path, change, limits, told):
    change(path)
    with pytest.raises(ValueError, match=told) as error:
        parquet_files.read_in_child(path, **limits)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_text_that_expands_is_one_line(path):
    pyarrow.parquet.write_table(
        pa.table({"name": ["x" * 2**27] * 2}), path, use_dictionary=False, compression="zstd", write_statistics=False
    )
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match=r"more than 0\.3 GB of memory|allocat"):
        parquet_files.read_in_child(path, memory_bytes=300 * 10**6)


def test_a_reader_that_has_seen_enough_leaves_no_child(path):
    pyarrow.parquet.write_table(pa.table({"number": range(10**6)}), path)
    stream = parquet_files.batches_in_child(path)
    next(stream)
    assert next(stream).num_rows == parquet_files.ROWS_AT_ONCE
    stream.close()
    children = psutil.Process().children()
    assert not [child for child in children if "paragen.common.parquet_files" in child.cmdline()]
