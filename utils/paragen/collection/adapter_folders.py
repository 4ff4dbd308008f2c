"""Adapters that are no collections: PEFT folders `<dataset>/<sample>/`, written by a parameter generator.

Beside the samples of one of our generators lies generated.json, which says on which datasets it was trained. Other
people's folders have none. All of it may come from a stranger: adapter_config.json is checked key by key
(adapter_config.py), tensors by their header before they are read and for finite values after that.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.collection import adapter_config, checkpoints, lora_config, manifest_kinds, sealed_json
from paragen.common import files, paths, safetensors_header
from paragen.common.cli import UserError

if TYPE_CHECKING:
    import torch

RECORD = "generated.json"  # beside the samples of a dataset
FORMAT = "paragen-generated-1"
KINDS = {  # of the record's values that are read
    "generator": manifest_kinds.OBJECT, "base_model": manifest_kinds.OBJECT, "dataset": manifest_kinds.TEXT,
    "seen": manifest_kinds.LINES, "files": manifest_kinds.OBJECT,
}  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16")  # of a factor, as safetensors names them
UNKNOWN = "training tasks unknown"


class Samples(NamedTuple):
    """The adapters that were written for one dataset. All have the same settings, layers and shapes."""

    dataset: str  # its folder's name
    folder: Path
    names: list[str]  # of the folders in it, in the order of their numbers
    config: dict[str, Any]  # adapter_config.json, checked
    hashes: dict[str, str]  # of the samples' files, by their path in the folder
    record: dict[str, Any] | None  # generated.json; None where there is none

    @property
    def training(self) -> str:
        """Whether the generator was trained on the dataset: seen, unseen, or UNKNOWN."""
        return UNKNOWN if self.record is None else "seen" if self.dataset in self.record["seen"] else "unseen"

    def tensors(self, name: str) -> "dict[str, torch.Tensor]":
        """A sample's factors by PEFT's keys, from a file that still has the hash with which it was found.

        Raises UserError where it changed, or has values that are not finite.
        """
        from safetensors.torch import load_file

        path = self.folder / name / paths.ADAPTER
        if files.sha256_of(path) != self.hashes[f"{name}/{paths.ADAPTER}"]:
            raise UserError(f"{paths.relative(path)}: changed while it was scored; score it again")
        found = load_file(path)
        for key, tensor in found.items():
            if not tensor.isfinite().all():
                raise UserError(f"{paths.relative(path)}: {key} holds values that are not finite; it cannot be scored")
        return {key: found[key] for key in checkpoints.in_natural_order(tuple(found))}


def find(top: Path, wanted: list[str]) -> list[Samples]:
    """The adapters below a folder: `<dataset>/<sample>/` in it, or `<sample>/` where it is one dataset's itself.

    Args:
        top: the folder.
        wanted: datasets as a user types them; none for all.

    Raises UserError for a folder without adapters, for a name that none has, and for files that are not sound.
    """
    if not top.is_dir():
        raise UserError(f"{paths.relative(top)}: there is no such folder")
    top = top.absolute()
    folders = {top.name: top} if _sample_names(top) else {}
    folders |= {each.name: each for each in sorted(top.iterdir()) if each.is_dir() and _sample_names(each)}
    if not folders:
        raise UserError(
            f"{paths.relative(top)}: no adapters: <dataset>/<sample>/ with {paths.ADAPTER_CONFIG} and {paths.ADAPTER} "
            "in it are expected"
        )
    chosen = [paths.choose(name, folders, "dataset with adapters") for name in wanted] or list(folders)
    return [read(folders[name]) for name in dict.fromkeys(chosen)]


def read(folder: Path) -> Samples:
    """The adapters of one dataset's folder, their settings and headers checked. Raises UserError for one not sound."""
    names = _sample_names(folder)
    first = names[0]
    configs = {name: adapter_config.read(folder / name / paths.ADAPTER_CONFIG) for name in names}
    layout = layout_of(folder / first / paths.ADAPTER, configs[first])
    for name in names:
        own, others = (lora_config.beyond_plain(configs[one]) for one in (name, first))
        for key in ("r", "lora_alpha", "use_rslora", "base_model_name_or_path", *own, *others):
            if configs[name][key] != configs[first][key]:
                where = paths.relative(folder / name / paths.ADAPTER_CONFIG)
                raise UserError(f"{where}: {key} is {configs[name][key]!r}, that of {first} is {configs[first][key]!r}")
        if layout_of(folder / name / paths.ADAPTER, configs[name]) != layout:
            raise UserError(f"{paths.relative(folder / name / paths.ADAPTER)}: has other layers or shapes than {first}")
    used = [f"{name}/{file}" for name in names for file in (paths.ADAPTER, paths.ADAPTER_CONFIG)]
    hashes = {path: files.sha256_of(folder / path) for path in used}
    record = read_record(folder)
    if record is not None and record["dataset"] != folder.name:
        raise UserError(
            f"{paths.relative(folder / RECORD)}: is of adapters for {record['dataset']}, not {folder.name}; give their "
            f"folder the name {record['dataset']} again, or remove the file to have them scored as adapters of unknown "
            "training tasks"
        )
    if record is not None and record["files"] != hashes:
        raise UserError(
            f"{paths.relative(folder / RECORD)}: is of other adapters than those beside it; generate them again, or "
            "remove it to have them scored as adapters of unknown training tasks"
        )
    return Samples(folder.name, folder, names, configs[first], hashes, record)


def layout_of(path: Path, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each factor in a safetensors file, from its header; its tensors are not read.

    Raises UserError for a file that is not sound, and for one that holds anything but the factors of linear layers of
    the rank in its adapter_config.json.
    """
    name = paths.relative(path)
    try:
        fault = safetensors_header.fault_of(path)
        tensors = {} if fault else safetensors_header.read_tensors(path)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    if fault or not tensors:
        raise UserError(f"{name}: {fault or 'holds no tensors'}")
    layers = checkpoints.layers_of(tensors)
    for layer in layers:
        rank = lora_config.rank_of(config, layer)
        for half, axis in (("A", 0), ("B", 1)):
            entry = tensors[f"{layer}.lora_{half}.weight"]
            shape = entry.get("shape")
            if entry.get("dtype") not in DTYPES or not isinstance(shape, list) or len(shape) != 2:
                raise UserError(f"{name}: {layer}.lora_{half}.weight is no matrix of floating-point numbers")
            if shape[axis] != rank:
                raise UserError(f"{name}: {layer}.lora_{half}.weight has rank {shape[axis]}, its settings say {rank}")
    return {key: tuple(entry["shape"]) for key, entry in tensors.items()}


def read_record(folder: Path) -> dict[str, Any] | None:
    """The generated.json in a dataset's folder; None where there is none. Raises UserError for one that is not sound.

    It has `generator` (name, and sha256 of its manifest), `base_model` (name, sha256), `rank`, `dataset`, `seen` (the
    datasets that the generator was trained on), `is_seen` (whether `dataset` is one), `prompts`, `seed`, and the
    hashes of the samples' files by their path in `files`.
    """
    way_out = "generate the adapters again with FORCE=1, or remove it"
    return sealed_json.read(folder / RECORD, FORMAT, KINDS, way_out)


def _sample_names(folder: Path) -> list[str]:
    """The folders in a folder that hold an adapter, sorted by number and name."""
    if not folder.is_dir():
        return []
    found = (each for each in folder.iterdir() if not each.name.startswith(".") and each.is_dir())
    names = [each.name for each in found if (each / paths.ADAPTER_CONFIG).is_file()]
    return sorted(names, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
