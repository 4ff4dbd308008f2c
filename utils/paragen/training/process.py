"""The training process: calls LLaMA-Factory through its Python entry point, with our templates and callbacks.

For one device, `ordinary.train` calls `train` in its own process. For several, launch.py runs this module for each:
    python -m paragen.training.launch JOB.json COUNT
Writes LLaMA-Factory's own files, the collected checkpoints and facts.json into the staging folder.
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from pathlib import Path

from datasets.exceptions import DatasetGenerationError, DatasetsError
from safetensors import SafetensorError

from paragen.common import cli, devices, files, paths
from paragen.common.cli import UserError
from paragen.model import base_models
from paragen.recipes import keys, render, templates
from paragen.training import deterministic, llamafactory_output, outcome, progress, token_cache

# Exceptions that LLaMA-Factory and its libraries raise before the first step for a wrong recipe, model or data file.
SETTINGS_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    OSError,
    RuntimeError,
    AssertionError,
    SafetensorError,
    DatasetsError,
)


def train(job: dict) -> None:
    """Train one job.

    Args:
        job: `recipe` (absolute path; its paths are relative to its folder), `config` (the rendered recipe), `phase`,
            `staging` (absolute path of an existing empty folder), `devices` (as devices.choose gives them, already
            pinned), `pictures` (whether a dataset has some), `tokens` (the folder for its tokenised rows in the
            sweep's cache, or None), `tokens_ready` (whether they lie there, checked; else the folder is filled),
            `continued` and `record` (see ordinary.continuation; or None).

    Raises UserError for a recipe that LLaMA-Factory or this machine cannot train.
    """
    recipe, config, staging = Path(job["recipe"]), job["config"], Path(job["staging"])
    progress.report(staging, "importing LLaMA-Factory")
    llamafactory_output.reduce()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    deterministic.choose_kernels()
    import torch
    from llamafactory.train.tuner import run_exp

    from paragen.training.checkpoint_record import CheckpointRecord
    from paragen.training.collector import Collector, Rules

    llamafactory_output.log_examples()
    os.chdir(recipe.parent)
    if job["devices"][:1] == ["cpu"] and len(job["devices"]) > 1:
        # accelerate names the devices of CPU processes cpu:0, cpu:1, ...; torch.load, on resuming, knows only cpu
        torch.serialization.register_package(
            priority=30,
            tagger=lambda storage: None,
            deserializer=lambda storage, location: storage if location.startswith("cpu:") else None,
        )
    collects = job["phase"] == "finetune"
    arguments = arguments_of(job)
    templates.register()
    check_arguments(recipe, arguments)
    check_template(recipe, arguments, job["pictures"])
    rules = Rules(config, continued=bool(job["continued"]))
    collector = Collector(staging, config.get("save_total_limit")) if collects else None
    record = CheckpointRecord(staging, job["record"], job["continued"]) if job["record"] else None
    progress.report(staging, "tokenising rows, loading the model")
    try:
        with record.watching() if record else contextlib.nullcontext():
            run_exp(arguments, [callback for callback in (rules, collector, record) if callback])
    except BaseException as error:
        print(file=sys.stderr, flush=True)  # the next message starts a new line after the progress bar
        if cli.is_out_of_memory(error):
            raise outcome.OutOfMemory(
                f"{recipe}: out of device memory; halve per_device_train_batch_size and double "
                "gradient_accumulation_steps, or set disable_gradient_checkpointing: false"
            ) from None
        if isinstance(error, SETTINGS_ERRORS) and not rules.began and cli.storage_fault(error) is None:
            raise refusal(recipe, error) from error
        if deterministic.missing_kernel(error):
            raise refusal(recipe, error) from error
        raise
    finally:
        if collector:
            collector.close()
    if rules.facts:  # the main process
        if (staging / "tokens").is_dir():
            token_cache.keep(staging / "tokens", Path(job["tokens"]))
        files.write_json(staging / "facts.json", {"device": devices.describe(), **rules.facts})


def arguments_of(job: dict) -> dict:
    """LLaMA-Factory's arguments for a job: the recipe with absolute paths, staging folder and device settings."""
    recipe, config, staging = Path(job["recipe"]), job["config"], Path(job["staging"])
    required = devices.settings(job["devices"])
    if required:
        llamafactory_output.expect_float32()
    arguments = {**config, **required, "output_dir": str(staging), "plot_loss": False}
    for key in keys.READ_PATHS:
        if arguments.get(key):
            arguments[key] = str(render.resolve(recipe, arguments[key]))
    if job["continued"]:
        arguments["resume_from_checkpoint"] = job["continued"]
    # The datasets library caches a file by its time and size, and tokenised rows by their text without their pictures.
    # With a cache of this run's own it cannot return outdated rows or pictures.
    arguments["cache_dir"] = str(staging / "cache")
    if job["tokens"]:
        arguments["tokenized_path"] = job["tokens"] if job["tokens_ready"] else str(staging / "tokens")
    if job["phase"] == "finetune":
        arguments["save_strategy"] = "no"  # the collector saves
    return arguments


def refusal(recipe: Path, error: BaseException) -> UserError:
    """An exception of LLaMA-Factory or its libraries that the recipe or a setting caused, as an error in one line."""
    if cause := deterministic.missing_kernel(error):
        return UserError(f"{recipe}: cannot be trained: {cause}")
    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__  # it names the file
    where = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    place = f" ({Path(where.filename).name}:{where.lineno})" if where else ""
    return UserError(
        f"{recipe}: cannot be trained: {type(error).__name__}: {' '.join(str(error).split())[:500]}{place}"
    )


def check_arguments(recipe: Path, arguments: dict) -> tuple:
    """Have LLaMA-Factory parse the arguments before anything is loaded, and return what it makes of them.

    Raises UserError where it refuses them.
    """
    from llamafactory.hparams import get_train_args

    check_bf16(recipe, arguments)
    try:
        return get_train_args(dict(arguments))
    except SETTINGS_ERRORS as error:
        raise refusal(recipe, error) from None


def keep_parser() -> None:
    """Have LLaMA-Factory make its argument parser once per process. Each takes 40 ms, and a dict needs none of it."""
    from llamafactory.hparams import parser
    from transformers import HfArgumentParser

    made = functools.cache(HfArgumentParser)
    vars(parser)["HfArgumentParser"] = lambda types: made(tuple(types))


def check_bf16(recipe: Path, arguments: dict) -> None:
    """Raise UserError where the arguments say bf16 and the GPU does not compute in it."""
    import torch

    key = next((key for key in ("bf16", "pure_bf16") if arguments.get(key)), None)
    if key and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise UserError(f"{recipe}: {key}: true, but {name} has no bfloat16; write fp16: true in its place")


def check_template(recipe: Path, arguments: dict, has_pictures: bool) -> None:
    """Raise UserError for an unknown template, and where template, data and model do not agree about pictures."""
    from llamafactory.data import TEMPLATES

    template = arguments.get("template")
    if template is None:
        return
    if template not in TEMPLATES:
        similar = sorted(name for name in TEMPLATES if name.startswith(str(template)[:2]))
        raise UserError(
            f"{recipe}: template {template!r} is not known to LLaMA-Factory nor in utils/prompt_templates.py"
            f"{'; similar ones: ' + ', '.join(similar) if similar else ''}"
        )
    takes_pictures = TEMPLATES[template].mm_plugin.image_token is not None
    if has_pictures and not takes_pictures:
        raise UserError(
            f"{recipe}: template {template!r} takes no pictures, but the data has some; use another, such as qwen2_vl"
        )
    model = render.resolve(recipe, arguments["model_name_or_path"])
    if takes_pictures and not base_models.has_processor(model):
        raise UserError(
            f"{recipe}: template {template!r} is for models that read pictures, but {paths.relative(model)} has no "
            "preprocessor_config.json; download the whole model, or use the template of its text-only variant"
        )


def main() -> int:
    """One process of several: train the job in the file on the command line, and record the outcome.

    What the user can correct is printed once, by the process that reads the outcomes.
    """
    cli.end_with_parent()
    job = json.loads(Path(sys.argv[1]).read_bytes())
    devices.pin(job["devices"])
    try:
        outcome.recorded(lambda: train(job), Path(job["staging"], f"outcome-{os.environ['RANK']}.json"))
    except Exception as error:
        if isinstance(error, UserError) or cli.storage_fault(error) is not None:
            return 1
        raise
    return 0


if __name__ == "__main__":
    cli.run(main)
