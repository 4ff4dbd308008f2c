"""Every reader of a checkpoint, a cache, an export or a base states in its docstring what has been verified of it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PARAGEN = Path(__file__).resolve().parent.parent / "utils" / "paragen"
# What opens such a file: of safetensors, torch, transformers, PEFT, LLaMA-Factory and pyarrow.
READERS = {"load_file", "safe_open", "load", "from_pretrained", "load_model", "read_table", "read_own", "read_in_child"}
# Whose `load` reads something else, or has verified what it returns.
OTHERS = {"json", "yaml", "OmegaConf", "render", "tl", "index", "checkpoints"}
SAID = re.compile(r"\b[Vv]erif|\bhash|[Cc]hecked against|nothing of .* is believed|in a child process")
ROOMS = (
    "archives",
    "collection",
    "exports",
    "analysis",
    "packed",
    "scoring",
    "training",
    "model",
    "publishing",
)


def readers() -> Iterator[tuple[str, str]]:
    """(Where, the docstrings of the function and of its class) for each function that calls one of READERS."""
    for room in ROOMS:
        for path in sorted((PARAGEN / room).glob("*.py")):
            yield from readers_in(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PARAGEN).as_posix(), "")


def readers_in(node: ast.AST, place: str, said: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            text = f"{said}\n{ast.get_docstring(child) or ''}"
            if isinstance(child, ast.FunctionDef) and any(map(is_reader, ast.walk(child))):
                yield f"{place}: {child.name}", text
            elif isinstance(child, ast.ClassDef):
                yield from readers_in(child, f"{place}: {child.name}", text)


def is_reader(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute):
        of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        return node.func.attr in READERS and of not in OTHERS
    return isinstance(node.func, ast.Name) and node.func.id in READERS


@pytest.mark.parametrize(("place", "said"), list(readers()), ids=lambda value: value if ": " in value[:80] else "")
def test_a_reader_says_what_it_has_verified(place, said):
    assert SAID.search(said), f"{place}: its docstring does not say what has been verified of what it reads"
