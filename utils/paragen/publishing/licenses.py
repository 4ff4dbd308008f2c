"""The licences of the data and the base model of a collection, where a record proves them.

Prepared data: data/sources.yaml. Own data: the keys `license`, `source`, `citation` and `language` of its entry in
data/dataset_info.json. Base models: models/models.yaml, or the source.json that `make model` wrote.
"""

from pathlib import Path
from typing import Any

from paragen.collection.manifest import BaseModel, Manifest, TrainedData
from paragen.common import files
from paragen.common.paths import relative
from paragen.dataset import dataset_info, names, sources
from paragen.model import base_models

CUSTOM = ("gemma", "llama", "other")  # how licences begin that a user of the data has to read and accept


def of_file(name: str, file: str, data_dir: Path) -> dict[str, Any]:
    """license, source, citation and language of the dataset `name`, whose file is `data_dir`/`file`; None: not known.

    A file counts as prepared data by its content, not by its name.
    """
    entry = dataset_info.read_info(data_dir).get(name)
    marks = entry if isinstance(entry, dict) and entry.get("file_name") == file else {}
    known = {key: marks.get(key) for key in dataset_info.PROVENANCE}
    source = prepared(file, data_dir) or {}
    return {key: value or source.get(key) for key, value in known.items()}


def prepared(file: str, data_dir: Path) -> dict[str, Any] | None:
    """The entry of data/sources.yaml for the file <category>/<name>; None when the file has another content."""
    table, path = Path(data_dir) / "sources.yaml", Path(data_dir) / file
    entry = sources.table(table)["files"].get(path.name) if table.is_file() else None
    if entry is None or entry["category"] != path.parent.name or not path.is_file():
        return None
    return entry if files.git_blob_id(path) == entry["blob"] else None


def of_base(base: BaseModel | None, models_dir: Path) -> dict[str, Any]:
    """name, hub_id, revision, license, made_from and gated of a base model; None: not known.

    The licence of a folder that a user put under models/ is not known, whatever its name.
    """
    base = base or BaseModel()
    facts = {"name": base.name, "hub_id": base.hub_id, "revision": base.revision, "made_from": None}
    source = base_models.source_of(models_dir / base.name) if base.name else {}
    if base.sha256 is None or source.get("sha256") != base.sha256:
        source = {}
    listed = next((entry for entry in base_models.table().values() if entry["hub_id"] and same(entry, base)), {})
    license_name = base_models.license_of(source.get("license")) or listed.get("license")
    made_from = source.get("derived_from") or (source.get("hub_id") if not base.hub_id else None)
    return {**facts, "license": license_name, "made_from": made_from, "gated": bool(listed.get("gated"))}


def same(entry: dict[str, Any], base: BaseModel) -> bool:
    """Whether a model of models/models.yaml is the one that a manifest names by its hub id."""
    return base.hub_id is not None and entry["hub_id"].lower() == base.hub_id.lower()


def unknown(folder: Path, manifest: Manifest, data_dir: Path, models_dir: Path) -> list[str]:
    """The data and the base model of a collection whose licences are not known, a phrase each with the way out.

    Args:
        folder: the collection's.
        manifest: its manifest.
        data_dir, models_dir: data/ and models/.

    The registered test split of a dataset counts as data of the collection: it is published with it.
    """
    found = []
    if manifest.data is None:
        found.append(f"{relative(folder)}: what it was trained on is not known (made from a stock run)")
    parts = [(data.name, data.file) for data in manifest.data or ()]
    paired = [split for data in manifest.data or () if (split := test_split(data, data_dir))]
    for name, file in [*parts, *((name, entry["file_name"]) for name, entry in paired)]:
        if not of_file(name, file, data_dir)["license"]:
            found.append(
                f'data/{file}: its licence is not known; write it as "license" into the entry {name!r} of '
                "data/dataset_info.json"
            )
    base = of_base(manifest.base_model, models_dir)
    if not base["license"]:
        place = models_dir / (base["name"] or "<unknown>")
        found.append(
            f"{relative(place)}: the base model's licence is not known; {base_models.how_to_get(place)} notes it"
        )
    return found


def spelled(license_name: str | None) -> str:
    """A licence as the hub spells it (`cc-by-sa-4.0`); `unknown` for None."""
    return "-".join(license_name.lower().split()) if license_name else "unknown"


def test_split(data: TrainedData, data_dir: Path) -> tuple[str, dict[str, Any]] | None:
    """(name, entry) of the registered test split of a dataset of a manifest, or None."""
    paired = names.test_split_name(data.name)
    info = dataset_info.read_info(data_dir)
    return (paired, dataset_info.entry_of(paired, data_dir)) if paired in info else None
