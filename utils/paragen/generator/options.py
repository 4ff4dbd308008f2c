"""What a generator is trained with. Standard library alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paragen.common import settings
from paragen.common.cli import UserError
from paragen.recipes import render

NAMED = {"steps": "TRAIN_STEPS", "seed": "TRAIN_SEED", "steps_of": "STEPS"}  # the settings with another name


@dataclass(frozen=True)
class Options:
    """The settings of a training; all of them decide its result.

    Attributes:
        steps: of the first stage, whose targets are the collected factors.
        base_steps: of the second stage, whose loss is the base model's own on the tasks' rows; 0 omits it.
        seed: of the network's start and of everything that is drawn.
        form: `raw`, factors as collected, or `canonical`, see analysis/canonical.py.
        importance: whether the tensors' errors are weighted by the importance that `make stats` computes.
        mix: whether a target is a mixture of two tasks' checkpoints, and its condition one of their conditions.
        answers: whether a condition's prompts have their answers with them.
        prompts: how many prompts a condition is the mean over.
        pool: the largest number of prompts of a dataset that conditions are drawn from.
        width: of the network.
        batch: how many pairs a step has.
        learning_rate, base_learning_rate: the largest of each stage.
        steps_of: which checkpoints of a collection are taken, as STEPS says it.
    """

    steps: int = 1000
    base_steps: int = 0
    seed: int = 0
    form: str = "raw"
    importance: bool = False
    mix: bool = False
    answers: bool = False
    prompts: int = 16
    pool: int = 256
    width: int = 512
    batch: int = 16
    learning_rate: float = 1e-3
    base_learning_rate: float = 1e-3
    steps_of: str = "all"

    @classmethod
    def of_settings(cls) -> "Options":
        """The options that the settings request. Raises UserError for a value that cannot be one."""
        found = cls(
            steps=settings.number("TRAIN_STEPS") or cls.steps,
            base_steps=settings.number("BASE_STEPS") or cls.base_steps,
            prompts=settings.number("PROMPTS") or cls.prompts,
            width=settings.number("WIDTH") or cls.width,
            seed=only_seed("TRAIN_SEED", settings.values("TRAIN_SEED")),
            form=settings.text("FORM") or cls.form,
            steps_of=settings.text("STEPS") or cls.steps_of,
            importance=settings.switch("IMPORTANCE"),
            mix=settings.switch("MIX"),
            answers=settings.switch("ANSWERS"),
        )
        if found.prompts > found.pool:
            raise UserError(f"PROMPTS={found.prompts}: a condition is the mean over at most {found.pool} prompts")
        return found


def deciding(options: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of Options, by name, that decide a generator: the second stage's rate only where there is one."""
    return {key: value for key, value in options.items() if key != "base_learning_rate" or options.get("base_steps")}


def setting_of(option: str) -> str | None:
    """The setting, as a user types it, of an attribute of Options; None where it has none."""
    name = NAMED.get(option, option.upper())
    return name if name in settings.SETTINGS else None


def only_seed(name: str, values: list[str]) -> int:
    """The one seed among the values of a setting, 0 without any. Raises UserError for several and for no seed."""
    if len(values) > 1:
        raise UserError(f"{name}={' '.join(values)}: give one seed")
    return render.parse_seed(values[0]) if values else 0
