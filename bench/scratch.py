"""A repository in a temporary folder, for a benchmark's own recipes, data, model and runs.

Imported by packed.py's parts, which run this repository's scripts with PARAGEN_TOP at it.
"""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from shapes import ROOT

import cli

CATEGORY = "common-sense-reasoning"


def in_process(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a process of its own, so that what it imports does not stay; leave when it fails."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        cli.fail(f"{function.__name__}{arguments} failed with status {process.exitcode}")


def make(top: Path, dataset: str, data: Path) -> None:
    """The folders of a repository with one registered dataset."""
    (top / "models").mkdir(parents=True)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    (top / "saves").mkdir()
    file_name = f"{CATEGORY}/{dataset}_train.json"
    (top / "data" / CATEGORY).mkdir(parents=True)
    shutil.copy(data, top / "data" / file_name)
    columns = {"prompt": "prompt", "response": "response", "system": "system"}
    info = {dataset: {"file_name": file_name, "columns": columns}}
    (top / "data" / "dataset_info.json").write_text(json.dumps(info))


def write_recipes(top: Path, like: str, dataset: str, model: str, steps: int, keep: int) -> tuple[Path, Path]:
    """A recipe pair like one of this repository's, for another base and other numbers of steps.

    Args:
        like: the short name of the model whose recipes for `dataset` are taken.
        model: the base's folder under the temporary repository's models/.
        steps, keep: of the pretrain, and collected after it.
    """
    folder = top / "collect_scripts" / CATEGORY / dataset
    folder.mkdir(parents=True)
    written = []
    for phase in ("pretrain", "finetune"):
        name = f"{like}_{dataset}_{phase}.yaml"
        config = OmegaConf.to_container(OmegaConf.load(ROOT / "collect_scripts" / CATEGORY / dataset / name))
        run = f"../../../saves/{CATEGORY}/{dataset}/{model}_lora-rank_{config['lora_rank']}"
        config |= {"model_name_or_path": f"../../../models/{model}", "output_dir": f"{run}_{phase}"}
        if phase == "pretrain":
            config |= {"max_steps": steps, "save_steps": steps // 2 if steps % 2 == 0 else steps}
        else:
            resumed = f"{run}_pretrain/checkpoint-{steps}"
            config |= {"max_steps": steps + keep, "save_total_limit": keep, "resume_from_checkpoint": resumed}
        (folder / name).write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        written.append(folder / name)
    return written[0], written[1]


def write_json(path: Path | None, content: Any) -> None:
    """Write raw numbers, where a file is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1))
