"""What datasets and their files may be called, and which names belong together: ARC-c, ARC-c_train and ARC-c_test."""

import re

# Folders have this name, and LLaMA-Factory splits a recipe's `dataset` at commas.
DATASET = re.compile(r"\w[\w.+-]*(?: [\w.+-]+)*")
RULE = "is no dataset name: letters, digits, . + - _ and single blanks"
PREPARED_FILE = re.compile(r"[\w.+-]+\.json")  # a file that data/sources.yaml lists
PATH_PART = re.compile(r"\w[\w.+ -]*")  # a category, a dataset, a run folder or a file in a published repository

SPLIT = re.compile(r"_(train|test|validation|valid|val|dev|eval)$")
PREPARED_SPLIT = re.compile(r"_(train|test|validation|prompts)$")


def is_dataset_name(name: str) -> bool:
    """Whether a dataset may be called `name`; RULE states what may."""
    return DATASET.fullmatch(name) is not None


def test_split_name(dataset: str) -> str:
    """The name under which the test split of a dataset is registered."""
    return f"{dataset}_test"


def dataset_of_file(stem: str) -> str:
    """The dataset that a file is registered as unless the user names one: its name without .json and _train."""
    return stem.removesuffix("_train")


def file_stems(dataset: str) -> tuple[str, str]:
    """The names, without .json, that the file of a dataset may have."""
    return dataset, f"{dataset}_train"


def split_in(name: str) -> str | None:
    """The split that a dataset's or a file's name ends in (`train`, `test`, `validation`, ...), or None."""
    found = SPLIT.search(name)
    return found[1] if found else None


def without_split(name: str) -> str:
    """A dataset's or a file's name without the split that it ends in."""
    return SPLIT.sub("", name)


def prepared_dataset(dataset: str) -> str:
    """The dataset that a prepared split belongs to: ARC-c for ARC-c_test."""
    return PREPARED_SPLIT.sub("", dataset)
