"""Which files another node needs to train a cell (STAGE=1). All lie in the repository, under names relative to it."""

import os
from pathlib import Path

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info
from paragen.model import base_models, model_files
from paragen.recipes import keys, render
from paragen.recipes.run import Cell, Run

OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", ".ot")


def check_paths(run: Run) -> None:
    """Raise UserError for a path in a recipe that means something else in another copy of the repository."""
    for key in keys.PATHS:
        value = run.config.get(key)
        if value and os.path.isabs(os.path.expanduser(value)):
            place = f"{run.recipe}:{render.line_of(run.recipe, key)}"
            raise UserError(f"{place}: {key} {value} is absolute; STAGE=1 needs a path relative to the recipe")
        if value:
            name_of(run, run.resolve(value))


def name_of(run: Run, path: Path) -> str:
    """`path` relative to the repository. Raises UserError with the run's recipe where it lies elsewhere."""
    path = path.absolute()
    if not path.is_relative_to(paths.ROOT):
        raise UserError(
            f"{run.recipe}: needs {path}, which lies outside {paths.ROOT}; STAGE=1 sends only files inside it"
        )
    return str(path.relative_to(paths.ROOT))


def files_of_cell(cell: Cell) -> dict[str, Path]:
    """The files that both phases of a cell need, by name."""
    found = {*cell.recipes, base_models.TABLE}
    for run in cell.runs:
        found |= files_of_model(run.base)
        folder = run.resolve(run.config.get("dataset_dir", "data"))
        media = run.resolve(run.config["media_dir"]) if run.config.get("media_dir") else folder
        found.add(folder / "dataset_info.json")
        for name in run.config["dataset"].split(","):
            found |= files_of_dataset(name.strip(), folder, media, run.config.get("max_samples"))
    return {name_of(cell.finetune, path): path for path in found}


def files_of_run(run: Run) -> dict[str, Path]:
    """The files of a complete run, by name."""
    folder = run.resolve(run.config["output_dir"])  # as the recipe names it: the target of a link may lie anywhere
    return {name_of(run, path): path for path in folder.rglob("*") if path.is_file()}


def files_of_model(folder: Path) -> set[Path]:
    """The files of a model folder, without copies of its weights in other formats."""
    weights = set(model_files.weight_files(folder))
    present = {path for path in folder.rglob("*") if path.is_file()}
    present = {path for path in present if not path.name.endswith((".lock", ".incomplete"))}
    return {path for path in present if path in weights or path.suffix not in OTHER_WEIGHTS}


def files_of_dataset(name: str, folder: Path, media: Path, count: int | None) -> set[Path]:
    """The data file of a dataset, and the pictures in its first `count` rows."""
    path = dataset_info.data_file(name, folder)
    columns = dataset_info.columns_of(dataset_info.entry_of(name, folder))
    if "images" not in columns:
        return {path}
    rows = dataset_info.load_rows(path)[:count]
    return {path} | {media / shown for row in rows for shown in dataset_info.pictures_of(row, columns["images"])}
