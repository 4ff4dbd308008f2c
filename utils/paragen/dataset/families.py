"""Families of datasets: those that share a form or an origin, so that what is learned from one is no news for another.

A measurement on a dataset that was left out leaves its whole family out. The family is the text `family` of an entry in
dataset_info.json; of a prepared dataset without it, the one in data/sources.yaml. Others are their own family.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paragen.common.paths import DATA
from paragen.dataset import dataset_info, names, sources


def families_of(datasets: Iterable[str], data_dir: Path = DATA) -> dict[str, str]:
    """The family of each dataset; a test split has that of its training set.

    Args:
        datasets: registered or prepared names, or others, which are their own families.
        data_dir: the folder of dataset_info.json and sources.yaml.

    Raises UserError where one of the two files is broken.
    """
    info, table = dataset_info.read_info(data_dir), Path(data_dir) / "sources.yaml"
    prepared = sources.table(table)["files"].values() if table.is_file() else ()
    listed = {entry["dataset"]: entry for entry in prepared}
    return {name: _family_of(names.without_split(name), info, listed) for name in datasets}


def _family_of(dataset: str, *tables: dict[str, Any]) -> str:
    """The family in the first of some tables of entries that states one."""
    for table in tables:
        entry = table.get(dataset)
        if isinstance(entry, dict) and entry.get(dataset_info.FAMILY):
            return entry[dataset_info.FAMILY]
    return dataset
