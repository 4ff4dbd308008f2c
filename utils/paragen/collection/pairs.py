"""Prompt-checkpoint pairs for PyTorch: a Dataset over saves/index.parquet. Users import it from utils/pairs.py.

Reads the index that `make index` wrote, the collections in it and the data files below data/. Writes nothing. Opening
reads only the index. A checkpoint is read when its pair is requested, and hashed the first time.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from paragen.collection import augmentation, index, run_files, task_descriptions, vectors
from paragen.collection import prompts as prompts_module
from paragen.collection.manifest import Manifest, read_manifest
from paragen.collection.shared_reader import SharedReader
from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import row_texts

FACTORS = 1  # tells the draw of factors from that of prompts
NAMING = {"category", "dataset", "collection"}  # filters that name what lies in a category
TAKEN = ("seed", "split")  # columns of the index whose names are other arguments of Pairs


class Tensors(dict[str, torch.Tensor]):
    """A checkpoint's tensors by PEFT's key: a dict that is pickled as one tensor.

    Pickled one by one, each tensor would take a file descriptor between processes, hundreds for one checkpoint.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_vector, (vectors.to_vector(self), vectors.layout_of(self))

    def __copy__(self) -> "Tensors":
        return Tensors(self)


def _from_vector(vector: torch.Tensor, layout: vectors.Layout) -> Tensors:
    return Tensors(vectors.to_dict(vector, layout))


class Pair(NamedTuple):
    """One item of `Pairs`."""

    prompts: list[dict[str, Any]]  # as prompts.of_collection returns them: system, prompt, response, images
    checkpoint: Tensors | torch.Tensor  # by PEFT's key in natural order; with vector=True 1-D, see Pairs.layout
    row: dict[str, Any]  # the checkpoint's row of the index: dataset, model, rank, step, loss, file, ...


class Pairs(Dataset):
    """The checkpoints of all collections that match the filters, each with prompts of its dataset.

    Args:
        prompts: how many prompts a pair has, drawn without replacement; 0 for none.
        seed: seeds all drawing, together with the pair's number and the epoch; the same in every worker.
        split: `train`, the rows that were trained on, or `test`, those that were not.
        vector: whether a checkpoint is one flat vector instead of a dict of tensors.
        augment: other factors of the same updates, drawn anew for each epoch: `permute` (reordered ranks), `sign`
            (flipped ranks) or `gl` (a random well-conditioned G, B·A = (B·G)(G^-1·A)); None for those as collected.
        where: a pyarrow expression over the index's columns, such as `pc.field("loss") < 0.2` or, of checkpoints that
            were evaluated, `pc.field("score") > pc.field("base_score")`; a row where it is null does not match.
        saves: the folder of the index (default: saves/).
        data_dir: the folder of dataset_info.json (default: data/).
        filters: column=value or column=[values] for any column of the index, but for `seed` and `split`, which are
            arguments above (use `where`). Texts match without case and punctuation. A row has to match all filters.
            Checkpoints of made tasks are left out, whatever `where` says, unless a filter names a category, a dataset
            or a collection: `category="made"`.

    Checkpoints are memory-mapped, read only, and no file stays open. Each is hashed once for all workers and epochs.

    Raises UserError when there is no index, when it is older than its collections, for a filter that names no column or
    no collected value, and when no row matches. Reading a pair raises one that names the file when a checkpoint, a
    manifest or a data file is gone, truncated or differs from what was recorded.
    """

    def __init__(
        self,
        *,
        prompts: int,
        seed: int = 0,
        split: str = "train",
        vector: bool = False,
        augment: str | None = None,
        where: pc.Expression | None = None,
        saves: str | Path | None = None,
        data_dir: str | Path | None = None,
        **filters: Any,
    ):
        self.prompts, self.seed = whole("prompts", prompts), whole("seed", seed)
        if split not in prompts_module.SPLITS:
            raise UserError(f"split={split!r} is not known; known: {', '.join(prompts_module.SPLITS)}")
        self.saves = Path(saves or paths.SAVES).absolute()
        self.data_dir = Path(data_dir or paths.DATA).absolute()
        self.split, self.vector = split, vector
        self.augment = augment and augmentation.check_kind(augment)
        table, self._seals = index.load_sealed(self.saves)
        table = select(table, where, filters)
        if not filters.keys() & NAMING and table.num_rows:
            table = table.filter(pc.not_equal(table["category"], paths.MADE).fill_null(True))
            if not table.num_rows:
                place = paths.relative(self.saves / paths.INDEX)
                raise UserError(f"{place}: all checkpoints that fit are of made tasks; category='made' takes them")
        if not table.num_rows:
            given = [f"{name}={value!r}" for name, value in filters.items()] + (
                [f"where={where}"] * (where is not None)
            )
            raise UserError(
                f"{paths.relative(self.saves / paths.INDEX)}: no checkpoint fits {' and '.join(given)}; "
                "make index lists what there is"
            )
        self.table = compact(table)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # the workers see it, too
        self._reader = SharedReader(self.saves, len(self))
        self._manifests: dict[str, Manifest] = {}
        self._descriptions: dict[str, list[str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_manifests": {}}

    def __len__(self) -> int:
        return self.table.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Draw other prompts and, with `augment`, other factors for all pairs, also in the workers of a DataLoader.

        Call it before each epoch.
        """
        self._epoch[0] = whole("epoch", epoch)

    def row(self, number: int) -> dict[str, Any]:
        """A checkpoint's row of the index."""
        number = range(len(self))[operator.index(number)]
        values = {name: self.table[name][number].as_py() for name in self.table.column_names}
        file = f"{values['collection']}/{run_files.checkpoint_name(values['step'])}"
        return {name: values.get(name, file) for name in index.COLUMNS}

    def __getitem__(self, number: int) -> Pair:
        number = range(len(self))[operator.index(number)]
        row = self.row(number)
        manifest = self._manifest(row["collection"])
        drawn = self._draw(number, manifest) if self.prompts else []
        tensors = self._reader.read(number, row)
        if self.augment:
            tensors = augmentation.augmented(tensors, self.augment, self._generator(number, FACTORS))
        return Pair(drawn, vectors.to_vector(tensors) if self.vector else Tensors(tensors), row)

    def layout(self, name: str) -> vectors.Layout:
        """The layout of a collection's vectors: key, shape, offset and dtype of each tensor.

        `name` is the `collection` of its rows. `vectors.to_dict(vector, layout)` turns a vector back into the dict of
        tensors.
        """
        if name not in self._reader.layouts:
            number = pc.index(self.table["collection"].cast(pa.string()), name).as_py()
            if number < 0:
                raise UserError(f"{name}: no such collection among these pairs")
            self._reader.read(number, self.row(number))
        return self._reader.layouts[name]

    def descriptions(self, name: str) -> list[str]:
        """The descriptions of a collection's task (see task_descriptions.py), read once; empty where there are none.

        `name` is the `collection` of its rows. Raises UserError where its manifest changed since the index was made.
        """
        if name not in self._descriptions:
            if name not in self._seals:
                raise UserError(f"{name}: no such collection in the index")
            self._descriptions[name] = task_descriptions.of_collection(self._manifest(name), self.data_dir)
        return self._descriptions[name]

    def _manifest(self, name: str) -> Manifest:
        """A collection's manifest without its checkpoints, checked to be the one that was indexed."""
        if name not in self._manifests:
            folder = self.saves / name
            manifest = read_manifest(folder)
            if manifest is None or manifest.sha256 != self._seals[name]:
                what = "is gone" if manifest is None else "changed"
                raise UserError(
                    f"{paths.relative(folder / paths.MANIFEST)}: {what} since the index was made; run: make index"
                )
            self._manifests[name] = replace(manifest, checkpoints=(), content={})
        return self._manifests[name]

    def _generator(self, number: int, *what: int) -> numpy.random.Generator:
        """What a pair is drawn with in this epoch, the same in every process; `what` tells its draws apart."""
        return numpy.random.default_rng((self.seed, int(self._epoch[0]), number, *what))

    def _draw(self, number: int, manifest: Manifest) -> list[dict[str, Any]]:
        """The prompts of a pair in this epoch."""
        parts = prompts_module.parts(manifest, self.split, self.data_dir)
        total = sum(len(rows) for _, rows in parts)
        if self.prompts > total:
            raise UserError(f"{manifest.run}: has {total} {self.split} prompts; prompts={self.prompts} asks for more")
        generator = self._generator(number)
        drawn = []
        for place in generator.choice(total, self.prompts, replace=False).tolist():
            for entry, rows in parts:
                if place < len(rows):
                    drawn.append(row_texts.texts_of(rows[place], entry))
                    break
                place -= len(rows)
        return drawn


def whole(name: str, value: Any) -> int:
    """`value`, checked to be a whole number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{name}={value!r} is not a whole number from 0 up")
    return value


def collate(pairs: Sequence[Pair]) -> dict[str, Any]:
    """A batch of pairs of any collections: for DataLoader(..., collate_fn=collate).

    Returns a dict: `prompts`, a list of prompts per pair; `row`, a list of dicts; `checkpoint`, a list of dicts of
    tensors or, for vectors, one tensor (pairs x longest vector), zeros behind the end of the shorter ones, with their
    numbers of values as `length` (pairs, int64).
    """
    batch = {"prompts": [pair.prompts for pair in pairs], "row": [pair.row for pair in pairs]}
    found = [pair.checkpoint for pair in pairs if isinstance(pair.checkpoint, torch.Tensor)]
    if not found:
        return {**batch, "checkpoint": [pair.checkpoint for pair in pairs]}
    return {
        **batch,
        "checkpoint": torch.nn.utils.rnn.pad_sequence(found, batch_first=True),
        "length": torch.tensor([vector.numel() for vector in found]),
    }


def select(table: pa.Table, where: pc.Expression | None, filters: Mapping[str, Any]) -> pa.Table:
    """The rows of an index that match filters, as `Pairs` takes them."""
    columns = ", ".join(name for name in index.COLUMNS if name not in TAKEN)
    for name, wanted in filters.items():
        if name not in index.COLUMNS:
            raise UserError(f"{name!r} is no column of the index; columns: {columns}")
        kind = table.schema.field(name).type
        values = list(wanted) if isinstance(wanted, (list, tuple, set, frozenset, range)) else [wanted]
        if pa.types.is_string(kind):
            known = {value for value in table[name].unique().to_pylist() if value is not None}
            values = [
                value if value is None else paths.choose(str(value), known, f"collected {name}") for value in values
            ]
        try:
            table = table.filter(pc.is_in(table[name], pa.array(values, kind)))
        except (pa.ArrowException, TypeError, OverflowError):
            raise UserError(f"{name}={wanted!r} does not fit that column, whose values are {kind}") from None
    try:
        return table if where is None else table.filter(where)
    except (pa.ArrowException, TypeError) as error:
        raise UserError(
            f"where={where}: {str(error).splitlines()[0]}; columns: {', '.join(TAKEN)}, {columns}"
        ) from None


def compact(table: pa.Table) -> pa.Table:
    """The table in less memory, since every worker gets a copy: without `file`, which follows from other columns, and
    with each name stored once."""
    for number, name in enumerate(table.column_names):
        if pa.types.is_string(table.schema.field(name).type) and name not in ("sha256", "file"):
            table = table.set_column(number, name, table[name].dictionary_encode())
    return table.drop_columns(["file"]).unify_dictionaries().combine_chunks()
