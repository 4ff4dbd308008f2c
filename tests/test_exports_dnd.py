"""FORMAT=dnd: what Drag-and-Drop LLMs trains on, read as its scripts read it."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from helpers import handmade
from helpers.handmade import CATEGORY, tree

from paragen.collection.manifest import read_manifest
from paragen.exports import dnd, dnd_prompts

CODING, MULTIMODAL = "coding", "multimodal"


def read_as_drag_and_drop(root: Path, task: str, datasets: list[str], ending: str, real_length: int, num_texts: int):
    """Pairs (dataset, layers in order, dtype, prompts), read in the way that Drag-and-Drop's training reads them."""
    import torch
    from safetensors.torch import load_file

    checkpoints = []
    for dataset in datasets:
        folder = root / "data" / task / dataset
        names = os.listdir(folder)
        checkpoints += [folder / name for name in names[: min(len(names), real_length)]]
    texts = [json.loads((root / "prepare" / "data" / f"{dataset}{ending}").read_text()) for dataset in datasets]
    prompts = [
        [row["prompt"] if "prompt" in row else row["conversations"][0]["value"] for row in rows] for rows in texts
    ]
    for number, path in enumerate(checkpoints):
        layers: dict[int, list[str]] = {}
        for key, tensor in load_file(path).items():
            assert key.startswith("base_model.model.")
            assert key.split(".")[4] == key.removeprefix("base_model.model.").split(".")[2]
            assert key.split(".")[6] in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
            assert torch.isfinite(tensor.to(torch.bfloat16)).all()
            layers.setdefault(int(key.removeprefix("base_model.model.").split(".")[2]), []).append(key)
        drawn = random.sample(prompts[number // real_length], num_texts)
        yield path.parent.name, sorted(layers), drawn


def test_drag_and_drop_pairs_each_text_checkpoint_with_prompts_of_its_dataset(trained_place):
    from safetensors.torch import load_file

    root = trained_place.export("dnd")
    pairs = list(read_as_drag_and_drop(root, "common_sense_reasoning", ["Toy"], "_train.json", 6, 16))
    assert len(pairs) == 6
    for dataset, layers, drawn in pairs:
        assert dataset == "Toy" and layers == [0, 1]
        assert all(text.startswith("is ") for text in drawn)
    folder = root / "data" / "common_sense_reasoning" / "Toy"
    assert sorted(os.listdir(folder)) == sorted(f"{step}.safetensors" for step in range(7, 13))
    collected = next(trained_place.saves.glob("*/*/*_finetune"))
    for step in range(7, 13):  # the very bytes, as a copy: an edited export leaves the collection alone
        source, target = collected / f"checkpoint-{step}.safetensors", folder / f"{step}.safetensors"
        assert source.read_bytes() == target.read_bytes() and not os.path.samefile(source, target)
        assert load_file(target).keys() == load_file(source).keys()
    rows = json.loads((root / "prepare" / "data" / "Toy_train.json").read_text())
    assert len(rows) == 48  # of 64: those that max_samples trained on
    assert rows[1] == {"prompt": "is 1 even?", "response": "[B]", "system": "answer"}


def test_drag_and_drop_reads_the_layers_of_a_vision_language_model(place):
    rows = [
        {"messages": [{"role": "system", "content": "look"}, {"role": "user", "content": f"<image>what is {n}?"},
                      {"role": "assistant", "content": f"a {n}"}], "images": [f"pictures/{n}.png"]}
        for n in range(20)
    ]  # fmt: skip
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
            "system_tag": "system"}  # fmt: skip
    entry = {"formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": tags}
    modules = handmade.llama_keys("model.language_model", layers=11)
    place.collect(MULTIMODAL, "Pics", rows, entry, model="Qwen2.5-VL-3B-Instruct", rank=16, modules=modules)
    root = place.export("dnd")
    pairs = list(read_as_drag_and_drop(root, "vllm3B", ["Pics"], ".json", 3, 16))
    assert [layers for _, layers, _ in pairs] == [list(range(11))] * 3
    assert all(text.startswith("<image>what is") for _, _, drawn in pairs for text in drawn)
    rows = json.loads((root / "prepare" / "data" / "Pics.json").read_text())
    assert rows[3]["conversations"] == [
        {"from": "human", "value": "<image>what is 3?"}, {"from": "gpt", "value": "a 3"},
    ]  # fmt: skip
    assert rows[3]["system"] == "look" and rows[3]["images"] == ["pictures/3.png"]
    assert (root / "prepare" / "data" / "Pics_train.json").read_text() == json.dumps(rows, ensure_ascii=False, indent=1)


@pytest.mark.parametrize(
    "roles, kept",
    [("system user assistant", "human gpt"), ("assistant user function observation", "human function_call observation"),
     ("system assistant", "gpt"), ("user assistant user assistant", "human gpt human gpt")],
)  # fmt: skip
def test_a_conversation_begins_with_its_prompt(roles, kept):
    said = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles.split())]
    row = dnd_prompts.as_row({"system": "s", "prompt": "", "response": "", "images": [], "messages": said})
    assert " ".join(turn["from"] for turn in row["conversations"]) == kept
    assert row["system"] == "s" and "images" not in row


def test_what_was_removed_from_an_export_no_longer_counts(place, capsys):
    place.collect(dataset="A", rank=4)
    place.collect(dataset="B", rank=8)
    place.export("dnd", DATASET="A")
    shutil.rmtree(place.out / "data")
    capsys.readouterr()
    place.export("dnd", DATASET="B")
    assert "different numbers" not in capsys.readouterr().out


def test_renamed_layers_keep_their_values(place):
    import torch
    from safetensors.torch import load_file

    run = place.collect(MULTIMODAL, "Pics", modules=handmade.llama_keys("model.language_model"))
    root = place.export("dnd")
    written = load_file(next(root.glob("data/*/Pics/5.safetensors")))
    for key, tensor in load_file(run / "checkpoint-5.safetensors").items():
        assert torch.equal(written[key.replace("model.language_model.", "model.")], tensor)


@pytest.mark.parametrize(
    "category, model, task",
    [
        (CATEGORY, "Qwen2.5-0.5B-Instruct", "common_sense_reasoning"),
        (CODING, "Qwen2.5-7B-Instruct", "coding7B"),
        (CODING, "Qwen2.5-1.5B-Instruct", "coding1.5B"),
        ("math", "qwen2.5-7b", "math7B"),
        (MULTIMODAL, "Qwen2.5-VL-3B-Instruct", "vllm3B"),
        ("math", "Mistral-7B-Instruct-v0.3", "math_Mistral-7B-Instruct-v0.3"),
        (CODING, "gpt2", "coding_gpt2"),
        (CATEGORY, "SmolLM2-135M-Instruct-Q4_1", "common_sense_reasoning"),
    ],
)
def test_tasks_are_named_as_drag_and_drop_names_them(category, model, task):
    assert dnd.task_of(category, model) == task


def test_two_models_ranks_or_seeds_do_not_share_an_export(place):
    place.collect(dataset="A", rank=4)
    place.collect(dataset="B", rank=8)
    place.collect(dataset="B", rank=4, model="Other")
    place.collect(dataset="C", rank=4, seed=7)
    for selection, told in (
        ({"DATASET": "A B"}, ["Tiny rank 4", "Tiny rank 8", "Other rank 4", "RANK=.."]),
        ({"DATASET": "A C"}, ["42", "7", "SEED=.."]),
    ):
        line = place.refused("dnd", **selection)
        assert all(text in line for text in told), line
        assert not place.out.exists()
    place.export("dnd", DATASET="A")
    before = tree(place.out)
    assert "rank (8, not 4)" in place.refused("dnd", DATASET="B", RANK="8")
    assert "model (Other, not Tiny)" in place.refused("dnd", DATASET="B", MODEL="other")
    assert "seed (7, not 42)" in place.refused("dnd", DATASET="C")
    assert tree(place.out) == before


def test_two_collections_of_one_dataset_are_named(place):
    place.collect(dataset="A")
    place.collect(dataset="A", folder="other_lora-rank_4_finetune", steps=(5, 6))
    assert "are both of A" in place.refused("dnd")


def test_adapters_of_other_layers_do_not_share_an_export(place):
    place.collect(dataset="A")
    place.collect(dataset="B", modules=handmade.llama_keys(modules=["self_attn.q_proj"]))
    assert "set of layers" in place.refused("dnd")
    assert not place.out.exists()


@pytest.mark.parametrize(
    "module",
    ["transformer.h.0.attn.c_attn", "model.visual.blocks.0.attn.qkv", "model.layers.0.mlp.fc1", "model.x.q_proj"],
)
def test_layers_that_drag_and_drop_does_not_parse_are_refused_by_name_before_anything_is_written(place, module):
    place.collect(dataset="A")
    place.collect(dataset="B", modules=[*handmade.llama_keys(), module])
    assert module in place.refused("dnd", DATASET="A B")
    assert not place.out.exists()


def test_few_or_differing_checkpoints_and_few_prompts_are_said(place, capsys):
    place.collect(dataset="A", steps=range(1, 4))
    place.collect(dataset="B", steps=range(1, 53), rows=handmade.texts("B", 200))
    place.export("dnd")
    told = capsys.readouterr().out
    assert "A: 3 checkpoints, fewer than the real_length of 50" in told and "set real_length to 3" in told
    assert "B: 52 checkpoints, more than the real_length of 50" in told and "KEEP=50" in told
    assert "(A 3, B 52)" in told and "use 3 of each" in told
    assert "A: 8 prompts, fewer than the num_texts of 128" in told and "B: 200 prompts" not in told
    assert "no tokenizer for Tiny at rank 4" in told


def test_datasets_exported_before_count_too(place, capsys):
    place.collect(CODING, "A", model="Qwen2.5-7B", steps=range(1, 4))
    place.collect(CODING, "B", model="Qwen2.5-7B", steps=range(1, 3))
    place.export("dnd", DATASET="A")
    capsys.readouterr()
    place.export("dnd", DATASET="B")
    told = capsys.readouterr().out
    assert "real_length of 100" in told and "(A 3, B 2)" in told


def test_a_model_and_rank_with_a_tokenizer_there_is_not_remarked_on(place, capsys):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    keys = [f"base_model.model.model.layers.{layer}.x.{name}.lora_A.weight" for layer in range(24) for name in names]
    shapes = {key: [8, 4864 if "down" in key else 896] for key in keys}
    for rank, told in ((8, ""), (16, "no tokenizer")):
        folder = place.collect(model="Qwen2.5-0.5B-Instruct", rank=rank)
        chosen = dnd.Chosen("x", folder, read_manifest(folder))
        dnd.print_tokenizer_note(dnd.Planned(chosen, "", "", {}, shapes, "float32"))
        said = capsys.readouterr().out
        assert told in said and bool(told) == bool(said)


def test_steps_of_an_earlier_export_do_not_stay(place):
    run = place.collect(dataset="A", steps=(1, 2, 3))
    place.export("dnd")
    shutil.rmtree(run)
    place.collect(dataset="A", steps=(2, 3, 4))
    folder = place.export("dnd") / "data" / "common_sense_reasoning" / "A"
    assert sorted(os.listdir(folder)) == ["2.safetensors", "3.safetensors", "4.safetensors"]


def test_a_checkout_with_the_same_prompts_keeps_its_file(place):
    place.collect(dataset="A")
    theirs = place.out / "prepare" / "data" / "A_train.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(json.dumps([{"prompt": row["prompt"], "note": "theirs"} for row in handmade.texts("A")]))
    before = theirs.read_bytes()
    place.export("dnd")
    assert theirs.read_bytes() == before


def test_a_checkout_with_other_prompts_is_changed_only_when_asked_and_keeps_its_own_beside(place):
    place.collect(dataset="A")
    theirs = place.out / "prepare" / "data" / "A_train.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(json.dumps(handmade.texts("A", 9)))  # a row that was not trained on
    before = theirs.read_bytes()
    assert "FORCE=1" in place.refused("dnd")
    assert list(tree(place.out)) == ["prepare/data/A_train.json"]
    place.export("dnd", FORCE="1")
    assert json.loads(theirs.read_text()) == handmade.texts("A")
    assert theirs.with_name("A_train.json.before-export").read_bytes() == before
    place.export("dnd", FORCE="1")  # ours by now
    assert theirs.with_name("A_train.json.before-export").read_bytes() == before


def test_changed_rows_are_refused(place):
    place.collect(dataset="A")
    (place.data / CATEGORY / "A.json").write_text(json.dumps(handmade.texts("other")))
    assert "A.json" in place.refused("dnd")
    assert not place.out.exists()


def test_a_stock_run_takes_the_prompts_that_the_checkout_has(place, capsys):
    handmade.collect(place.saves, None, CATEGORY, "Stock", seed=None)
    assert "Stock_train.json" in place.refused("dnd")
    assert not place.out.exists()
    theirs = place.out / "prepare" / "data" / "Stock_train.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(json.dumps(handmade.texts("Stock", 9)))
    place.export("dnd")
    assert "is not known" in capsys.readouterr().out
    assert len(os.listdir(place.out / "data" / "common_sense_reasoning" / "Stock")) == 3
