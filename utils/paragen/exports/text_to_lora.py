"""Collections as Text-to-LoRA reads them: OUT is the root of its checkout, or an empty folder to copy into one.

    FORMAT=text-to-lora MODEL=.. RANK=8 [VAL="BoolQ"] [STEPS=best] OUT=~/text-to-lora python utils/export.py

Writes
    train_outputs/sft/oracle_lora/<dataset>/    adapter_model.safetensors (float32, unless DTYPE says otherwise),
                                                adapter_config.json as PEFT 0.15 takes it, args.yaml
    tasks/<dataset>/                            metadata.yaml: descriptions, and how the rows become prompts; train.json
    chat_templates/<base model>/                chat_template.jinja of the base model's tokenizer
    configs/paragen.yaml                        the datasets to train on, those held out by VAL, the layers, the model
One base model, rank and recipe an export, since the first adapter's config counts for all of them.
"""

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from paragen.collection import derived, prompts
from paragen.collection.index import Chosen
from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.exports import checkpoint_copies, parts, tasks
from paragen.exports.tasks import Task
from paragen.model import model_files

FORMAT = "text-to-lora"
ADAPTERS = "train_outputs/sft/oracle_lora"
CONFIG = "configs/paragen.yaml"
DESCRIPTIONS = 128  # that its scripts read of a task
# Its own protocol; other values train as well, but are no comparison.
PROTOCOL = {"r": 8, "lora_alpha": 16, "use_rslora": True, "lora_dropout": 0.05, "modules": ["q_proj", "v_proj"]}


def export(chosen: list[Chosen], out: Path, dtype: str | None) -> None:
    """Export one adapter of each dataset.

    Args:
        chosen: the collections, one a dataset, of one model, rank and recipe.
        out: the root of a Text-to-LoRA checkout or an empty folder.
        dtype: what the adapters are cast to; None is float32.

    Raises UserError, before anything is written, for what Text-to-LoRA refuses or gets wrong silently.
    """
    plan = tasks.planned(chosen, FORMAT)
    check_enough(plan)
    base = base_of(plan[0])
    kept = dtype or "float32"
    sources = {f"{ADAPTERS}/{task.name}": tasks.source_of(task, FORMAT, kept) | {"base": base} for task in plan}
    tasks.check_out(out, sources)
    made: list[tuple[str, dict[str, Any], Callable[[Path], None]]] = []
    for task in plan:
        name = f"{ADAPTERS}/{task.name}"
        made.append((name, sources[name], partial(write_adapter, task, base, kept)))
        rows = task_rows(task)
        metadata = metadata_of(task, rows)
        source = {"format": FORMAT, "metadata": metadata, "rows_sha256": files.sha256_of_value(rows)}
        made.append((f"tasks/{task.name}", source, partial(write_task, metadata, rows)))
    template, text = f"chat_templates/{base}/chat_template.jinja", chat_template(plan[0])
    if parts.is_foreign(out, template):
        say(f"note: {paths.relative(out / template)} stays: its checkout has a template for {base}")
    else:
        made.append((template, {"format": FORMAT, "text": text}, partial(write_text, text)))
    config = config_of(plan, base)
    made.append((CONFIG, {"format": FORMAT, "content": config}, partial(write_text, tasks.as_yaml(config))))
    missing = [(name, source) for name, source, _ in made if not derived.is_there(out, name, source)]
    for name, source in missing:
        derived.check_replaceable(out, name, source)
    derived.check_room(out, sum(2 * task.entry.bytes for task in plan if f"{ADAPTERS}/{task.name}" in dict(missing)))
    for name, source, write in made:
        parts.make(out, name, source, write)
    print_notes(plan, base)


def check_enough(plan: list[Task]) -> None:
    """Raise UserError for a single dataset to train on."""
    trained = [task.name for task in plan if not task.held_out]
    if len(trained) < 2:
        raise UserError(
            f"{trained[0]}: is the only dataset to train on; Text-to-LoRA divides by the deviation across tasks, and "
            "every loss would be NaN: select more with DATASET=.., or hold out fewer with VAL=.."
        )


def base_of(task: Task) -> str:
    """The base model's name as Text-to-LoRA loads it: the hub id, or else a path in its checkout.

    A bare folder name, as our adapter_config.json has it, would be looked up on the hub.
    """
    base = task.chosen.manifest.base_model
    if base is None or not (base.hub_id or base.name):
        raise UserError(
            f"{task.chosen.name}: does not know its base model (it was made from a stock run); collect again"
        )
    return base.hub_id or f"models/{base.name}"


def chat_template(task: Task) -> str:
    """The chat template of the base model's tokenizer. Raises UserError where the model is gone or has none."""
    base = task.chosen.manifest.base_model
    assert base is not None  # see `base_of`
    folder = paths.MODELS / (base.name or "")
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if not config.is_file():
        raise UserError(
            f"{paths.relative(folder)}: is not there; Text-to-LoRA needs the chat template of its tokenizer: make "
            f"model MODEL={paths.typed(base.hub_id or base.name or '')}"
        )
    found = model_files.read_json(config).get("chat_template")
    if isinstance(found, list):
        found = next((one["template"] for one in found if one.get("name") == "default"), None)
    if not found:
        raise UserError(
            f"{paths.relative(config)}: has no chat template, without which Text-to-LoRA does not start; put one at "
            f"{paths.relative(file)}"
        )
    return found


def changes_without_breaks(template: str) -> bool:
    """Whether a chat template says something else once its line breaks and indents of four are gone.

    Text-to-LoRA removes these. A template that cannot be rendered without the tokenizer's own functions counts as
    changed.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    messages = [{"role": role, "content": f"a {role}"} for role in ("user", "assistant")]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers has it
    try:
        said = [
            environment.from_string(text).render(messages=messages, bos_token="<s>", eos_token="</s>")
            for text in (template, template.replace("    ", "").replace("\n", ""))
        ]
    except TemplateError:
        return True
    return said[0] != said[1]


def task_rows(task: Task) -> list[dict[str, str]]:
    """The rows that a task's adapter was trained on: prompt, response and system prompt of each."""
    rows = prompts.of_collection(task.chosen.manifest, "train", paths.DATA)
    return [{key: row[key] for key in ("prompt", "response", "system")} for row in rows]


def metadata_of(task: Task, rows: list[dict[str, str]]) -> dict[str, Any]:
    """The content of a task's metadata.yaml. A system prompt that all rows share is the task's, others precede the
    prompt."""
    systems = {row["system"] for row in rows}
    shared = systems.pop() if len(systems) == 1 else None
    return {
        "descriptions": task.descriptions,
        "ds_kwargs": {"path": "json", "data_files": f"tasks/{task.name}/train.json", "split": "train"},
        "system_message": shared or "",
        "user_prompt_template": "{prompt}" if shared is not None else "{system}\n\n{prompt}",
        "assistant_prefill": "",
        "response_field": "response",
    }


def config_of(plan: list[Task], base: str) -> dict[str, Any]:
    """The content of configs/paragen.yaml."""
    trained = [task for task in plan if not task.held_out]
    return {
        "model_dir": base,
        "train_ds_names": [task.name for task in trained],
        "n_train_ds": len(trained),
        "n_descs_per_ds": min(DESCRIPTIONS, *(len(task.descriptions) for task in trained)),
        "target_modules": tasks.modules_of(plan[0]),
        "eval_ds_info": {task.name: {"descriptions": task.descriptions} for task in plan if task.held_out},
        "additional_eval_descs": [],
    }


def write_adapter(task: Task, base: str, dtype: str, folder: Path) -> None:
    """Write a task's adapter to the new folder `folder`."""
    folder.mkdir()
    checkpoint_copies.write_checkpoint(task.chosen.folder, task.entry, folder / paths.ADAPTER, dtype)
    config = {**task.config, "base_model_name_or_path": base, "target_modules": tasks.modules_of(task)}
    checkpoint_copies.write_config(folder, config)
    write_text(tasks.as_yaml({"model_dir": base, "train_ds_names": [task.name]}), folder / "args.yaml")


def write_task(metadata: dict[str, Any], rows: list[dict[str, str]], folder: Path) -> None:
    """Write a task's metadata and rows to the new folder `folder`."""
    folder.mkdir()
    write_text(tasks.as_yaml(metadata), folder / "metadata.yaml")
    write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", folder / "train.json")


def write_text(text: str, path: Path) -> None:
    """Write a text file."""
    path.write_text(text, encoding="utf-8")


def print_notes(plan: list[Task], base: str) -> None:
    """Print what Text-to-LoRA does not say."""
    found = {**plan[0].config, "modules": tasks.modules_of(plan[0])}
    differing = [f"{key} {found.get(key)}, not {value}" for key, value in PROTOCOL.items() if found.get(key) != value]
    if differing:
        say(f"note: its own adapters are of another kind ({'; '.join(differing)}): results are no comparison")
    least = min(len(task.descriptions) for task in plan)
    if least < DESCRIPTIONS:
        say(f"note: Text-to-LoRA reads up to {DESCRIPTIONS} descriptions of a task; the fewest here are {least}")
    if changes_without_breaks(chat_template(plan[0])):
        say(
            f"note: Text-to-LoRA removes line breaks and indents of chat_templates/{base}/chat_template.jinja, after "
            "which it says something else: put one there in which no text depends on them"
        )
    if base.startswith("models/"):
        models = shlex.quote(str(paths.MODELS))
        say(f"note: in its checkout, {base} has to be the base model's folder: ln -s {models} models")
    say(
        f"note: in Text-to-LoRA: python scripts/train_hyper_recon.py {CONFIG} --exp_setup=hyper_lora "
        f"--model_dir={base} --skip_eval=True ...; its evaluation knows its own tasks alone"
    )
