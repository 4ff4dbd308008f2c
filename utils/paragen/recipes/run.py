"""What is trained, rendered once and passed on: a Run (one phase) and a Cell (a pretrain and a finetune run)."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from paragen.common import paths
from paragen.recipes import keys, render


@dataclass(frozen=True)
class Run:
    """A recipe rendered at a rank, seed and overrides, with all its paths resolved. `run_of` makes it.

    Two runs are equal where recipe, rank and overrides are.
    """

    recipe: Path  # absolute
    rank: int
    overrides: tuple[str, ...]  # `key=value` texts
    config: dict[str, Any] = field(compare=False, repr=False)  # the rendered recipe; its paths are relative to `recipe`
    phase: str = field(compare=False)  # one of paths.PHASES
    seed: int = field(compare=False)
    folder: Path = field(compare=False)  # the run folder, absolute; for a link, its target
    base: Path = field(compare=False)  # the base model's folder, absolute
    resumed: Path | None = field(compare=False)  # the checkpoint folder from which it resumes, absolute

    def __str__(self) -> str:
        return f"{paths.relative(self.recipe)} at rank {self.rank}"

    @property
    def collects(self) -> bool:
        """Whether it becomes a collection."""
        return self.phase == "finetune"

    @property
    def datasets(self) -> list[str]:
        """The names of the datasets that it is trained on."""
        return [name.strip() for name in self.config["dataset"].split(",")]

    @property
    def data_dir(self) -> Path:
        """The folder with dataset_info.json, absolute."""
        return self.resolve(self.config.get("dataset_dir", "data"))

    @property
    def resumed_step(self) -> int:
        """The step of the checkpoint from which it resumes; 0 where there is none, or its name has none."""
        named = paths.CHECKPOINT.fullmatch(self.resumed.name) if self.resumed else None
        return int(named[1]) if named else 0

    def resolve(self, path: str) -> Path:
        """The absolute path of a path in the recipe."""
        return render.resolve(self.recipe, path)


def run_of(recipe: Path, rank: int, overrides: tuple[str, ...] = ()) -> Run:
    """Render a recipe.

    Args:
        recipe: path of a LLaMA-Factory YAML.
        rank: LoRA rank.
        overrides: `key=value` texts, as for `render.render`.

    Raises UserError when the recipe cannot be trained.
    """
    config = render.render(recipe, rank, list(overrides))
    resumed = config.get("resume_from_checkpoint")
    return Run(
        recipe=recipe.absolute(),
        rank=rank,
        overrides=tuple(overrides),
        config=config,
        phase=render.phase_of(config),
        seed=config.get("seed", keys.OMITTED_SEED),
        folder=render.run_folder(recipe, config),
        base=render.resolve(recipe, config["model_name_or_path"]),
        resumed=render.resolve(recipe, resumed) if resumed else None,
    )


@dataclass(frozen=True)
class Cell:
    """The two recipes of a dataset and a model, at a rank: they make one collection.

    Each recipe is rendered when its run is first needed. Later changes of the recipe's file have no effect.
    """

    dataset: str
    model: str
    rank: int
    recipes: tuple[Path, Path]  # pretrain and finetune
    overrides: tuple[str, ...] = ()  # `key=value` texts for both
    finetune_overrides: tuple[str, ...] = ()  # for the finetune alone

    def __str__(self) -> str:
        return " ".join((self.dataset, self.model, f"rank {self.rank}", *self.overrides))

    @cached_property
    def pretrain(self) -> Run:
        """The run that trains the adapter to a good region. Raises UserError for a broken recipe."""
        return run_of(self.recipes[0], self.rank, self.overrides)

    @cached_property
    def finetune(self) -> Run:
        """The run that collects. Raises UserError for a broken recipe."""
        return run_of(self.recipes[1], self.rank, self.overrides + self.finetune_overrides)

    def run(self, phase: str) -> Run:
        """The run of a phase. Raises UserError for a broken recipe."""
        return self.pretrain if phase == "pretrain" else self.finetune

    @property
    def runs(self) -> tuple[Run, Run]:
        """Both runs, in the order in which they are trained. Raises UserError for a broken recipe."""
        return self.pretrain, self.finetune
