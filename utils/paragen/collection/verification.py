"""Reads a whole collection and lists what is wrong with it. `presence.py` compares names and lengths alone."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paragen.collection import adapter_config, evaluation, presence, run_identity
from paragen.collection.manifest import CheckpointEntry, Manifest
from paragen.collection.run_files import checkpoint_folder, checkpoint_name
from paragen.common import devices, files, locks, paths, safetensors_header
from paragen.common.cli import UserError
from paragen.model import loading

# By a safetensors dtype: the bytes of a value, and the bits of its exponent.
EXPONENTS = {"F64": (8, 0x7FF << 52), "F32": (4, 0xFF << 23), "BF16": (2, 0xFF << 7), "F16": (2, 0x1F << 10)}
PIECE = 1 << 16  # values that are read and looked at at once: they stay in the processor's cache


def faults_of(folder: Path, manifest: Manifest) -> list[str]:
    """The faults of a collection's files, hashes, steps, keys, shapes, values and evaluation.json, a phrase each.

    Files that are no part of the collection are none, but for a checkpoint that the manifest does not list.
    """
    entries, steps, faults = manifest.checkpoints, manifest.steps, presence.faults_of(folder, manifest)
    unlisted, _ = presence.strangers_in(folder, manifest)
    faults += [f"{name} does not belong here" for name in unlisted]
    faults += presence.content_faults(folder, manifest)
    if manifest.recipe is not None and steps != list(range(steps[0], steps[0] + len(steps))):
        faults.append(f"the steps are not consecutive: {steps}")
    kept = manifest.recipe and manifest.recipe.get("save_total_limit")
    if kept and len(steps) != kept:
        faults.append(f"{len(steps)} checkpoints, but the recipe keeps {kept}")
    if (folder / paths.ADAPTER_CONFIG).is_file():
        try:
            adapter_config.read(folder / paths.ADAPTER_CONFIG, paths.ADAPTER_CONFIG)
        except UserError as error:
            faults.append(str(error))
    try:
        if (scores := evaluation.bytes_in(folder)) is not None:
            evaluation.parse(scores, manifest, evaluation.FILE)
    except UserError as error:
        faults.append(str(error))
    sizes = presence.sizes_in(folder)
    whole = [entry for entry in entries if sizes.get(entry.file_name) == entry.bytes]
    return faults + _checkpoint_faults(folder, whole, manifest.rank)


def pretrain_faults(folder: Path, manifest: Manifest) -> list[str]:
    """The faults of a pretrain run's files, all of which are read, a phrase each."""
    faults = presence.faults_of(folder, manifest) + presence.content_faults(folder, manifest)
    missing = {fault.partition(" ")[0].partition("/")[0] for fault in faults}
    for entry in manifest.checkpoints:
        name = checkpoint_folder(entry.step)
        if name not in missing and run_identity.resumed_sha256(folder / name) != entry.sha256:
            faults.append(f"{name} does not have its recorded sha256")
    return faults


def _checkpoint_faults(folder: Path, entries: Sequence[CheckpointEntry], rank: int) -> list[str]:
    """Faults of the checkpoint files, which are read several at a time."""
    with ThreadPoolExecutor(min(8, devices.cpu_cores())) as threads:
        read = list(threads.map(lambda entry: _read_checkpoint(folder / entry.file_name, entry), entries))
    faults, layout = [], None
    for entry, (of_file, found) in zip(entries, read, strict=True):
        name = entry.file_name
        if found is None:
            faults += of_file
            continue
        layout = layout or found
        if found != layout:
            faults.append(f"{name} has other keys, shapes or types than the first checkpoint")
        shapes = {key: shape for key, (shape, _) in found.items() if key.endswith(("lora_A.weight", "lora_B.weight"))}
        if flat := [key for key, shape in shapes.items() if len(shape) < 2]:
            faults.append(f"{name} holds {flat[0]}, which is no matrix")
            continue
        ranks = {shape[key.endswith("lora_B.weight")] for key, shape in shapes.items()}  # of lora_B, the columns
        if ranks != {rank}:
            faults.append(f"{name} holds rank {sorted(ranks)}, not {rank}")
        faults += of_file
    return faults


def _read_checkpoint(path: Path, entry: CheckpointEntry) -> tuple[list[str], dict[str, tuple] | None]:
    """(The faults of one checkpoint file, shape and dtype by key). A file with another hash is not opened; its second
    value is None."""
    from safetensors import SafetensorError, safe_open

    sha256, is_finite = _hash_and_look(path)
    if sha256 != entry.sha256:
        return [f"{path.name} does not have its recorded sha256"], None
    try:
        safetensors_header.read_header(path)
        with safe_open(path, "np") as file:
            places = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            layout = {key: (tuple(place.get_shape()), place.get_dtype()) for key, place in places.items()}
    except (SafetensorError, ValueError) as error:
        return [f"{path.name} is not a safetensors file: {' '.join(str(error).split())[:200]}"], None
    return [] if is_finite else [f"{path.name} holds values that are not finite"], layout


def _hash_and_look(path: Path) -> tuple[str, bool]:
    """(The SHA-256 of a safetensors file, whether all its values are finite), from one reading, a piece at a time.

    A value is not finite when its exponent has all bits set. A file whose header does not fit it counts as finite.
    """
    import numpy as np

    digest, is_finite = hashlib.sha256(), True
    with open(path, "rb") as file:
        for size, width, mask in _pieces_of(path):
            data = file.read(size)
            digest.update(data)
            if width and len(data) == size:
                is_finite = is_finite and not ((np.frombuffer(data, f"<u{width}") & mask) == mask).any()
        while data := file.read(files.CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest(), bool(is_finite)


def _pieces_of(path: Path) -> Iterator[tuple[int, int, int]]:
    """The pieces of a safetensors file from its beginning: (bytes, bytes of a value or 0, the bits of its exponent).

    Nothing after the first tensor that overlaps the one before, or that its dtype does not divide.
    """
    try:
        header = safetensors_header.read_header(path)
        tensors = safetensors_header.tensors_in(header).values()
        spans = sorted((*tensor["data_offsets"], str(tensor["dtype"])) for tensor in tensors)
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    yield len(header), 0, 0
    place = 0
    for begin, end, dtype in spans:
        width, mask = EXPONENTS.get(dtype, (1, 0))
        if type(begin) is not int or type(end) is not int or not place <= begin <= end or (end - begin) % width:
            return
        yield begin - place, 0, 0
        place = begin
        while place < end:
            size = min(PIECE * width, end - place)
            yield size, width if mask else 0, mask
            place += size


_loaded: set[tuple[Path, bytes, str]] = set()  # what PEFT loaded without a fault in this process, see `peft_faults`


def peft_faults(folder: Path, step: int, base: Path) -> list[str]:
    """What PEFT reports when it loads one checkpoint onto the base model's structure, without the base's weights.

    PEFT gets the checked keys of adapter_config.json (adapter_config.py), and no code of the base's folder runs.
    That depends on adapter_config.json and on the checkpoint's keys, dtypes and shapes, but on no value: collections
    that are equal in these are loaded once. The hashes of the checkpoint and of adapter_config.json are verified by
    `faults_of`, not here; the base's are not.
    """
    layout = safetensors_header.read_tensors(folder / checkpoint_name(step))
    key = base, (folder / paths.ADAPTER_CONFIG).read_bytes(), files.sha256_of_value(layout)
    if key in _loaded:
        return []
    faults = _load_with_peft(folder, step, base)
    if not faults:
        _loaded.add(key)
    return faults


def _load_with_peft(folder: Path, step: int, base: Path) -> list[str]:
    """`peft_faults` of a kind that was not loaded yet; what has been verified is said there."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    with loading.as_user_error(base, "download the model again"), torch.device("meta"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        reads_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING  # as LLaMA-Factory chooses the class
        kind = AutoModelForImageTextToText if reads_pictures else AutoModelForCausalLM
        model = kind.from_config(config, trust_remote_code=False)
    settings = adapter_config.read(folder / paths.ADAPTER_CONFIG)
    with locks.process_folder() as adapter:
        os.symlink((folder / checkpoint_name(step)).absolute(), Path(adapter, paths.ADAPTER))
        try:
            made = adapter_config.lora_config(settings)
            loaded = PeftModel.from_pretrained(model, adapter, config=made, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
            return [f"PEFT does not load checkpoint {step}: {' '.join(str(error).split())[:300]}"]
        with safe_open(Path(adapter, paths.ADAPTER), "pt") as file:
            stored = set(file.keys())
    differing = stored ^ set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    if differing:
        return [f"PEFT does not take checkpoint {step}: {len(differing)} keys differ, such as {min(differing)}"]
    return []
