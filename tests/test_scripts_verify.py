"""verify.py finds damage to a collection."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import scored
from safetensors.torch import load_file, save_file

import verify
from paragen.collection import discovery, evaluation, verification
from paragen.collection import verify as collection_verify
from paragen.collection.manifest import read_manifest, sealed
from paragen.collection.run_files import CHECKPOINT_FILE, is_resumed
from paragen.model import base_models, model_files

STEP = "checkpoint-9.safetensors"


@pytest.fixture
def folder(collected, monkeypatch) -> Path:
    monkeypatch.setattr(verify.paths, "MODELS", collected.top / "models")
    return collected.run_folder("finetune")


def edit_manifest(folder: Path, change, seal: bool = True) -> None:
    """Change a manifest. `seal` updates its hash, as a tool does; without it, the change looks like an editor's."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(sealed(manifest) if seal else manifest))


def rewrite(folder: Path, change) -> None:
    """Change a checkpoint's tensors, and record the new hash in the manifest."""
    from paragen.common import files

    tensors = load_file(folder / STEP)
    change(tensors)
    save_file(tensors, folder / STEP)

    def record(manifest):
        (entry,) = [entry for entry in manifest["checkpoints"] if entry["step"] == 9]
        entry.update(bytes=(folder / STEP).stat().st_size, sha256=files.sha256_of(folder / STEP))

    edit_manifest(folder, record)


def flip(path: Path, place: int = -1) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_a_bit(folder: Path) -> None:
    flip(folder / STEP)


def edit_scores(folder: Path) -> None:
    path = scored.write(folder, scored.evaluated({7: 0.5}))
    path.write_text(path.read_text().replace("0.5", "0.9"))


def add_key(manifest):
    manifest["recipe"]["learning_rate"] = 1.0


def test_a_fresh_collection_is_whole_and_loads_with_peft(folder, capsys):
    assert verify.verify(folder).faults == []
    assert "6 checkpoints, steps 7-12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, f"{STEP} does not have its recorded sha256"),
        (lambda f: (f / STEP).write_bytes((f / STEP).read_bytes()[:100]), f"{STEP} has 100 bytes"),
        (lambda f: (f / STEP).unlink(), f"{STEP} is missing"),
        (lambda f: shutil.copy(f / "checkpoint-8.safetensors", f / STEP), f"{STEP} does not have its recorded sha256"),
        (
            lambda f: shutil.copy(f / STEP, f / "checkpoint-99.safetensors"),
            "checkpoint-99.safetensors does not belong here",
        ),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (
            lambda f: (f / "adapter_config.json").write_text("{}"),
            "adapter_config.json does not have its recorded sha256",
        ),
        (lambda f: flip(f / "trainer_log.jsonl"), "trainer_log.jsonl does not have its recorded sha256"),
        (lambda f: flip(f / "training_loss.png"), "training_loss.png does not have its recorded sha256"),
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("["), "broken"),
        (lambda f: edit_manifest(f, add_key, seal=False), "was edited after it was written"),
        (lambda f: edit_manifest(f, lambda m: m["checkpoints"].pop(2)), "the steps are not consecutive"),
        (lambda f: rewrite(f, lambda t: t[min(t)].fill_(torch.nan)), "values that are not finite"),
        (lambda f: rewrite(f, lambda t: t.pop(min(t))), "other keys, shapes or types"),
        (lambda f: rewrite(f, lambda t: t.update({min(t): t[min(t)].half()})), "other keys, shapes or types"),
        (lambda f: edit_manifest(f, lambda m: m.update(rank=8)), "holds rank [4], not 8"),
        (lambda f: rewrite(f, lambda t: t.update({min(t): torch.tensor(1.0)})), "lora_A.weight, which is no matrix"),
        (lambda f: rewrite(f, lambda t: t.update({max(t): torch.ones(8)})), "lora_B.weight, which is no matrix"),
        (lambda f: rewrite(f, lambda t: t.update({max(t): torch.ones(8, 2)})), "holds rank [2, 4], not 4"),
        (lambda f: (f / "evaluation.json").write_text("{"), "evaluation.json: broken"),
        (lambda f: (f / "evaluation.json").write_text("{}"), "evaluation.json: not of format 1"),
        (
            lambda f: edit_scores(f),
            "evaluation.json: was edited after it was written; remove it and run: make evaluate",
        ),
        (
            lambda f: evaluation.write(f, replace(read_manifest(f), sha256="0"), []),
            "evaluation.json: is of other checkpoints",
        ),
        (
            lambda f: scored.write(f, scored.evaluated({6: 0.5, 7: 0.5})),
            "has a score of step 6, which is none of its",
        ),
        (
            lambda f: scored.write(f, scored.evaluated({7: 0.5}, metric="luck")),
            "the metric 'luck', which is not known",
        ),
        (
            lambda f: scored.write(f, scored.evaluated({7: 0.5}, checkpoints=[{"step": 7}])),
            "holds a score that is none",
        ),
        (lambda f: scored.write(f, scored.evaluated({}, rows="all")), "has another kind of value"),
        (lambda f: scored.write(f, scored.evaluated({}, limit="4")), "holds the limit '4', which is no number of rows"),
        (lambda f: scored.write(f, scored.evaluated({}, limit=2**60)), "which is no number of rows"),
        (lambda f: edit_manifest(f, lambda m: m.update(base_model={"name": "Gone"})), "make model MODEL=<org>/Gone"),
    ],
)
def test_damage_to_a_collection_is_named(folder, capsys, damage, message):
    damage(folder)
    assert verify.verify(folder).faults != []
    lines = capsys.readouterr().out.splitlines()
    assert any(message in line for line in lines), lines
    assert all(line.startswith("FAULTY") for line in lines)


@pytest.mark.parametrize(
    "name",
    ["checkpoint-4/adapter_config.json", "checkpoint-4/optimizer.pt", "checkpoint-8/adapter_model.safetensors",
     "trainer_log.jsonl", "training_loss.png", "manifest.json"],
)  # fmt: skip
def test_a_flipped_bit_in_any_file_of_the_pretrain_run_is_named(folder, collected, capsys, monkeypatch, name):
    pretrain = collected.run_folder("pretrain")
    monkeypatch.setattr("sys.argv", ["verify.py", str(folder)])
    assert verify.main() == 0
    flip(pretrain / name, (pretrain / name).stat().st_size // 2)
    capsys.readouterr()
    assert verify.main() == 1
    whole, fault = capsys.readouterr().out.splitlines()
    assert whole.startswith("whole") and fault.startswith("FAULTY") and f"{pretrain.name}" in fault
    assert name.partition("/")[0] in fault


def test_every_file_of_a_run_is_covered_by_a_hash_of_its_manifest(collected):
    """Of a pretrain run and of a collection: no byte of theirs can change unseen."""
    for phase in ("pretrain", "finetune"):
        run = collected.run_folder(phase)
        hashed = set(read_manifest(run).files_sha256) | {"manifest.json", "adapter_config.json"}
        names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        rest = names - hashed
        assert all(
            CHECKPOINT_FILE.fullmatch(name) if phase == "finetune" else is_resumed(Path(name).name) for name in rest
        )
        assert {"trainer_log.jsonl", "training_loss.png"} < hashed


def test_scores_and_leftovers_of_a_killed_evaluation_are_no_faults(folder, capsys):
    scored.write(folder, scored.evaluated({"base": 0.4, 7: 0.5, 12: 0.6}))
    (folder / ".evaluation.json.4711.tmp").write_text("{")
    assert verify.verify(folder).faults == []
    assert capsys.readouterr().out.startswith("whole")


def test_files_that_are_no_part_of_a_collection_are_named_and_no_fault(folder, capsys):
    (folder / "notes.txt").write_text("mine")
    (folder / "plots").mkdir()
    found = verify.verify(folder)
    assert found.faults == [] and found.others == ["notes.txt", "plots/"]
    assert verify.content_of([found])["collections"][0]["others"] == ["notes.txt", "plots/"]
    whole, kept = capsys.readouterr().out.splitlines()
    assert whole.startswith("whole") and kept.startswith("KEPT") and kept.endswith("notes.txt, plots/")


@pytest.mark.parametrize(
    ("name", "what"), [("model.safetensors", "config or weights"), ("tokenizer.json", "tokenizer files")]
)
def test_rot_in_a_base_model_is_found_when_models_are_read_anew(folder, capsys, monkeypatch, name, what):
    """A flipped bit keeps size and times, so that the hashes known from the first reading would go on to be used."""
    models = folder.parents[3] / "models"
    path = models / "Tiny-Llama" / name
    base_models.identity_of(path.parent)  # known from now on
    model_files.hashes_of(path.parent, [path])
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[content.index(b'"', len(content) // 2)] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    cache = json.loads((models / ".hashes.json").read_text())
    renewed = {key.replace(str(before.st_ctime_ns), str(path.stat().st_ctime_ns)): sha for key, sha in cache.items()}
    (models / ".hashes.json").write_text(json.dumps(renewed))  # rot changes no time at all

    assert verify.verify(folder).faults == []
    collection_verify._read_model.cache_clear()
    (fault,) = verify.verify(folder, rehash_models=True).faults
    assert f"models/Tiny-Llama has other {what} than it was trained with" in fault and "make model" in fault
    monkeypatch.setattr("sys.argv", ["verify.py", str(folder)])
    monkeypatch.setenv("REHASH_MODELS", "1")
    assert verify.main() == 1 and "FAULTY" in capsys.readouterr().out


def test_an_adapter_that_does_not_fit_its_base_model_is_a_fault(folder, capsys):
    """Also after one that fits: what PEFT took once is not taken for what another configuration makes of it."""
    assert verify.verify(folder).faults == []
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    sha256 = hashlib.sha256((folder / "adapter_config.json").read_bytes()).hexdigest()
    edit_manifest(folder, lambda manifest: manifest.update(adapter_config_sha256=sha256))
    assert verify.verify(folder).faults != []
    assert "PEFT does not" in capsys.readouterr().out


def test_collections_with_one_configuration_and_layout_are_loaded_with_peft_once(folder, monkeypatch):
    loaded = []
    load = verification._load_with_peft
    monkeypatch.setattr(verification, "_load_with_peft", lambda *given: loaded.append(given) or load(*given))
    other = Path(shutil.copytree(folder, folder.with_name("Tiny-Llama_lora-rank_4_seed-7_finetune")))
    assert verify.verify(folder).faults == [] == verify.verify(other).faults
    assert len(loaded) == 1


def test_json_says_the_same_on_stdout_alone(folder, monkeypatch, capsys):
    broken = Path(shutil.copytree(folder, folder.with_name("Tiny-Llama_lora-rank_4_seed-7_finetune")))
    (broken / STEP).unlink()
    monkeypatch.setenv("JSON", "1")
    monkeypatch.setattr("sys.argv", ["verify.py", str(folder.parent)])
    assert verify.main() == 1
    told = capsys.readouterr()
    content = json.loads(told.out)
    assert content["summary"] == {"whole": 1, "faulty": 1, "faulty_pretrains": 0} and "FAULTY" in told.err
    whole, faulty = content["collections"]
    assert whole["whole"] and whole["steps"] == list(range(7, 13)) and whole["bytes"] > 0 and whole["faults"] == []
    assert not faulty["whole"] and faulty["faults"] == [f"{STEP} is missing"] and faulty["bytes"] is None


def test_all_collections_below_a_folder_are_found_and_hidden_ones_are_not(collected):
    shutil.copytree(collected.run_folder("finetune"), collected.saves / ".x_finetune.staging-1")
    shutil.copytree(collected.run_folder("finetune"), collected.saves / "any name")
    found = discovery.find_collections([collected.top / "saves"])
    assert [path.name for path in found] == ["Tiny-Llama_lora-rank_4_finetune", "any name"]


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "lama"}, {"hidden_size": "many"}, {"hidden_size": 33}, {"num_attention_heads": 0},
        {"hidden_act": "no such"}, {"vocab_size": -1}, {"rope_scaling": {"rope_type": 5}}, {"dtype": "flaot32"}, None,
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_config_of_the_base_model_is_one_line(folder, capsys, change):
    path = verify.paths.MODELS / "Tiny-Llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else '{"model_type": "llama", ')
    found = verify.verify(folder, None)
    assert len(found.faults) == 1 and "\n" not in found.faults[0]
    assert "models/Tiny-Llama: cannot be loaded (" in found.faults[0] or "PEFT does not load" in found.faults[0]


def test_a_base_of_another_shape_is_a_fault(folder, capsys):
    path = verify.paths.MODELS / "Tiny-Llama" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_size": 2 * config["hidden_size"]}))
    (fault,) = verify.verify(folder, None).faults
    assert fault.startswith("PEFT does not load checkpoint 12: ") and "size mismatch" in fault
