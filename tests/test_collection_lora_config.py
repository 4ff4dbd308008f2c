"""A layer's rank and scaling, read out of adapter_config.json, are those of PEFT's own layers."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from paragen.collection import lora_config
from paragen.collection.checkpoints import PEFT_PREFIX

SETTINGS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 7}},
    "alphas of their own": {"alpha_pattern": {"q_proj": 2, "k_proj": 9}},
    "the first pattern that matches counts": {"alpha_pattern": {r"layers\.0\..*": 2, "q_proj": 30}},
    "a pattern from the beginning of the name": {"alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 5}},
    "part of a name is no match": {"alpha_pattern": {"proj": 5, "self_attn": 6}},
    "all together": {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"k_proj": 1, "v_proj": 40}, "use_rslora": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_rank_and_scaling_are_pefts(name, tmp_path):
    small = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = LoraConfig(r=5, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **SETTINGS[name])
    adapted = get_peft_model(LlamaForCausalLM(small), config)
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    layers = [layer for layer, module in adapted.named_modules() if hasattr(module, "lora_A") and module.lora_A]
    assert len(layers) == 14
    for layer in layers:
        module = adapted.get_submodule(layer)
        for spelling in (layer, layer.removeprefix(PEFT_PREFIX)):
            assert lora_config.scaling_of(saved, spelling) == module.scaling["default"], layer
            assert lora_config.rank_of(saved, spelling) == module.r["default"], layer
    if name != "plain":
        plain = {lora_config.scaling_of({"r": 5, "lora_alpha": 12}, layer) for layer in layers}
        found = {lora_config.scaling_of(saved, layer) for layer in layers}
        assert (found == plain) == (name == "part of a name is no match")


def test_scaling_by_hand():
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    config = {"lora_alpha": 16, "r": 4}
    assert lora_config.scaling_of(config, layer) == 4
    assert lora_config.scaling_of({**config, "use_rslora": True}, layer) == 8
    assert lora_config.scaling_of({**config, "alpha_pattern": {"k_proj": 9, "q_proj": 2}}, layer) == 0.5
    assert lora_config.scaling_of({**config, "alpha_pattern": {r"layers\.0\..*": 2}}, layer) == 4
