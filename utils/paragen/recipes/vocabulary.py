"""What may stand in a recipe: the keys and templates there are, the datasets one can train on, how many rows they have.

Imported by make_recipe.py and check_recipes.py. LLaMA-Factory's keys and templates are read from its source text:
importing it takes up to 25 s.
"""

import ast
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, sources

OUR_TEMPLATES = paths.UTILS / "prompt_templates.py"
ARGUMENT_FILES = (
    ("llamafactory", "hparams/model_args.py"),
    ("llamafactory", "hparams/data_args.py"),
    ("llamafactory", "hparams/training_args.py"),
    ("llamafactory", "hparams/finetuning_args.py"),
    ("llamafactory", "hparams/generating_args.py"),
    ("transformers", "training_args_seq2seq.py"),
    ("transformers", "training_args.py"),
)


@cache
def known_keys() -> dict[str, str]:
    """Every key that LLaMA-Factory's training takes, with its type as its source says it (`float | None`)."""
    return {field.target.id: ast.unparse(field.annotation) for field in _fields()}


@cache
def deprecated_keys() -> dict[str, str]:
    """The keys that LLaMA-Factory or transformers calls deprecated, with what its help text says of each."""
    found = {}
    for field in _fields():
        texts = [node.value for node in ast.walk(field) if isinstance(node, ast.Constant)]
        told = next((text for text in texts if isinstance(text, str) and "deprecated" in text.lower()), None)
        if told:
            found[field.target.id] = told
    return found


def _fields() -> Iterator[ast.AnnAssign]:
    """The fields of the dataclasses that LLaMA-Factory's parser fills from a recipe."""
    for package, name in ARGUMENT_FILES:
        for node in _syntax_of(_source(package) / name).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and _is_set_from_outside(field):
                    yield field


def _is_set_from_outside(field: ast.AnnAssign) -> bool:
    options = {option.arg: option.value for option in getattr(field.value, "keywords", [])}
    init = options.get("init")
    return not (isinstance(init, ast.Constant) and init.value is False) and not field.target.id.startswith("_")


@cache
def stock_templates() -> frozenset[str]:
    """The names of the prompt templates that LLaMA-Factory brings."""
    return frozenset(_registered(_source("llamafactory") / "data" / "template.py"))


@cache
def our_templates() -> frozenset[str]:
    """The names of the prompt templates that this repository adds, in utils/prompt_templates.py."""
    return frozenset(_registered(OUR_TEMPLATES))


def _registered(path: Path) -> set[str]:
    """The names in the `register_template(name="...", ...)` calls of a file."""
    calls = (node for node in ast.walk(_syntax_of(path)) if isinstance(node, ast.Call))
    names = set()
    for call in calls:
        if ast.unparse(call.func).split(".")[-1] != "register_template":
            continue
        given = [option.value for option in call.keywords if option.arg == "name"] or call.args[:1]
        names |= {value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)}
    return names


def _source(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.origin:
        raise UserError(f"{package} is not installed in .venv; run: make setup")
    return Path(found.origin).parent


def _syntax_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def listed() -> dict[str, dict]:
    """The training sets that data/sources.yaml lists and `make data` brings, by the name they are registered under."""
    return {entry["dataset"]: entry for entry in sources.table()["files"].values() if entry["kind"] == "train"}


def trainable() -> list[str]:
    """The names of all datasets that are registered with responses, or listed as training sets."""
    registered = dataset_info.read_info()
    own = [name for name, entry in registered.items() if not (isinstance(entry, dict) and entry.get("prompts_only"))]
    return sorted({*own, *listed()})


def category_of(dataset: str) -> str | None:
    """The category that a dataset is filed in, from where its file lies or should; None where that does not tell."""
    registered = dataset_info.read_info().get(dataset)
    if isinstance(registered, dict):
        folder = str(registered.get("file_name", "")).split("/")[0]
        return folder if folder in paths.CATEGORIES else None
    return listed().get(dataset, {}).get("category")


def rows_of(dataset: str) -> tuple[int | None, int | None]:
    """The rows of a dataset, and how many at its end no recipe trains on; each None where nothing tells it.

    Asked are the entry in dataset_info.json, the list in sources.yaml, and for the rows the file itself.
    """
    told = listed().get(dataset, {})
    entry = dataset_info.read_info().get(dataset)
    entry = entry if isinstance(entry, dict) else {}
    held_out = entry.get("held_out", told.get("held_out", None if told else 0))
    rows = told.get("rows") or _rows_in(paths.DATA / str(entry.get("file_name")))
    return rows, held_out


def trainable_rows(dataset: str, rows: int | None = None) -> int | None:
    """How many of a dataset's first rows may be trained on; None: not known.

    `rows`: all that it has, used where nothing else tells.
    """
    known, held_out = rows_of(dataset)
    known = known or rows
    if held_out is not None:
        return known and known - held_out
    return known - sources.held_out(known) if known else sources.TRAINED_ROWS


def _rows_in(path: Path) -> int | None:
    """The rows of a data file; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return len(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{paths.relative(path)}: not a JSON list of rows; see: make check-data") from None
