"""What LLaMA-Factory's trainer would do for one run: its rows in order, learning rates, logging, saving.

Imported by packed_train.py. Everything comes from a real trainer of LLaMA-Factory over the numbers of the rows, which
has no model and never trains; only the steps themselves are ours.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import skip_first_batches
from llamafactory.train.callbacks import LogCallback
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.trainer_callback import DefaultFlowCallback

from paragen.collection import checkpoints
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.packed.batches import Row
from paragen.packed.layers import NotPackable
from paragen.packed.packed_engine import Adapter
from paragen.training import collector
from paragen.training.attempts import Attempt


class Course:
    """One run's way through its data.

    Args:
        attempt: the run.
        arguments: LLaMA-Factory's parsed (model, data, training, finetuning, generating) arguments of its recipe.
        tokenizer: LLaMA-Factory's, for the trainer.
        rows: the tokenised training rows.

    `first` and `last` are the steps (from 1) trained now; `rates[i]` is the learning rate of step `first + i`.
    """

    def __init__(self, attempt: Attempt, arguments: tuple, tokenizer: Any, rows: list[Row]):
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
        self.resumed = arguments[2].resume_from_checkpoint and Path(arguments[2].resume_from_checkpoint)
        self.loader = self.trainer.get_train_dataloader()
        values = self.trainer.set_initial_training_values(self.args, self.loader)
        epochs, self.per_epoch, self.steps_in_epoch, self.last = values[0], values[1], values[5], values[6]
        self.trainer._init_training_state(self.last, self.per_epoch, epochs, self.resumed, None)
        state = self.trainer.state
        state.compute_steps(self.args, self.last)  # a resumed state brings its own rhythm, see collector.Rules
        state.log_history = []
        self.first = state.global_step + 1
        if self.last < self.first:
            raise NotPackable("it has no step left to train")
        self._take_rates()
        self._plan_saves()
        self.unlogged: list[float] = []

    def begin(self) -> None:
        """Begin the log."""
        self.trainer.callback_handler.on_train_begin(self.args, self.trainer.state, self.trainer.control)

    def _take_rates(self) -> None:
        """Let the real scheduler run through: the rate of each step, its state after each, AdamW's settings."""
        trainer = self.trainer
        optimizer = trainer.create_optimizer()
        scheduler = trainer.create_scheduler(self.last, optimizer)
        if self.resumed:
            stored = torch.load(self.resumed / "optimizer.pt", map_location="cpu", weights_only=True)
            for group, before in zip(optimizer.param_groups, stored["param_groups"], strict=True):
                group.update({key: value for key, value in before.items() if key != "params"})
            scheduler.load_state_dict(torch.load(self.resumed / "scheduler.pt", weights_only=True))
        group = optimizer.param_groups[0]
        if group["amsgrad"] or group["maximize"] or not group.get("decoupled_weight_decay", True):
            raise NotPackable("its optimizer is not plain AdamW")
        self.optimizer = {key: group[key] for key in ("betas", "eps", "weight_decay")}
        self.rates, self.schedules = [], []
        for _ in range(self.first, self.last + 1):
            self.rates.append(float(group["lr"]))
            optimizer.step()
            scheduler.step()
            groups = [{key: one for key, one in each.items() if key != "params"} for each in optimizer.param_groups]
            self.schedules.append((groups, dict(scheduler.state_dict())))

    def _plan_saves(self) -> None:
        """Ask transformers' own rule after which steps the run logs and saves."""
        state, control, rule = self.trainer.state, self.trainer.control, DefaultFlowCallback()
        self.logged, saved = set(), []
        keep = self.attempt.run.config.get("save_total_limit")
        self.kept_from = self.last - (keep or self.last - self.first + 1) + 1
        if self.collects:
            collector.check_window(keep, self.first - 1, self.last)
        before = state.global_step
        for step in range(self.first, self.last + 1):
            state.global_step, control.should_log, control.should_save = step, False, False
            rule.on_step_end(self.args, state, control)
            if control.should_log or (self.collects and step >= self.kept_from - 1):
                self.logged.add(step)
            if control.should_save and not self.collects:
                saved.append(step)
        state.global_step = before
        control.should_log = control.should_save = control.should_training_stop = False
        self.saved = set(saved[-keep:] if keep else saved)

    @property
    def collects(self) -> bool:
        return self.attempt.run.collects

    def is_kept(self, step: int) -> bool:
        """Whether the adapter after this step belongs to the collection."""
        return self.collects and self.kept_from <= step <= self.last

    def steps(self) -> Iterator[list[Row]]:
        """The rows of each step from `first` on, as the trainer's loader, sampler and resume rules give them."""
        accumulated = self.args.gradient_accumulation_steps
        epoch, done = divmod(self.first - 1, self.per_epoch)
        left = self.last - self.first + 1
        while left:
            loader = skip_first_batches(self.loader, done * accumulated) if done else self.loader
            loader.set_epoch(epoch)
            batches = iter(loader)
            for _ in range(done, self.per_epoch):
                taken = [number for _ in range(accumulated) for number in next(batches, ())]
                yield [self.rows[number] for number in taken]
                left -= 1
                if not left:
                    return
            epoch, done = epoch + 1, 0

    def log(self, loss: float) -> dict[str, float]:
        """Take the next step's loss; writes the log's line where one is due. Returns the loss and rate that it shows.

        As in the trainer, a line shows the mean since the one before, and a loss that is not finite counts as that.
        """
        state = self.trainer.state
        state.global_step += 1
        step = state.global_step
        if not np.isfinite(loss):
            loss = sum(self.unlogged) / (1 + len(self.unlogged))
        self.unlogged.append(loss)
        done = (step - 1) % self.per_epoch + 1
        batches = min(done * self.args.gradient_accumulation_steps, self.steps_in_epoch)
        state.epoch = (step - 1) // self.per_epoch + batches / self.steps_in_epoch
        if step not in self.logged:
            return {}
        shown = {"loss": sum(self.unlogged) / len(self.unlogged), "learning_rate": self.rates[step - self.first]}
        self.unlogged.clear()
        self.trainer.log(dict(shown))
        return shown

    def finish(self) -> None:
        """End a complete training's log: as the trainer does, with a line that has no loss."""
        self.trainer.log({"train_runtime": 0.0})
        self.end()

    def end(self) -> None:
        """Write what waits of the log; more often is no harm."""
        self.trainer.callback_handler.on_train_end(self.args, self.trainer.state, self.trainer.control)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the training."""
        return collector.facts_of(self.args, len(self.rows), self.last)

    def saver(self, adapter: Adapter, vector: Tensor, moments: dict[str, Tensor], config: Any) -> Callable[[], None]:
        """What writes the stock, resumable checkpoint folder of the present step; call it in any thread.

        Args:
            vector, moments: the adapter and AdamW's state after that step, on the CPU.
            config: PEFT's LoraConfig.
        """
        step = self.trainer.state.global_step
        folder = self.attempt.staging / f"checkpoint-{step}"
        folder.mkdir()
        set_seed(self.args.seed)
        self.trainer._save_rng_state(str(folder))
        state = copy.deepcopy(self.trainer.state)
        groups, schedule = self.schedules[step - self.first]

        def write() -> None:
            save_file(named(adapter, vector), folder / paths.ADAPTER, {"format": "pt"})
            collector.save_config(config, folder)
            torch.save(schedule, folder / "scheduler.pt")
            torch.save(optimizer_state(adapter, moments, groups), folder / "optimizer.pt")
            state.save_to_json(str(folder / "trainer_state.json"))
            files.sync_tree(folder)

        return write


def optimizer_state(adapter: Adapter, moments: dict[str, Tensor], groups: list[dict]) -> dict[str, Any]:
    """AdamW's state_dict as the trainer saves it: entries in the order of the parameters, all of the first group."""
    averages = [  # copies: torch.save writes the whole storage behind a view
        [value.clone() for value in named(adapter, moments[name]).values()] for name in ("exp_avg", "exp_avg_sq")
    ]
    state = {
        number: {"step": moments["step"].clone(), "exp_avg": first, "exp_avg_sq": second}
        for number, (first, second) in enumerate(zip(*averages, strict=True))
    }
    members = [list(range(len(state))), *([] for _ in groups[1:])]
    groups = [{**group, "params": numbers} for group, numbers in zip(groups, members, strict=True)]
    return {"state": state, "param_groups": groups}


def named(adapter: Adapter, vector: Tensor) -> dict[str, Tensor]:
    """An adapter's vector as PEFT's tensors, contiguous, by PEFT's names in the order of the model's parameters."""
    tensors = {}
    for part in adapter.parts:
        tensors[f"{checkpoints.PEFT_PREFIX}{part.layer}.lora_A.weight"] = vector[part.a].view(adapter.rank, -1)
        tensors[f"{checkpoints.PEFT_PREFIX}{part.layer}.lora_B.weight"] = (
            vector[part.b].view(adapter.rank, -1).t().contiguous()
        )
    return tensors


def resumed_factors(checkpoint: Path, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B of a stock checkpoint folder, by layer. Raises UserError where its layers are others."""
    stored = load_file(checkpoint / paths.ADAPTER)
    keys = [
        (f"{checkpoints.PEFT_PREFIX}{layer}.lora_A.weight", f"{checkpoints.PEFT_PREFIX}{layer}.lora_B.weight")
        for layer in layers
    ]
    if {key for pair in keys for key in pair} != set(stored):
        raise UserError(
            f"{checkpoint / paths.ADAPTER}: adapts other layers than the recipe; train it again with FORCE=1"
        )
    return {layer: (stored[a], stored[b]) for layer, (a, b) in zip(layers, keys, strict=True)}


def resumed_moments(checkpoint: Path) -> dict[str, Tensor]:
    """AdamW's state in a stock checkpoint folder as one step and two vectors in the order of packed_engine.parts_of."""
    state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)["state"]
    entries = [state[number] for number in sorted(state)]
    if len({float(entry["step"]) for entry in entries}) != 1:
        raise NotPackable("the parameters of its pretrain took different numbers of steps")
    vectors = {}
    for name in ("exp_avg", "exp_avg_sq"):
        down = [entry[name].reshape(-1) for entry in entries[::2]]
        up = [entry[name].t().reshape(-1) for entry in entries[1::2]]
        vectors[name] = torch.cat([*down, *up]).float()
    return {"step": entries[0]["step"].float().reshape(()), **vectors}


def rows_of(dataset: Any) -> list[Row]:
    """LLaMA-Factory's tokenised dataset as rows."""
    columns = zip(dataset["input_ids"], dataset["labels"], strict=True)
    return [Row(np.asarray(tokens, np.int64), np.asarray(labels, np.int64)) for tokens, labels in columns]
