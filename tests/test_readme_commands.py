"""Every command of README.md that can run without a hub: run from README's own text, in order, in a clean tree."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.forked_python import PLAIN, PYTHON
from test_readmes import FENCED, blocks_of, prose_of, text_of

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.runs]
NOT_HERE = {  # commands of README that cannot run here, by their beginning, and why
    "make test": "it runs this",
    "make data DATASET=ARC-c": "downloads",
    "make model MODEL=qwen2.5-0.5b": "downloads; a tiny random model of that architecture stands in",
    "make model MODEL=org/name": "downloads; a folder under models/ stands in",
    "HF_ENDPOINT=https://hf-mirror.com make model": "downloads",
    "make collect-all CATEGORY=math": "needs all datasets of the category, which are downloads",
    "make clean-checkpoints DATASET=ARC-c": "needs a stock run of downloaded data",
    "make evaluate DATASET=ARC-c RANK=8": "needs downloaded data; `make evaluate DATASET=MySet` runs",
    "make generator": "needs collections of several downloaded datasets; tests/test_generator.py runs it on made tasks",
    "make benchmark-generator": "likewise; tests/test_benchmark.py",
    "make publish": "needs a hub",
    "make pull": "needs a hub",
    "make import": "needs FILE, which README leaves out",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """What git holds, in a folder with a blank in its name, and what README takes for granted: a user's own files."""
    top = tmp_path_factory.mktemp("clean") / "a tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, top / name)
    rows = [{"question": f"{n} plus {n % 7}?", "answer": f"#### {n + n % 7}"} for n in range(80)]
    (top / "data" / "math").mkdir(exist_ok=True)
    (top / "data" / "math" / "GSM8K_train.json").write_text(json.dumps(rows))
    lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in rows)]
    (top / "MySet.csv").write_text("\n".join(lines))
    make_models = ROOT / "tests" / "helpers" / "tiny_models.py"
    subprocess.run([PYTHON, make_models, top / "models", "qwen2.5-0.5b", "llama-7b"], check=True)
    (top / "models" / "qwen2.5-0.5b").rename(top / "models" / "Qwen2.5-0.5B-Instruct")
    (top / "models" / "llama-7b").rename(top / "models" / "name")
    return top


def commands() -> list[str]:
    """README's commands in the order in which they stand, without comments: blocks, and `make ...` in sentences."""
    text, found = text_of("README.md"), []
    for block in FENCED.finditer(text):
        if block[2] == "bash":
            found += [(block.start(), number, line) for number, line in enumerate(block[3].splitlines())]
    for match in re.finditer(r"`((?:[A-Z_]+=\S+ )?make [a-z][^`]*)`", text):
        if match[1] in prose_of("README.md"):
            found.append((match.start(), 0, match[1]))
    cleaned = [re.sub(r"\s+#.*", "", command).strip() for *_, command in sorted(found)]
    whole = [command for command in cleaned if command and "..." not in command and "<" not in command]
    return list(dict.fromkeys(whole))


def test_every_command_is_run_or_named_with_a_reason():
    for beginning in NOT_HERE:
        assert any(command.startswith(beginning) for command in commands()), f"README has no {beginning} any more"
    assert len(commands()) > 25


def test_the_commands_run(tree):
    folder, failed = tree, []
    environment = {**os.environ, "DEVICES": "cpu"}
    for command in commands():
        if any(command.startswith(beginning) for beginning in NOT_HERE):
            continue
        if command.startswith("cd "):
            folder = tree / command.removeprefix("cd ")
            continue
        here = tree if command.startswith("make") else folder
        python = PLAIN if command == "make demo" else PYTHON  # the demo forks
        own = {**environment, "PY": python}
        done = subprocess.run(["bash", "-c", command], cwd=here, env=own, capture_output=True, text=True)
        if done.returncode:
            failed.append(f"{command}: {done.stdout[-800:]}{done.stderr[-800:]}")
    assert not failed, "\n\n".join(failed)


def test_the_python_examples_run(tree):
    environment = {**os.environ, "PYTHONPATH": str(tree / "utils")}
    for block in blocks_of("README.md", "python"):
        if "from pairs import" in block:
            done = subprocess.run([PYTHON, "-c", block], cwd=tree, env=environment, capture_output=True, text=True)
            assert done.returncode == 0 and done.stdout.startswith("16 "), done.stdout + done.stderr
