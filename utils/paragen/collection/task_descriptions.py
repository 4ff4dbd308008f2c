"""The descriptions of a collection's task: those registered for its dataset now, otherwise those that its manifest has.

They may be added after a training (`make describe`), and never make a run stale.
"""

from pathlib import Path

from paragen.collection.manifest import Manifest
from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, descriptions


def of_collection(manifest: Manifest, data_dir: Path | None = None) -> list[str]:
    """The descriptions of the datasets that a collection was trained on, each once; an empty list where there are none.

    Args:
        manifest: the collection's.
        data_dir: the folder of dataset_info.json (default: data/).

    Raises UserError where dataset_info.json, or what it says of such a dataset, is not sound.
    """
    folder = Path(data_dir or paths.DATA)
    info, recorded = dataset_info.read_info(folder), {part.name: part.entry for part in manifest.data or ()}
    found: dict[str, None] = {}
    for name in recorded or [name.strip() for name in manifest.dataset.split(",")]:
        here = dataset_info.entry_of(name, folder) if name in info else {}
        texts = descriptions.descriptions_of(here) or descriptions.descriptions_of(recorded.get(name, {}))
        found.update(dict.fromkeys(texts))
    return list(found)


def required(manifest: Manifest, least: int = 1, data_dir: Path | None = None) -> list[str]:
    """The same. Raises UserError, naming the command that adds them, where there are fewer than `least`."""
    found = of_collection(manifest, data_dir)
    if len(found) < least:
        has = f"has {len(found)} descriptions, {least} are needed" if found else "has no descriptions of its task"
        raise UserError(f"{manifest.dataset}: {has}; {descriptions.way_to_add(manifest.dataset)}")
    return found
