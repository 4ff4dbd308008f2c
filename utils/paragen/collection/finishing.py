"""Turns the staging folder of a finished training into a run folder: checks its checkpoints and completes its files."""

import functools
import io
import json
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paragen.collection.manifest import CheckpointEntry
from paragen.collection.run_files import LOG, PICTURE, is_hashed_beside
from paragen.common import devices, files
from paragen.common.cli import UserError

DRAWING = threading.Lock()  # pyplot draws one picture at a time


def read_back(folder: Path, checkpoints: Iterable[CheckpointEntry]) -> None:
    """Raise unless each checkpoint file of a collection is on disk with the bytes that were recorded."""

    def check(entry: CheckpointEntry) -> None:
        path = folder / entry.file_name
        if not path.is_file() or path.stat().st_size != entry.bytes or files.sha256_of(path) != entry.sha256:
            raise UserError(f"{path}: does not hold what was written (a failing disk?); run it again")

    with ThreadPoolExecutor(min(8, devices.cpu_cores())) as threads:
        list(threads.map(check, checkpoints))


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two safetensors files hold the same keys, dtypes, shapes and bits. Neither has been verified before: this
    run has just written both."""
    import torch
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype
        and torch.equal(first[key].view(-1).view(torch.uint8), second[key].view(-1).view(torch.uint8))
        for key in first
    )


def check_finite(path: Path) -> None:
    """Raise UserError when a safetensors file holds values that are not finite: the training diverged.

    The file is one that this run wrote; a collection's has been verified by `read_back`.
    """
    import torch
    from safetensors.torch import load_file

    if not all(torch.isfinite(tensor).all() for tensor in load_file(path).values()):
        raise UserError("the training diverged: the adapter holds values that are not finite; lower learning_rate")


def tidy(folder: Path, keep: set[str]) -> None:
    """Remove all files and folders from a staging folder but those named in `keep`."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir():
            files.remove_folder(path)
        else:
            path.unlink()


def draw_loss(folder: Path, title: str, kept_from: int | None = None) -> None:
    """Draw training_loss.png from trainer_log.jsonl: the loss per step, the steps from `kept_from` on shaded."""
    import matplotlib.pyplot as plt
    from llamafactory.extras.ploting import gen_loss_plot

    with open(folder / LOG, encoding="utf-8") as file:
        log = [json.loads(line) for line in file]
    with DRAWING:
        figure = gen_loss_plot(log)
        axes = figure.axes[0]
        axes.set_title(title, fontsize=9)
        if kept_from is not None:
            axes.axvspan(kept_from - 0.5, log[-1]["current_steps"] + 0.5, alpha=0.12, color="tab:green", label="kept")
            axes.legend()
        figure.savefig(folder / PICTURE, dpi=100)
        plt.close(figure)


@functools.cache
def prepare_drawing() -> None:
    """Draw a picture that nobody sees. The first one of a process imports matplotlib, which may look for fonts, for
    seconds; a thread can have that done before a run is complete."""
    import matplotlib.pyplot as plt
    from llamafactory.extras.ploting import gen_loss_plot

    with DRAWING:
        figure = gen_loss_plot([{"current_steps": step, "loss": 1.0} for step in (1, 2)])
        figure.savefig(io.BytesIO(), dpi=100)
        plt.close(figure)


def hashes_beside(folder: Path) -> dict[str, str]:
    """The key `files_sha256` of a manifest for a run folder (see run_files.is_hashed_beside)."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: files.sha256_of(path) for name, path in named.items() if is_hashed_beside(name)}


def set_base_name(adapter_config: Path, base: dict) -> None:
    """Replace the local path of the base model in adapter_config.json by its hub id and revision, or its folder's name.

    PEFT keeps target_modules as a set; they are sorted so that equal runs have equal files.
    """
    config = json.loads(adapter_config.read_bytes())
    config["base_model_name_or_path"] = base["hub_id"] or base["name"]
    config["revision"] = base["revision"]
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    files.write_json(adapter_config, config)
