"""One odd folder in saves/ disables no command for the others: it is named and left out, and the status is 1.

The one rule: a command that does something with collections does it with all others that were selected. Commands that
show what is there (status, plan, disk, clean-up) end with 0, as a broken collection is one of the states they show.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.forked_python import PYTHON

from paragen.collection import checkpoints, index, verification
from paragen.collection.manifest import require_manifest, sealed
from paragen.common.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
CATEGORY = "common-sense-reasoning"
WHOLE = ["Tiny-Llama_lora-rank_1_finetune", "Tiny-Llama_lora-rank_2_finetune"]
COMMANDS = {
    "verify": ("verify", {}, 1), "index": ("index", {}, 1), "stats": ("stats", {}, 1), "report": ("report", {}, 1),
    "evaluate": ("evaluate", {"STEPS": "last", "LIMIT": "1"}, 1),
    "export peft": ("export", {"FORMAT": "peft"}, 1), "export table": ("export", {"FORMAT": "table"}, 1),
    "export archive": ("export", {"FORMAT": "archive"}, 1),
    "publish": ("publish", {"REPO": "user/name", "DRY_RUN": "1", "ALLOW_UNKNOWN_LICENSE": "1"}, 1),
    "status": ("status", {}, 0), "plan": ("plan", {}, 0), "disk": ("disk", {}, 0),
    "clean-up": ("clean_up", {"DRY_RUN": "1"}, 0),
}  # fmt: skip
QUICK = ("index", "status", "disk")


def odd_manifests(whole: dict) -> dict[str, bytes]:
    """Manifests that are none, or whose values no manifest has, by a name for each."""
    changed = {
        "seed": {"seed": 10**40}, "run": {"pretrain": {"run": "a/b", "step": 1, "sha256": None}},
        "list": {"pretrain": [1]}, "rows": {"trained_rows": "many"}, "data": {"data": "Toy"},
        "base": {"base_model": "tiny"}, "steps": {"checkpoints": [{"step": "1"}]}, "name": {"dataset": "\ud800"},
    }  # fmt: skip
    texts = {name: json.dumps(sealed_or_not({**whole, **change})).encode() for name, change in changed.items()}
    return {**texts, "broken": b"[", "empty": b"", "deep": b"[" * 10**5, "bytes": bytes(range(256)), "number": b"1"}


def sealed_or_not(content: dict) -> dict:
    try:
        return sealed(content)
    except ValueError:  # half a surrogate pair
        return content


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> tuple[Path, list[str]]:
    """A project with two whole collections and many odd folders; and the names of these."""
    top = tmp_path_factory.mktemp("odd") / "my project"
    shutil.copytree(ROOT / "tests" / "collected_before", top, symlinks=True)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    for name in ("exports", "publish", "index.parquet"):
        shutil.rmtree(top / "saves" / name) if (top / "saves" / name).is_dir() else (top / "saves" / name).unlink()
    toy = top / "saves" / CATEGORY / "Toy"
    whole = json.loads((toy / WHOLE[0] / "manifest.json").read_bytes())
    names = []
    for name, manifest in odd_manifests(whole).items():
        folder = toy / f"Odd-{name}_lora-rank_1_finetune"
        folder.mkdir()
        (folder / "manifest.json").write_bytes(manifest)
        names.append(folder.name)
    for name, make in {"folder": Path.mkdir, "fifo": os.mkfifo, "none": lambda path: None}.items():
        folder = toy / f"Odd-{name}_lora-rank_1_finetune"
        folder.mkdir()
        make(folder / "manifest.json")
        names.append(folder.name)
    (toy / "Odd-link_lora-rank_1_finetune").symlink_to("nowhere")
    (toy / "Odd-file_lora-rank_1_finetune").write_text("a file")
    (toy / "Odd\nline_lora-rank_1_finetune").mkdir()
    os.mkfifo(toy / "Odd-pipe_lora-rank_1_finetune")
    return top, names


def call(top: Path, script: str, settings: dict[str, str]) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PARAGEN_")}
    given = {**clean, "PARAGEN_TOP": str(top), "DEVICES": "cpu", **settings}
    return subprocess.run(
        [PYTHON, ROOT / "utils" / f"{script}.py"], env=given, capture_output=True, text=True, timeout=300
    )


def check(odd, name: str) -> None:
    top, names = odd
    script, settings, status = COMMANDS[name]
    done = call(top, script, settings)
    told = done.stdout + done.stderr
    assert "Traceback" not in told and done.returncode == status, told
    if status:
        assert [one for one in names if one not in told] == [], told


@pytest.mark.parametrize("name", QUICK)
def test_a_command_for_everything_does_the_others_and_names_each_odd_folder(odd, name):
    check(odd, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in QUICK])
def test_each_command_for_everything_does_the_others_and_names_each_odd_folder(odd, name):
    check(odd, name)
    made = {"stats": "stats", "export peft": "exports/peft", "export archive": "exports/archive"}.get(name)
    if made:
        found = {path.name.removesuffix(".archive") for path in (odd[0] / "saves" / made / CATEGORY / "Toy").iterdir()}
        assert found == set(WHOLE)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "evaluation.json", "checkpoint-96.safetensors", "manifest.json"]
)
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name)])
def test_a_pipe_a_folder_or_a_link_to_itself_in_place_of_a_file_is_a_fault(tmp_path, name, make):
    folder = tmp_path / "a run_finetune"
    shutil.copytree(ROOT / "tests" / "collected_before" / "saves" / CATEGORY / "Toy" / WHOLE[0], folder)
    manifest = require_manifest(folder)
    (folder / name).unlink()
    make(folder / name)
    assert any(name in fault for fault in verification.faults_of(folder, manifest))
    found, faults = index.update(tmp_path)
    if name == "adapter_config.json":  # of which the index reads nothing
        with pytest.raises(UserError, match=name):
            checkpoints.adapter_config(folder, manifest)
    else:
        assert found.num_rows == 0 and name in faults[folder.name]
