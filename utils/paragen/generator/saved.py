"""A generator on disk: what its folder holds, how it is written and loaded.

generator.safetensors   the network, the mean and scale of what it gives, and those of conditions
config.json             what the network is made from, and the adapter_config.json of what it writes
manifest.json           what it was trained on: pairs with hashes, settings, datasets, families, versions, losses
trainer_log.jsonl  training_loss.png
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from paragen.collection import checkpoints, manifest_kinds, manifest_recipe, run_files, run_identity, sealed_json
from paragen.collection.index import Chosen
from paragen.collection.manifest import PACKAGES, sealed
from paragen.common import devices, files, paths
from paragen.common.cli import UserError
from paragen.generator import checkpoint_data, options, sources
from paragen.generator.conditions import Reader
from paragen.generator.factor_layout import FactorLayout
from paragen.generator.network import Network
from paragen.generator.options import Options
from paragen.model import base_models

if TYPE_CHECKING:
    from paragen.generator.train import Training

FORMAT = "paragen-generator-1"
WEIGHTS, CONFIG = "generator.safetensors", "config.json"
OF_RECIPE = {**manifest_recipe.MODEL, **manifest_recipe.TEXT, **manifest_recipe.DTYPE}  # what a reader needs
# The keys of a manifest that decide a generator, and what messages call them.
IDENTITY = {"settings": "setting", "base_model": "base model", "rank": "rank", "pairs": "set of collections"}
LOSSES = {1: "squared error of standardised factors", 2: "the base model's loss per token"}  # by stage
KINDS = {  # of the values in a manifest that are read
    "settings": manifest_kinds.OBJECT, "base_model": manifest_kinds.OBJECT, "rank": manifest_kinds.RANK,
    "pairs": manifest_kinds.LIST, "datasets": manifest_kinds.LINES, "files": manifest_kinds.OBJECT,
}  # fmt: skip
WAY_OUT = "train it again with FORCE=1"


def identity_of(chosen: Sequence[Chosen], wanted: Options) -> dict[str, Any]:
    """What decides a generator, as its manifest records it."""
    manifest = chosen[0].manifest
    base = manifest.base_model
    return {
        "settings": options.deciding(asdict(wanted)),
        "base_model": {"name": manifest.base_name, "sha256": base.sha256 if base else None},
        "rank": manifest.rank,
        "pairs": sources.records_of(chosen, wanted.steps_of),
    }


def is_there(folder: Path, identity: dict[str, Any], naming: str = "NAME") -> bool:
    """Whether a folder holds the generator of this identity; not with FORCE=1.

    Args:
        folder: of a generator.
        identity: as `identity_of` gives it.
        naming: the setting with which a user takes another folder.

    Raises UserError where it holds something else.
    """
    if not folder.exists() or run_identity.force_requested():
        return False
    manifest = manifest_of(folder)
    known = {**manifest, "settings": options.deciding(manifest["settings"])}
    other = [key for key in IDENTITY if known[key] != identity[key]]
    if not other:
        return True
    what = " and ".join(differences(known["settings"], identity["settings"])) or f"another {IDENTITY[other[0]]}"
    raise UserError(f"{paths.relative(folder)}: was trained with {what}; take another {naming}, or FORCE=1 replaces it")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two generators' options, with the values of those that are settings."""
    return [
        f"{name}={old.get(key)}, not {new[key]}" if (name := options.setting_of(key)) else f"another {key}"
        for key in new
        if old.get(key) != new[key]
    ]


def write(staging: Path, name: str, identity: dict[str, Any], training: "Training") -> None:
    """Write the files of a trained generator into its staging folder, the manifest last."""
    first = training.chosen[0]
    tensors = {f"network.{key}": value for key, value in training.network.state_dict().items()}
    tensors |= {"mean": training.data.mean, "scale": training.data.scale}
    tensors |= {"condition.mean": training.condition_mean, "condition.std": training.condition_std}
    files.write_atomically(staging / WEIGHTS, save({key: value.cpu().contiguous() for key, value in tensors.items()}))
    recipe = first.manifest.recipe or {}
    config = {
        "hidden_size": len(training.condition_mean),
        "width": training.wanted.width,
        "shapes": training.layout.shapes,
        "dtype": str(training.data.stored_dtype).removeprefix("torch."),
        "adapter_config": json.loads(checkpoints.adapter_config_bytes(first.folder, first.manifest)),
        "recipe": {key: recipe[key] for key in OF_RECIPE if key in recipe},
    }
    files.write_json(staging / CONFIG, config)
    lines = "".join(json.dumps(line) + "\n" for line in training.log)
    files.write_atomically(staging / run_files.LOG, lines.encode())
    draw_losses(training.log, staging / run_files.PICTURE, name)
    last = {f"stage {line['stage']}": line["loss"] for line in training.log}
    content = {
        "format": FORMAT,
        "name": name,
        **identity,
        "datasets": sorted({dataset for one in training.chosen for dataset in sources.datasets_of(one)}),
        "families": sorted({pair["family"] for pair in identity["pairs"]}),
        "losses": last,
        "parameters": sum(parameter.numel() for parameter in training.network.parameters()),
        "device": devices.describe(),
        "versions": {package: version(package) for package in PACKAGES},
        "files": {path: files.sha256_of(staging / path) for path in (WEIGHTS, CONFIG, run_files.LOG)},
    }
    files.write_json(staging / paths.MANIFEST, sealed(content))


def draw_losses(log: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss of each stage, side by side: their units differ."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    stages = sorted({line["stage"] for line in log})
    figure, axes = plt.subplots(1, len(stages), figsize=(6.4 * len(stages), 4.8), squeeze=False)
    for stage, panel in zip(stages, axes[0], strict=True):
        lines = [line for line in log if line["stage"] == stage]
        panel.plot([line["current_steps"] for line in lines], [line["loss"] for line in lines])
        panel.set_xlabel("step")
        panel.set_ylabel(LOSSES[stage])
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a generator. Raises UserError where the folder holds none, or an edited one."""
    content = sealed_json.read(folder / paths.MANIFEST, FORMAT, KINDS, WAY_OUT)
    if content is None:
        raise UserError(f"{paths.relative(folder)}: holds no generator; name one of saves/generators")
    return content


class Generator:
    """A trained generator, on the GPU where there is one. `load` makes one."""

    def __init__(self, folder: Path, manifest: dict[str, Any], config: dict[str, Any], tensors: dict[str, Tensor]):
        self.folder, self.manifest, self.config = folder, manifest, config
        self.sha256, self.rank, self.datasets = manifest["sha256"], manifest["rank"], manifest["datasets"]
        self.device = devices.own()
        self.layout = FactorLayout({key: tuple(shape) for key, shape in config["shapes"].items()})
        self.dtype: torch.dtype = getattr(torch, config["dtype"])
        self.mean, self.scale = tensors["mean"].to(self.device), tensors["scale"].to(self.device)
        self.condition = tensors["condition.mean"], tensors["condition.std"]
        self.network = Network(2 * config["hidden_size"] + 1, config["width"], self.layout.kinds)
        own = {key.removeprefix("network."): value for key, value in tensors.items() if key.startswith("network.")}
        self.network.load_state_dict(own)
        self.network.to(self.device).eval()

    @cached_property
    def reader(self) -> Reader:
        """Its base model. Raises UserError where that is not on disk, or is not the one that it was trained for."""
        base = self.manifest["base_model"]
        folder = base_models.local_folder(paths.MODELS / base["name"])
        if base_models.identity_of(folder)["sha256"] != base["sha256"]:
            raise UserError(
                f"{paths.relative(folder)}: is not the base model that {self.folder.name} was trained for; put its "
                "files back"
            )
        return Reader(self.config["recipe"], folder)

    def move(self, device: torch.device) -> None:
        """Have its weights on another device, where it computes from now on."""
        self.device, self.mean, self.scale = device, self.mean.to(device), self.scale.to(device)
        self.network.to(device)

    @torch.inference_mode()
    def vectors(self, conditions: Tensor) -> Tensor:
        """The adapters of conditions [n, inputs], as vectors [n, size] float32 on the device."""
        outputs = self.layout.join([part.float() for part in self.network(conditions.to(self.device))])
        return outputs * checkpoint_data.spread(self.layout, self.scale) + self.mean


def load(folder: Path) -> Generator:
    """The generator in a folder. Raises UserError where its files are not those that its manifest records."""
    manifest = manifest_of(folder)
    for name, sha256 in manifest["files"].items():
        path = folder / name
        if not path.is_file() or files.sha256_of(path) != sha256:
            raise UserError(f"{paths.relative(path)}: is gone, or not as {paths.MANIFEST} records it; {WAY_OUT}")
    return Generator(folder, manifest, json.loads((folder / CONFIG).read_bytes()), load_file(folder / WEIGHTS))
