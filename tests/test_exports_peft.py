"""FORMAT=peft: folders that PEFT loads with the collected weights, for every kind of model."""

import ast
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import CATEGORY, ROOT
from helpers import scored
from helpers.forked_python import PYTHON

from paragen.exports import peft

CODING, MULTIMODAL = "coding", "multimodal"


def logits(model, ids):
    import torch

    with torch.no_grad():
        return model(input_ids=ids).logits


def test_peft_loads_each_step_with_the_collected_weights(trained_place, trained_once):
    import torch
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run = next(trained_place.saves.glob("*/*/*_finetune"))
    root = trained_place.export("peft")
    folders = sorted((root / run.relative_to(trained_place.saves)).iterdir(), key=lambda folder: int(folder.name[11:]))
    assert [folder.name for folder in folders] == [f"checkpoint-{step}" for step in range(7, 13)]
    base = trained_once.top / "models" / "Tiny-Llama"
    ids = torch.arange(3, 40)[None]
    bare = AutoModelForCausalLM.from_pretrained(base)
    seen = [logits(bare, ids)]
    for folder in folders[::5]:
        assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        found = logits(model, ids)
        last = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[2])
        set_peft_model_state_dict(last, load_file(run / f"{folder.name}.safetensors"))
        assert torch.equal(found, logits(last, ids))
        assert all((found - other).abs().max() > 1e-4 for other in seen)
        seen.append(found)


@pytest.fixture(scope="session")
def architectures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    names = ["gpt2", "qwen2.5-vl-3b", "gemma-3-4b"]
    subprocess.run(
        [PYTHON, ROOT / "tests" / "helpers" / "tiny_models.py", folder, *names],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5-vl-3b", "gemma-3-4b"])
def test_peft_takes_every_key_of_other_architectures(place, architectures, name, capsys):
    import torch
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    reads_pictures = name != "gpt2"
    auto = transformers.AutoModelForImageTextToText if reads_pictures else transformers.AutoModelForCausalLM
    targets = ["c_attn", "c_proj", "c_fc"] if name == "gpt2" else r".*language_model.*\.(q_proj|v_proj|down_proj)"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")
    config.init_lora_weights = "gaussian"
    model = get_peft_model(auto.from_pretrained(architectures / name), config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    modules = peft.modules_of(list(state))
    written = {**config.to_dict(), "target_modules": targets, "inference_mode": True}
    category = MULTIMODAL if reads_pictures else CODING
    place.collect(category, "A", model=name, modules=modules, states=[state], steps=[9], config=written)
    folder = next(place.export("peft").glob("*/A/*/checkpoint-9"))
    loaded = PeftModel.from_pretrained(auto.from_pretrained(architectures / name), folder)
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    ids = torch.arange(20, 40)[None]
    assert torch.equal(logits(loaded.eval(), ids), logits(model.eval(), ids))
    told = capsys.readouterr().out
    assert ("c_attn" in told) == (name == "gpt2") and ("SGLang takes target_modules" in told) == reads_pictures
    assert ("AutoModelForImageTextToText" in (folder / "README.md").read_text()) == reads_pictures


@pytest.mark.parametrize(
    "asked, steps",
    [("", list(range(1, 8))), ("all", list(range(1, 8))), ("last", [7]), ("every:3", [1, 4, 7]), ("every:10", [7])],
)
def test_steps_selects_checkpoints(place, asked, steps):
    run = place.collect(dataset="A", steps=range(1, 8))
    root = place.export("peft", STEPS=asked)
    found = (root / run.relative_to(place.saves)).iterdir()
    assert sorted(int(folder.name.removeprefix("checkpoint-")) for folder in found) == steps


def test_another_selection_of_steps_replaces_the_folder(place):
    run = place.collect(dataset="A", steps=range(1, 8))
    folder = place.export("peft", STEPS="last") / run.relative_to(place.saves)
    place.export("peft", STEPS="every:3")
    assert sorted(os.listdir(folder)) == ["checkpoint-1", "checkpoint-4", "checkpoint-7"]


@pytest.mark.parametrize("asked", ["every:0", "every", "3", "every:-1", "last 2"])
def test_steps_that_make_no_sense_are_refused(place, asked):
    place.collect()
    assert f"STEPS={asked}" in place.refused("peft", STEPS=asked)
    assert not place.out.exists()


def test_steps_are_refused_where_they_would_be_ignored(place):
    place.collect()
    assert "STEPS=last" in place.refused("dnd", STEPS="last")


def test_ranks_models_and_seeds_lie_side_by_side(place):
    for how in ({"rank": 4}, {"rank": 8}, {"rank": 4, "seed": 7}, {"rank": 4, "model": "Other"}):
        place.collect(dataset="A", **how)
    root = place.export("peft")
    assert sorted(path.name for path in (root / CATEGORY / "A").iterdir()) == [
        "Other_lora-rank_4_finetune",
        "Tiny_lora-rank_4_finetune",
        "Tiny_lora-rank_4_seed-7_finetune",
        "Tiny_lora-rank_8_finetune",
    ]


def test_an_edited_adapter_config_is_refused(place):
    path = place.collect(dataset="A") / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 4', '"r": 8'))
    assert "adapter_config.json does not have its recorded sha256" in place.refused("peft")
    assert not place.out.exists()


def test_what_serving_engines_refuse_is_said(place, capsys):
    place.collect(dataset="A", rank=24, config={"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"]})
    place.collect(dataset="B", rank=600)
    place.export("peft", DATASET="A")
    told = capsys.readouterr().out
    assert "bias, modules_to_save, use_dora" in told and "--max-lora-rank 32" in told
    place.export("peft", DATASET="B")
    assert "up to 512, not 600" in capsys.readouterr().out


def test_the_model_card_names_the_score_of_its_step(place):
    folder = place.collect()
    scored.write(folder, scored.evaluated({"base": 0.4, 5: 0.5}))
    out = place.export("peft")
    cards = {path.parent.name: path.read_text() for path in out.rglob("README.md")}
    said = (
        "score of the collected checkpoint: 0.5000 (0.4000 to 0.6000): share of right choices, as generated, 100 rows"
    )
    assert f"- {said} of Toy_test; its base model 0.4000 (0.3000 to 0.5000)\n" in cards["checkpoint-5"]
    assert "score" not in cards["checkpoint-6"]
    scored.write(folder, scored.evaluated({"base": 0.4, 5: 0.5, 6: 0.6}))
    place.export("peft")
    assert "checkpoint: 0.6000" in next(out.rglob("checkpoint-6/README.md")).read_text(), "other scores, other cards"


def test_the_model_card_links_the_base_only_by_its_hub_id(place):
    place.collect(dataset="A", hub_id="org/tiny")
    place.collect(dataset="B")
    root = place.export("peft")
    cards = {name: next(root.glob(f"*/{name}/*/checkpoint-5/README.md")).read_text() for name in "AB"}
    assert (
        "base_model: org/tiny\n" in cards["A"] and "vllm serve org/tiny --enable-lora --max-lora-rank 8" in cards["A"]
    )
    assert "base_model:" not in cards["B"]


@pytest.mark.parametrize("model", ['a"); import os; os.getcwd("', "a`$(id)`", "a<script>[b](c)", "a'b c"])
def test_no_name_in_a_manifest_becomes_code_in_the_model_card(place, model):
    place.collect(dataset="A", model=model, folder="A_lora-rank_4_finetune")
    card = next(place.export("peft").rglob("checkpoint-5/README.md")).read_text()
    code = card.split("```python\n")[1].split("```")[0]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert sorted(strings) == sorted([f"models/{model}", "this folder"])
    called = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert [getattr(function, "attr", None) for function in called] == ["from_pretrained"] * 2
    command = next(line for line in card.splitlines() if "vllm serve" in line).strip("` ")
    assert shlex.split(command)[2] == f"models/{model}"
    assert "<script>" not in card.replace("\\<", "").replace(code, "").replace(command, "")


@pytest.mark.parametrize("hub_id", ["a/b\nimport os", 'a/b"', "a/b/c", "-x/b", "../b", "a/" + "b" * 200, "ä/b"])
def test_a_hub_id_that_is_none_is_refused(place, hub_id):
    place.collect(dataset="A", hub_id=hub_id)
    assert "base_model.hub_id is " in place.refused("peft")


def test_a_hub_id_that_yaml_would_read_as_another_type_is_quoted(place):
    place.collect(dataset="A", hub_id="1e5")
    front = next(place.export("peft").rglob("checkpoint-5/README.md")).read_text().split("---\n")[1]
    assert yaml.safe_load(front)["base_model"] == "1e5"
