"""A manifest is checked once, whoever wrote it: a strange one ends in one clear line, an older one is read."""

import copy
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest

import disk
import export
import index as index_script
import publish
import report
import stats
import verify
from paragen.collection import discovery, index
from paragen.collection.manifest import (
    CheckpointEntry,
    new_manifest,
    parse_manifest,
    read_manifest,
    sealed,
    write_manifest,
)
from paragen.common import paths
from paragen.common.cli import UserError

HASH = "0" * 64
WHOLE = sealed({
    "format": 2, "phase": "finetune", "category": "math", "dataset": "Toy", "run": "Tiny_lora-rank_4_finetune",
    "rank": 4, "recipe_sha256": HASH, "recipe": {"dataset": "Toy", "learning_rate": 0.1, "save_total_limit": 2},
    "data": [{
        "name": "Toy", "file": "math/Toy.json", "entry": {"columns": {"prompt": "prompt", "response": "response"}},
        "sha256": HASH, "rows_in_file": 9, "rows": 8, "rows_sha256": HASH, "pictures": None,
    }],
    "base_model": {"name": "Tiny", "hub_id": "someone/Tiny", "revision": "abc", "sha256": HASH},
    "tokenizer": {"sha256": HASH}, "pretrain": {"run": "Tiny_lora-rank_4_pretrain", "step": 4, "sha256": HASH},
    "adapter_config_sha256": HASH, "seed": 42, "device": "cpu", "processes": 1, "threads": 2, "precision": "float32",
    "deterministic": True,
    "rows_at_a_time": 1, "accumulated": 2, "trained_rows": 8, "total_steps": 6, "engine": "packed", "packed_with": 3,
    "data_warnings": ["Toy: one answer"],
    "versions": {"torch": "2.0"},
    "attempt": {"id": "a1", "started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:01:00+00:00"},
    "checkpoints": [
        {"step": 5, "loss": 0.5, "learning_rate": 0.1, "bytes": 10, "sha256": HASH},
        {"step": 6, "loss": None, "learning_rate": None, "bytes": 10, "sha256": HASH},
    ],
    "converted": {"from": "float32", "to": "bfloat16", "sha256": HASH, "before": {"from": "float64"}},
})  # fmt: skip


def parsed(content: dict):
    return parse_manifest(json.dumps(content).encode(), "a/manifest.json", "get it again")


def place_of(key: str, content: dict) -> tuple:
    """The object that a key such as `data.0.file` lies in, and its name there."""
    *way, last = key.split(".")
    for part in way:
        content = content[int(part) if part.isdecimal() else part]
    return content, int(last) if last.isdecimal() else last


def changed(key: str, value) -> dict:
    content = copy.deepcopy(WHOLE)
    holder, name = place_of(key, content)
    holder[name] = value
    return sealed(content)


def refusal(data: bytes) -> str:
    with pytest.raises(UserError) as error:
        parse_manifest(data, "a/manifest.json", "get it again")
    line = str(error.value)
    assert line.startswith("a/manifest.json: ") and line.endswith("get it again") and "\n" not in line
    assert line.isprintable() and len(line) < 300
    return line


def test_every_value_has_its_place_in_the_record():
    manifest = parsed(WHOLE)
    assert (manifest.phase, manifest.category, manifest.dataset, manifest.rank) == ("finetune", "math", "Toy", 4)
    assert manifest.steps == [5, 6] and manifest.checkpoints[0] == CheckpointEntry(5, 0.5, 0.1, 10, HASH)
    assert manifest.checkpoints[1].file_name == "checkpoint-6.safetensors"
    assert manifest.deterministic is True
    assert (manifest.data[0].file, manifest.data[0].rows) == ("math/Toy.json", 8)
    assert (manifest.base_name, manifest.base_model.hub_id) == ("Tiny", "someone/Tiny")
    assert manifest.attempt.finished - manifest.attempt.started == timedelta(minutes=1)
    assert (manifest.converted.to_dtype, manifest.packed_with) == ("bfloat16", 3)
    assert manifest.data_warnings == ["Toy: one answer"]
    assert manifest.content == WHOLE


def test_an_older_manifest_is_read_and_keys_of_a_later_one_are_kept():
    needed = {
        "format", "phase", "dataset", "run", "rank", "recipe", "data", "base_model", "tokenizer", "pretrain",
        "adapter_config_sha256", "checkpoints",
    }  # fmt: skip
    older = {key: value for key, value in WHOLE.items() if key in needed}
    older |= dict.fromkeys(("recipe", "data", "base_model", "tokenizer", "pretrain", "adapter_config_sha256"))
    manifest = parsed(sealed(older))
    assert manifest.data_warnings is manifest.deterministic is None
    assert manifest.category is manifest.seed is manifest.attempt is manifest.converted is manifest.base_name is None
    later = sealed({**WHOLE, "new": {"deep": [1]}})
    assert parsed(later).content == later and parsed(later).steps == [5, 6]


def test_what_is_written_is_read_again_with_the_same_bytes(tmp_path):
    folder = tmp_path / "math" / "Toy" / "Tiny_lora-rank_4_finetune"
    folder.mkdir(parents=True)
    identity = {key: WHOLE[key] for key in ("recipe", "data", "base_model", "tokenizer", "pretrain")}
    entries = [CheckpointEntry(**entry) for entry in WHOLE["checkpoints"]]
    made = new_manifest(folder, "finetune", 4, identity, entries, {"seed": 7})
    write_manifest(folder, made)
    before = (folder / "manifest.json").read_bytes()
    assert list(json.loads(before))[:7] == ["format", "phase", "category", "dataset", "run", "rank", "recipe_sha256"]
    assert list(json.loads(before)["checkpoints"][0]) == ["step", "loss", "learning_rate", "bytes", "sha256"]
    assert read_manifest(folder) == made
    write_manifest(folder, read_manifest(folder))
    assert (folder / "manifest.json").read_bytes() == before


def test_a_value_that_cannot_be_read_again_is_not_written(tmp_path):
    entry = CheckpointEntry(5, float("nan"), 0.1, 10, HASH)
    identity = dict.fromkeys(("recipe", "data", "base_model", "tokenizer", "pretrain"))
    with pytest.raises(UserError, match=r"checkpoints\[0\]\.loss is nan, not a finite number"):
        new_manifest(tmp_path / "math" / "Toy" / "Run", "finetune", 4, identity, [entry], {})


WRONG = {"a text": "x y", "a number": 1.5, "true": True, "a list": ["x"], "an object": {"x": ["y"]}}
FITS = {  # what of WRONG a key may hold all the same
    "dataset": ("a text",), "run": ("a text",), "device": ("a text",), "precision": ("a text",), "engine": ("a text",),
    "recipe": ("an object",), "checkpoints.0.loss": ("a number",), "checkpoints.0.learning_rate": ("a number",),
    "data.0.name": ("a text",), "data.0.file": ("a text",), "data.0.pictures": ("an object",),
    "data.0.entry": ("an object",), "base_model.name": ("a text",), "base_model.revision": ("a text",),
    "base_model": ("an object",), "tokenizer": ("an object",), "pretrain.run": ("a text",), "attempt.id": ("a text",),
    "converted.from": ("a text",), "converted.before": ("an object",),
    "deterministic": ("true",), "data_warnings": ("a list",), "data_warnings.0": ("a text",),
}  # fmt: skip
UNREAD = {"recipe_sha256", "data.0.rows_in_file", "format"}  # `format` is tested beside the others


def keys_of(content, before: str = "") -> list[str]:
    """The keys of a JSON value and of all that lies in it; of a list, those of its first element."""
    found = []
    for key, value in content.items() if isinstance(content, dict) else list(enumerate(content))[:1]:
        found.append(f"{before}{key}")
        if isinstance(value, (dict, list)) and key not in ("recipe", "entry", "versions", "before"):
            found += keys_of(value, f"{before}{key}.")
    return found


@pytest.mark.parametrize("key", [key for key in keys_of(WHOLE) if key not in UNREAD and key != "sha256"])
def test_another_kind_of_value_is_refused_and_named(key):
    for kind, value in WRONG.items():
        if kind in FITS.get(key, ()):
            continue
        line = refusal(json.dumps(changed(key, value)).encode())
        assert line.startswith("a/manifest.json: not a manifest of format 2: "), (kind, line)
        assert key.split(".")[0] in line, (kind, line)


HOSTILE = [
    ("deterministic", 1, "deterministic is 1, not true or false"),
    ("checkpoints.0.step", -3, "checkpoints[0].step is -3, not a whole number from 1 up"),
    ("checkpoints.0.step", 0, "checkpoints[0].step is 0, not a whole number from 1 up"),
    ("checkpoints.0.step", 10**30, "checkpoints[0].step is 1000000000000000000000000000000, not a whole number"),
    ("checkpoints.0.step", "../../evil", "checkpoints[0].step is '../../evil', not a whole number"),
    ("checkpoints.0.step", 6, "checkpoints has step 6 after step 6, not in ascending order"),
    ("checkpoints.0.step", 7, "checkpoints has step 6 after step 7, not in ascending order"),
    ("checkpoints.0.bytes", -1, "checkpoints[0].bytes is -1, not a whole number"),
    ("checkpoints.0.bytes", 2**70, "checkpoints[0].bytes is 1180591620717411303424, not a whole number"),
    ("checkpoints.0.loss", float("nan"), "checkpoints[0].loss is nan, not a finite number"),
    ("checkpoints.0.loss", float("-inf"), "checkpoints[0].loss is -inf, not a finite number"),
    ("checkpoints.0.loss", 10**400, "checkpoints[0].loss is 1000"),
    ("checkpoints.0.sha256", "A" * 64, "not a SHA-256"),
    ("checkpoints.0.sha256", "0" * 1000, "not a SHA-256"),
    ("checkpoints", [], "checkpoints lists no checkpoint"),
    ("checkpoints", [None], "checkpoints[0] is None, not an object"),
    ("checkpoints", None, "checkpoints is None, not a list"),
    ("rank", 0, "rank is 0, not a rank"),
    ("rank", 2**31, "rank is 2147483648, not a rank"),
    ("seed", -1, "seed is -1, not a seed"),
    ("seed", 2**63, "seed is 9223372036854775808, not a seed"),
    ("phase", "elsewhere", "phase is 'elsewhere', not pretrain or finetune"),
    ("category", "../math", "category is '../math', not a category"),
    ("pretrain.step", -1, "pretrain.step is -1, not a whole number"),
    ("data.0.rows", -1, "data[0].rows is -1, not a whole number"),
    ("data.0.file", "x\0y", r"data[0].file is 'x\x00y', not a path"),
    ("data.0.entry", None, "data[0].entry is None, not an object"),
    ("data.0.entry", {"columns": ["prompt"]}, "data[0].entry.columns is ['prompt'], not an object of names"),
    ("data.0.entry", {"formatting": "own"}, "data[0].entry.formatting is 'own', not alpaca or sharegpt"),
    ("data.0.entry", {"tags": {}}, "data[0].entry.tags is {}, not an object that names role_tag"),
    ("data.0.entry", {"held_out": -5}, "data[0].entry.held_out is -5, not a whole number"),
    ("base_model.hub_id", 'x"); import os', "base_model.hub_id is"),
    ("versions", {"torch": "2\n0"}, "versions is"),
    ("attempt.started", "yesterday", "attempt.started is 'yesterday', not a time with its time zone"),
    ("attempt.started", "2026-01-01T00:00:00", "not a time with its time zone"),
    ("recipe.seed", 10**40, "recipe.seed is 1000"),
    ("recipe.seed", float("nan"), "recipe.seed is nan, not finite numbers"),
    ("recipe.learning_rate", "fast", "recipe.learning_rate is 'fast', not a finite number"),
    ("recipe.save_total_limit", {}, "recipe.save_total_limit is {}, not a whole number"),
    ("recipe.template", ["qwen"], "recipe.template is ['qwen'], not a text"),
    ("recipe.lr_scheduler_kwargs", [[[[[[[1]]]]]]], "recipe.lr_scheduler_kwargs is [[[[[[[1]]]]]]], not "),
    ("run", "x" * 256, "not the plain name of a file or folder"),
    ("data.0.file", "math/" + "x" * 256, "not a path"),
    ("trained_rows", "many", "trained_rows is 'many', not a whole number"),
    ("seed", 10**40, "seed is 1000"),
    ("pretrain", [], "pretrain is [], not an object"),
    ("converted.to", "load", "converted.to is 'load', not a dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "told"), HOSTILE)
def test_a_value_out_of_bounds_is_refused_and_named(key, value, told):
    assert told in refusal(json.dumps(changed(key, value)).encode())


@pytest.mark.parametrize("key", ["run", "dataset", "base_model.name", "pretrain.run", "data.0.name"])
@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "a/b", "a\\b", "..", ".hidden", "", " ", "a\nb", "a\0b", " a", "a\u202eb"]
)
def test_a_name_that_may_lead_out_of_its_folder_is_refused(key, name):
    line = refusal(json.dumps(changed(key, name)).encode())
    assert line.endswith("not the plain name of a file or folder; get it again")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[", b"[]", b"null", b"7", b"{}", b"\xff\xfe", b'{"format": 2}', b'{"format": true}',
        b"[" * 100_000, b'{"x":' * 100_000, b'{"format": ' + b"9" * 10_000 + b"}",
        json.dumps(WHOLE | {"format": 3}).encode(), json.dumps(WHOLE | {"seed": 1}).encode(),
        json.dumps(WHOLE | {"sha256": None}).encode(), json.dumps(WHOLE | {"sha256": ["x"]}).encode(),
        json.dumps({**WHOLE, "new": "\ud800"}).encode(),
        json.dumps(sealed({**WHOLE, "new": json.loads("[" * 400 + "]" * 400)})).encode(),
        json.dumps(sealed({**WHOLE, "new": "x" * 2**25})).encode(),
    ],
)  # fmt: skip
def test_bytes_that_are_no_manifest_end_in_one_line(data):
    refusal(data)


@pytest.mark.parametrize("key", sorted(WHOLE.keys() - {"sha256"}))
def test_a_missing_key_is_named_or_was_not_there_from_the_first(key):
    content = sealed({name: value for name, value in WHOLE.items() if name != key})
    try:
        assert getattr(parsed(content), key, None) is None
    except UserError as error:
        assert f"has no {key!r}" in str(error) or "not a manifest of format 2" in str(error)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to a device"])
def test_what_is_no_file_ends_in_one_line(tmp_path, kind):
    path = tmp_path / "manifest.json"
    make = {"fifo": os.mkfifo, "folder": os.mkdir, "link to a device": lambda path: path.symlink_to("/dev/zero")}
    make[kind](path)
    with pytest.raises(UserError, match=r"manifest.json: cannot be read: .+"):
        read_manifest(tmp_path)


ODD = (
    {"seed": 10**40}, {"pretrain": {"run": "a/b", "step": 1}}, {"pretrain": []}, {"trained_rows": "x"}, {"data": "x"},
    {"base_model": 5}, {"tokenizer": "x"}, {"new": json.loads("[" * 400 + "]" * 400)}, {"recipe": {"template": [1]}},
    {"rank": "4"}, {"checkpoints": [{"step": 1}]}, {"run": 5}, {"versions": {"torch": 2}}, {"attempt": []},
)  # fmt: skip
COMMANDS = {
    "index": index_script, "stats": stats, "export": export, "report": report, "disk": disk,
    "verify": verify, "publish": publish,
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_odd_manifests_of_other_collections_stop_no_command(place, capsys, monkeypatch, command):
    folder: Path = place.collect(dataset="A", model="Fine")
    content = json.loads((folder / "manifest.json").read_bytes())
    for number, values in enumerate(ODD):
        other = folder.parent.parent / "B" / f"Odd-{number}_lora-rank_4_finetune"
        other.mkdir(parents=True)
        (other / "manifest.json").write_text(json.dumps(sealed({**content, **values})))
    lone = folder.with_name("Lone_lora-rank_4_finetune")
    lone.mkdir()
    (lone / "manifest.json").write_text('{"phase": "finetune", "x": "\\ud800"}')
    wanted = {"DATASET": "A", "MODEL": "Fine", "OUT": str(place.out), "FORMAT": "peft", "DRY_RUN": "1", "REPO": "a/b"}
    wanted |= {"ALLOW_UNKNOWN_LICENSE": "1"}
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [command])
    for needed in ("MODELS", "SCRIPTS"):
        monkeypatch.setattr(paths, needed, place.saves.parent / needed.lower())
    result = COMMANDS[command].main()
    if command == "index":
        assert "15 " in capsys.readouterr().err or result == 1


def test_a_strangers_manifest_below_saves_is_named_and_nothing_else_suffers(place, capsys):
    folder: Path = place.collect()
    content = json.loads((folder / "manifest.json").read_bytes())
    for number, values in enumerate(({"rank": "4"}, {"run": "../../x"}, {"checkpoints": [{"step": 1}]}, {"seed": []})):
        other = folder.with_name(f"Other-{number}_lora-rank_4_finetune")
        other.mkdir()
        (other / "manifest.json").write_text(json.dumps(sealed({**content, **values})))
    table, faults = index.update(place.saves)
    assert len(set(table["collection"].to_pylist())) == 1 and len(faults) == 4
    assert all("not a manifest of format 2: " in fault and "\n" not in fault for fault in faults.values())
    assert len(discovery.find_collections([place.saves])) == 5


@pytest.mark.parametrize(
    "recipe",
    [{"quantization_bit": 1}, {"lora_target": "q_proj,v_proj\n"}, {"bf16": 1}, {"learning_rate": "1e-4"}],
)
def test_what_llamafactory_trains_can_be_recorded(recipe):
    content = sealed({**WHOLE, "recipe": {**WHOLE["recipe"], **recipe}})
    assert parsed(content).recipe == content["recipe"]


def test_a_run_may_have_many_datasets():
    names = ",".join(f"a data set of mine {number}" for number in range(40))
    assert parsed(sealed({**WHOLE, "dataset": names})).dataset == names
    with pytest.raises(UserError, match="dataset"):
        parsed(sealed({**WHOLE, "dataset": "Toy,../Toy"}))
