"""Generates adapters from prompts (and a description), and writes them as PEFT folders with their origin.

OUT/<dataset>/<sample>/adapter_model.safetensors, adapter_config.json      samples are numbered from 1
OUT/<dataset>/generated.json    the generator, the datasets it saw, the prompts, the seed, the files' hashes
"""

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow.compute as pc
import torch
from safetensors.torch import save
from torch import Tensor

from paragen.collection import adapter_folders, checkpoints, index, prompts, run_identity
from paragen.collection.adapter_folders import FORMAT, RECORD
from paragen.collection.index import Chosen
from paragen.collection.manifest import sealed
from paragen.common import cli, files, locks, paths
from paragen.common.cli import UserError, say
from paragen.dataset import dataset_info, descriptions, names
from paragen.exports import checkpoint_copies
from paragen.generator import conditions
from paragen.generator.conditions import Row
from paragen.generator.saved import Generator

Adapter = dict[str, Tensor]


class Source(NamedTuple):
    """The prompts of a dataset that conditions are drawn from."""

    dataset: str
    file: str  # relative to data/
    rows: list[Row]  # never rows that are held out for scoring
    description: str | None


def source_of(dataset: str) -> Source:
    """The prompts of a registered dataset: the rows that its collections were trained on, where there are some, else
    all but those that its entry holds out.

    Raises UserError for a name that is not registered, and for a test split, whose rows are for scoring.
    """
    name, (entry, rows) = prompts.registered(dataset)
    if names.split_in(name) not in (None, "train"):
        raise UserError(f"{name}: holds rows to score on; name the dataset, {names.without_split(name)}")
    table, _ = index.read(paths.SAVES)
    trained = table.filter(pc.equal(table["dataset"], name))["rows"].to_pylist()
    count = min([len(rows) - (entry.get(dataset_info.HELD_OUT) or 0), *(each for each in trained if each)])
    part = (entry, rows[:count])
    texts = descriptions.descriptions_of(entry)
    file = dataset_info.data_file(name, paths.DATA).relative_to(paths.DATA).as_posix()
    return Source(name, file, conditions.texts_in(part), texts[0] if texts else None)


def draw_prompts(count: int, samples: int, seed: int, each: int) -> list[list[int]]:
    """The numbers of the rows that each sample is conditioned on, drawn without replacement within a sample.

    Args:
        count: how many rows there are.
        samples: how many samples.
        seed: of the draws; a sample's draw does not depend on how many there are.
        each: how many rows a sample has; all of them where there are no more.
    """
    sizes = min(each, count)
    draws = (numpy.random.default_rng((seed, sample)) for sample in range(samples))
    return [sorted(draw.choice(count, sizes, replace=False).tolist()) for draw in draws]


def generate(
    generator: Generator, prompts: Sequence[Row] | Tensor, samples: int = 1, seed: int = 0, each: int = 16,
    description: str | Tensor | None = None,
) -> list[Adapter]:  # fmt: skip
    """Adapters from prompts, and a description where there is one.

    Args:
        generator: from `saved.load`.
        prompts: rows to draw from, or embeddings [n, hidden size] as `Reader.embed` returns them.
        samples: how many adapters, each from a draw of its own (`draw_prompts`).
        seed: of the draws.
        each: how many prompts a sample is conditioned on.
        description: of the task, where it has one; or its embedding [1, hidden size] by `Reader.embed_texts`.

    Returns the tensors of each adapter by PEFT's key, float32 on the CPU. Raises UserError without prompts.
    """
    if len(prompts) == 0:
        raise UserError("there are no prompts to generate from")
    drawn = draw_prompts(len(prompts), samples, seed, each)
    mean, std = generator.condition
    if isinstance(prompts, Tensor):
        embedded = {number: prompts[number] for rows in drawn for number in rows}
    else:
        wanted = sorted({number for rows in drawn for number in rows})
        found = generator.reader.embed(
            [prompts[number] for number in wanted], generator.manifest["settings"]["answers"]
        )
        embedded = dict(zip(wanted, found, strict=True))
    if not isinstance(description, Tensor):
        description = generator.reader.embed_texts([description]) if description else mean.new_zeros(0, len(mean))
    texts = (description - mean) / std
    means = torch.stack([torch.stack([embedded[number] for number in rows]).cpu().mean(0) for rows in drawn])
    numbers = torch.full((samples,), 0 if len(texts) else -1)
    inputs = conditions.joined((means - mean) / std, texts, numbers)
    return [generator.layout.tensors_of(vector) for vector in generator.vectors(inputs).cpu()]


def mean_of(adapters: Sequence[Adapter]) -> Adapter:
    """The mean of adapters' factors, float32. They have to have one start."""
    return {key: torch.stack([one[key].float() for one in adapters]).mean(0) for key in adapters[0]}


def last_checkpoint(one: Chosen) -> Adapter:
    """A collection's last checkpoint, float32. Raises UserError where it is not as recorded."""
    entry = one.manifest.checkpoints[-1]
    tensors = checkpoints.load(one.folder / entry.file_name, entry.bytes, entry.sha256)
    return {key: tensor.float() for key, tensor in tensors.items()}


def record_of(generator: Generator, source: Source, drawn: Sequence[Sequence[int]], seed: int) -> dict[str, Any]:
    """What decides the adapters of a dataset, as generated.json records it."""
    used = sorted({number for rows in drawn for number in rows})
    return {
        "format": FORMAT,
        "generator": {"name": generator.folder.name, "sha256": generator.sha256},
        "base_model": generator.manifest["base_model"],
        "rank": generator.rank,
        "dataset": source.dataset,
        "seen": generator.datasets,
        "is_seen": source.dataset in generator.datasets,
        "prompts": {
            "file": source.file,
            "rows_sha256": {str(number): files.sha256_of_value(source.rows[number]) for number in used},
            "samples": [list(rows) for rows in drawn],
        },
        "description": source.description,
        "seed": seed,
    }


def write(generator: Generator, adapters: Sequence[Adapter], record: dict[str, Any], out: Path) -> Path:
    """Write adapters below OUT/<dataset>/, whole or not at all.

    Args:
        generator: what generated them.
        adapters: the samples.
        record: as `record_of` gives it.
        out: the folder of all datasets.

    Returns OUT/<dataset>. What is there is replaced: see `is_there`.
    """
    folder = out / record["dataset"]
    out.mkdir(parents=True, exist_ok=True)
    with locks.lock(files.beside(folder, "lock"), waiting=f"waiting for what writes {paths.relative(folder)}"):
        files.recover_folder(folder)
        staging = files.beside(folder, f"staging-{secrets.token_hex(4)}")
        try:
            with cli.writing_to(folder):
                for number, adapter in enumerate(adapters, 1):
                    sample = staging / str(number)
                    sample.mkdir(parents=True)
                    tensors = {key: value.to(generator.dtype).contiguous() for key, value in adapter.items()}
                    files.write_atomically(sample / paths.ADAPTER, save(tensors, {"format": "pt"}))
                    checkpoint_copies.write_config(sample, generator.config["adapter_config"])
                content = sealed({**record, "files": files.hashes_below(staging)})
                files.write_json(staging / RECORD, content)
                files.sync_tree(staging)
                files.publish_folder(staging, folder)
        finally:
            files.remove_folder(staging)
    say(f"generated: {paths.relative(folder)}, {len(adapters)} adapters")
    return folder


def is_there(record: dict[str, Any], out: Path) -> bool:
    """Whether OUT/<dataset> holds the adapters of a record, unchanged; not with FORCE=1.

    Raises UserError where it holds something else: with FORCE=1, only where that was not generated.
    """
    folder = out / record["dataset"]
    if not folder.exists():
        return False
    if files.read_cache(folder / RECORD).get("format") != FORMAT:
        raise UserError(f"{paths.relative(folder)}: is there already, and was not generated here; choose another OUT")
    if run_identity.force_requested():
        return False
    there = adapter_folders.read_record(folder) or {}
    if changed := [key for key in record if there.get(key) != json.loads(json.dumps(record[key]))]:
        raise UserError(
            f"{paths.relative(folder)}: was generated with other {', '.join(changed)}; FORCE=1 replaces it, or choose "
            "another OUT"
        )
    found = files.hashes_below(folder)
    return all(found.get(name) == sha256 for name, sha256 in there["files"].items())
