"""Small collections of any model, rank, seed and category, written without training: real files, random weights."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import export
from helpers.forked_python import PYTHON
from paragen.collection.manifest import FORMAT, sealed
from paragen.common import files, paths
from paragen.common.cli import UserError

UTILS = Path(__file__).resolve().parents[2] / "utils"
CATEGORY = "common-sense-reasoning"
KEYS = (
    "CATEGORY", "DATASET", "MODEL", "MODELS", "RANK", "RANKS", "SEED", "FORCE", "FORMAT", "OUT", "DTYPE", "STEPS",
    "PARTS", "VAL", "SLICE", "COPY", "DRY_RUN",
)  # fmt: skip
TEXT_LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def llama_keys(prefix: str = "model", layers: int = 2, modules=TEXT_LAYERS) -> list[str]:
    """The adapted modules of a model with Llama's layer names below `prefix`."""
    return [f"{prefix}.layers.{layer}.{module}" for layer in range(layers) for module in modules]


def tensors_of(modules: list[str], rank: int, seed: int, inputs: int = 16, outputs: int = 12, dtype: str = "float32"):
    """Random LoRA factors for modules, by PEFT's keys."""
    import torch

    made = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, inputs, generator=made)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(outputs, rank, generator=made)
    return {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}


def register(data: Path, category: str, dataset: str, rows: list[dict], entry: dict | None = None) -> dict:
    """Put a dataset under data/ and return the element of a manifest's `data` for it."""
    info = data / "dataset_info.json"
    known = json.loads(info.read_text()) if info.exists() else {}
    columns = {"prompt": "prompt", "response": "response", "system": "system"}
    known[dataset] = {"file_name": f"{category}/{dataset}.json", **(entry or {"columns": columns})}
    (data / category).mkdir(parents=True, exist_ok=True)
    info.write_text(json.dumps(known))
    (data / category / f"{dataset}.json").write_text(json.dumps(rows))
    return {
        "name": dataset, "file": f"{category}/{dataset}.json", "entry": entry or {"columns": columns},
        "rows_in_file": len(rows), "rows": len(rows), "rows_sha256": files.sha256_of_value(rows), "pictures": None,
    }  # fmt: skip


def texts(dataset: str, count: int = 8) -> list[dict]:
    """Rows of a text dataset."""
    return [{"prompt": f"{dataset} {n}?", "response": f"answer {n}", "system": "be brief"} for n in range(count)]


def collect(
    saves: Path, data: dict | None, category: str, dataset: str, model: str = "Tiny", rank: int = 4,
    seed: int | None = 42, steps=(5, 6, 7), modules: list[str] | None = None, folder: str | None = None,
    config: dict | None = None, states: list[dict] | None = None, dtype: str = "float32", hub_id: str | None = None,
) -> Path:  # fmt: skip
    """Write a collection; `states` are its checkpoints' tensors where they are not random; `data` None: a stock run."""
    from safetensors.torch import save_file

    seed_part = "" if seed in (42, None) else f"_seed-{seed}"
    run = saves / category / dataset / (folder or f"{model}_lora-rank_{rank}{seed_part}_finetune")
    run.mkdir(parents=True)
    modules = modules or llama_keys()
    entries = []
    for number, step in enumerate(steps):
        path = run / f"checkpoint-{step}.safetensors"
        tensors = states[number] if states else tensors_of(modules, rank, step, dtype=dtype)
        save_file(tensors, path, metadata={"format": "pt"})
        size = path.stat().st_size
        sha256 = files.sha256_of(path)
        entries.append({"step": step, "loss": 0.5, "learning_rate": 1e-4, "bytes": size, "sha256": sha256})
    known = {
        "base_model_name_or_path": hub_id or model, "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank,
        "lora_alpha": 2 * rank, "target_modules": sorted({module.split(".")[-1] for module in modules}),
        "bias": "none", "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    files.write_json(run / "adapter_config.json", {**known, **(config or {})})
    manifest = {
        "format": FORMAT, "phase": "finetune",
        "category": category if category in paths.CATEGORIES else None,
        "dataset": dataset, "run": run.name, "rank": rank, "recipe": {"dataset": dataset} if data else None,
        "data": [data] if data else None, "tokenizer": None, "pretrain": None, "seed": seed,
        "adapter_config_sha256": files.sha256_of(run / "adapter_config.json"),
        "base_model": {"name": model, "hub_id": hub_id, "revision": None, "sha256": files.sha256_of_value(model)},
        "checkpoints": entries,
    }  # fmt: skip
    files.write_json(run / paths.MANIFEST, sealed(manifest))
    return run


class Place:
    """A user's saves/ and data/, and the command that exports from them."""

    def __init__(self, top: Path, monkeypatch):
        self.saves, self.data, self.out = top / "my saves", top / "data", top / "my out"
        self.saves.mkdir(parents=True)
        self.monkeypatch = monkeypatch
        for name in KEYS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(paths, "SAVES", self.saves)
        monkeypatch.setattr(paths, "DATA", self.data)

    def collect(self, category=CATEGORY, dataset="A", rows=None, entry=None, **how) -> Path:
        rows = rows or texts(dataset)
        known = register(self.data, category, dataset, rows, entry)
        return collect(self.saves, known, category, dataset, **how)

    def export(self, format_name: str, **environment: str) -> Path:
        """Export as `make export FORMAT=...`; returns OUT."""
        with self.monkeypatch.context() as patch:
            for name, value in {"FORMAT": format_name, "OUT": str(self.out), **environment}.items():
                patch.setenv(name, str(value))
            export.main()
        return self.out

    def refused(self, format_name: str, **environment: str) -> str:
        """The one error line of an export that is refused."""
        with pytest.raises(UserError) as error:
            self.export(format_name, **environment)
        assert "\n" not in str(error.value)
        return str(error.value)

    def start(self, format_name: str, limit: int | None = None, **environment: str) -> subprocess.Popen:
        """Start an export in a new process, from another folder; files are limited to `limit` bytes."""
        code = (
            "import sys, pathlib, resource, signal; sys.path.insert(0, sys.argv[1])\n"
            "from paragen.common import cli, paths\n"
            "paths.SAVES, paths.DATA = map(pathlib.Path, sys.argv[2:4])\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "if len(sys.argv) > 4: resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)\n"
            "import export; cli.run(export.main)"
        )
        environment = {**os.environ, "FORMAT": format_name, "OUT": str(self.out), **environment}
        command = [PYTHON, "-c", code, UTILS, self.saves, self.data, *([str(limit)] if limit else [])]
        return subprocess.Popen(
            command, env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder with their content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
