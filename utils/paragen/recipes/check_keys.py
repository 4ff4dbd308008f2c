"""What is wrong with a recipe's keys: unknown or deprecated ones, values of the wrong type, paths of one machine."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from paragen.common import paths
from paragen.recipes import keys, vocabulary
from paragen.recipes.recipe_file import Fault, Recipe, is_positive

TYPES = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
KIND = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}


def key_faults(recipe: Recipe) -> Iterator[Fault]:
    """Keys that LLaMA-Factory does not know or deprecates, values of the wrong type, code of strangers."""
    known, gone = vocabulary.known_keys(), vocabulary.deprecated_keys()
    for key, value in recipe.config.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            yield str(key), f"LLaMA-Factory has no such key{f'; near: {near[0]}' if near else ''}"
        elif key == "warmup_ratio":
            yield key, f"is deprecated; `warmup_steps: {value}` is the same (below 1: a fraction of all steps)"
        elif key in gone:
            yield key, f"is deprecated; LLaMA-Factory's help says: {gone[key]}"
        elif not is_of_type(value, known[key]):
            wanted = KIND[plain_type(known[key])]
            yield key, f"{value!r} is not {wanted}"
    if recipe.config.get("trust_remote_code"):
        yield "trust_remote_code", "lets code from the model's folder run; set it to false"
    for key in keys.EXPECTED:
        if recipe.config.get(key) is None:
            why = ": the length in steps (epochs depend on the batch)" if key == "max_steps" else ""
            yield key, f"is missing{why}"
    if "num_train_epochs" in recipe.config and is_positive(recipe.config.get("max_steps")):
        yield "num_train_epochs", "has no effect beside max_steps; omit it"
    if recipe.config.get("max_steps") is not None and not is_positive(recipe.config["max_steps"]):
        yield "max_steps", f"{recipe.config['max_steps']!r} is not a positive whole number"


def plain_type(annotation: str) -> str:
    """A type without its None: `float` for `float | None` and `Optional[float]`."""
    return re.sub(r"^Optional\[(.*)\]$", r"\1", annotation).removesuffix(" | None").strip()


def is_of_type(value: Any, annotation: str) -> bool:
    """Whether LLaMA-Factory takes a value for a key of this type; only the types of TYPES are checked."""
    kind = plain_type(annotation)
    if value is None or kind not in TYPES:
        return True
    return isinstance(value, TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


def path_faults(recipe: Recipe) -> Iterator[Fault]:
    """Paths that leave the repository, or that exist on one machine only."""
    for key in (*keys.PATHS, "deepspeed"):
        value, path = recipe.config.get(key), recipe.resolved(key)
        if path is None or not isinstance(value, str):
            continue
        if value.startswith(("/", "~")):
            yield key, f"{value!r} is a path of one machine; make it relative to the recipe: ../../../..."
        elif not path.is_relative_to(paths.ROOT):
            yield key, f"{value!r} leaves the repository"
        elif key == "output_dir" and not path.is_relative_to(paths.SAVES):
            yield key, f"{value!r} is not under saves/"
