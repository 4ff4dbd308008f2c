"""A repository in a temporary folder, for a benchmark's own recipes, data, model and runs.

Imported by packed.py's parts, which run this repository's scripts with PARAGEN_TOP at it.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from shapes import ROOT

from paragen.common import cli
from paragen.common.cli import say

CATEGORY = "common-sense-reasoning"


def in_process(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a process of its own, so that what it imports does not stay; leave when it fails."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        cli.fail(f"{function.__name__}{arguments} failed with status {process.exitcode}")


def timed(top: Path, name: str, script: str, *arguments: Any, **environment: str) -> dict[str, Any]:
    """Run a script of bench/ that writes what it noted to a JSON file, its first argument, in a process of its own.

    Args:
        top: the folder for that file and the log, both called `name`.

    Returns what it noted, with when it `started` and `exited`. Leaves with the log's end when it fails.
    """
    result, log = top / f"{name}.json", top / f"{name}.log"
    command = [sys.executable, ROOT / "bench" / script, result, *arguments]
    started = time.time()
    with open(log, "wb") as output:
        done = subprocess.run(
            [str(word) for word in command], env={**os.environ, **environment}, stdout=output, stderr=output
        )
    exited = time.time()
    if done.returncode:
        sys.exit(f"{log.read_text(errors='replace')[-6000:]}\nerror: {name} failed with {done.returncode}")
    say(f"{name}: {exited - started:.1f} s")
    return {"started": started, "exited": exited, **json.loads(result.read_text())}


def make(top: Path, dataset: str, data: Path, test: Path | None = None) -> None:
    """The folders of a repository with one registered dataset, and its test split where there is one."""
    (top / "models").mkdir(parents=True)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    (top / "saves").mkdir()
    (top / "data" / CATEGORY).mkdir(parents=True)
    columns = {"prompt": "prompt", "response": "response", "system": "system"}
    info = {}
    for name, source, part in ((dataset, data, "train"), (f"{dataset}_test", test, "test")):
        if source is not None:
            file_name = f"{CATEGORY}/{dataset}_{part}.json"
            shutil.copy(source, top / "data" / file_name)
            info[name] = {"file_name": file_name, "columns": columns}
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
