"""A recipe file as the checks see it: its keys with their lines, its header, and what its path states."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.recipes import render
from paragen.recipes.figures_table import FIGURES

Fault = tuple[str, str]  # the key, and what is wrong with it


@dataclass
class Recipe:
    """A readable recipe. The names are empty for a recipe outside collect_scripts/<category>/<dataset>/."""

    path: Path
    config: dict[str, Any]
    lines: dict[str, int]  # the line of each key
    header: list[tuple[int, str]]  # the comment lines at its top
    category: str = ""
    dataset: str = ""
    short: str = ""  # the model in the file's name
    phase: str = ""
    faults: list[Fault] = field(default_factory=list)

    def resolved(self, key: str) -> Path | None:
        """The absolute path that a key names, or None."""
        value = self.config.get(key)
        return render.resolve(self.path, value) if isinstance(value, str) and value else None

    def place(self, key: str) -> str:
        """`file:line: key`, as faults begin; without the line for a key that is missing."""
        number = self.lines.get(key)
        return f"{paths.relative(self.path)}{f':{number}' if number else ''}: {key}"


def all_recipes() -> list[Path]:
    """All recipes under collect_scripts/, without the rendered ones of running trainings."""
    found = (path for ending in ("yaml", "yml") for path in paths.SCRIPTS.rglob(f"*.{ending}"))
    return sorted(path for path in found if path != FIGURES and "_temp_rank_" not in path.name)


def other_half(path: Path) -> Path:
    """The path of a finetune recipe's pretrain recipe, or the other way round, by its name."""
    swapped = {"_pretrain.yaml": "_finetune.yaml", "_finetune.yaml": "_pretrain.yaml"}
    ending = next((ending for ending in swapped if path.name.endswith(ending)), "")
    return path.with_name(path.name.removesuffix(ending) + swapped.get(ending, ""))


def read_recipe(path: Path) -> Recipe:
    """A recipe with the names that its path states. Raises UserError when it is no recipe at all."""
    config = render.load(path)
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(root, yaml.MappingNode):  # OmegaConf reads a text as a mapping of that text to nothing
        raise UserError(f"{path}: not a recipe: a mapping of LLaMA-Factory keys is expected")
    lines = {name.value: name.start_mark.line + 1 for name, _ in root.value}
    header = [(number, line) for number, line in enumerate(text.splitlines(), 1) if number < min(lines.values())]
    recipe = Recipe(path, config, lines, [(number, line) for number, line in header if line.startswith("#")])
    parts = path.relative_to(paths.SCRIPTS).parts if path.is_relative_to(paths.SCRIPTS) else ()
    if len(parts) == 3:
        recipe.category, recipe.dataset = parts[:2]
        named = re.fullmatch(rf"(.+)_{re.escape(recipe.dataset)}_(pretrain|finetune)\.yaml", path.name)
        if named:
            recipe.short, recipe.phase = named.groups()
    return recipe


def resumed_step(recipe: Recipe) -> int | None:
    """The step that a recipe resumes from, or None."""
    resumed = recipe.resolved("resume_from_checkpoint")
    found = resumed and paths.CHECKPOINT.fullmatch(resumed.name)
    return int(found[1]) if found else None


def is_positive(value: Any) -> TypeGuard[int]:
    """Whether a recipe's value is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
