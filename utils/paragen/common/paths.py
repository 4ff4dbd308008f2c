"""The repository's folders, and how run folders and checkpoints are named."""

import difflib
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from paragen.common.cli import UserError

# PARAGEN_TOP is set on a node that has its data, models and runs in another folder than its scripts (sweep/stage.py).
UTILS = Path(__file__).resolve().parents[2]  # what PYTHONPATH names: the scripts, and the package `paragen`
ROOT = Path(os.environ.get("PARAGEN_TOP") or UTILS.parent)
SCRIPTS = ROOT / "collect_scripts"
DATA = ROOT / "data"
MODELS = ROOT / "models"
SAVES = ROOT / "saves"
MADE = "made"  # the category of generated tasks (make made-tasks), which a selection without names leaves out
CATEGORIES = ("coding", "common-sense-reasoning", "math", "multimodal", MADE)
PHASES = ("pretrain", "finetune")
ADAPTER = "adapter_model.safetensors"  # PEFT's name for the weights in a checkpoint folder
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name for its settings
MANIFEST = "manifest.json"
INDEX = "index.parquet"  # in saves/
# Folders in saves/ of what is made from collections and can be made again.
DERIVED = ("exports", "stats", "report", "publish", "generators", "generated", "benchmarks")
TOKENS = ".tokens"  # in saves/: tokenised rows, which the runs of sweeps share
REMOVED_TOKENS = ".removed-"  # how some of them are called while they are deleted
EXPORT_RECORD = "export.json"  # in the folder of an export

# The part of a run folder's name that states its adapter's rank and seed. A model's own name may have such a part, too
# (a merged adapter, for example), so the last one counts.
RANK_PART = re.compile(r"_lora-rank_(\d+)(?:_seed-(\d+))?(?=_|$)")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
RUN_PATH = re.compile(r"(.*?)([^/]*)(/checkpoint-\d+)?((?:/\.?)*)", re.DOTALL)  # parents, run folder, what follows


def loose(name: str) -> str:
    """`name` without case and punctuation, to compare it with what a user types (`arcc` is `ARC-c`)."""
    return re.sub(r"[\W_]", "", name.lower())


def choose(name: str, choices: Iterable[str], what: str) -> str:
    """The one of `choices` that `name` means; an exact match precedes one without case and punctuation.

    Args:
        name: what a user typed.
        choices: the names there are.
        what: what they are names of, for the error.

    Raises UserError naming all choices when none or several match.
    """
    choices = sorted(choices)
    if name in choices:
        return name
    found = [choice for choice in choices if loose(choice) == loose(name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(choices) or "none yet"
    raise UserError(
        f"{what} {name!r} is {'ambiguous' if found else 'not known'}{nearest(name, choices)}; known: {known}"
    )


def nearest(typed: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name nearest to what a user typed; an empty text where none is near."""
    names = {loose(name): name for name in sorted(known, reverse=True)}
    found = difflib.get_close_matches(loose(typed), names, 1)
    return f"; did you mean {names[found[0]]}?" if found else ""


def typed(name: str) -> str:
    """A dataset's or a model's name as a setting takes it: without blanks, which separate values; for the shell."""
    return shlex.quote("".join(name.split()))


def rank_in(path: str) -> tuple[int, int | None] | None:
    """The rank and the seed (None: the recipe's own) in the name of a run folder; None where it names no rank.

    `path` is the run folder or a checkpoint in it.
    """
    match = _rank_match(_split_run(path)[1])
    if match is None:
        return None
    return int(match[1]), int(match[2]) if match[2] else None


def with_rank(path: str, rank: int, seed: int | None = None) -> str:
    """`path` (a run folder or a checkpoint in it) for another rank; unchanged where it names no rank.

    A `seed` replaces the one in the path. It is added even where the path names no rank: two seeds must not share a
    folder.
    """
    before, name, after = _split_run(path)
    seed_part = "" if seed is None else f"_seed-{seed}"
    match = _rank_match(name)
    if match:
        seed_part = seed_part or (f"_seed-{match[2]}" if match[2] else "")
        name = f"{name[: match.start()]}_lora-rank_{rank}{seed_part}{name[match.end() :]}"
    elif seed is not None:
        ending = next((f"_{phase}" for phase in PHASES if name.endswith(f"_{phase}")), "")
        name = f"{name.removesuffix(ending)}{seed_part}{ending}"
    return before + name + after


def _rank_match(name: str) -> re.Match[str] | None:
    return max(RANK_PART.finditer(name), key=lambda match: match.start(), default=None)


def _split_run(path: str) -> tuple[str, str, str]:
    """`path` as (the folders before, the run folder's name, what follows it)."""
    found = RUN_PATH.fullmatch(path)
    assert found, "it matches every text"
    return found[1], found[2], (found[3] or "") + found[4]


def relative(path: Path) -> str:
    """`path` as messages show it: relative to the repository where it is inside it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
