"""The frozen base model of a pack, and what LLaMA-Factory and PEFT prepare for each run on it.

Tokenised rows, initial adapters and the model itself come from LLaMA-Factory's own functions, in its order and with its
seeds.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llamafactory.model import load_model
from llamafactory.model.adapter import init_adapter
from peft import LoraConfig
from transformers import PreTrainedModel, set_seed

from paragen.collection import run_identity
from paragen.common import cli
from paragen.common.cli import UserError, say
from paragen.packed import peft_comparison, stock_checkpoint, tokenised_rows
from paragen.packed.adapter import Adapter
from paragen.packed.batches import IGNORED, Row
from paragen.packed.continuation import CheckpointRecorder, Continuation, unlogged_losses
from paragen.packed.initial_adapter import InitialAdapter, drawn, initial_adapter_of
from paragen.packed.layers import NotPackable
from paragen.packed.model import unload_adapter, use_fused_kernels
from paragen.packed.schedule import TrainingLog, TrainingSchedule
from paragen.packed.tokenised_rows import RowsAhead, Source, Tokenizers
from paragen.recipes import templates
from paragen.training import data_notes, llamafactory_output, ordinary, process, progress
from paragen.training.attempts import Attempt

OutOfMemory = torch.OutOfMemoryError

# Settings that LLaMA-Factory gets here whatever the recipe sets: no progress bar per run, nothing computed twice, and
# no processes of its own that tokenise, which would outlive those that tokenise ahead.
OVERRIDES = {
    "disable_gradient_checkpointing": True, "disable_tqdm": True, "report_to": "none", "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None, "dataloader_persistent_workers": False, "preprocessing_num_workers": None,
}  # fmt: skip


class PackedRun(NamedTuple):
    """A run that is ready to be trained in a pack."""

    schedule: TrainingSchedule
    log: TrainingLog
    adapter: Adapter
    config: LoraConfig
    done: int  # steps that an interrupted attempt has trained already
    recorder: CheckpointRecorder


class FrozenBase:
    """The base model that the runs of a pack share; the first run that is admitted loads it.

    Args:
        wanted: the device, as devices.choose gives it, already pinned.
    """

    def __init__(self, wanted: list[str]):
        llamafactory_output.log_examples()
        process.keep_parser()
        self.wanted = wanted
        self.model: PreTrainedModel | None = None
        self.tokenizers = Tokenizers()
        self.tokenizer: Any = None  # of the run admitted last; runs differ in what their templates add to it
        self.refused: NotPackable | None = None  # why the model cannot be packed, once that is known
        self.dtype = torch.float32
        self.layers: list[str] = []  # the adapted layers
        self.initial_adapters: dict[tuple, InitialAdapter] = {}
        self.first: InitialAdapter | None = None  # as PEFT made it; None where others cannot be drawn like it
        self.rows: dict[str | None, list[Row]] = {}  # by the key of the data and settings; None where there is none
        self.ahead: RowsAhead | None = None  # those that other processes make

    @contextlib.contextmanager
    def tokenising_ahead(self, attempts: list[Attempt]) -> Iterator[None]:
        """Within it, other processes tokenise the rows of some attempts, while this one admits them.

        Those that cannot be made so are left to `admit`, which then raises what is wrong with them.
        """
        sources: dict[str, Source] = {}
        for attempt in attempts:
            key = run_identity.tokens_key(attempt.identity)
            if key is not None and key not in self.rows and key not in sources:
                with contextlib.suppress(UserError, *process.SETTINGS_ERRORS):  # `admit` meets it again
                    job = ordinary.job_of(attempt, self.wanted, False)
                    source = self._source(attempt, job, self._parse(attempt, job))
                    if source.cached is None or not source.cached.is_dir():
                        self.tokenizers.of(source.parsed)  # loaded here, the other processes have it
                        sources[key] = source
                        progress.report(attempt.staging, "tokenising rows")
        with tokenised_rows.ahead(sources) as self.ahead:
            try:
                yield
            finally:
                self.ahead = None

    def admit(self, attempt: Attempt, continued: Continuation) -> PackedRun:
        """Prepare a run, from where it goes on.

        Raises UserError for a mistake in its recipe or data, NotPackable where it cannot be packed.
        """
        progress.report(attempt.staging, f"tokenising rows{', loading the model' if self.model is None else ''}")
        key = run_identity.tokens_key(attempt.identity)
        is_made = key in self.rows or (self.ahead is not None and key in self.ahead.sources)
        job = ordinary.job_of(attempt, self.wanted, not is_made)
        job["continued"] = str(continued.checkpoint) if continued.checkpoint else None
        parsed = self._parse(attempt, job)
        try:
            ready = self._admit(attempt, continued, job, parsed)
            progress.report(attempt.staging, "waiting for its pack")
            return ready
        except (NotPackable, OutOfMemory):
            raise
        except process.SETTINGS_ERRORS as error:
            if cli.storage_fault(error) is not None:
                raise
            raise process.refusal(attempt.run.recipe, error) from error

    def _parse(self, attempt: Attempt, job: dict) -> tuple:
        """LLaMA-Factory's parsed arguments for a job. Sets the seed, as a start of the run does."""
        arguments = process.arguments_of(job) | OVERRIDES
        templates.register()
        parsed = process.check_arguments(attempt.run.recipe, arguments)
        process.check_template(attempt.run.recipe, arguments, job["pictures"])
        return parsed

    def _source(self, attempt: Attempt, job: dict, parsed: tuple) -> Source:
        return Source(attempt.staging, Path(job["tokens"]) if job["tokens"] else None, parsed, self.tokenizers)

    def _admit(self, attempt: Attempt, continued: Continuation, job: dict, parsed: tuple) -> PackedRun:
        if parsed[3].lora_dropout >= 1:
            raise NotPackable(f"lora_dropout is {parsed[3].lora_dropout}, which leaves nothing to learn")
        self.tokenizer = self.tokenizers.of(parsed)[0]["tokenizer"]
        rows = self._rows(attempt, job, parsed)
        initial = self._initial_adapter(parsed, rows)
        schedule = TrainingSchedule(attempt, parsed, self.tokenizer, rows, continued.checkpoint is not None)
        factors, moments = initial.factors, None
        if schedule.resumed:
            factors = stock_checkpoint.load_factors(schedule.resumed, self.layers)
            moments = stock_checkpoint.moments_of(schedule.moments)
            schedule.moments = {}  # the adapter has them
        max_norm, dropout = schedule.args.max_grad_norm or 0.0, max(0.0, parsed[3].lora_dropout)
        rates = [0.0] * (schedule.first - schedule.begins) + schedule.rates
        adapter = Adapter(factors, initial.scaling, rates, schedule.optimizer, max_norm, moments, dropout)
        log = TrainingLog(schedule, unlogged_losses(continued.checkpoint) if continued.checkpoint else [])
        recorder = CheckpointRecorder(attempt.staging, continued.record)
        return PackedRun(schedule, log, adapter, copy.deepcopy(initial.config), continued.done, recorder)

    def _rows(self, attempt: Attempt, job: dict, parsed: tuple) -> list[Row]:
        """The run's tokenised rows; runs with the same data and settings share them."""
        key = run_identity.tokens_key(attempt.identity)
        if key is None or key not in self.rows:
            self.rows[key] = self._new_rows(key, self._source(attempt, job, parsed), str(attempt.run))
            if attempt.run.resumed is None:
                lengths = [len(row.tokens) for row in self.rows[key]]
                data_notes.announce(data_notes.cut_rows(lengths, attempt.run.config))
        if any((row.labels == IGNORED).all() for row in self.rows[key]):
            raise NotPackable(
                "a row has nothing to learn, and the mean loss of a step with such rows alone is undefined"
            )
        return self.rows[key]

    def _new_rows(self, key: str | None, source: Source, name: str) -> list[Row]:
        """Rows that another process has made, or make them here."""
        if self.ahead is None or key not in self.ahead.sources:
            return source.rows()
        rows, fault = self.ahead.take(key)
        if rows is None:
            rows = source.rows()  # raises what is wrong with the data
            say(f"{name}: a process that tokenised its rows failed ({fault}); they were made without it")
        return rows

    def _initial_adapter(self, parsed: tuple, rows: list[Row]) -> InitialAdapter:
        """The run's initial adapter; runs with the same seed and LoRA settings share it. Loads the model at first."""
        model_args, _, args, finetuning_args, _ = parsed
        key = (
            args.seed, finetuning_args.lora_rank, finetuning_args.lora_alpha, finetuning_args.use_rslora,
            finetuning_args.lora_dropout, tuple(finetuning_args.lora_target),
        )  # fmt: skip
        if key in self.initial_adapters:
            return self.initial_adapters[key]
        if self.refused is not None:
            raise self.refused
        if self.model is not None and self.first is not None:
            initial = drawn(self.model, self.first, finetuning_args, args.seed, bool(args.resume_from_checkpoint))
            if initial.factors:
                self.initial_adapters[key] = initial
            return initial
        set_seed(args.seed)
        if self.model is None:
            self.initial_adapters[key] = self._load_once(model_args, finetuning_args, args, rows)
            return self.initial_adapters[key]
        adapted = init_adapter(self.model.config, self.model, model_args, finetuning_args, True)
        initial = initial_adapter_of(adapted)
        self.model = unload_adapter(adapted)
        if list(initial.factors) != self.layers:
            raise NotPackable("its runs adapt different layers")
        self.initial_adapters[key] = initial
        return initial

    def _load_once(self, *arguments: Any) -> InitialAdapter:
        try:
            return self._load(*arguments)
        except NotPackable as refused:
            self.refused = refused
            raise

    def _load(self, model_args: Any, finetuning_args: Any, args: Any, rows: list[Row]) -> InitialAdapter:
        """Load the model, check that the packed layers compute for it what PEFT computes, and set `model`.

        Its hash is in the attempt's snapshot: it was verified when the attempt began, anew where its files' sizes or
        times changed since they were hashed, and is again before the run is published.
        """
        if args.device.type not in ("cpu", "cuda"):
            raise NotPackable(f"the packed engine has not been tried on {args.device.type}")
        adapted = load_model(self.tokenizer, model_args, finetuning_args, True).to(args.device)
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        peft_comparison.check_packable(adapted, self.dtype)
        first = initial_adapter_of(adapted)
        self.layers = list(first.factors)
        compared = peft_comparison.rows_to_compare(rows)
        expected = peft_comparison.peft_gradient(adapted, compared, self.dtype)
        model = unload_adapter(adapted)
        use_fused_kernels(model)
        peft_comparison.check_against_peft(model, first.factors, first.scaling, compared, expected, self.dtype)
        if first.equals(drawn(model, first, finetuning_args, args.seed)):
            self.model, self.first = model, first
            return first
        set_seed(args.seed)
        again = init_adapter(model.config, model, model_args, finetuning_args, True)
        if not first.equals(initial_adapter_of(again)):
            raise NotPackable("its initial adapters depend on the loading of the model")
        self.model = unload_adapter(again)
        return first
