"""Every architecture of the model table, tiny: pretrain, finetune, a whole collection; and each is causal."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import warm
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
RANK = 2
# What makes a real recipe small. The names of recipe keys; paths are the recipe's own.
SMALL = ("max_samples=12", "cutoff_len=96", "logging_steps=1", "per_device_train_batch_size=2", "warmup_steps=0")
SMALL_PRETRAIN = (*SMALL, "max_steps=2", "save_steps=2")
SMALL_FINETUNE = (*SMALL, "gradient_accumulation_steps=1", "max_steps=5", "save_total_limit=3")
RECIPE = """### model
model_name_or_path: ../../../models/{name}
image_max_pixels: 12544
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: {target}
### dataset
dataset: {dataset}
dataset_dir: ../../../data
template: {template}
cutoff_len: 512
### output
output_dir: ../../../saves/multimodal/{dataset}/{name}_lora-rank_8_{phase}
plot_loss: true
### train
gradient_accumulation_steps: 2
learning_rate: 1e-3
lr_scheduler_type: cosine
bf16: true
disable_gradient_checkpointing: true
"""
PRETRAIN = "max_steps: 75\nsave_steps: 25\n"
FINETUNE = """resume_from_checkpoint: ../../../saves/multimodal/{dataset}/{name}_lora-rank_8_pretrain/checkpoint-2
max_steps: 125
save_steps: 1
save_total_limit: 100
save_only_model: true
"""


class Projects:
    """A user's folder tree with tiny models (all of them by default), a dataset of text and one of pictures."""

    def __init__(self, top: Path, names: tuple[str, ...] = ()):
        self.top = top
        command = [sys.executable, ROOT / "tests" / "tiny_models.py", top / "models", *names]
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run([sys.executable, ROOT / "tests" / "tiny_pictures.py", top / "data"], check=True)

    def recipe(self, name: str, phase: str) -> Path:
        """A recipe of the model, as the repository's own are written."""
        kind = tiny_models.NAMES[name]
        dataset = "Colours" if name == "qwen2.5-vl-3b" else "Toy"
        text = RECIPE + (PRETRAIN if phase == "pretrain" else FINETUNE)
        path = self.top / "collect_scripts" / "multimodal" / dataset / f"{name}_{dataset}_{phase}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        names = {"name": name, "dataset": dataset, "phase": phase}
        path.write_text(text.format(**names, target=kind.lora_target, template=kind.template))
        return path

    def train(self, name: str, phase: str) -> Path:
        """Train a phase of a model through utils/train.py; the run folder."""
        import rank_config

        recipe = self.recipe(name, phase)
        overrides = SMALL_PRETRAIN if phase == "pretrain" else SMALL_FINETUNE
        result = self.start(recipe, *overrides)
        assert result.status == 0, result.output
        return rank_config.run_folder(recipe, rank_config.render(recipe, RANK, list(overrides)))

    def start(self, recipe: Path, *overrides: str, **environment: str) -> warm.Result:
        """Run utils/train.py on a recipe to its end."""
        arguments = [str(recipe), str(RANK), *overrides]
        return warm.start("train", arguments, environment, self.top / "log.txt").wait()


@pytest.fixture(scope="module")
def projects(tmp_path_factory) -> Projects:
    return Projects(tmp_path_factory.mktemp("architectures"))


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_architecture_trains_and_its_collection_is_whole(projects, monkeypatch, capsys, name):
    import verify

    pretrain = projects.train(name, "pretrain")
    resumable = {path.name for path in (pretrain / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt"} <= resumable
    assert not {name for name in resumable if "token" in name or "processor" in name or "template" in name}
    folder = projects.train(name, "finetune")
    monkeypatch.setattr(verify.paths, "MODELS", projects.top / "models")
    assert verify.verify(folder), capsys.readouterr().out
    others = {"adapter_config.json", "manifest.json", "trainer_log.jsonl", "training_loss.png"}
    assert {path.name for path in folder.iterdir()} == {f"checkpoint-{n}.safetensors" for n in (3, 4, 5)} | others
    manifest = json.loads((folder / "manifest.json").read_text())
    assert all(entry["loss"] for entry in manifest["checkpoints"])
    assert len({entry["sha256"] for entry in manifest["checkpoints"]}) == 3
    with safe_open(folder / "checkpoint-5.safetensors", "pt") as file:
        keys = list(file.keys())
    assert keys and len(keys) % 4 == 0, "two layers with an A and a B for each target"
    apart = ("lm_head", "cls", "embed", "wte", "vision_tower", "visual", "projector", "merger", "pooler")
    assert not [key for key in keys if any(part in key for part in apart)], "heads, embeddings and vision stay frozen"


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_a_later_token_never_changes_what_is_said_before_it(projects, name):
    logits, changed = logits_before_and_after(projects.top / "models" / name)
    assert (logits[:-1] - changed[:-1]).abs().max() < 1e-6
    assert (logits[-1] - changed[-1]).abs().max() > 1e-2, "the test would see a difference"


def test_bert_without_is_decoder_would_see_its_own_labels(projects, tmp_path):
    """Why models/ must not hold a BERT as it comes from the hub."""
    bidirectional = shutil.copytree(projects.top / "models" / "bert", tmp_path / "bert")
    config = json.loads((bidirectional / "config.json").read_text())
    (bidirectional / "config.json").write_text(json.dumps({**config, "is_decoder": False}))
    logits, changed = logits_before_and_after(bidirectional)
    assert (logits[:-1] - changed[:-1]).abs().max() > 1e-2


def logits_before_and_after(model_folder: Path):
    """The logits at 24 positions, and those after the last token changed; the model as LLaMA-Factory loads it."""
    import torch
    from llamafactory.hparams import get_infer_args
    from llamafactory.model.loader import load_model, load_tokenizer

    model_args, _, finetuning_args, _ = get_infer_args({"model_name_or_path": str(model_folder), "template": "empty"})
    model = load_model(load_tokenizer(model_args)["tokenizer"], model_args, finetuning_args).float().eval()
    tokens = torch.arange(10, 34)[None]
    other = tokens.clone()
    other[0, -1] = 99
    extra = {"token_type_ids": torch.zeros_like(tokens)} if model.config.model_type == "gemma3" else {}
    with torch.no_grad():
        return [model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0] for ids in (tokens, other)]
