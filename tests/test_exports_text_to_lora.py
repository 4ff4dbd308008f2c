"""FORMAT=text-to-lora: the folders that Text-to-LoRA's reconstruction training reads, by the rules of its own code."""

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from helpers import handmade
from helpers.handmade import llama_keys, tree
from safetensors.torch import load_file

from paragen.common import paths

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
DESCRIPTIONS = [f"Answer question number {number} about the world." for number in range(20)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROTOCOL = {"lora_alpha": 16, "use_rslora": True, "lora_dropout": 0.05}
LATER = {
    "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.1",
    "qalora_group_size": 16, "target_parameters": None, "use_qalora": False,
}  # fmt: skip
HUB = "somebody/Tiny"


@pytest.fixture
def place(place, monkeypatch):
    """The same with the folder of a base model, whose tokenizer has a chat template."""
    models = place.saves.parent / "models"
    (models / "Tiny").mkdir(parents=True)
    (models / "Tiny" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    monkeypatch.setattr(paths, "MODELS", models)
    return place


def collect(place, dataset, descriptions=DESCRIPTIONS, modules=ATTENTION, config=PROTOCOL, rows=None, **how):
    entry = {"columns": {"prompt": "prompt", "response": "response", "system": "system"}, "descriptions": descriptions}
    return place.collect(
        dataset=dataset, entry=entry, modules=llama_keys(modules=modules), config={**LATER, **config}, rows=rows,
        **{"rank": 8, "hub_id": HUB, **how},
    )  # fmt: skip


def adapters_as_text_to_lora(root: Path, model_dir: str, names: list[str]) -> dict[str, Path]:
    """The adapter of each task, found as its `get_target_lora_dirs` finds them."""
    found: dict[str, Path] = {}
    for folder in root.glob("train_outputs/sft/oracle_lora/*/"):
        arguments = yaml.safe_load((folder / "args.yaml").read_text())
        if arguments["model_dir"].strip("/") == model_dir.strip("/"):
            (task,) = arguments["train_ds_names"]
            assert task not in found  # a second one would take the first one's place silently
            if task in names:
                found[task] = folder
    assert found.keys() == set(names)
    return found


def by_module(tensors: dict[str, torch.Tensor], module: str, half: str) -> torch.Tensor:
    """The factors of one layer name, stacked in the order of the layers' numbers."""
    layers = {int(key.split("layers.")[-1].split(".")[0]): value for key, value in tensors.items()
              if module in key and f"lora_{half}" in key}  # fmt: skip
    return torch.stack([layers[number] for number in range(len(layers))])


def prompts_as_text_to_lora(root: Path, task: str) -> list[tuple[str, str, str]]:
    """System prompt, prompt and response of each row, through the task's metadata."""
    metadata = yaml.safe_load((root / "tasks" / task / "metadata.yaml").read_text())
    arguments = metadata["ds_kwargs"]
    assert arguments["path"] == "json" and arguments["split"] == "train" and metadata["assistant_prefill"] == ""
    rows = json.loads((root / arguments["data_files"]).read_text())
    return [
        (metadata["system_message"], metadata["user_prompt_template"].format(**row), row[metadata["response_field"]])
        for row in rows
    ]


def test_text_to_lora_reads_an_adapter_a_task(place, capsys):
    runs = {name: collect(place, name, dtype="bfloat16") for name in ("A", "B", "Held")}
    root = place.export("text-to-lora", VAL="held")
    assert "of another kind" not in capsys.readouterr().out, "its own protocol"
    config = yaml.safe_load((root / "configs" / "paragen.yaml").read_text())
    assert config == {
        "model_dir": HUB, "train_ds_names": ["A", "B"], "n_train_ds": 2, "n_descs_per_ds": 20,
        "target_modules": ["q_proj", "v_proj"], "eval_ds_info": {"Held": {"descriptions": DESCRIPTIONS}},
        "additional_eval_descs": [],
    }  # fmt: skip
    folders = adapters_as_text_to_lora(root, HUB + "/", config["train_ds_names"])
    adapters_as_text_to_lora(root, HUB, ["Held"])
    for task, folder in folders.items():
        adapter = json.loads((folder / "adapter_config.json").read_text())
        assert not adapter.keys() & LATER.keys() and adapter["base_model_name_or_path"] == HUB
        assert (root / "chat_templates" / HUB / "chat_template.jinja").read_text() == TEMPLATE
        tensors, stored = (
            load_file(folder / "adapter_model.safetensors"),
            load_file(runs[task] / "checkpoint-7.safetensors"),
        )
        for module in config["target_modules"]:
            for half, shape in (("A", (2, 8, 16)), ("B", (2, 12, 8))):
                factors = by_module(tensors, module, half)
                assert factors.shape == shape and factors.dtype == torch.float32
                assert torch.equal(factors, by_module(stored, module, half).float())
        metadata = yaml.safe_load((root / "tasks" / task / "metadata.yaml").read_text())
        assert metadata["descriptions"][: config["n_descs_per_ds"]] == DESCRIPTIONS
    assert prompts_as_text_to_lora(root, "A")[1] == ("be brief", "A 1?", "answer 1")


def test_datasets_loads_the_rows_as_its_sft_training_does(place, monkeypatch, tmp_path):
    import datasets

    rows = [{"prompt": f"{{{n}}}?", "response": str(n), "system": f"count from {n % 2}"} for n in range(10)]
    collect(place, "A", rows=rows)
    collect(place, "B")
    root = place.export("text-to-lora")
    assert prompts_as_text_to_lora(root, "A")[3] == ("", "count from 1\n\n{3}?", "3")
    metadata = yaml.safe_load((root / "tasks" / "A" / "metadata.yaml").read_text())
    monkeypatch.chdir(root)
    for split, count in (("train", 10), ("train[:90%]", 9), ("train[90%:]", 1)):
        loaded = datasets.load_dataset(**{**metadata["ds_kwargs"], "split": split}, cache_dir=str(tmp_path / "cache"))
        assert len(loaded) == count and set(loaded.column_names) == {"prompt", "response", "system"}


def test_what_goes_wrong_there_silently_is_refused_before_anything_is_written(place):
    collect(place, "A")
    assert "every loss would be NaN" in place.refused("text-to-lora")
    collect(place, "B")
    assert "A: is the only dataset to train on" in place.refused("text-to-lora", VAL="B")
    collect(place, "Bare", descriptions=[])
    assert "Bare: has no descriptions of its task" in place.refused("text-to-lora")
    for name, config in {"Alpha": {"lora_alpha": 32}, "Plain": {"use_rslora": False}}.items():
        collect(place, name, config={**PROTOCOL, **config})
        assert "the first adapter's would count for all" in place.refused("text-to-lora", DATASET=f"A {name}")
    collect(place, "Wide", modules=(*ATTENTION, "mlp.down_proj"))
    assert "other target layers or shapes" in place.refused("text-to-lora", DATASET="A Wide")
    collect(place, "Rank", rank=4)
    assert "one model and rank" in place.refused("text-to-lora", DATASET="A Rank")
    collect(place, "A", seed=7)
    assert "holds one seed" in place.refused("text-to-lora", DATASET="A B")
    collect(place, "A", category="math")
    assert "are both of A" in place.refused("text-to-lora", DATASET="A B", SEED="42")
    assert not place.out.exists()
    (paths.MODELS / "Tiny" / "tokenizer_config.json").write_text("{}")
    selected = {"DATASET": "A B", "SEED": "42", "CATEGORY": handmade.CATEGORY}
    assert "has no chat template" in place.refused("text-to-lora", **selected)
    (paths.MODELS / "Tiny" / "tokenizer_config.json").unlink()
    assert f"make model MODEL={HUB}" in place.refused("text-to-lora", **selected)
    assert not place.out.exists()


def test_a_model_without_hub_id_is_a_path_in_the_checkout(place, capsys):
    for name in "AB":
        collect(place, name, hub_id=None)
    root = place.export("text-to-lora")
    adapters_as_text_to_lora(root, "models/Tiny", ["A", "B"])
    assert (root / "chat_templates" / "models" / "Tiny" / "chat_template.jinja").exists()
    assert f"ln -s {shlex.quote(str(paths.MODELS))} models" in capsys.readouterr().out


def test_the_checkouts_own_template_stays_and_nothing_else_of_it_is_replaced(place, capsys):
    for name in "AB":
        collect(place, name)
    own = place.out / "chat_templates" / HUB / "chat_template.jinja"
    own.parent.mkdir(parents=True)
    own.write_text("theirs")
    place.export("text-to-lora", DRY_RUN="1")
    told = capsys.readouterr().out
    assert "chat_template.jinja stays" in told and list(tree(place.out).values()) == [b"theirs"]
    for name in ("train_outputs/sft/oracle_lora/A", "tasks/B", "configs/paragen.yaml"):
        assert f"would write: {place.out / name}\n" in told
    place.export("text-to-lora")
    assert own.read_text() == "theirs"
    before = {path: path.stat().st_mtime_ns for path in place.out.rglob("*")}
    place.export("text-to-lora")
    assert {path: path.stat().st_mtime_ns for path in place.out.rglob("*")} == before
    (place.out / "tasks" / "C").mkdir()
    (place.out / "tasks" / "C" / "metadata.yaml").write_text("theirs")
    collect(place, "C")
    assert "no export of ours" in place.refused("text-to-lora")
    assert sorted(path.name for path in (place.out / "train_outputs/sft/oracle_lora").iterdir()) == ["A", "B"]


@pytest.mark.parametrize(
    "template, changed",
    [(TEMPLATE, False), ("{%- for message in messages %}\n    {{- message['content'] + '\\n' }}\n{%- endfor %}", False),
     ("{% for message in messages %}\n{{ message['content'] }}\n{% endfor %}", True), ("{{ unknown() }}", True)],
)  # fmt: skip
def test_a_template_that_depends_on_its_line_breaks_is_named(place, capsys, template, changed):
    for name in "AB":
        collect(place, name)
    (paths.MODELS / "Tiny" / "chat_template.jinja").write_text(template)
    root = place.export("text-to-lora")
    assert (root / "chat_templates" / HUB / "chat_template.jinja").read_text() == template
    assert ("removes line breaks" in capsys.readouterr().out) == changed


def test_an_export_holds_adapters_of_one_kind_also_over_several_calls(place):
    for name in "AB":
        collect(place, name)
    place.export("text-to-lora")
    for name in "CD":
        collect(place, name, rank=4)
    said = place.refused("text-to-lora", DATASET="C D")
    assert "oracle_lora/A: is of another model, rank or recipe; take another OUT" in said
    for name in "AB":
        collect(place, name, rank=4)
    place.export("text-to-lora", RANK="4")
    collect(place, "E", rank=4)
    place.export("text-to-lora", DATASET="E D", RANK="4")


def test_a_changed_checkpoint_is_never_exported(place, capsys):
    for name in "ABC":
        run = collect(place, name)
    content = bytearray((run / "checkpoint-7.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "checkpoint-7.safetensors").write_bytes(content)
    assert "checkpoint-7.safetensors" in place.refused("text-to-lora", DATASET="C")
    assert not place.out.exists()
    place.export("text-to-lora")
    assert "checkpoint-7.safetensors" in capsys.readouterr().err, "the others are exported"
    assert {path.name for path in place.out.glob("**/oracle_lora/*")} == {"A", "B"}
