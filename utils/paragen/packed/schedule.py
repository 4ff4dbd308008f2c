"""What LLaMA-Factory's trainer would do in one run: its rows in order, learning rates, and when it logs and saves.

Everything comes from a real trainer of LLaMA-Factory, whose dataset is the numbers of the rows and which never trains;
the packed engine takes the optimizer's steps.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from llamafactory.train.callbacks import LogCallback
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_callback import DefaultFlowCallback

from paragen.packed.batches import Row
from paragen.packed.layers import NotPackable
from paragen.training import collector, data_notes
from paragen.training.attempts import Attempt


class TrainingSchedule:
    """The steps of one run. Steps count from 1.

    Args:
        attempt: the run.
        arguments: LLaMA-Factory's parsed (model, data, training, finetuning, generating) arguments of its recipe.
        tokenizer: LLaMA-Factory's, for the trainer.
        rows: the tokenised training rows.
        is_continued: whether the run goes on from a checkpoint of an interrupted attempt at it.

    `first` and `last` are the first and last step to train; `begins` is the first one of a run without interruption.
    `rates[i]` is the learning rate of step `first + i`, and `optimizer_states[i]` are the optimizer's parameter groups
    and the scheduler's state after it. `optimizer` are AdamW's settings. `logged` and `saved` are the steps after which
    a line is logged or a stock checkpoint saved; `resumed` is the checkpoint folder that the run starts from, if any,
    and `moments` is AdamW's state in it, by parameter.

    Raises NotPackable where no step is left to train or the optimizer is not plain AdamW, UserError where the
    collection asks for more steps than there are.
    """

    def __init__(self, attempt: Attempt, arguments: tuple, tokenizer: Any, rows: list[Row], is_continued: bool = False):
        self.attempt, self.rows = attempt, rows
        self.args, finetuning_args = arguments[2], arguments[3]
        set_seed(self.args.seed)  # the sampler takes its seed from torch
        self.trainer = CustomSeq2SeqTrainer(
            finetuning_args=finetuning_args,
            processor=None,
            model=torch.nn.Linear(1, 1, bias=False),
            args=self.args,
            data_collator=list,
            train_dataset=range(len(rows)),
            tokenizer=tokenizer,
            callbacks=[LogCallback()],
        )
        for shown in (PrinterCallback, ProgressCallback):
            self.trainer.remove_callback(shown)
        self.resumed = self.args.resume_from_checkpoint and Path(self.args.resume_from_checkpoint)
        self.loader = self.trainer.get_train_dataloader()
        values = self.trainer.set_initial_training_values(self.args, self.loader)
        epochs, self.steps_per_epoch, self.batches_per_epoch, self.last = values[0], values[1], values[5], values[6]
        self.trainer._init_training_state(self.last, self.steps_per_epoch, epochs, self.resumed, None)
        state = self.trainer.state
        state.compute_steps(self.args, self.last)  # a resumed state has the pretrain's rhythm, see collector.Rules
        self.first = self.begins = state.global_step + 1
        if is_continued:
            self.begins = attempt.run.resumed_step + 1
        else:
            state.log_history = []
        if self.last < self.first and not is_continued:
            raise NotPackable("it has no step left to train")
        self.moments: dict[int, dict[str, Tensor]] = {}
        self._run_scheduler()
        self._plan_saves()

    def _run_scheduler(self) -> None:
        """Run the trainer's own scheduler over all steps; set `rates`, `optimizer_states` and `optimizer`.

        The resumed checkpoint's files were verified by run_identity.pretrain_of when the attempt began; no pickled code
        runs.
        """
        trainer = self.trainer
        optimizer = trainer.create_optimizer()
        scheduler = trainer.create_scheduler(self.last, optimizer)
        if self.resumed:
            stored = torch.load(self.resumed / "optimizer.pt", map_location="cpu", weights_only=True)
            self.moments = stored["state"]
            for group, before in zip(optimizer.param_groups, stored["param_groups"], strict=True):
                group.update({key: value for key, value in before.items() if key != "params"})
            scheduler.load_state_dict(torch.load(self.resumed / "scheduler.pt", weights_only=True))
        group = optimizer.param_groups[0]
        if group["amsgrad"] or group["maximize"] or not group.get("decoupled_weight_decay", True):
            raise NotPackable("its optimizer is not plain AdamW")
        self.optimizer = {key: group[key] for key in ("betas", "eps", "weight_decay")}
        self.rates, self.optimizer_states = [], []
        for _ in range(self.first, self.last + 1):
            self.rates.append(float(group["lr"]))
            optimizer.step()
            scheduler.step()
            groups = [{key: one for key, one in each.items() if key != "params"} for each in optimizer.param_groups]
            self.optimizer_states.append((groups, dict(scheduler.state_dict())))

    def _plan_saves(self) -> None:
        """Set `logged`, `saved` and the first collected step by transformers' own rule."""
        state, control, rule = self.trainer.state, self.trainer.control, DefaultFlowCallback()
        self.logged, saved = set(), []
        keep = self.attempt.run.config.get("save_total_limit")
        self.first_collected = self.last - (keep or self.last - self.first + 1) + 1
        if self.collects:
            collector.check_window(keep, self.first - 1, self.last)
        before = state.global_step
        for step in range(self.first, self.last + 1):
            state.global_step, control.should_log, control.should_save = step, False, False
            rule.on_step_end(self.args, state, control)
            if control.should_log or (self.collects and step >= self.first_collected - 1):
                self.logged.add(step)
            if control.should_save and not self.collects:
                saved.append(step)
        state.global_step = before
        control.should_log = control.should_save = control.should_training_stop = False
        self.saved = set(saved[-keep:] if keep else saved)

    @property
    def collects(self) -> bool:
        """Whether the run makes a collection."""
        return self.attempt.run.collects

    def is_collected(self, step: int) -> bool:
        """Whether the adapter after this step belongs to the collection."""
        return self.collects and self.first_collected <= step <= self.last

    def step_batches(self) -> Iterator[list[Row]]:
        """The rows of each step from `begins` on, in the order of the trainer's loader, sampler and resume rules."""
        accumulated = self.args.gradient_accumulation_steps
        epoch, done = divmod(self.begins - 1, self.steps_per_epoch)
        left = self.last - self.begins + 1
        while left:
            loader = skip_first_batches(self.loader, done * accumulated) if done else self.loader
            loader.set_epoch(epoch)
            batches = iter(loader)
            for _ in range(done, self.steps_per_epoch):
                taken = [number for _ in range(accumulated) for number in next(batches, ())]
                yield [self.rows[number] for number in taken]
                left -= 1
                if not left:
                    return
            epoch, done = epoch + 1, 0

    def facts(self) -> dict[str, Any]:
        """The training's entries in the manifest."""
        cut = data_notes.cut_rows([len(row.tokens) for row in self.rows], self.attempt.run.config)
        return {**collector.facts_of(self.args, len(self.rows), self.last), "data_warnings": cut}


class TrainingLog:
    """Writes trainer_log.jsonl as LLaMA-Factory's trainer does, and keeps the trainer's state for checkpoints.

    Args:
        schedule: the run's.
        unlogged: the losses since the last line of an interrupted attempt's log, which goes on.
    """

    def __init__(self, schedule: TrainingSchedule, unlogged: list[float]):
        self.schedule, self.trainer = schedule, schedule.trainer
        self.unlogged = list(unlogged)  # the losses since the last line

    def begin(self) -> None:
        """Begin the log."""
        self.trainer.callback_handler.on_train_begin(self.schedule.args, self.trainer.state, self.trainer.control)

    def add(self, loss: float) -> dict[str, float]:
        """Add the next step's loss, and write a line of the log where one is due.

        As in the trainer, a line has the mean of the losses since the line before.

        Returns the line's `loss` and `learning_rate`; empty where no line is due.
        """
        schedule, state = self.schedule, self.trainer.state
        state.global_step += 1
        step = state.global_step
        self.unlogged.append(loss)
        done = (step - 1) % schedule.steps_per_epoch + 1
        batches = min(done * schedule.args.gradient_accumulation_steps, schedule.batches_per_epoch)
        state.epoch = (step - 1) // schedule.steps_per_epoch + batches / schedule.batches_per_epoch
        if step not in schedule.logged:
            return {}
        rate = schedule.rates[step - schedule.first]
        shown = {"loss": sum(self.unlogged) / len(self.unlogged), "learning_rate": rate}
        self.unlogged.clear()
        self.trainer.log(dict(shown))
        return shown

    def finish(self) -> None:
        """End the log of a complete training, with a line without a loss, as the trainer does."""
        self.trainer.log({"train_runtime": 0.0})
        self.end()

    def end(self) -> None:
        """Write the lines that are still in memory; may be called more than once."""
        self.trainer.callback_handler.on_train_end(self.schedule.args, self.trainer.state, self.trainer.control)
