"""On an NVIDIA GPU: the same training twice gives the same bits, in both engines, with long rows.

Each training is a process of its own; those of one case run beside each other. `make test-gpu` runs these tests; on a
machine without a GPU they are skipped.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import packed_project, tiny_models
from transformers import LlamaConfig, LlamaForCausalLM

from paragen.common import files

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 400
# The tokens that a row has at least, and the dtype of the base model's file; all compute in bfloat16.
CASES = {"over 300 tokens": (310, "float32"), "over 1,000 tokens": (1010, "bfloat16")}
RUNS = [(how, number) for how in ("graphs", "eager", "ordinary") for number in (1, 2)]
RANKS = (4, 8)  # of the pack's cells; the first is trained the ordinary way, too
LONG = {"cutoff_len": 1400, "learning_rate": 5e-4}  # keys of both recipes


def make_model(folder: Path, dtype: str) -> None:
    """A random Llama whose heads are 64 wide, as those of the models that recipes name."""
    tokenizer = tiny_models.tokenizer_of("qwen2.5-0.5b")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Trained:
    """The trainings of one case, each in a project of its own below `top`."""

    def __init__(self, top: Path, tokens: int, dtype: str):
        make_model(top / "model", dtype)
        self.projects, started = {}, []
        for how, number in RUNS:
            project = packed_project.Packable(top / f"{how} {number}", top / "model")
            rows = [
                {"prompt": "long " * (tokens // 5) + "er " * (n % 7), "response": "yes " * (4 + n % 30)}
                for n in range(13)
            ]
            project.data("Toy", rows=rows)
            cells = [project.cell(rank=rank, pretrain=LONG, finetune=LONG) for rank in RANKS]
            self.projects[how, number] = project
            started.append(self._start(project, how, cells[:1] if how == "ordinary" else cells))
        for log, process in started:
            assert process.wait(SECONDS) == 0, log.read_text()

    def _start(self, project: packed_project.Packable, how: str, cells: list) -> tuple[Path, subprocess.Popen]:
        command = [sys.executable, str(ROOT / "tests" / "helpers" / "gpu_training.py"), how]
        command += [text for cell in cells for text in cell.arguments()]
        path = os.pathsep.join(filter(None, (str(ROOT / "utils"), os.environ.get("PYTHONPATH"))))
        own = {"PYTHONPATH": path, "DEVICES": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **own, "ENGINE": "" if how == "ordinary" else "packed"}
        log = project.top / "log.txt"
        with open(log, "w") as file:
            return log, subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def folders(self, how: str, phase: str, rank: int = RANKS[0]) -> list[Path]:
        """The run folders of both trainings."""
        return [self.projects[how, number].folder(phase, rank=rank) for number in (1, 2)]

    def losses(self, how: str) -> dict[int, float]:
        """The losses of the collected steps of the cell that is trained in each way."""
        manifest = packed_project.manifest_of(self.folders(how, "finetune")[0])
        return {entry["step"]: entry["loss"] for entry in manifest["checkpoints"]}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("case"), *CASES[request.param])


@pytest.mark.parametrize("how", ["graphs", "eager"])
def test_a_pack_trained_twice_has_the_same_bits(trained, how):
    for rank in RANKS:
        for phase in ("pretrain", "finetune"):
            assert_same_bits(*trained.folders(how, phase, rank))


def test_a_cell_trained_alone_twice_has_the_same_bits(trained):
    for phase in ("pretrain", "finetune"):
        assert_same_bits(*trained.folders("ordinary", phase))


def assert_same_bits(one: Path, other: Path) -> None:
    """The adapters of two runs, and the losses in their logs."""
    for manifest in map(packed_project.manifest_of, (one, other)):
        assert manifest["deterministic"] is True and manifest["precision"] == "bfloat16"
        assert manifest["device"] == torch.cuda.get_device_name()
    adapters = [
        {str(path.relative_to(folder)): files.sha256_of(path) for path in folder.rglob("*.safetensors")}
        for folder in (one, other)
    ]
    assert adapters[0] and adapters[0] == adapters[1]
    assert packed_project.log_of(one) == packed_project.log_of(other)


@pytest.mark.parametrize("how", ["graphs", "eager"])
def test_a_packs_losses_are_those_of_the_cell_alone(trained, how):
    """To 0.01 of about 4: what bfloat16 leaves of the logits' differences in a mean (bench/README.md has 0.006)."""
    assert trained.losses(how) == pytest.approx(trained.losses("ordinary"), abs=0.01)


def test_rows_are_as_long_as_the_case_says(trained):
    folder = next(iter(trained.projects.values())).top / "data"
    rows = json.loads((folder / "Toy.json").read_text())
    tokenizer = tiny_models.tokenizer_of("qwen2.5-0.5b")
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    assert min(lengths) > 300 and max(lengths) < LONG["cutoff_len"] - 200
