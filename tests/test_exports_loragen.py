"""FORMAT=loragen: what LoRAGen's first stage trains on, read by the rules of its own loader."""

import json
import re

import torch
import yaml
from helpers import handmade, scored
from helpers.handmade import llama_keys, tree
from safetensors.torch import load_file

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
DESCRIPTIONS = [f"Answer question number {number} about the world." for number in range(20)]


def collect(place, dataset, descriptions=DESCRIPTIONS, modules=ATTENTION, **how):
    entry = {"columns": {"prompt": "prompt", "response": "response", "system": "system"}, "descriptions": descriptions}
    return place.collect(dataset=dataset, entry=entry, modules=llama_keys(modules=modules), **how)


def read_as_loragen(root, split: str) -> dict[str, dict[str, torch.Tensor]]:
    """By task, the stacked factors that the loader makes of a split's adapters, and those that the loss reads."""
    found = {}
    for task in json.loads((root / "split.json").read_text())[split]:
        path = root / "loras" / task / "adapter_model.safetensors"
        assert path.exists()  # a name without file is dropped silently there
        tensors = load_file(path)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        numbers = [re.search(r"^base_model\.model\.model\.layers\.(\d+)\.self_attn", key) for key in tensors]
        layers = range(max(int(number[1]) for number in numbers if number) + 1)
        stacks = {}
        for name, (module, half) in {"qa": "qA", "qb": "qB", "va": "vA", "vb": "vB"}.items():
            key = f"base_model.model.model.layers.{{}}.self_attn.{module}_proj.lora_{half}.weight"
            factors = [tensors[key.format(layer)] for layer in layers]
            assert all((factor.shape[0] < factor.shape[1]) == (half == "A") for factor in factors)
            stacks[name] = torch.stack(factors)
            assert torch.equal(stacks[name], tensors[f"decoder_only.lora_{name}"])
        found[task] = stacks
    return found


def test_loragen_reads_the_last_checkpoint_of_each_dataset(place, capsys):
    runs = {name: collect(place, name, dtype="bfloat16") for name in ("A", "B", "C")}
    root = place.export("loragen", VAL="c")
    assert list(read_as_loragen(root, "train")) == ["A", "B"] and list(read_as_loragen(root, "val")) == ["C"]
    stacks = read_as_loragen(root, "train")["B"]
    assert {name: tuple(stack.shape) for name, stack in stacks.items()} == {
        "qa": (2, 4, 16), "qb": (2, 12, 4), "va": (2, 4, 16), "vb": (2, 12, 4),
    }  # fmt: skip
    stored = load_file(runs["B"] / "checkpoint-7.safetensors")
    assert torch.equal(
        stacks["va"][1], stored["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"].float()
    )
    texts = yaml.safe_load((root / "descriptions" / "A" / "metadata.yaml").read_text())["descriptions"]
    assert texts == DESCRIPTIONS
    config = yaml.safe_load((root / "config.yaml").read_text())
    assert config["data"]["params"] == {"data_dir": str(root / "loras"), "split_file": str(root / "split.json")}
    sizes = config["model"]["params"]["ddconfig"]
    assert sizes["encoder"]["params"] == {
        "d_model": 16, "rank": 4, "dec_only": True, "d_in": 16, "d_out_q": 12, "d_out_v": 12
    }  # fmt: skip
    assert sizes["decoder"]["params"]["num_layers"] == 2 and sizes["decoder"]["params"]["dec_dv_out"] == 12
    assert "lora_config_bench_tasks.yaml" in capsys.readouterr().out


def test_peft_loads_an_adapter_cut_to_q_and_v_beside_its_stacked_tensors(place, capsys):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes))
    modules = ["q_proj", "v_proj", "down_proj"]
    made = get_peft_model(base, LoraConfig(r=4, target_modules=modules)).state_dict()
    made = {key.replace(".default", ""): torch.randn_like(value) for key, value in made.items() if "lora_" in key}
    collect(place, "A", states=[made], steps=[1], config={"target_modules": modules, "lora_alpha": 8})
    said = place.refused("loragen")
    assert "lora_target: q_proj,v_proj" in said and "SLICE=1" in said and not place.out.exists()
    root = place.export("loragen", SLICE="1")
    assert "the scores of the collections are not those" in capsys.readouterr().out
    assert list(read_as_loragen(root, "train")) == ["A"]
    fresh = LlamaForCausalLM(base.config)
    loaded = PeftModel.from_pretrained(fresh, root / "loras" / "A")
    found = {key.replace(".default", ""): value for key, value in loaded.state_dict().items() if "lora_" in key}
    kept = {key: value for key, value in made.items() if "down_proj" not in key}
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[key], kept[key]) for key in kept)


def test_what_loragen_cannot_read_is_refused_before_anything_is_written(place, capsys):
    collect(place, "A")
    collect(place, "Bare", descriptions=[])
    assert "Bare: has no descriptions" in place.refused("loragen")
    assert 'make describe DATASET=Bare TEXT=".."' in place.refused("loragen")
    collect(place, "Narrow", modules=("self_attn.q_proj",))
    assert "was trained on q_proj; LoRAGen reads q_proj and v_proj: collect it again" in place.refused(
        "loragen", DATASET="Narrow", SLICE="1"
    )
    collect(place, "Wide", rank=12)
    assert "rank 12 is not below the layers' widths 16, 12, 12" in place.refused("loragen", DATASET="Wide")
    assert "DTYPE=bfloat16: LoRAGen trains on float32 alone" in place.refused("loragen", DATASET="A", DTYPE="bfloat16")
    assert "VAL=A: leaves no dataset to train on" in place.refused("loragen", DATASET="A", VAL="A")
    assert "VAL" not in place.refused("loragen", DATASET="A", STEPS="every:2")
    assert "holds one model and rank, not Tiny rank 4, Tiny rank 12" in place.refused("loragen", DATASET="A Wide")
    other = collect(place, "Alpha", config={"lora_alpha": 4})
    assert "Alpha" in other.as_posix()
    assert "lora_alpha 4" in place.refused("loragen", DATASET="A Alpha")
    collect(place, "Later", config={"target_parameters": ["experts"]})
    assert "target_parameters=['experts'], which PEFT 0.15 does not know" in place.refused("loragen", DATASET="Later")
    assert not place.out.exists()
    place.export("loragen", DATASET="A", DRY_RUN="1")
    told = capsys.readouterr().out
    for name in ("loras/A", "descriptions/A", "split.json", "config.yaml"):
        assert f"would write: {place.out / name}\n" in told
    assert not place.out.exists()


def test_the_best_step_is_chosen_by_scores_that_are_not_reported(place):
    run = collect(place, "A")
    place.collect(dataset="Other")
    own = scored.evaluated({5: 0.9, 6: 0.1, 7: 0.1})
    scored.write(run, own)
    said = place.refused("loragen", DATASET="A", STEPS="best")
    assert "is not scored on rows other than the reported ones" in said and "make evaluate DATASET=A MODEL=" in said
    scored.write(run, own, scored.evaluated({5: 0.1, 6: 0.5, 7: 0.2}, split="Other", paired=False))
    root = place.export("loragen", DATASET="A", STEPS="best")
    stored = load_file(run / "checkpoint-6.safetensors")
    written = load_file(root / "loras" / "A" / "adapter_model.safetensors")
    assert all(torch.equal(written[key], stored[key]) for key in stored)


def test_a_second_export_writes_nothing_and_a_damaged_one_is_mended(place):
    collect(place, "A")
    collect(place, "B")
    place.export("loragen")
    before = {path: path.stat().st_mtime_ns for path in place.out.rglob("*")}
    place.export("loragen")
    assert {path: path.stat().st_mtime_ns for path in place.out.rglob("*")} == before
    whole = tree(place.out)
    (place.out / "split.json").unlink()
    (place.out / "loras" / "B" / "adapter_model.safetensors").write_bytes(b"cut")
    place.export("loragen")
    assert tree(place.out) == whole


def test_a_changed_checkpoint_is_never_exported(place):
    run = collect(place, "A")
    content = bytearray((run / "checkpoint-7.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "checkpoint-7.safetensors").write_bytes(content)
    assert "checkpoint-7.safetensors" in place.refused("loragen")
    assert not list(place.out.rglob("*.safetensors"))
    assert handmade.CATEGORY in run.as_posix()
