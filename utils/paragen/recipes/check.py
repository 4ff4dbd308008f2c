"""Checks recipes without training them: names against contents, keys, templates, LoRA targets, a pair's agreement.

    python utils/check_recipes.py                     all recipes under collect_scripts/       (make check-recipes)
    python utils/check_recipes.py RECIPE.yaml ...     these, each with its other half

Reads the recipes, models/models.yaml, data/dataset_info.json and data/sources.yaml, and writes nothing. Every fault is
a line on stderr with file, line and key; the status is 1 when there is one.
"""

import difflib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from paragen.common import paths, safetensors_header
from paragen.common.cli import UserError
from paragen.dataset import dataset_info
from paragen.model import base_models, model_files
from paragen.recipes import keys, render, vocabulary

FIGURES = paths.SCRIPTS / "figures.yaml"
# fmt: off
HEADS = {
    "lm_head", "embed_out", "embed_tokens", "word_embeddings", "wte", "wpe", "decoder", "predictions", "cls", "score",
}
# The linear layers of the table's models on which LLaMA-Factory's `all` trains, those of vision towers included.
LINEAR = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv", "proj", "out_proj",
    "fc1", "fc2",
}
# fmt: on
TYPES = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
KIND = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}

Fault = tuple[str, str]  # the key, and what is wrong with it


@dataclass
class Recipe:
    """A recipe that could be read; names are empty where it does not lie in collect_scripts/<category>/<dataset>/."""

    path: Path
    config: dict[str, Any]
    lines: dict[str, int]  # the line of each key
    header: list[tuple[int, str]]  # the comment lines at its top
    category: str = ""
    dataset: str = ""
    short: str = ""  # the model in the file's name
    phase: str = ""
    faults: list[Fault] = field(default_factory=list)

    def resolved(self, key: str) -> Path | None:
        """The absolute path that a key names, or None."""
        value = self.config.get(key)
        return render.resolve(self.path, value) if isinstance(value, str) and value else None

    def place(self, key: str) -> str:
        """`file:line: key`, as faults begin; the line is left out for a key that is not there."""
        number = self.lines.get(key)
        return f"{paths.relative(self.path)}{f':{number}' if number else ''}: {key}"


def all_recipes() -> list[Path]:
    """All recipes under collect_scripts/; not the rendered ones of running trainings."""
    found = (path for ending in ("yaml", "yml") for path in paths.SCRIPTS.rglob(f"*.{ending}"))
    return sorted(path for path in found if path != FIGURES and "_temp_rank_" not in path.name)


def other_half(path: Path) -> Path:
    """The finetune recipe's pretrain recipe, and the other way round, by name."""
    swapped = {"_pretrain.yaml": "_finetune.yaml", "_finetune.yaml": "_pretrain.yaml"}
    ending = next((ending for ending in swapped if path.name.endswith(ending)), "")
    return path.with_name(path.name.removesuffix(ending) + swapped.get(ending, ""))


def check(chosen: list[Path]) -> tuple[list[str], int]:
    """All faults of the recipes, a line each, and in how many recipes they are."""
    messages, faulty, read = [], set(), {}
    for path in chosen:
        try:
            read[path] = read_recipe(path)
        except UserError as error:
            messages.append(str(error).replace(str(path), paths.relative(path)))
            faulty.add(path)
    for recipe in read.values():
        for test in (name_faults, key_faults, model_faults, dataset_faults, path_faults, phase_faults, header_faults):
            recipe.faults += test(recipe)
        recipe.faults += pair_faults(recipe, read)
        told = [f"{recipe.place(key)}: {text}" for key, text in recipe.faults]
        messages += told or runner_fault(recipe)
        if told or runner_fault(recipe):
            faulty.add(recipe.path)
    return messages, len(faulty)


def read_recipe(path: Path) -> Recipe:
    """A recipe with the names that its place says. Raises UserError when it is no recipe at all."""
    config = render.load(path)
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    lines = {name.value: name.start_mark.line + 1 for name, _ in root.value}
    header = [(number, line) for number, line in enumerate(text.splitlines(), 1) if number < min(lines.values())]
    recipe = Recipe(path, config, lines, [(number, line) for number, line in header if line.startswith("#")])
    parts = path.relative_to(paths.SCRIPTS).parts if path.is_relative_to(paths.SCRIPTS) else ()
    if len(parts) == 3:
        recipe.category, recipe.dataset = parts[:2]
        named = re.fullmatch(rf"(.+)_{re.escape(recipe.dataset)}_(pretrain|finetune)\.yaml", path.name)
        if named:
            recipe.short, recipe.phase = named.groups()
    return recipe


def runner_fault(recipe: Recipe) -> list[str]:
    """Whatever else train_with_rank.sh would refuse."""
    try:
        render.render(recipe.path, recipe.config.get("lora_rank", keys.OMITTED_RANK))
    except UserError as error:
        return [str(error).replace(str(recipe.path), paths.relative(recipe.path))]
    return []


def name_faults(recipe: Recipe) -> Iterator[Fault]:
    """Category, dataset, model, phase and rank: in the file's name, its folder, and its paths."""
    path = recipe.path
    if not path.is_relative_to(paths.SCRIPTS) or path.parent == paths.SCRIPTS:
        return  # a recipe may lie anywhere; then its name says nothing
    form = "collect_scripts/<category>/<dataset>/<model>_<dataset>_pretrain.yaml or ..._finetune.yaml"
    if not recipe.short:
        yield "its name", f"is not of the form {form}"
        return
    if recipe.category not in paths.CATEGORIES:
        yield "its folder", f"{recipe.category!r} is no category; the categories are {', '.join(paths.CATEGORIES)}"
    if recipe.config.get("dataset") != recipe.dataset:
        yield "dataset", f"is {recipe.config.get('dataset')!r}, but the file and its folder say {recipe.dataset!r}"
    rank = recipe.config.get("lora_rank", keys.OMITTED_RANK)
    folder = recipe.resolved("model_name_or_path")
    wanted = f"saves/{recipe.category}/{recipe.dataset}/{folder and folder.name}_lora-rank_{rank}_{recipe.phase}"
    if folder and recipe.resolved("output_dir") != paths.ROOT / wanted:
        yield "output_dir", f"is {recipe.config.get('output_dir')!r}; this recipe fills {wanted}"


def key_faults(recipe: Recipe) -> Iterator[Fault]:
    """Keys that LLaMA-Factory does not know or that go, values of another type than it takes, code of strangers."""
    known, gone = vocabulary.known_keys(), vocabulary.deprecated_keys()
    for key, value in recipe.config.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            yield str(key), f"LLaMA-Factory has no such key{f'; near: {near[0]}' if near else ''}"
        elif key == "warmup_ratio":
            yield key, f"is deprecated; `warmup_steps: {value}` is the same (below 1: a fraction of all steps)"
        elif key in gone:
            yield key, f"is deprecated; LLaMA-Factory's help says: {gone[key]}"
        elif not is_of_type(value, known[key]):
            wanted = KIND[plain_type(known[key])]
            yield key, f"{value!r} is not {wanted}"
    if recipe.config.get("trust_remote_code"):
        yield "trust_remote_code", "lets code from the model's folder run; say false"
    for key in keys.EXPECTED:
        if recipe.config.get(key) is None:
            why = ": the length in steps (epochs depend on the batch)" if key == "max_steps" else ""
            yield key, f"is missing{why}"
    if "num_train_epochs" in recipe.config:
        yield "num_train_epochs", "has no effect beside max_steps; leave it out"
    if recipe.config.get("max_steps") is not None and not positive(recipe.config["max_steps"]):
        yield "max_steps", f"{recipe.config['max_steps']!r} is not a positive whole number"


def plain_type(annotation: str) -> str:
    """`float` for `float | None` and `Optional[float]`."""
    return re.sub(r"^Optional\[(.*)\]$", r"\1", annotation).removesuffix(" | None").strip()


def is_of_type(value: Any, annotation: str) -> bool:
    """Whether LLaMA-Factory takes a value for a key; types that are not plain are not looked at."""
    kind = plain_type(annotation)
    if value is None or kind not in TYPES:
        return True
    return isinstance(value, TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


def positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def model_faults(recipe: Recipe) -> Iterator[Fault]:
    """The model's folder, the template and the layers that get adapters."""
    folder, table = recipe.resolved("model_name_or_path"), base_models.table()
    by_folder = {entry["folder"]: short for short, entry in table.items()}
    if folder and folder.parent != paths.MODELS:
        given = recipe.config["model_name_or_path"]
        yield "model_name_or_path", f"{given!r} is not a folder in models/: ../../../models/<folder>"
    elif folder and recipe.short:
        short = by_folder.get(folder.name, folder.name.lower())
        if short != recipe.short:
            wanted = table.get(recipe.short, {}).get("folder")
            way_out = f"{recipe.short} is models/{wanted}" if wanted else f"models/{folder.name} is {short}"
            yield "model_name_or_path", f"is models/{folder.name}, but the file's name says {recipe.short}; {way_out}"
    template = recipe.config.get("template")
    known = vocabulary.stock_templates() | vocabulary.our_templates()
    if template is not None and template not in known:
        near = ", ".join(difflib.get_close_matches(str(template), known, 3)) or "see LLaMA-Factory's data/template.py"
        yield "template", f"{template!r} is neither LLaMA-Factory's nor in utils/prompt_templates.py; near: {near}"
    entry = table.get(by_folder.get(folder.name)) if folder else None
    for text in target_faults(recipe.config.get("lora_target", "all"), folder, entry):
        yield "lora_target", text


def target_faults(target: Any, folder: Path | None, entry: dict | None) -> Iterator[str]:
    """What is wrong with a LoRA target for the model in `folder`, whose `entry` in models/models.yaml may be None."""
    told = entry["lora_target"] if entry else "all"
    if not isinstance(target, str) or not target.strip():
        yield f"{target!r} is not `all` or a comma list of layer names"
        return
    if target == "all":
        if told != "all":
            yield f"`all` does not fit {folder.name}; models/models.yaml says {told}"
        return
    layers = layers_on_disk(folder)
    known = set(told.split(",")) if told != "all" else LINEAR if entry else None
    for part in (part.strip() for part in target.split(",")):
        if part.split(".")[-1] in HEADS:
            yield f"{part!r} is the head or an embedding, which is tied to the other one in many models; leave it out"
        elif layers and not any(name == part or name.endswith(f".{part}") for name in layers):
            yield f"{part!r}: models/{folder.name} has no such layer"
        elif not layers and known and part not in known and part.split(".")[-1] not in known:
            yield f"{part!r}: {folder.name} has no such layer; it has {','.join(sorted(known))}"


def layers_on_disk(folder: Path | None) -> set[str]:
    """The names of a model's layers, from the heads of its weight files; empty where it is not here."""
    names = set()
    for path in model_files.weight_files(folder) if folder and folder.is_dir() else []:
        try:
            tensors = safetensors_header.read_tensors(path)
        except (ValueError, AttributeError, OSError):
            continue  # `make model` reports broken weights
        names |= {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    return names


def dataset_faults(recipe: Recipe) -> Iterator[Fault]:
    """The dataset: known, trainable, in the category of the recipe's folder, and its held-out rows left alone."""
    dataset = recipe.config.get("dataset")
    if recipe.resolved("dataset_dir") != paths.DATA:
        yield "dataset_dir", f"is {recipe.config.get('dataset_dir')!r}; the datasets are in data/: ../../../data"
    if not isinstance(dataset, str) or not dataset:
        return
    registered = dataset_info.read_info().get(dataset)
    if registered is None and dataset not in vocabulary.listed():
        way_out = f"make register FILE=data/<category>/{dataset}.json"
        yield "dataset", f"{dataset!r} is neither registered nor listed in data/sources.yaml; {way_out}"
        return
    if dataset not in vocabulary.trainable():
        yield "dataset", f"{dataset!r} holds prompts only and cannot be trained on"
        return
    place = vocabulary.category_of(dataset)
    if recipe.category and place and place != recipe.category:
        yield "dataset", f"the data of {dataset} is in {place}, the recipe in {recipe.category}"
    rows, held_out = vocabulary.rows_of(dataset)
    usable, most = vocabulary.trainable_rows(dataset), recipe.config.get("max_samples")
    if usable is not None and usable != rows and (most is None or (isinstance(most, int) and most > usable)):
        said = "is missing, so all rows are trained on" if most is None else f"{most} is too much"
        yield (
            "max_samples",
            f"{said}: the rows of {dataset} after the first {usable} stay unseen, to score checkpoints on",
        )


def path_faults(recipe: Recipe) -> Iterator[Fault]:
    """Paths that leave the repository or that mean something on one machine only."""
    for key in (*keys.PATHS, "deepspeed"):
        value, path = recipe.config.get(key), recipe.resolved(key)
        if path is None:
            continue
        if value.startswith(("/", "~")):
            yield key, f"{value!r} is a path of one machine; say it relative to the recipe: ../../../..."
        elif not path.is_relative_to(paths.ROOT):
            yield key, f"{value!r} leaves the repository"
        elif key == "output_dir" and not path.is_relative_to(paths.SAVES):
            yield key, f"{value!r} is not under saves/"


def phase_faults(recipe: Recipe) -> Iterator[Fault]:
    """What a recipe says of saving and resuming, against the phase that its name says."""
    config, found = recipe.config, render.phase_of(recipe.config)
    if recipe.phase == "pretrain":
        if config.get("resume_from_checkpoint"):
            yield "resume_from_checkpoint", "a pretrain starts anew; leave it out"
        if config.get("save_only_model"):
            yield "save_only_model", "the finetune resumes with the optimizer's state; leave it out"
    if recipe.phase != "finetune" and found != "finetune":
        return
    if not config.get("resume_from_checkpoint"):
        yield "resume_from_checkpoint", "is missing: a finetune goes on from a checkpoint of its pretrain"
    if config.get("save_steps") != 1:
        yield "save_steps", f"{config.get('save_steps')!r} does not collect every step; say 1"
    if config.get("save_only_model") is not True:
        yield "save_only_model", "is not true: every checkpoint would hold the optimizer's state too"
    limit, step = config.get("save_total_limit"), resumed_step(recipe)
    if not positive(limit):
        yield "save_total_limit", f"{limit!r} is not how many checkpoints are kept"
    elif step is not None and positive(config.get("max_steps")) and config["max_steps"] != step + limit:
        told = f"{step + limit} = the resumed step {step} + save_total_limit {limit}"
        yield "max_steps", f"{config['max_steps']} leaves {config['max_steps'] - step} steps to collect; say {told}"


def resumed_step(recipe: Recipe) -> int | None:
    """The step that a recipe resumes from, or None."""
    resumed = recipe.resolved("resume_from_checkpoint")
    found = resumed and paths.CHECKPOINT.fullmatch(resumed.name)
    return int(found[1]) if found else None


def header_faults(recipe: Recipe) -> Iterator[Fault]:
    """The commands at the top: for this model, dataset and rank, and for the file itself."""
    named = {"MODEL": recipe.short, "DATASET": recipe.dataset, "RANK": str(recipe.config.get("lora_rank", ""))}
    for number, text in recipe.header:
        command = text.lstrip("# ").strip()
        if not recipe.short or not command.startswith("make "):
            continue
        try:
            words = shlex.split(command)[1:]
        except ValueError:
            words = []
        given = dict(word.split("=", 1) for word in words if "=" in word)
        for key, right in named.items():
            if right and key in given and given[key] != right:
                yield "header", f"line {number} says {key}={given[key]}, the recipe is for {right}"


def pair_faults(recipe: Recipe, read: dict[Path, Recipe]) -> Iterator[Fault]:
    """A finetune against its pretrain, and whether either is alone."""
    if not recipe.phase:
        return
    other_path = other_half(recipe.path)
    if not other_path.exists():
        yield "its pair", f"{paths.relative(other_path)} is missing"
        return
    if recipe.phase == "pretrain" or other_path not in read:
        return
    pretrain, config = read[other_path], recipe.config
    for key in keys.SAME_IN_PAIR:
        mine, theirs = config.get(key), pretrain.config.get(key)
        if mine != theirs:
            yield key, f"is {mine!r}, in {other_path.name} it is {theirs!r}"
    resumed, run = recipe.resolved("resume_from_checkpoint"), pretrain.resolved("output_dir")
    if resumed is None:
        return
    if resumed.parent != run or resumed_step(recipe) is None:
        given = config["resume_from_checkpoint"]
        yield "resume_from_checkpoint", f"{given!r} is no checkpoint-<step> of {other_path.name}'s output_dir"
    elif not is_saved(resumed_step(recipe), pretrain.config):
        told = f"save_steps {pretrain.config.get('save_steps')}, max_steps {pretrain.config.get('max_steps')}"
        kept = pretrain.config.get("save_total_limit")
        told += f", save_total_limit {kept}" if kept else ""
        yield "resume_from_checkpoint", f"step {resumed_step(recipe)} is not there after {other_path.name}: {told}"


def is_saved(step: int, pretrain: dict[str, Any]) -> bool:
    """Whether a pretrain leaves a checkpoint of a step: every save_steps and at its end, of those the last few kept."""
    every, last, kept = (pretrain.get(key) for key in ("save_steps", "max_steps", "save_total_limit"))
    if not positive(every) or not positive(last):
        return True  # that is said at those keys
    steps = sorted({*range(every, last + 1, every), last})
    return step in (steps[-kept:] if positive(kept) else steps)
