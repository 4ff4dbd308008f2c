"""The names of the files in a run folder."""

import re

from paragen.common import paths

LOG, PICTURE, EVALUATION = "trainer_log.jsonl", "training_loss.png", "evaluation.json"
OPTIONAL = (LOG, PICTURE, EVALUATION)  # a collection may lack these
BESIDE = (paths.ADAPTER_CONFIG, *OPTIONAL)  # the files of a collection beside its manifest and checkpoints
CHECKPOINT_FILE = re.compile(r"checkpoint-\d+\.safetensors")


def checkpoint_name(step: int) -> str:
    """The file name of a collection's checkpoint."""
    return f"checkpoint-{step}.safetensors"
