"""The trainer callbacks: one applies the recipe's settings to a resumed run, one collects the last N adapters.

Writes checkpoint-<step>.safetensors, adapter_config.json and collected.json into the run's staging folder during the
training.
"""

import hashlib
import queue
import threading
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from paragen.common import cli, files, safetensors_header
from paragen.common.cli import UserError, say
from paragen.dataset import pictures
from paragen.training import data_notes, deterministic, progress

BUFFERS = 2  # copies of the adapter in memory: one being written, one being filled or waiting


def check_window(keep: int | None, resumed_step: int, max_steps: int) -> None:
    """Raise UserError for a recipe that trains fewer steps than it keeps.

    Args:
        keep: the number of adapters to keep (None: every step's).
        resumed_step: the step of the resumed checkpoint.
        max_steps: the last step.
    """
    steps = max(0, max_steps - resumed_step)
    if steps == 0 or (keep and keep > steps):
        wanted = f"{keep} kept steps" if keep else "at least one step"
        raise UserError(
            f"save_total_limit requests {wanted}, but only {steps} remain between the resumed step {resumed_step} and "
            f"the last one, {max_steps}; set max_steps to {resumed_step + (keep or 1)} or more, or keep fewer (KEEP)"
        )


class Rules(TrainerCallback):
    """Applies the recipe's logging and saving intervals to a resumed run, and records facts that only the trainer has.

    On resuming, transformers replaces the whole trainer state by the one in the checkpoint. Without this callback, the
    pretrain's intervals and log history would continue. `facts` is filled in the main process only.

    Args:
        config: the rendered recipe.
        continued: whether the resumed checkpoint is of an interrupted attempt at this run, whose log continues.
    """

    def __init__(self, config: dict[str, Any], continued: bool = False) -> None:
        self.config = config
        self.continued = continued
        self.facts: dict[str, Any] = {}
        self.began = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        lr_scheduler: Any = None, train_dataloader: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.began = True
        progress.report(Path(str(args.output_dir)), "training")
        state.compute_steps(args, state.max_steps)
        if not self.continued:
            state.log_history = []
        pictures.check_not_cut(train_dataloader.dataset, train_dataloader.collate_fn)
        if state.is_world_process_zero:
            resumed_rate = getattr(lr_scheduler, "base_lrs", [args.learning_rate])[0]
            if resumed_rate != args.learning_rate:
                say(f"learning_rate {args.learning_rate} has no effect: the resumed pretrain's {resumed_rate} is used")
            lengths = data_notes.lengths_in(train_dataloader.dataset)
            cut = data_notes.cut_rows(lengths, self.config)
            data_notes.announce(cut if state.global_step == 0 else [])
            self.facts = {**facts_of(args, len(lengths), state.max_steps), "data_warnings": cut}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        cli.check_stopped()
        return control


def facts_of(args: TrainingArguments, rows: int, steps: int) -> dict[str, Any]:
    """What a manifest records of a training.

    Args:
        args: the trainer's arguments.
        rows: how many rows are trained on.
        steps: the last step.
    """
    return {
        "processes": args.world_size,
        "threads": torch.get_num_threads(),
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "deterministic": deterministic.are_kernels_deterministic(),
        "rows_at_a_time": args.per_device_train_batch_size,
        "accumulated": args.gradient_accumulation_steps,
        "trained_rows": rows,
        "total_steps": steps,
    }


class Collector(TrainerCallback):
    """Writes the adapter after each of the last `keep` optimizer steps.

    The training thread only copies the adapter (a few MB) into a buffer that has the layout of the file. A thread of
    its own hashes and writes. At most BUFFERS copies exist. An error in that thread ends the training at its next step.

    Args:
        folder: an existing folder for the checkpoints.
        keep: how many of the last steps are kept; None: all.
    """

    def __init__(self, folder: Path, keep: int | None):
        self.folder = folder
        self.keep = keep
        self.records: dict[int, dict[str, Any]] = {}
        self.free: queue.Queue[PinnedBuffer] = queue.Queue()
        self.full: queue.Queue[tuple[int, PinnedBuffer] | None] = queue.Queue()
        self.error: BaseException | None = None
        self.writer: threading.Thread | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        check_window(self.keep, state.global_step, state.max_steps)
        self.first = state.max_steps - (self.keep or state.max_steps - state.global_step) + 1
        if not state.is_world_process_zero:
            return
        adapter = getattr(model, "module", model)
        if not isinstance(adapter, PeftModel):
            raise UserError("a collection holds LoRA adapters, but this recipe trains no PEFT model")
        # These tensors share the parameters' memory, which the optimizer updates in place, so they serve all steps.
        live = get_peft_model_state_dict(adapter)
        save_config(adapter.peft_config["default"], self.folder)
        for _ in range(BUFFERS):
            self.free.put(PinnedBuffer(live))
        self.writer = threading.Thread(target=self._write_all, name="collector", daemon=True)
        self.writer.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step >= self.first - 1:
            control.should_log = True  # each kept step gets its own loss, not a mean over several steps
        if state.global_step >= self.first and self.writer is not None:
            buffer = self._free_buffer()
            buffer.fill()
            self.full.put((state.global_step, buffer))
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if logs and "loss" in logs:
            record = self.records.setdefault(state.global_step, {})
            record.update(loss=logs["loss"], learning_rate=logs["learning_rate"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.writer is None:
            return
        self.close()
        if self.error is not None:
            raise self.error
        write_collected(self.folder, {step: record for step, record in self.records.items() if step >= self.first})

    def close(self) -> None:
        """Wait until the writer has written what it has; nothing is written afterwards, even after a failure."""
        if self.writer is not None:
            self.full.put(None)
            self.writer.join()

    def _free_buffer(self) -> "PinnedBuffer":
        """A buffer that is not in use; waits for one. Raises the error of a failed write."""
        while True:
            if self.error is not None:
                raise self.error
            try:
                return self.free.get(timeout=1)
            except queue.Empty:
                continue

    def _write_all(self) -> None:
        try:
            while (item := self.full.get()) is not None:
                step, buffer = item
                data = buffer.content()
                files.write_atomically(self.folder / f"checkpoint-{step}.safetensors", data, durable=False)
                self.records.setdefault(step, {}).update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                self.free.put(buffer)
        except BaseException as error:  # the training thread raises it
            self.error = error


def write_collected(folder: Path, records: dict[int, dict[str, Any]]) -> None:
    """Write collected.json, which completion.py reads: loss, learning rate, size and hash of each kept step."""
    files.write_json(folder / "collected.json", [{"step": step, **record} for step, record in sorted(records.items())])


def layout_of(tensors: dict[str, torch.Tensor]) -> tuple[bytes, list[str]]:
    """The layout that the safetensors library gives a checkpoint file: its header bytes, its keys in file order."""
    layout = save({key: tensor.detach().cpu() for key, tensor in tensors.items()}, {"format": "pt"})
    header = safetensors_header.header_in(layout)
    entries = safetensors_header.tensors_in(header)
    return header, sorted(entries, key=lambda key: entries[key]["data_offsets"][0])


class PinnedBuffer:
    """The bytes of a safetensors file whose tensors can be replaced many times; with a GPU, in pinned memory.

    The safetensors library lays out the file once. Filling concatenates the tensors into the file's data, so that
    serialising costs no more than the copy that is needed anyway. From a CUDA device this is one kernel and one
    transfer into pinned memory. The host does not wait for them, and work queued later on the device's stream (the next
    optimizer step) cannot change what is copied.

    Args:
        tensors: by name; of any dtype, contiguous, all on one device. `fill` reads their present values.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        head, in_file_order = layout_of(tensors)
        self.sources = [tensors[key].detach().view(-1).view(torch.uint8) for key in in_file_order]
        on_cuda = self.sources[0].is_cuda
        size = len(head) + sum(source.numel() for source in self.sources)
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda)
        self.bytes[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self.data = self.bytes[len(head) :]
        self.on_device = torch.empty_like(self.data, device=self.sources[0].device) if on_cuda else None
        self.filled = torch.cuda.Event() if on_cuda else None

    def fill(self) -> None:
        """Copy the tensors' present values; on a CUDA device this returns before the copies are done."""
        if self.filled is None or self.on_device is None:
            torch.cat(self.sources, out=self.data)
        else:
            torch.cat(self.sources, out=self.on_device)
            self.data.copy_(self.on_device, non_blocking=True)
            self.filled.record()

    def content(self) -> memoryview:
        """The file's bytes, once the copies are done; valid until the next `fill`."""
        if self.filled is not None:
            self.filled.synchronize()
        return self.bytes.numpy().data


def save_config(config: PeftConfig, folder: Path) -> None:
    """Write adapter_config.json as PEFT's `save_pretrained` writes it for a checkpoint."""
    inference_mode = config.inference_mode
    config.inference_mode = True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference_mode
