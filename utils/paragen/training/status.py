"""The state of a cell: missing, pretrained, collecting, complete, stale or broken. Writes nothing."""

import json

from paragen.collection import discovery, run_files, run_identity
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.recipes.run import Cell


def state_of(cell: Cell) -> tuple[str, str]:
    """(the state of a cell; for collecting, stale and broken ones the details, else an empty text)."""
    try:
        pretrain, finetune = cell.runs
        if any(files.is_held(files.beside(run.folder, "lock")) for run in cell.runs):
            return "collecting", progress_of(cell)
        if not finetune.folder.exists():
            return ("pretrained" if (pretrain.folder / paths.MANIFEST).is_file() else "missing"), ""
        state = discovery.state_of(finetune.folder, run_identity.identity_of(finetune))
    except UserError as error:
        return "broken", str(error)
    if state.name == "unknown":
        return "broken", f"{paths.relative(finetune.folder)} has no manifest.json"
    return state.name, "; ".join(state.changed)


def progress_of(cell: Cell) -> str:
    """The progress of a cell's present run, from the log in its staging folder; empty where there is none."""
    for run in cell.runs:
        for staging in files.companions(run.folder, "staging-"):
            try:
                last = json.loads((staging / run_files.LOG).read_text(encoding="utf-8").splitlines()[-1])
                loss = f", loss {last['loss']:.4f}" if "loss" in last else ""
                left = f", {last['remaining_time']} left" if "remaining_time" in last else ""
                return f"{run.phase} step {last['current_steps']} of {last['total_steps']}{loss}{left}"
            except (OSError, IndexError, ValueError, KeyError):
                return f"{run.phase} starting"  # no complete line yet, or the run ended meanwhile
    return ""
