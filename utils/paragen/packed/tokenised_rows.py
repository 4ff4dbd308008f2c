"""The tokenised rows of a pack's runs, as LLaMA-Factory makes them: several datasets at a time, in other processes."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.model import load_tokenizer

from paragen.common import devices, files, parallel
from paragen.packed.batches import Row
from paragen.packed.side_processes import Calls
from paragen.recipes import keys
from paragen.training import token_cache

FILE = "rows.npz"  # in a staging folder: the rows that another process has made, until they are read
TEMPLATE_KEYS = (*keys.TEXT, "train_on_prompt")  # the data arguments that decide a template and what it adds


class Tokenizers:
    """LLaMA-Factory's tokenizers with templates. Loading one takes a second: runs with equal settings share it."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {}

    def of(self, parsed: tuple) -> tuple[dict[str, Any], Any]:
        """LLaMA-Factory's tokenizer module (`tokenizer` and `processor`) and template for parsed arguments.

        As without sharing, the model arguments get what loading a tokenizer sets in them.
        """
        model_args, data_args = parsed[:2]
        before = {name: value for name, value in vars(model_args).items() if name != "cache_dir"}  # each run's own
        key = repr((sorted(before.items()), [getattr(data_args, name) for name in TEMPLATE_KEYS]))
        if key not in self.known:
            module = load_tokenizer(model_args)
            template = copy.copy(get_template_and_fix_tokenizer(module["tokenizer"], data_args))  # others change it
            self.known[key] = module, template, {name: vars(model_args)[name] for name in before}
        module, template, after = self.known[key]
        vars(model_args).update(after)
        return module, template


class Source(NamedTuple):
    """What the rows of a run are made from.

    Attributes:
        staging: the run's staging folder, which has the caches of the datasets library.
        cached: the folder for them in the sweep's cache, or None.
        parsed: LLaMA-Factory's parsed arguments.
        tokenizers: those of the pack.
    """

    staging: Path
    cached: Path | None
    parsed: tuple
    tokenizers: Tokenizers

    def rows(self) -> list[Row]:
        """Tokenise the rows, or read them from the sweep's cache where the arguments say so."""
        module, template = self.tokenizers.of(self.parsed)
        data = get_dataset(template, *self.parsed[:3], stage="sft", **module)
        if self.cached and (self.staging / "tokens").is_dir():
            token_cache.keep(self.staging / "tokens", self.cached)
        return rows_of(data["train_dataset"])

    def start_over(self) -> None:
        """Remove what a process left that was to make the rows."""
        for left in ("tokens", "cache"):
            files.remove_folder(self.staging / left)


class RowsAhead:
    """Rows that other processes make ahead of their use.

    Args:
        sources: what they are made from, by the key of the data and settings.
        calls: the processes, which make the rows of the sources in this order.
    """

    def __init__(self, sources: dict[str, Source], calls: Calls):
        self.sources, self.calls, self.numbers = sources, calls, {key: place for place, key in enumerate(sources)}

    def take(self, key: str) -> tuple[list[Row] | None, str | None]:
        """(The rows of a key once they are made, None); where that failed: (None, why)."""
        source = self.sources[key]
        if (fault := self.calls.fault_of(self.numbers[key])) is not None:
            source.start_over()
            return None, fault
        return read(source.staging / FILE), None


@contextmanager
def ahead(sources: dict[str, Source]) -> Iterator[RowsAhead | None]:
    """Until the body ends, other processes make rows, on as many cores as a run may use.

    Args:
        sources: what they are made from, by the key of the data and settings. Their tokenizers are loaded already.

    Yields None where there is too little to divide, or a single core to use.
    """
    width = min(devices.threads(), parallel.WORKERS)
    if width < 2 or len(sources) < 2 or sys.platform != "linux":  # elsewhere a fork is not safe, or there is none
        yield None
        return
    with Calls(_maker(list(sources.values())), len(sources), width) as calls:
        yield RowsAhead(sources, calls)


def _maker(sources: list[Source]) -> Callable[[int], None]:
    """A function for `Calls` that makes the rows of the source of a number, into its staging folder."""

    def make(number: int) -> None:
        datasets.disable_progress_bars()  # several would be drawn over each other
        write(sources[number].staging / FILE, sources[number].rows())

    return make


def write(path: Path, rows: list[Row]) -> None:
    """Write rows to a file for `read`."""
    lengths = np.array([len(row.tokens) for row in rows], np.int64)
    tokens, labels = (np.concatenate(each) for each in zip(*rows, strict=True))
    np.savez(path, lengths=lengths, tokens=tokens, labels=labels)


def read(path: Path) -> list[Row]:
    """The rows in a file of `write`, which is removed. Not verified: a process of this run has just written it."""
    with np.load(path, allow_pickle=False) as found:
        rows = _split(found["tokens"], found["labels"], found["lengths"])
    path.unlink()
    return rows


def rows_of(dataset: datasets.Dataset) -> list[Row]:
    """LLaMA-Factory's tokenised dataset as rows; they are parts of two arrays, without Python lists of numbers."""
    table = dataset.select_columns(["input_ids", "labels"]).with_format("arrow")[:]
    columns = [pa.concat_arrays(table[name].chunks) for name in ("input_ids", "labels")]
    tokens, labels = (column.flatten().to_numpy(zero_copy_only=False).astype(np.int64) for column in columns)
    return _split(tokens, labels, columns[0].value_lengths().to_numpy(zero_copy_only=False))


def _split(tokens: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> list[Row]:
    """Rows of these lengths from their tokens and labels, each joined to one array."""
    ends = np.cumsum(lengths)[:-1]
    return [Row(*pair) for pair in zip(np.split(tokens, ends), np.split(labels, ends), strict=True)]
