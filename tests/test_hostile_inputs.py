"""Random hostile inputs through the commands that read them: only errors of one line, no code, no bomb, no traces."""

import shutil
from pathlib import Path

import pytest
from helpers import fork_server, hostile

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent


def given(tmp_path: Path, kind: str, count: int, seed: str) -> str:
    """What commands did with so many inputs of a kind; they must have done nothing else than they may."""
    top = tmp_path / "my project"
    shutil.copytree(ROOT / "tests" / "collected_before", top)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    run = fork_server.start(
        "helpers.hostile", [kind, str(count), seed, str(top)], {"PARAGEN_TOP": str(top)}, tmp_path / "log.txt"
    )
    run.process.join(3600)
    result = run.wait()
    faults = [line for line in result.output.splitlines() if line.startswith("FAULT ")]
    assert result.status == 0, "\n".join(faults[:20]) or result.output[-3000:]
    return result.output


def test_some_hostile_inputs_of_each_kind_do_nothing_but_end_in_one_line(tmp_path):
    output = given(tmp_path, "all", 3, "quick")
    assert all(f"3 {kind}: " in output for kind in hostile.KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", hostile.KINDS)
def test_hundreds_of_hostile_inputs_do_nothing_but_end_in_one_line(tmp_path, kind):
    assert f"500 {kind}: " in given(tmp_path, kind, 500, "slow")
