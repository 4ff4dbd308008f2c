"""The rooms of utils/paragen: each has one subject, says so, and imports downwards only (utils/README.md)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

UTILS = Path(__file__).resolve().parent.parent / "utils"
PARAGEN = UTILS / "paragen"
ROOMS = [
    "common", "hub", "model", "dataset", "recipes", "collection", "training", "archives", "packed", "analysis",
    "exports", "publishing", "scoring", "generator", "sweep", "benchmark",
]  # fmt: skip
SCRIPTS = {path.stem for path in UTILS.glob("*.py")}
EDITED = "prompt_templates"  # the one script that rooms import: users add their templates there
MODULES = sorted(path.relative_to(PARAGEN) for path in PARAGEN.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_room_imports_itself_rooms_below_and_no_script(module):
    names = [name.split(".") for name in imported(PARAGEN / module)]
    rooms = {name[1] for name in names if name[0] == "paragen"}
    below = ROOMS[: ROOMS.index(module.parts[0]) + 1] if len(module.parts) > 1 else []
    assert rooms <= set(below), f"{module} imports {sorted(rooms - set(below))}"
    assert not {name[0] for name in names} & (SCRIPTS - {EDITED}), f"{module} imports a script"


def test_the_rooms_are_these():
    assert sorted(path.name for path in PARAGEN.iterdir() if path.is_dir() and path.name[0] != "_") == sorted(ROOMS)


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_a_room_says_what_it_is_for(room):
    assert ast.get_docstring(ast.parse((PARAGEN / room / "__init__.py").read_text(encoding="utf-8")))


def test_common_needs_the_standard_library_alone():
    """setup_env.py imports it before .venv exists; what a function imports when it is called does not count."""
    for path in (PARAGEN / "__init__.py", *(PARAGEN / "common").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(name.split(".")[0] in {*sys_names(), "paragen"} for name in names), path


def sys_names() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names


@pytest.mark.parametrize("room", ["common", "recipes", "collection", "training"])
def test_no_comment_silences_the_type_checker(room):
    """The other rooms stand on these; .mypy.ini demands every annotation there."""
    for path in (PARAGEN / room).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "type: ignore" not in text and "mypy:" not in text, path
    config = (UTILS.parent / ".mypy.ini").read_text(encoding="utf-8")
    (strict,) = re.findall(r"^\[(.*)\]\ndisallow_untyped_defs = True$", config, re.MULTILINE)
    assert f"paragen.{room}.*" in strict


@pytest.mark.parametrize("script", sorted(UTILS.glob("*.py")), ids=lambda path: path.name)
def test_a_script_is_short(script):
    """It parses settings, calls a room and prints."""
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 150
