"""What a recipe may contain: LLaMA-Factory's keys and templates, and the datasets that can be trained on.

The keys and templates are read from LLaMA-Factory's source text: importing it takes up to 25 s.
"""

import ast
import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import comparison, dataset_info, sources
from paragen.recipes import templates

TEST_SPLIT = "is a test split: checkpoints are scored on it, and none is trained on it"  # said of those
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
    """Every key that LLaMA-Factory's training takes, with its type as in its source (`float | None`)."""
    return {name: ast.unparse(field.annotation) for name, field in _fields()}


@cache
def deprecated_keys() -> dict[str, str]:
    """The keys that LLaMA-Factory or transformers calls deprecated, each with the help text that does so."""
    found = {}
    for name, field in _fields():
        texts = [node.value for node in ast.walk(field) if isinstance(node, ast.Constant)]
        note = next((text for text in texts if isinstance(text, str) and "deprecated" in text.lower()), None)
        if note:
            found[name] = note
    return found


def _fields() -> Iterator[tuple[str, ast.AnnAssign]]:
    """The fields, with their names, of the dataclasses that LLaMA-Factory's parser fills from a recipe."""
    for package, file in ARGUMENT_FILES:
        for node in _syntax_of(_source(package) / file).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for field in node.body:
                if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                    continue
                if not field.target.id.startswith("_") and _is_init_field(field):
                    yield field.target.id, field


def _is_init_field(field: ast.AnnAssign) -> bool:
    """Whether a dataclass field is an argument of `__init__`."""
    options = {option.arg: option.value for option in getattr(field.value, "keywords", [])}
    init = options.get("init")
    return not (isinstance(init, ast.Constant) and init.value is False)


@cache
def stock_templates() -> frozenset[str]:
    """The names of LLaMA-Factory's own prompt templates."""
    return frozenset(_registered(_source("llamafactory") / "data" / "template.py"))


@cache
def our_templates() -> frozenset[str]:
    """The names of the prompt templates that this repository adds, in utils/prompt_templates.py.

    Raises UserError where that file cannot be run, or names a template as LLaMA-Factory does.
    """
    ours = frozenset(templates.recorded())
    if taken := sorted(ours & stock_templates()):
        raise UserError(f"{templates.FILE}: template {taken[0]!r} is one of LLaMA-Factory's; give yours another name")
    return ours


def known_templates() -> frozenset[str]:
    """The names of all prompt templates that a recipe may name: LLaMA-Factory's and ours."""
    return stock_templates() | our_templates()


def _registered(path: Path) -> set[str]:
    """The names in the `register_template(name="...", ...)` calls of a file."""
    calls = (node for node in ast.walk(_syntax_of(path)) if isinstance(node, ast.Call))
    names: set[str] = set()
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
    """The training sets that data/sources.yaml lists for `make data`, by the name under which they are registered."""
    return {entry["dataset"]: entry for entry in _prepared().values() if entry["kind"] == "train"}


@cache
def _prepared() -> dict[str, dict]:
    """The files that data/sources.yaml lists, by name."""
    return sources.table()["files"]


def trainable() -> list[str]:
    """The names of all datasets that are registered with responses, or listed as training sets; no test splits."""
    registered = dataset_info.read_info()
    own = {name for name, entry in registered.items() if not (isinstance(entry, dict) and entry.get("prompts_only"))}
    return sorted({*own, *listed()} - test_splits())


def test_splits() -> set[str]:
    """The names of all datasets, registered or listed, that are for scoring: X_test, X_validation and the like."""
    files = {entry["dataset"]: name for name, entry in _prepared().items()}
    registered = dataset_info.read_info()
    files |= {name: str(entry.get("file_name")) for name, entry in registered.items() if isinstance(entry, dict)}
    return {name for name, file in files.items() if comparison.is_test(name, Path(file))}


def category_of(dataset: str) -> str | None:
    """The category of a dataset: the folder of its file, or the one in data/sources.yaml; None where it has none."""
    registered = dataset_info.read_info().get(dataset)
    if isinstance(registered, dict):
        folder = str(registered.get("file_name", "")).split("/")[0]
        return folder if folder in paths.CATEGORIES else None
    return listed().get(dataset, {}).get("category")


def rows_of(dataset: str) -> tuple[int | None, int | None]:
    """(all rows of a dataset, how many at its end no recipe trains on); each None where it is not known.

    Both come from the entry in dataset_info.json and from data/sources.yaml, the number of rows also from the file.
    """
    prepared = listed().get(dataset, {})
    entry = dataset_info.read_info().get(dataset)
    entry = entry if isinstance(entry, dict) else {}
    held_out = entry.get("held_out", prepared.get("held_out", None if prepared else 0))
    rows = _rows_in(paths.DATA / str(entry.get("file_name"))) or prepared.get("rows")
    return rows, held_out


def trainable_rows(dataset: str, rows: int | None = None) -> int | None:
    """How many of a dataset's first rows may be trained on; None: not known.

    Args:
        dataset: its registered name.
        rows: the number of all its rows, used where it is not known otherwise.
    """
    known, held_out = rows_of(dataset)
    known = known or rows
    if held_out is not None:
        return known and known - held_out
    return known - sources.held_out(known) if known else sources.TRAINED_ROWS


def _rows_in(path: Path) -> int | None:
    """The number of rows in a data file; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return len(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise UserError(f"{paths.relative(path)}: not a JSON list of rows; see: make check-data") from None
