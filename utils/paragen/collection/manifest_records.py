"""What a manifest.json says, as records: whoever holds one relies on its types and bounds (manifest.py checks them)."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from paragen.collection.run_files import checkpoint_name

IDENTITY = ("recipe", "data", "base_model", "tokenizer", "pretrain")  # the sections that run_identity.py makes


@dataclass(frozen=True)
class CheckpointEntry:
    """One checkpoint of a run: a file of a collection, or a folder `checkpoint-<step>/` of a pretrain run.

    Attributes:
        step: the optimizer step after which it was saved, from 1 up.
        loss: the training loss that was logged at this step; None where none was.
        learning_rate: the one that was logged at this step; None where none was.
        bytes: the size of the file, or of all files in the folder.
        sha256: of the file's bytes; of a folder, the hash over the hashes of the files that a resumed run reads.
    """

    step: int
    loss: float | None
    learning_rate: float | None
    bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """The checkpoint's file in a collection."""
        return checkpoint_name(self.step)


@dataclass(frozen=True)
class TrainedData:
    """One dataset that a run was trained on.

    Attributes:
        name: its key in data/dataset_info.json.
        file: its data file, relative to data/.
        entry: its entry in dataset_info.json, without `file_name`.
        rows: how many rows were trained on, the file's first ones.
        rows_sha256: their hash.
        sha256: the hash of the whole file; None in manifests that lack it.
        pictures: how many pictures the rows show, and their hash; None without pictures.
    """

    name: str
    file: str
    entry: dict[str, Any]
    rows: int
    rows_sha256: str
    sha256: str | None
    pictures: dict[str, Any] | None


@dataclass(frozen=True)
class BaseModel:
    """The base model of a run: its folder's name below models/, its hub id and commit, the hash of its config and
    weights; each None where it is not known."""

    name: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Tokenizer:
    """The hash of the tokenizer's files, None where it is not known."""

    sha256: str | None


@dataclass(frozen=True)
class ResumedPretrain:
    """The checkpoint that a run resumed: its run folder's name, its step, its hash (see CheckpointEntry)."""

    run: str
    step: int
    sha256: str | None


@dataclass(frozen=True)
class Attempt:
    """The attempt that made a run: its id, and when it started and finished (with a time zone)."""

    id: str
    started: datetime
    finished: datetime


@dataclass(frozen=True)
class Conversion:
    """How the checkpoints were cast to another dtype after the training.

    Attributes:
        from_dtype: the dtypes that they had, separated by commas.
        to_dtype: the one that they have.
        manifest_sha256: the `sha256` of the manifest of the collection that was cast.
    """

    from_dtype: str
    to_dtype: str
    manifest_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A run's manifest, checked. What a run made from stock LLaMA-Factory cannot know is None.

    Attributes:
        phase: `pretrain` or `finetune`.
        category: one of paths.CATEGORIES, None for a run folder that lies in none of them.
        dataset: the recipe's `dataset`; several are separated by commas.
        run: the run folder's name.
        rank: the LoRA rank.
        recipe: the recipe's keys and values that decide what is trained.
        checkpoints: at least one, in ascending order of their steps.
        seed, device, processes, threads, precision: of the training; `threads` are the CPU threads of each process.
        deterministic: whether all kernels were deterministic (see training/deterministic.py).
        rows_at_a_time, accumulated: the batch of one process, and the gradient accumulation steps.
        trained_rows, total_steps: rows after conversion, and the number of the last optimizer step.
        engine, packed_with: `packed` and the number of adapters in the pack, where that engine trained it.
        dropout_stream: `packed` where LoRA's dropout had that engine's own random numbers (see packed/dropout.py).
        files_sha256: the hashes of the log, the loss picture and a pretrain's adapter configs, by path in the run
            folder; None in manifests that lack them.
        data_warnings: what is odd about the rows trained on and the test split, a text each; not part of the identity.
        versions: of Python and the packages, by name.
        sha256: of `content` without its key `sha256`.
        content: the JSON object as it stands in manifest.json, to be written or sealed again; do not change it.
    """

    phase: str
    category: str | None
    dataset: str
    run: str
    rank: int
    recipe: dict[str, Any] | None
    data: tuple[TrainedData, ...] | None
    base_model: BaseModel | None
    tokenizer: Tokenizer | None
    pretrain: ResumedPretrain | None
    adapter_config_sha256: str | None
    checkpoints: tuple[CheckpointEntry, ...]
    sha256: str
    seed: int | None
    device: str | None
    processes: int | None
    threads: int | None
    precision: str | None
    deterministic: bool | None
    rows_at_a_time: int | None
    accumulated: int | None
    trained_rows: int | None
    total_steps: int | None
    engine: str | None
    packed_with: int | None
    dropout_stream: str | None
    files_sha256: dict[str, str] | None
    data_warnings: list[str] | None
    versions: dict[str, str] | None
    attempt: Attempt | None
    converted: Conversion | None
    content: dict[str, Any] = field(compare=False, repr=False)

    @property
    def identity(self) -> dict[str, Any]:
        """The sections that run_identity.py makes and compares, as they stand in manifest.json."""
        return {section: self.content[section] for section in IDENTITY}

    @property
    def base_name(self) -> str | None:
        """The name of the base model's folder, None where it is not known."""
        return self.base_model.name if self.base_model else None

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        return [entry.step for entry in self.checkpoints]
