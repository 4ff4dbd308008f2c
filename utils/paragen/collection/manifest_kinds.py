"""Checks the values of a manifest, which may come from a stranger: what each kind of value has to be."""

import math
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from paragen.collection.run_files import is_hashed_beside
from paragen.common import paths
from paragen.dataset import dataset_info, descriptions

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16")
HUB_ID_FORM = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
DEEPEST_SHOWN = 50  # levels of a value that messages show
LONGEST_PATH = 1000  # characters
LONGEST_NAME = 255  # bytes of a file's name
LARGEST = 2**53 - 1  # JSON readers that keep numbers as float64 hold all whole numbers up to here


class Kind(NamedTuple):
    """What a value has to be: in words, and as a test of a value that is not null."""

    words: str
    fits: Callable[[Any], bool]


def is_plain_name(value: Any) -> bool:
    """Whether a value is the name of a file or folder, with no way to lead to another folder."""
    return (
        isinstance(value, str)
        and value.isprintable()
        and value.strip() == value != ""
        and not value.startswith(".")
        and not set(value) & set("/\\")
        and len(value.encode()) <= LONGEST_NAME
    )


def is_flat(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested at most `levels` deep in a JSON value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is None or (levels > 0 and all(is_flat(one, levels - 1) for one in inner))


def is_time(value: Any) -> bool:
    """Whether a value is a date and time with a time zone, in ISO 8601."""
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float64 holds; a JSON true is none."""
    return math.isfinite(value) if type(value) is float else type(value) is int and abs(value) <= LARGEST


TEXT = Kind("a text of one line", lambda value: isinstance(value, str) and value.isprintable())
NAME = Kind("the plain name of a file or folder", is_plain_name)
DATASETS = Kind(  # the commas separate several
    NAME.words,
    lambda value: (
        isinstance(value, str)
        and value.strip() == value
        and all(is_plain_name(one.strip()) for one in value.split(","))
    ),
)
PATH = Kind(
    "a path",
    lambda value: (
        isinstance(value, str)
        and value.isprintable()
        and 0 < len(value) <= LONGEST_PATH
        and all(len(part.encode()) <= LONGEST_NAME for part in value.split("/"))
    ),
)
HUB_ID = Kind("a hub id", lambda value: isinstance(value, str) and bool(HUB_ID_FORM.fullmatch(value)))
SHA256 = Kind("a SHA-256", lambda value: isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{64}", value)))
TIME = Kind("a time with its time zone", is_time)
WHOLE = Kind("a whole number from 0 up", lambda value: type(value) is int and 0 <= value <= LARGEST)
COUNT = Kind("a whole number from 1 up", lambda value: type(value) is int and 1 <= value <= LARGEST)
RANK = Kind("a rank", lambda value: type(value) is int and 1 <= value < 2**31)
SEED = Kind("a seed", lambda value: type(value) is int and 0 <= value < 2**63)
NUMBER = Kind("a finite number", is_number)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXTS = Kind("an object of texts", lambda value: isinstance(value, dict) and all(map(TEXT.fits, value.values())))
NAMES = Kind(
    "an object of names",
    lambda value: isinstance(value, dict) and all(one is None or isinstance(one, str) for one in value.values()),
)
TAGS = Kind(
    f"an object that names {', '.join(dataset_info.REQUIRED_TAGS)}",
    lambda value: NAMES.fits(value) and all(value.get(tag) for tag in dataset_info.REQUIRED_TAGS),
)
DESCRIPTIONS = Kind("descriptions of a task", lambda value: descriptions.fault_of(value) is None)
FORMATTING = Kind(" or ".join(dataset_info.CANDIDATES), lambda value: value in list(dataset_info.CANDIDATES))
YES_OR_NO = Kind("true or false", lambda value: isinstance(value, bool))
HASHES = Kind(
    "an object of hashes by file",
    lambda value: (
        isinstance(value, dict) and all(map(is_hashed_beside, value)) and all(map(SHA256.fits, value.values()))
    ),
)
LIST = Kind("a list", lambda value: isinstance(value, list))
LINES = Kind("a list of texts of one line", lambda value: isinstance(value, list) and all(map(TEXT.fits, value)))
PHASE = Kind(" or ".join(paths.PHASES), lambda value: value in paths.PHASES)
CATEGORY = Kind("a category", lambda value: value in paths.CATEGORIES)
DTYPE = Kind("a dtype", lambda value: value in DTYPES)


class Unfit(ValueError):
    """A value that is not what its key has in a manifest; the text names both."""


class Section:
    """A JSON object of a manifest, whose values are read by key and checked.

    Args:
        value: the object; Unfit is raised when it is none.
        place: what messages put before its keys, such as `data[0].`.
    """

    def __init__(self, value: Any, place: str = ""):
        check(value, OBJECT, place.removesuffix("."))
        self.value, self.place = value, place

    def get(self, key: str, kind: Kind, nullable: bool = False) -> Any:
        """The value of a key that has to be there. Raises Unfit when it is missing or of another kind."""
        if key not in self.value:
            raise Unfit(f"{self.place}{key} is missing")
        value = self.value[key]
        return None if value is None and nullable else check(value, kind, self.place + key)

    def get_optional(self, key: str, kind: Kind) -> Any:
        """The same, but None for a key that is missing or null."""
        return None if self.value.get(key) is None else self.get(key, kind)

    def section(self, key: str, make: "Callable[[Section], T]") -> T | None:
        """What `make` returns for the object of a key, None where it is missing or null."""
        return None if self.value.get(key) is None else make(Section(self.value[key], f"{self.place}{key}."))

    def sections(self, key: str, make: "Callable[[Section], T]") -> tuple[T, ...] | None:
        """What `make` returns for each object in the list of a key, None where it is missing or null."""
        found = self.get_optional(key, LIST)
        if found is None:
            return None
        return tuple(make(Section(one, f"{self.place}{key}[{number}].")) for number, one in enumerate(found))


def check(value: Any, kind: Kind, key: str) -> Any:
    """`value`, when it is of a kind. Raises Unfit otherwise."""
    if not kind.fits(value):
        shown = repr(value) if is_flat(value, DEEPEST_SHOWN) else f"a deep {type(value).__name__}"
        raise Unfit(f"{key} is {shown if len(shown) <= 80 else shown[:77] + '...'}, not {kind.words}")
    return value
