"""The names of the files in a run folder."""

import re

from paragen.common import paths

LOG, PICTURE, EVALUATION = "trainer_log.jsonl", "training_loss.png", "evaluation.json"
OPTIONAL = (LOG, PICTURE, EVALUATION)  # a collection may lack these
BESIDE = (paths.ADAPTER_CONFIG, *OPTIONAL)  # the files of a collection beside its manifest and checkpoints
CHECKPOINT_FILE = re.compile(r"checkpoint-\d+\.safetensors")

STATE = "trainer_state.json"  # in a checkpoint folder: the step at which it was saved, and the log until then
# The files that a checkpoint folder needs to be resumed; each of them changes the training that follows.
RESUMED = (paths.ADAPTER, "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE)


def checkpoint_name(step: int) -> str:
    """The file name of a collection's checkpoint."""
    return f"checkpoint-{step}.safetensors"


def checkpoint_folder(step: int) -> str:
    """The name of a checkpoint folder in a pretrain run."""
    return f"checkpoint-{step}"


def is_resumed(name: str) -> bool:
    """Whether a resumed training reads this file of a checkpoint folder (several processes have an rng_state each)."""
    return name in RESUMED or re.fullmatch(r"rng_state_\d+\.pth", name) is not None


def is_hashed_beside(path: str) -> bool:
    """Whether a manifest records the hash of this file by its path in the run folder: the log, the loss picture, and
    what a checkpoint folder has beside the files that are resumed. All others have a hash of their own there."""
    folder, _, name = path.rpartition("/")
    if not folder:
        return name in (LOG, PICTURE)
    return paths.CHECKPOINT.fullmatch(folder) is not None and is_kept(name) and not is_resumed(name)


def is_kept(name: str) -> bool:
    """Whether a finished pretrain run keeps this file of a checkpoint folder."""
    return is_resumed(name) or name in (paths.ADAPTER_CONFIG, "scaler.pt")
