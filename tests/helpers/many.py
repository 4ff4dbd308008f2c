"""Many small whole collections with their pretrain runs, written without training: a project to look at states in."""

import json
import shutil
from pathlib import Path

import numpy
from safetensors.numpy import load_file, save_file

from paragen.collection import run_files, run_identity
from paragen.collection.manifest import CheckpointEntry, new_manifest, write_manifest
from paragen.common import files, paths
from paragen.recipes.run import Cell, Run

STORED = Path(__file__).resolve().parents[1] / "collected_before"
CATEGORY = "common-sense-reasoning"
MODEL = "tiny"
RANKS = (2, 4, 8, 16, 64)
KEPT = (94, 95, 96)
RESUMED = 90


def make(top: Path, datasets: int = 20, optimizer_bytes: int = 1000) -> list[Cell]:
    """Write a project with collections of Toy0, Toy1, ... at RANKS; returns their cells.

    Args:
        top: the project's folder, which `PARAGEN_TOP` names to the scripts.
        datasets: how many datasets.
        optimizer_bytes: the length of each pretrain's optimizer.pt; it takes no space on disk.
    """
    shutil.copytree(STORED / "models", top / "models")
    shutil.copy(paths.ROOT / "models" / "models.yaml", top / "models")
    (top / "data" / CATEGORY).mkdir(parents=True)
    cells, info = [], {}
    for number in range(datasets):
        name = f"Toy{number}"
        rows = json.loads((STORED / "data" / CATEGORY / "Toy.json").read_text())
        (top / "data" / CATEGORY / f"{name}.json").write_text(json.dumps([{**row, "system": name} for row in rows]))
        columns = {"prompt": "prompt", "response": "response", "system": "system"}
        info[name] = {"file_name": f"{CATEGORY}/{name}.json", "columns": columns}
        recipes = tuple(write_recipe(top, name, phase) for phase in paths.PHASES)
        cells += [Cell(name, MODEL, rank, recipes) for rank in RANKS]
    (top / "data" / "dataset_info.json").write_text(json.dumps(info))
    for cell in cells:
        write_pretrain(cell.pretrain, optimizer_bytes)
        write_collection(cell.finetune)
    return cells


def write_recipe(top: Path, dataset: str, phase: str) -> Path:
    """Write the recipe of a dataset and a phase."""
    text = (STORED / "collect_scripts" / CATEGORY / "Toy" / f"{MODEL}_Toy_{phase}.yaml").read_text()
    recipe = top / "collect_scripts" / CATEGORY / dataset / f"{MODEL}_{dataset}_{phase}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(text.replace("dataset: Toy", f"dataset: {dataset}").replace("/Toy/", f"/{dataset}/"))
    return recipe


def write_pretrain(run: Run, optimizer_bytes: int) -> None:
    """Write a pretrain run with the checkpoint that its finetune resumes."""
    checkpoint = run.folder / run_files.checkpoint_folder(RESUMED)
    checkpoint.mkdir(parents=True)
    for name in run_files.RESUMED:
        (checkpoint / name).write_text(json.dumps({"global_step": RESUMED, "of": run.folder.name}))
    with open(checkpoint / "optimizer.pt", "r+b") as file:
        file.truncate(optimizer_bytes)
    size, resumed = files.size_of(checkpoint.iterdir()), run_identity.pretrain_of(checkpoint)
    entry = CheckpointEntry(RESUMED, 1.5, 1e-4, size, resumed["sha256"])
    identity = run_identity.identity_of(run)
    write_manifest(run.folder, new_manifest(run.folder, "pretrain", run.rank, identity, [entry], {}))


def write_collection(run: Run) -> None:
    """Write a collection that verifies: the stored one's keys at the run's rank, random values."""
    stored = STORED / "saves" / CATEGORY / "Toy" / "Tiny-Llama_lora-rank_2_finetune"
    run.folder.mkdir(parents=True)
    config = {**json.loads((stored / paths.ADAPTER_CONFIG).read_text()), "r": run.rank}
    files.write_json(run.folder / paths.ADAPTER_CONFIG, config)
    entries, shapes = [], {key: value.shape for key, value in load_file(stored / "checkpoint-96.safetensors").items()}
    for step in KEPT:
        made = numpy.random.default_rng([step, run.rank, len(run.folder.parent.name)])
        tensors = {}
        for key, (rows, columns) in shapes.items():
            shape = (run.rank, columns) if "lora_A" in key else (rows, run.rank)
            tensors[key] = made.standard_normal(shape, dtype=numpy.float32)
        path = run.folder / run_files.checkpoint_name(step)
        save_file(tensors, path, metadata={"format": "pt"})
        entries.append(CheckpointEntry(step, 1.1, 1e-4, path.stat().st_size, files.sha256_of(path)))
    facts = {"adapter_config_sha256": files.sha256_of(run.folder / paths.ADAPTER_CONFIG), "seed": run.seed}
    identity = run_identity.identity_of(run)
    write_manifest(run.folder, new_manifest(run.folder, "finetune", run.rank, identity, entries, facts))
