"""Makes copies of a collection under other names, with manifests that match."""

import json
import shutil
from pathlib import Path

from paragen.collection.manifest import sealed


def twin(folder: Path, dataset: str = "Toy", model: str = "Tiny-Llama", rank: int = 4, seed: int | None = None) -> Path:
    """Copy a collection as one of another dataset, base model, rank or seed; returns its folder."""
    named_seed = "" if seed is None else f"_seed-{seed}"
    twin = folder.parent.parent / dataset / f"{model}_lora-rank_{rank}{named_seed}_finetune"
    shutil.copytree(folder, twin)

    def change(manifest):
        manifest.update(dataset=dataset, rank=rank, run=twin.name)
        manifest["base_model"]["name"] = model
        if seed is not None:
            manifest["seed"] = seed

    edit(twin, change)
    return twin


def edit(folder: Path, change, seal: bool = True) -> None:
    """Change a manifest. `seal` updates its hash, as a tool does; without it, the change looks like an editor's."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(sealed(manifest) if seal else manifest))


def flip_a_bit(path: Path) -> None:
    """Change one bit of a file, as a failing disk does."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
