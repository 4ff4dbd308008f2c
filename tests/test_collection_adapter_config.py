"""adapter_config.json: what PEFT saves loads, and nothing in one runs code, imports a module or takes minutes."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
from peft import EvaConfig, LoraConfig
from test_scripts_verify import edit_manifest, folder  # noqa: F401 (a fixture)

import verify
from paragen.collection import adapter_config
from paragen.common import files
from paragen.common.cli import UserError

NAMES = ["q_proj", "v_proj"]
SAVED = {
    "plain": {},
    "as LLaMA-Factory": {"r": 64, "lora_alpha": 128, "lora_dropout": 0.05, "target_modules": ["q_proj", "down_proj"]},
    "all layers": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|k_proj|up_proj)"},
    "an expression without vision": {"target_modules": r"^(?!.*visual).*(?:gate_proj|q_proj|up_proj|o_proj).*"},
    "whole names": {"target_modules": [f"model.layers.{number}.mlp.up_proj" for number in range(2000)]},
    "other kinds": {"use_rslora": True, "use_dora": True, "bias": "lora_only", "fan_in_fan_out": True},
    "patterns": {"rank_pattern": {"q_proj": 3, r"^model\.layers\.\d+\.mlp": 4}, "alpha_pattern": {"k_proj": 1.5}},
    "whole modules": {"modules_to_save": ["lm_head", "model.embed_tokens"], "exclude_modules": ["visual"]},
    "some layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "parameters": {"target_parameters": ["feed_forward.experts.gate_up_proj"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [0, 5]}},
    "PiSSA": {"init_lora_weights": "pissa_niter_16"},
    "EVA": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "replicated": {"layer_replication": [[0, 4], [2, 5]]},
}


@pytest.mark.parametrize("name", SAVED)
def test_a_config_that_peft_saves_loads_as_peft_loads_it(tmp_path, name):
    LoraConfig(**{"target_modules": NAMES, "task_type": "CAUSAL_LM", **SAVED[name]}).save_pretrained(tmp_path)
    found = adapter_config.lora_config(adapter_config.read(tmp_path / "adapter_config.json")).to_dict()
    expected = LoraConfig.from_pretrained(tmp_path).to_dict() | {"inference_mode": True}
    if name == "EVA":
        expected |= {"init_lora_weights": True, "eva_config": None}
    assert found == expected


def test_a_null_key_of_a_newer_peft_is_dropped(tmp_path):
    LoraConfig(target_modules=NAMES).save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "A"})
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "velora_config": None, "r": None}))
    assert adapter_config.lora_config(adapter_config.read(path)).r == 8


def test_each_key_of_the_pinned_peft_is_known_with_its_default():
    defaults = LoraConfig().to_dict() | {"peft_version": None}
    known = {key: listed.default for key, listed in adapter_config.LISTED.items()} | adapter_config.DEFAULTS
    known |= {key: defaults.get(key) for key in adapter_config.IGNORED if key != "runtime_config"}
    assert known | {"peft_type": "LORA"} == defaults
    assert {field.name for field in dataclasses.fields(LoraConfig)} == defaults.keys() | {"runtime_config"}


REFUSED = {
    "a module": {"megatron_config": {"a": 1}, "megatron_core": "this"},
    "a module alone": {"megatron_core": "this"},
    "a newer kind": {"velora_config": {"rank": 3}},
    "nested repeats": {"target_modules": r"(\w+)+$"},
    "repeated alternatives": {"target_modules": "(a|a)*b"},
    "many alternatives": {"exclude_modules": "(a|a)" * 40 + "b"},
    "many repeats": {"rank_pattern": {".*.*.*.*x": 4}},
    "optional characters": {"alpha_pattern": {"m?" * 40 + "m" * 40: 4}},
    "an expression among names": {"modules_to_save": ["(a+)+"]},
    "an expression for layers": {"layers_to_transform": [1], "layers_pattern": ["(.*)*x"]},
    "an expression to look around": {"target_modules": "(?=.*)*x"},
    "thousands of layers": {"layer_replication": [[0, 2]] * 3000},
    "thousands of iterations": {"init_lora_weights": "pissa_niter_100000"},
    "a rank": {"r": 999999},
    "a rank of a layer": {"rank_pattern": {"q_proj": 10**9}},
    "a rank that is true": {"r": True},
    "an alpha": {"lora_alpha": 1e999},
    "a dropout": {"lora_dropout": 2},
    "a list of numbers": {"target_modules": [1]},
    "a task": {"task_type": ["CAUSAL_LM"]},
    "a deep list": {"modules_to_save": [[[[[]]]]]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_run_code_or_take_minutes_is_refused_by_name(tmp_path, name):
    LoraConfig(target_modules=NAMES).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **REFUSED[name]}))
    started = time.process_time()
    with pytest.raises(UserError) as error:
        adapter_config.read(path)
    assert any(f"adapter_config.json: {key} is " in str(error.value) for key in REFUSED[name])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - started < 2


@pytest.mark.parametrize("content", ["", "[", "[]", "5", "[" * 100_000, '{"peft_type": "IA3"}', '{"r": ' + "9" * 9999])
def test_a_broken_one_is_one_line(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"adapter_config.json: [^\n]+$"):
        adapter_config.read(tmp_path / "adapter_config.json")


@pytest.mark.parametrize("name", ["a module", "nested repeats", "thousands of layers"])
def test_verify_names_a_hostile_config_and_imports_nothing(folder: Path, capsys, name):  # noqa: F811
    sys.modules.pop("this", None)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **REFUSED[name]}))
    edit_manifest(folder, lambda manifest: manifest.update(adapter_config_sha256=files.sha256_of(path)))
    found = verify.verify(folder, None)
    assert [fault.startswith("adapter_config.json: ") for fault in found.faults] == [True]
    assert "this" not in sys.modules
