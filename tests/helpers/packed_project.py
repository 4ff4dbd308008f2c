"""A project whose cells are trained packed and the ordinary way, and how far apart the two come out."""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import yaml

from helpers import fork_server
from helpers.forked_python import PYTHON

ROOT = Path(__file__).resolve().parents[2]
CATEGORY = "common-sense-reasoning"
MODEL = "Tiny"
BOUND = 1e-4  # of the relative difference in norm of each tensor
FOLDER = "../../../saves/common-sense-reasoning/{dataset}/{model}_lora-rank_4_{phase}"
BOTH = {
    "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4, "lora_target": "all",
    "dataset_dir": "../../../data", "cutoff_len": 96, "logging_steps": 3, "bf16": True, "learning_rate": 4e-3,
    "lr_scheduler_type": "cosine",
}  # fmt: skip
# With 13 rows an epoch has 7 batches, the last of one row, and 4 steps, the last of one batch.
PRETRAIN = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 20, "save_steps": 9}
# Epochs of 5 steps now, the last of one row: step 18 lies inside one.
FINETUNE = {
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "max_steps": 28, "save_steps": 1,
    "save_total_limit": 10, "save_only_model": True,
}  # fmt: skip
RESUMED = 18


class Cell(NamedTuple):
    """A pair of recipes, a rank, and overrides for both phases."""

    pretrain: Path
    finetune: Path
    rank: int = 4
    overrides: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The command line arguments of packed_train.py for this cell."""
        return ["--cell", str(self.pretrain), str(self.finetune), str(self.rank), *self.overrides]


class Packable:
    """models/, data/, collect_scripts/ and saves/ for cells of one base model.

    Args:
        top: a folder to be made.
        model: the folder of the base model, which is linked.
        template: LLaMA-Factory's name of its template.
    """

    def __init__(self, top: Path, model: Path, template: str = "qwen"):
        self.top, self.template = top, template
        self.saves = top / "saves" / CATEGORY
        (top / "models").mkdir(parents=True)
        (top / "models" / MODEL).symlink_to(model)
        (top / "data").mkdir()
        self.info = top / "data" / "dataset_info.json"
        self.info.write_text("{}")

    def data(self, dataset: str, count: int = 13, rows: list[dict] | None = None) -> None:
        """Register a dataset of so many rows of different lengths, or of these."""
        rows = rows or [
            {"prompt": f"{dataset} asks " + "for more " * (7 * n % 5), "response": "yes " * (1 + n % 4) + f"{n}"}
            for n in range(count)
        ]
        (self.top / "data" / f"{dataset}.json").write_text(json.dumps(rows))
        entry = {"file_name": f"{dataset}.json", "columns": {"prompt": "prompt", "response": "response"}}
        self.info.write_text(json.dumps({**json.loads(self.info.read_text()), dataset: entry}))

    def cell(
        self, dataset: str = "Toy", rank: int = 4, *overrides: str, pretrain: dict | None = None,
        finetune: dict | None = None, resumed: int = RESUMED, tag: str = "tiny",
    ) -> Cell:  # fmt: skip
        """Write a pair of recipes, with these keys beside or instead of the usual ones (None: without it)."""
        if not (self.top / "data" / f"{dataset}.json").exists():
            self.data(dataset)
        seed = next((f"_seed-{text[5:]}" for text in overrides if text.startswith("seed=")), "")
        named = {phase: FOLDER.format(dataset=dataset, model=MODEL, phase=phase) for phase in ("pretrain", "finetune")}
        start = {"resume_from_checkpoint": f"{named['pretrain']}/checkpoint-{resumed}"}
        folder = self.top / "collect_scripts" / CATEGORY / dataset
        folder.mkdir(parents=True, exist_ok=True)
        recipes = []
        for phase, keys in (
            ("pretrain", PRETRAIN | (pretrain or {})),
            ("finetune", FINETUNE | start | (finetune or {})),
        ):
            model = f"../../../models/{MODEL}"
            own = {
                "model_name_or_path": model,
                "template": self.template,
                "dataset": dataset,
                "output_dir": named[phase],
            }
            config = {key: value for key, value in (BOTH | own | keys).items() if value is not None}
            recipes.append(folder / f"{tag}{seed}_{dataset}_rank-{rank}_{phase}.yaml")
            recipes[-1].write_text(yaml.safe_dump(config, sort_keys=False))
        return Cell(*recipes, rank, overrides)

    def folder(self, phase: str, dataset: str = "Toy", rank: int = 4, seed: str = "") -> Path:
        """A run folder."""
        return self.saves / dataset / f"{MODEL}_lora-rank_{rank}{seed}_{phase}"

    def start(self, *cells: Cell, **environment: str) -> fork_server.Run:
        """Start packed_train.py on cells, with ENGINE=packed unless overridden, so that nothing falls back."""
        arguments = [text for cell in cells for text in cell.arguments()]
        return fork_server.start(
            "paragen.packed.packed_train", arguments, {"ENGINE": "packed", **environment}, self.top / "packed.txt"
        )

    def packed(self, *cells: Cell, **environment: str) -> fork_server.Result:
        """Run packed_train.py on cells to its end."""
        return self.start(*cells, **environment).wait()

    def ordinary(self, cell: Cell, *phases: str, **environment: str) -> fork_server.Result:
        """Train phases of a cell (both by default) through utils/train.py; the last one's result."""
        for phase in phases or ("pretrain", "finetune"):
            arguments = [str(getattr(cell, phase)), str(cell.rank), *cell.overrides]
            result = fork_server.start("train", arguments, environment, self.top / "log.txt").wait()
            if result.status:
                break
        return result

    def collect(self, *cells: Cell) -> None:
        """Train cells packed, all in one call; it must succeed."""
        result = self.packed(*cells)
        assert result.status == 0, result.output

    def collect_ordinary(self, *cells: Cell) -> None:
        """Train cells the ordinary way; it must succeed."""
        for cell in cells:
            result = self.ordinary(cell)
            assert result.status == 0, result.output

    def set_aside(self, name: str) -> Path:
        """Rename saves/, so that the same cells can be trained again; where it is now."""
        return (self.top / "saves").rename(self.top / name) / CATEGORY

    def left_over(self) -> list[str]:
        """Files that no run may leave: hidden entries beside run folders, rendered recipes."""
        hidden = [path.name for path in self.saves.glob("*/.*")]
        return hidden + [path.name for path in self.top.glob("collect_scripts/*/*/*_temp_*")]


def make_models(folder: Path, *names: str) -> None:
    """Tiny models of tests/helpers/tiny_models.py below a folder, made in a process of their own."""
    command = [PYTHON, ROOT / "tests" / "helpers" / "tiny_models.py", folder, *names]
    subprocess.run(command, check=True, capture_output=True)


def furthest(ours: Path, theirs: Path) -> tuple[float, str]:
    """The largest relative difference in norm of a tensor in the adapters of two folders, and which one it is.

    All files with adapters below them are compared; the same ones must be in both.
    """
    from safetensors.torch import load_file

    names = sorted(str(path.relative_to(theirs)) for path in theirs.rglob("*.safetensors"))
    assert names and names == sorted(str(path.relative_to(ours)) for path in ours.rglob("*.safetensors"))
    worst = (0.0, "")
    for name in names:
        mine, other = load_file(ours / name), load_file(theirs / name)
        assert mine.keys() == other.keys(), name
        for key, tensor in other.items():
            assert mine[key].dtype == tensor.dtype and mine[key].shape == tensor.shape, (name, key)
            worst = max(worst, (((mine[key] - tensor).norm() / tensor.norm()).item(), f"{name}: {key}"))
    return worst


def assert_same_adapters(ours: Path, theirs: Path) -> None:
    """Every tensor of every checkpoint below two folders is the same to BOUND."""
    off, where = furthest(ours, theirs)
    assert off <= BOUND, (off, where)


def log_of(folder: Path) -> list[dict]:
    """A run folder's log, less the times."""
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith("_time")} for line in lines]


def manifest_of(folder: Path) -> dict:
    """A run folder's manifest."""
    return json.loads((folder / "manifest.json").read_text())


def hashes(folder: Path) -> dict[int, str]:
    """The hash of each checkpoint of a run, as its manifest has it."""
    return {entry["step"]: entry["sha256"] for entry in manifest_of(folder)["checkpoints"]}
