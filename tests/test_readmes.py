"""The README.md of each folder, CONTRIBUTING.md and SECURITY.md: what they name exists, and README.md stays short."""

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from test_rooms import ROOMS

from paragen.common import settings

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 200
FOLDERS = ("collect_scripts", "data", "models", "saves", "utils", "bench", "tests")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", *(f"{folder}/README.md" for folder in FOLDERS)]
MADE_UP = "collect_scripts/math/GSM8K"  # README.md's example of a new pair
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
PATH = re.compile(r"(?<![\w.<>/-])(?:\.\./)*((?:utils|bench|collect_scripts|tests)/[\w./*<>{},-]*\w)")
EVERY_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose_of(document: str) -> str:
    """A document without its fenced blocks."""
    return FENCED.sub("", text_of(document))


def blocks_of(document: str, language: str) -> list[str]:
    """The contents of the fenced blocks in a language."""
    return [block for _, name, block in FENCED.findall(text_of(document)) if name == language]


def code_of(document: str) -> str:
    """What a document shows as code: fenced blocks without their comments, and code in sentences; one per line."""
    blocks = [re.sub(r"(^|\s)#.*", "", block) for _, _, block in FENCED.findall(text_of(document))]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", prose_of(document))])


def anchors_of(document: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    seen, anchors = Counter(), set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose_of(document), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return anchors


def rows_of(document: str) -> list[str]:
    """The code in the first column of a document's tables, in order."""
    return re.findall(r"^\| \[?`([^`]+)`", text_of(document), re.MULTILINE)


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= MOST_LINES


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_every_document_is_in_git():
    """models/ and saves/ are ignored but for a few files."""
    listed = subprocess.run(["git", "ls-files", *DOCUMENTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(listed.stdout.split()) == sorted(DOCUMENTS)


@EVERY_DOCUMENT
def test_links_lead_somewhere(document):
    for link in LINK.findall(prose_of(document)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / document).parent.joinpath(file).resolve() if file else ROOT / document
        assert target.is_relative_to(ROOT) and target.exists(), link
        if anchor:
            assert anchor in anchors_of(str(target.relative_to(ROOT))), link


@EVERY_DOCUMENT
def test_make_targets_exist(document):
    known = set(re.findall(r"^([a-z-]+)(?: [a-z-]+)*:", text_of("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", code_of(document), re.MULTILINE))
    assert named <= known, sorted(named - known)


@EVERY_DOCUMENT
def test_settings_are_read_somewhere(document):
    """DATASET=.. and the like, in front of or behind a command."""
    read = text_of("Makefile") + "".join(
        path.read_text(encoding="utf-8") for ending in ("py", "sh") for path in (ROOT / "utils").rglob(f"*.{ending}")
    )
    named = set(re.findall(r"(?:^|\s)([A-Z][A-Z_]+)=", code_of(document), re.MULTILINE))
    unknown = [name for name in sorted(named) if not re.search(rf"\b{name}\b", read)]
    assert not unknown


@EVERY_DOCUMENT
def test_paths_exist(document):
    for path in PATH.findall(code_of(document)):
        if "<" not in path and "{" not in path and path != MADE_UP:
            assert next(ROOT.glob(path), None), path


@pytest.mark.parametrize("folder", ["utils", "bench", "tests"])
def test_scripts_named_without_a_folder_exist(folder):
    there = {path.name for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")}
    named = set(re.findall(r"(?<![\w/<>.*-])(\w+\.(?:py|sh))\b", code_of(f"{folder}/README.md")))
    assert named <= there, sorted(named - there)


def test_every_script_has_a_line():
    scripts = {path.name for path in (ROOT / "utils").iterdir() if path.suffix in (".py", ".sh")}
    assert scripts <= set(rows_of("utils/README.md"))


def test_every_room_has_a_line_in_their_order():
    assert [row for row in rows_of("utils/README.md") if row in ROOMS] == ROOMS


def test_security_says_of_every_target_what_it_runs():
    """But of those that print, and of those that test this repository itself."""
    printing = {"help", "plan", "status", "disk", "check-data", "data-all"}
    targets = set(settings.TARGETS) - printing - {"test", "test-all", "test-gpu", "lint", "format"}
    named = set(re.findall(r"`make ([a-z-]+)`", text_of("SECURITY.md")))
    assert targets <= named, sorted(targets - named)
    assert "[SECURITY.md](SECURITY.md)" in text_of("README.md")


def test_every_benchmark_is_named():
    text = text_of("bench/README.md")
    assert not [path.name for path in (ROOT / "bench").glob("*.py") if f"`{path.name}`" not in text]


def test_every_mark_and_helper_of_the_tests_has_a_line():
    marks = re.findall(r'"markers", "(\w+):', text_of("tests/conftest.py"))
    helpers = [path.name for path in (ROOT / "tests" / "helpers").glob("*.py") if path.name != "__init__.py"]
    assert marks and {*marks, *helpers} <= set(rows_of("tests/README.md"))


@EVERY_DOCUMENT
def test_python_examples_import_what_is_there(document):
    for block in blocks_of(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("paragen", "pairs"):
                module = ROOT / "utils" / f"{node.module.replace('.', '/')}.py"
                assert {alias.name for alias in node.names} <= names_in(module), node.module


def names_in(module: Path) -> set[str]:
    """The names that a module defines or imports at its top level."""
    names = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names
