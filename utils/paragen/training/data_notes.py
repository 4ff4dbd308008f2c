"""What is odd about the data of a training: printed when it starts, recorded in its manifest."""

from collections.abc import Sequence
from typing import Any

from paragen.common.cli import say
from paragen.dataset import data_warnings
from paragen.recipes import keys
from paragen.recipes.run import Run

CUT = "what is longer is cut off"

_printed: set[str] = set()  # a sweep or a pack trains many runs on the same data


def warnings_of(run: Run, data: Sequence[dict]) -> list[str]:
    """The warnings about the rows that a run is trained on and their test splits; `data` is that of its identity."""
    folder = run.resolve(run.config.get("dataset_dir", "data"))
    each = (data_warnings.of_trained(one["name"], one["file"], one["entry"], one["rows"], folder) for one in data)
    return [line for lines in each for line in lines]


def cut_rows(lengths: Sequence[int], config: dict) -> list[str]:
    """The warning about the rows that a recipe's `cutoff_len` cuts, in a list.

    Args:
        lengths: of all tokenised rows, in tokens. A row of exactly `cutoff_len` counts, too: whether it was longer is
            not known any more.
        config: the rendered recipe.
    """
    if config.get("packing") or config.get("neat_packing"):
        return []  # several rows are joined up to that length
    limit = config.get("cutoff_len", keys.OMITTED_CUTOFF)
    reached = sum(length >= limit for length in lengths)
    return [f"cutoff_len {limit} is reached by {data_warnings.share(reached, len(lengths))}: {CUT}"] if reached else []


def lengths_in(dataset: Any) -> list[int]:
    """The tokens of each row of LLaMA-Factory's tokenised dataset, counted without making Python lists of them."""
    import pyarrow.compute as pc

    table = dataset.select_columns(["input_ids"]).with_format("arrow")[:]
    return pc.list_value_length(table["input_ids"]).to_pylist()


def announce(warnings: Sequence[str]) -> None:
    """Print warnings, each once per process."""
    for warning in warnings:
        if warning not in _printed:
            _printed.add(warning)
            say(f"warning: {warning}")
