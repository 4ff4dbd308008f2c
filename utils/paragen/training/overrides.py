"""Refuses overrides (`key=value` arguments) that would have no effect on a run, but would make its result stale."""

from collections.abc import Iterator
from typing import Any

from paragen.collection.manifest import read_manifest
from paragen.common.cli import UserError
from paragen.recipes import keys, render
from paragen.recipes.run import Run


def check(run: Run) -> None:
    """Raise UserError for an override of a run that has no effect, with the key that has one."""
    given = render.parse_overrides(run.overrides)
    steps = run.config.get("max_steps")
    if "num_train_epochs" in given and steps not in (None, keys.EPOCHS_DECIDE):
        raise _no_effect(run, given, "num_train_epochs", f"max_steps, {steps}, decides; override that")
    if "save_strategy" in given and run.collects:
        raise _no_effect(run, given, "save_strategy", "a finetune collects the last save_total_limit steps")
    for key in keys.HELD_BY_CHECKPOINT if run.resumed else ():
        if key in given and all(given[key] != value for value in _known_values(run, key)):
            reason = "it resumes with the value in its checkpoint; give it to the pretrain, or omit it"
            raise _no_effect(run, given, key, reason)


def _known_values(run: Run, key: str) -> Iterator[Any]:
    """The values of a key that a resumed run may be given, since they are what it was or will be trained with."""
    yield render.load(run.recipe).get(key)
    for folder in (run.resumed.parent if run.resumed else run.folder, run.folder):
        manifest = read_manifest(folder)
        if manifest is not None and manifest.identity["recipe"] is not None:
            yield manifest.identity["recipe"].get(key)


def _no_effect(run: Run, given: dict[str, Any], key: str, reason: str) -> UserError:
    return UserError(f"{run}: {key}={given[key]} has no effect: {reason}")
