"""A base model loaded once for a pack, and what LLaMA-Factory and PEFT make of each run that joins it.

Imported by packed_train.py. Tokenised rows, initial adapters and the model itself come from LLaMA-Factory's own
functions, in its order and with its seeds; a first comparison with its forward and backward pass makes sure that the
packed layers compute the same for this model.
"""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer
from llamafactory.model.adapter import init_adapter
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import set_seed

import prompt_templates
from paragen.collection import run_identity
from paragen.common import cli
from paragen.packed.batches import IGNORED, Row, Step
from paragen.packed.layers import NotPackable
from paragen.packed.model import fuse, plain, positions_vary
from paragen.packed.packed_engine import Adapter, Engine
from paragen.packed.schedule import Course, resumed_factors, resumed_moments, rows_of
from paragen.training import ordinary, process
from paragen.training.attempts import Attempt

OutOfMemory = torch.OutOfMemoryError

# Of what LLaMA-Factory would do, this is done otherwise or not at all: no bar per run, nothing computed twice.
OURS = {
    "disable_gradient_checkpointing": True, "disable_tqdm": True, "report_to": "none", "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None, "dataloader_persistent_workers": False,
}  # fmt: skip
COMPARED = 1024  # tokens of a row at most; PEFT's forward pass makes all logits
# Settings of models that change their logits behind the output layer.
LOGITS_CHANGED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 0.1)}  # relative, of the loss and of the gradient


class Fresh(NamedTuple):
    """A new adapter as PEFT starts it."""

    config: LoraConfig
    factors: dict[str, tuple[Tensor, Tensor]]  # lora_A, lora_B by layer
    scaling: float


class Member(NamedTuple):
    """A run that is ready to be packed."""

    course: Course
    adapter: Adapter
    config: LoraConfig


class Base:
    """The frozen model of a pack; the first run that is admitted loads it.

    Args:
        wanted: the device, as devices.choose gives it, already pinned.
    """

    def __init__(self, wanted: list[str]):
        self.wanted = wanted
        self.model: nn.Module | None = None
        self.tokenizer: Any = None  # the last one; of all runs that share a model, but for what a template adds
        self.refused: NotPackable | None = None
        self.dtype = torch.float32
        self.layers: list[str] = []
        self.fresh: dict[tuple, Fresh] = {}
        self.rows: dict[str, list[Row]] = {}

    def admit(self, attempt: Attempt) -> Member:
        """Make a run ready. Raises UserError for what is wrong with it, NotPackable for what packing cannot do."""
        job = ordinary.job_of(attempt, self.wanted)
        arguments = process.arguments_of(job) | OURS
        prompt_templates.register()
        process.check_arguments(attempt.run.recipe, arguments)
        process.check_template(attempt.run.recipe, arguments, job["pictures"])
        try:
            return self._admit(attempt, job, arguments)
        except (NotPackable, OutOfMemory):
            raise
        except process.SETTINGS_ERRORS as error:
            if cli.storage_fault(error) is not None:
                raise
            raise process.refusal(attempt.run.recipe, error) from error

    def _admit(self, attempt: Attempt, job: dict, arguments: dict) -> Member:
        parsed = get_train_args(dict(arguments))  # sets the seed, as every start of LLaMA-Factory does
        rows = self._rows(attempt, job, parsed)
        fresh = self._fresh(parsed, rows)
        course = Course(attempt, parsed, self.tokenizer, rows)
        factors, moments = fresh.factors, None
        if course.resumed:
            factors, moments = resumed_factors(course.resumed, self.layers), resumed_moments(course.resumed)
        adapter = Adapter(
            factors, fresh.scaling, course.rates, course.optimizer, course.args.max_grad_norm or 0.0, moments
        )
        return Member(course, adapter, copy.deepcopy(fresh.config))

    def _rows(self, attempt: Attempt, job: dict, parsed: tuple) -> list[Row]:
        key = run_identity.tokens_key(attempt.identity)
        if key is None or key not in self.rows:
            tokenizer_module = load_tokenizer(parsed[0])
            self.tokenizer = tokenizer_module["tokenizer"]
            template = get_template_and_fix_tokenizer(self.tokenizer, parsed[1])
            data = get_dataset(template, *parsed[:3], stage="sft", **tokenizer_module)
            if job["tokens"] and (attempt.staging / "tokens").is_dir():
                process.keep_tokens(attempt.staging / "tokens", Path(job["tokens"]))
            self.rows[key] = rows_of(data["train_dataset"])
        if any((row.labels == IGNORED).all() for row in self.rows[key]):
            raise NotPackable("a row has nothing to learn, and the mean over a step of such rows is no number")
        return self.rows[key]

    def _fresh(self, parsed: tuple, rows: list[Row]) -> Fresh:
        model_args, _, args, finetuning_args, _ = parsed
        key = (
            args.seed, finetuning_args.lora_rank, finetuning_args.lora_alpha, finetuning_args.use_rslora,
            tuple(finetuning_args.lora_target),
        )  # fmt: skip
        if key in self.fresh:
            return self.fresh[key]
        if self.refused is not None:
            raise self.refused
        set_seed(args.seed)
        if self.model is None:
            self.fresh[key] = self._load_once(model_args, finetuning_args, args, rows)
            return self.fresh[key]
        adapted = init_adapter(self.model.config, self.model, model_args, finetuning_args, True)
        fresh = fresh_of(adapted)
        self.model = plain(adapted)
        if list(fresh.factors) != self.layers:
            raise NotPackable("its runs adapt different layers")
        self.fresh[key] = fresh
        return fresh

    def _load_once(self, *arguments: Any) -> Fresh:
        try:
            return self._load(*arguments)
        except NotPackable as refused:
            self.refused = refused
            raise

    def _load(self, model_args: Any, finetuning_args: Any, args: Any, rows: list[Row]) -> Fresh:
        if args.device.type not in ("cpu", "cuda"):
            raise NotPackable(f"it was not tried on {args.device.type}")
        adapted = load_model(self.tokenizer, model_args, finetuning_args, True).to(args.device)
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        check_packable(adapted, self.dtype)
        first = fresh_of(adapted)
        self.layers = list(first.factors)
        by_length = sorted(rows, key=lambda row: len(row.tokens))
        short = [row for row in by_length if len(row.tokens) <= COMPARED] or by_length[:1]
        compared = [short[len(short) // 2], short[-1]]
        theirs = stock_gradient(adapted, compared, self.dtype)
        model = plain(adapted)
        fuse(model)
        compare(model, first, theirs, compared, self.dtype)
        set_seed(args.seed)
        again = init_adapter(model.config, model, model_args, finetuning_args, True)
        pairs = zip(first.factors.values(), fresh_of(again).factors.values(), strict=True)
        if not all(torch.equal(one, other) for pair in pairs for one, other in zip(*pair, strict=True)):
            raise NotPackable("its initial adapters depend on the loading of the model")
        self.model = plain(again)
        return first


def fresh_of(adapted: PeftModel) -> Fresh:
    """The adapter of a PEFT model, copied to the CPU."""
    factors, scaling = {}, set()
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            pair = module.lora_A["default"].weight, module.lora_B["default"].weight
            factors[name] = tuple(weight.detach().to("cpu", torch.float32, copy=True) for weight in pair)
            scaling.add(module.scaling["default"])
    if len(scaling) != 1:
        raise NotPackable("its layers are scaled differently")
    return Fresh(adapted.peft_config["default"], factors, scaling.pop())


def check_packable(adapted: PeftModel, dtype: torch.dtype) -> None:
    """Raise NotPackable for what the packed layers cannot do to a model."""
    model = adapted.base_model.model
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise NotPackable(f"the model has dropout ({name})")
        if isinstance(module, LoraLayer):
            if type(module) is not LoraLinear or type(module.base_layer) is not nn.Linear:
                raise NotPackable(f"{name} is no linear layer with plain LoRA")
            if dtype is torch.float32 and module.base_layer.weight.dtype is not torch.float32:
                raise NotPackable(f"{name} computes in {module.base_layer.weight.dtype}, its adapter in float32")
    config = model.config.to_dict()
    if changed := [key for key in LOGITS_CHANGED if config.get(key) not in (None, 1, 1.0)]:
        raise NotPackable(f"the model changes its logits ({changed[0]})")
    if positions_vary(model):
        raise NotPackable("its rotary positions depend on the longest row of a batch")
    if any(isinstance(module, LoraLayer) for module in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise NotPackable("its embeddings or its output layer are adapted")
    dropouts = [key for key, value in config.items() if key.endswith("dropout") and value]
    if dropouts:
        raise NotPackable(f"the model has dropout ({dropouts[0]})")
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    if any(".lora_A.default." not in name and ".lora_B.default." not in name for name in trained):
        raise NotPackable("more than LoRA's factors are trained")


def stock_gradient(adapted: PeftModel, rows: list[Row], dtype: torch.dtype) -> tuple[float, Tensor]:
    """The loss of some rows, and its gradient by an adapter that does something, from PEFT's own forward pass.

    The adapter's second factors, zero at the start, are set to small waves (`rippled`); the gradient is in fresh_of's
    order, A and then B of each layer.
    """
    device = adapted.device
    length = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    labels, mask = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        here = slice(0, len(row.tokens))
        tokens[number, here], labels[number, here] = torch.from_numpy(row.tokens), torch.from_numpy(row.labels)
        mask[number, here] = 1
    trained = [parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for parameter in trained[1::2]:
        parameter.data.copy_(rippled(parameter))
    with torch.autocast(device.type, torch.bfloat16, dtype is torch.bfloat16):
        loss = adapted(
            input_ids=tokens.to(device), attention_mask=mask.to(device), labels=labels.to(device),
            num_items_in_batch=(labels != IGNORED).sum().to(device),
        ).loss  # fmt: skip
    gradients = torch.autograd.grad(loss, trained)
    for parameter in trained[1::2]:
        parameter.data.zero_()
    return loss.item(), torch.cat([gradient.flatten().float().cpu() for gradient in gradients])


def rippled(like: Tensor) -> Tensor:
    """A second factor that is not zero: small waves, the same on every device."""
    return (0.01 * torch.sin(torch.arange(like.numel(), dtype=torch.float32))).view(like.shape).to(like.device)


def compare(model: nn.Module, fresh: Fresh, theirs: tuple[float, Tensor], rows: list[Row], dtype: torch.dtype) -> None:
    """Raise NotPackable unless the packed layers have the loss and the gradient that PEFT's have."""
    factors = {layer: (a, rippled(b).cpu()) for layer, (a, b) in fresh.factors.items()}
    adapter = Adapter(factors, fresh.scaling, [0.0], {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}, 0.0)
    engine = Engine(model, [adapter], dtype)
    try:
        loss, gradient = engine.gradient_of(Step([rows]))
    except (RuntimeError, TypeError, IndexError) as error:
        if isinstance(error, OutOfMemory):
            raise
        raise NotPackable(f"the packed layers cannot run this model: {' '.join(str(error).split())[:200]}") from error
    finally:
        engine.close()
    ordered = []
    for part in adapter.parts:
        ordered += [gradient[part.a], gradient[part.b].view(adapter.rank, -1).t().reshape(-1)]
    off = abs(loss - theirs[0]) / abs(theirs[0]), ((torch.cat(ordered) - theirs[1]).norm() / theirs[1].norm()).item()
    if not all(one <= most for one, most in zip(off, TOLERANCE[dtype], strict=True)):
        raise NotPackable(
            f"the packed layers differ from PEFT's for this model (loss {off[0]:.1e}, gradient {off[1]:.1e})"
        )
