"""Tiny models of every architecture in the model table: pretrain, finetune, a collection; and each is causal."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import fork_server, tiny_models
from helpers.forked_python import PYTHON
from safetensors import safe_open

from paragen.model import base_models
from paragen.recipes import render

pytestmark = pytest.mark.runs

ROOT = Path(__file__).resolve().parent.parent
RANK = 2
# What makes a real recipe small. Its template, targets, figures and paths stay its own.
SMALL = (
    "max_samples=12", "cutoff_len=96", "image_max_pixels=12544", "logging_steps=1", "warmup_steps=0",
    "per_device_train_batch_size=2", "disable_gradient_checkpointing=true",
)  # fmt: skip
SMALL_PRETRAIN = (*SMALL, "gradient_accumulation_steps=2", "max_steps=2", "save_steps=2")
SMALL_FINETUNE = (*SMALL, "gradient_accumulation_steps=1", "max_steps=5", "save_total_limit=3")


class Projects:
    """A user's folder tree with tiny models (all of them by default), a dataset of text and one of pictures."""

    def __init__(self, top: Path, names: tuple[str, ...] = ()):
        self.top = top
        subprocess.run(
            [PYTHON, ROOT / "tests" / "helpers" / "tiny_models.py", top, *names],
            check=True,
            capture_output=True,
        )
        (top / "models").mkdir()
        for name in names or tiny_models.NAMES:
            (top / name).rename(top / "models" / base_models.table()[name]["folder"])
        subprocess.run([PYTHON, ROOT / "tests" / "helpers" / "tiny_pictures.py", top / "data"], check=True)

    def recipe(self, name: str, phase: str) -> Path:
        """The repository's recipe of the model, at its place in this tree."""
        dataset = "multimodal/MathV360K" if name == "qwen2.5-vl-3b" else "common-sense-reasoning/ARC-c"
        place = Path("collect_scripts", dataset, f"{name}_{Path(dataset).name}_{phase}.yaml")
        (self.top / place).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(ROOT / place, self.top / place)

    def overrides(self, name: str, phase: str) -> list[str]:
        """The `key=value` arguments that make a recipe small."""
        if phase == "pretrain":
            return list(SMALL_PRETRAIN)
        resumed = render.render(self.recipe(name, phase), RANK)["resume_from_checkpoint"]
        return [*SMALL_FINETUNE, f"resume_from_checkpoint={Path(resumed).parent}/checkpoint-2"]

    def model(self, name: str) -> Path:
        """The folder of a tiny model, named as the real one's."""
        return self.top / "models" / base_models.table()[name]["folder"]

    def train(self, name: str, phase: str) -> Path:
        """Train a phase of a model through utils/train.py; the run folder."""
        recipe = self.recipe(name, phase)
        overrides = self.overrides(name, phase)
        result = self.start(recipe, *overrides)
        assert result.status == 0, result.output
        return render.run_folder(recipe, render.render(recipe, RANK, overrides))

    def start(self, recipe: Path, *overrides: str, **environment: str) -> fork_server.Result:
        """Run utils/train.py on a recipe to its end."""
        arguments = [str(recipe), str(RANK), *overrides]
        return fork_server.start("train", arguments, environment, self.top / "log.txt").wait()


@pytest.fixture(scope="module")
def projects(tmp_path_factory) -> Projects:
    return Projects(tmp_path_factory.mktemp("architectures"))


def test_the_tiny_models_cover_every_kind_of_model_in_the_table():
    def kind(entry: dict) -> tuple:
        return entry["template"], entry["lora_target"], entry["processor"]

    table = base_models.table()
    assert {name: kind(table[name]) for name in tiny_models.NAMES} == {
        name: (known.template, known.lora_target, known.image_token is not None)
        for name, known in tiny_models.NAMES.items()
    }
    assert {kind(entry) for entry in table.values()} == {kind(table[name]) for name in tiny_models.NAMES}


QUICK = ("bert", "gpt2", "qwen2.5-vl-3b")  # without a chat template, without nn.Linear, with a processor


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny_models.NAMES]
)
def test_every_architecture_trains_and_its_collection_verifies(projects, monkeypatch, capsys, name):
    import verify

    pretrain = projects.train(name, "pretrain")
    resumable = {path.name for path in (pretrain / "checkpoint-2").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt"} <= resumable
    assert not {name for name in resumable if "token" in name or "processor" in name or "template" in name}
    folder = projects.train(name, "finetune")
    monkeypatch.setattr(verify.paths, "MODELS", projects.top / "models")
    assert verify.verify(folder).faults == [], capsys.readouterr().out
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
def test_a_later_token_does_not_change_earlier_logits(projects, name):
    logits, changed = logits_before_and_after(projects.model(name))
    assert (logits[:-1] - changed[:-1]).abs().max() < 1e-6
    assert (logits[-1] - changed[-1]).abs().max() > 1e-2, "the test would see a difference"


def test_bert_without_is_decoder_sees_later_tokens(projects, tmp_path):
    """A BERT from the hub must not be trained without that setting."""
    bidirectional = shutil.copytree(projects.model("bert"), tmp_path / "bert")
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
