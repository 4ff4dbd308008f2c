"""The trainer callback of a pretrain that can go on after an interruption: it records which checkpoints are whole.

transformers does not save the loss that was summed up since the last line of the log, and without it the next line of a
continued run would be another. It is saved beside each checkpoint, and set again. `interrupted.py` reads the record.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from paragen.common import files
from paragen.training import interrupted

SUMS = ("_total_loss_scalar", "_globalstep_last_logged")  # the trainer's numbers that its checkpoints lack


class CheckpointRecord(TrainerCallback):
    """Records the hashes of each saved checkpoint in the staging folder, after all of its files are written.

    Args:
        staging: the staging folder.
        record: the run's `circumstances` (see interrupted.py), and as `stamps` the files that it is trained from, by
            path, as they were before they were read. No checkpoint is recorded where one of these was touched before
            the training began: the rows in memory may then be other ones.
        continued: the checkpoint folder of an interrupted attempt from which this one goes on, or None.
    """

    def __init__(self, staging: Path, record: dict[str, Any], continued: str | None) -> None:
        self.staging = staging
        self.present = record["circumstances"]
        self.stamps = record["stamps"]
        self.continued = Path(continued) if continued else None
        self.trainer: Trainer | None = None
        self.is_recording = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While the body runs, a trainer that is made is known to this callback, to which transformers passes none."""
        patched: Any = Trainer
        initialise = patched.__init__

        def initialise_and_remember(trainer: Trainer, *arguments: Any, **options: Any) -> None:
            self.trainer = trainer
            initialise(trainer, *arguments, **options)

        patched.__init__ = initialise_and_remember
        try:
            yield
        finally:
            patched.__init__ = initialise
            self.trainer = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("the trainer was made outside of `watching`")
        if self.continued is not None:
            sums = json.loads((self.continued / interrupted.UNLOGGED.format(args.process_index)).read_bytes())
            trainer._tr_loss = torch.tensor(sums.pop("_tr_loss"), device=args.device)
            for name in SUMS:
                setattr(trainer, name, sums[name])
        self.is_recording = interrupted.are_untouched(self.stamps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer is None:
            return
        checkpoint = self.staging / f"checkpoint-{state.global_step}"
        sums = {name: getattr(trainer, name) for name in SUMS} | {"_tr_loss": trainer._tr_loss.item()}
        files.write_json(checkpoint / interrupted.UNLOGGED.format(args.process_index), sums)
        if args.world_size > 1:
            torch.distributed.barrier()  # the other processes have written their files, too
        if self.is_recording and state.is_world_process_zero:
            interrupted.add(self.staging, self.present, state.global_step)
