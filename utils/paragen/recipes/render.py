"""Renders a recipe at a rank: the result is the plain LLaMA-Factory config that is trained.

Rendering sets `lora_rank` and the `_lora-rank_<r>_` part of `output_dir` and `resume_from_checkpoint` (with a seed
other than the recipe's: `_lora-rank_<r>_seed-<s>_`); `key=value` arguments override recipe keys as in LLaMA-Factory.
"""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.recipes import keys

LARGEST_RECIPE = 1_000_000  # bytes
MOST_ALIASES = 20


def parse_rank(text: str) -> int:
    """A LoRA rank from text. Raises UserError unless it is a positive whole number."""
    if not re.fullmatch(r"[0-9]{1,6}", str(text)) or int(text) == 0:
        raise UserError(f"rank {text!r} is not a positive whole number")
    return int(text)


def parse_seed(text: str) -> int:
    """A seed from text. Raises UserError unless it is a whole number."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError(f"seed {text!r} is not a whole number")
    return int(text)


def load(recipe: Path) -> dict:
    """The recipe's keys and values, read as LLaMA-Factory reads them (OmegaConf: `5e-5` is a number).

    The same content is parsed once. Raises UserError with file and line unless it is a YAML mapping with text keys.
    """
    content = recipe.read_bytes() if recipe.is_file() else None
    return copy.deepcopy(_load(recipe, content))


@cache
def _load(recipe: Path, _content: bytes | None) -> dict:
    try:
        if (size := os.path.getsize(recipe)) > LARGEST_RECIPE:
            raise UserError(f"{recipe}: not a recipe: it has {size} bytes")
        _check_aliases(recipe)
        config = _resolved(OmegaConf.load(recipe), str(recipe))
    except FileNotFoundError:
        raise UserError(f"{recipe}: no such recipe") from None
    except IsADirectoryError:
        raise UserError(f"{recipe}: is a folder; give a recipe, such as <model>_<dataset>_pretrain.yaml") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{recipe}:{mark.line + 1}" if mark else str(recipe)
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise UserError(f"{recipe}: not a recipe: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OmegaConfBaseException, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise UserError(f"{recipe}: not a recipe: {_first_line(error)}") from None
    if not isinstance(config, dict) or not config or not all(isinstance(key, str) for key in config):
        raise UserError(f"{recipe}: not a recipe: a mapping of LLaMA-Factory keys is expected")
    return config


def _check_aliases(recipe: Path) -> None:
    """Raise UserError for a recipe with so many YAML aliases that a short text may become gigabytes."""
    content = recipe.read_bytes()
    if content.count(b"*") > MOST_ALIASES:
        events = yaml.parse(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if sum(isinstance(event, yaml.AliasEvent) for event in events) > MOST_ALIASES:
            raise UserError(f"{recipe}: not a recipe: it has more than {MOST_ALIASES} YAML aliases")


def _resolved(config: object, name: str) -> object:
    """What OmegaConf read, with references to other keys (`${seed}`) replaced by their values.

    Raises UserError for a resolver such as `${oc.env:HF_TOKEN}`: what it reads would be written into manifests, logs
    and folders' names. LLaMA-Factory's own configs use none.
    """
    for text in _texts(OmegaConf.to_container(config, resolve=False)):
        if calls_a_resolver(text):
            raise UserError(f"{name}: {text[:80]!r} calls a resolver, which recipes may not; write the value itself")
    return OmegaConf.to_container(config, resolve=True)


def calls_a_resolver(text: str) -> bool:
    """Whether OmegaConf would call a function for a text: whether a `${...}` holds a colon."""
    open_braces, place = 0, 0
    while place < len(text):
        if text.startswith("${", place):
            open_braces, place = open_braces + 1, place + 1
        elif text[place] == ":" and open_braces:
            return True
        elif text[place] == "}" and open_braces:
            open_braces -= 1
        place += 1
    return False


def _texts(value: object) -> Iterator[str]:
    """All texts in a value, keys of mappings among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def render(recipe: Path, rank: int, overrides: Sequence[str] = ()) -> dict:
    """What is trained: the recipe with the overrides, for this rank.

    Args:
        recipe: path of a LLaMA-Factory YAML whose paths are relative to its own folder.
        rank: LoRA rank, positive.
        overrides: `key=value` texts; a value is read as YAML (`bf16=false`, `learning_rate=1e-4`).

    Raises UserError with file, line, key and value when the recipe cannot be trained.
    """
    own = load(recipe)
    _check_own_ranks(recipe, own)
    given = parse_overrides(overrides)
    config = {**own, **given}
    _check_keys(recipe, config)
    if given.get("lora_rank", rank) != rank:
        raise UserError(f"lora_rank={given['lora_rank']} contradicts rank {rank}; omit the override")

    own_seed = own.get("seed", keys.OMITTED_SEED)
    seed = config.get("seed", keys.OMITTED_SEED)
    config["lora_rank"] = rank
    for key in keys.RUN_PATHS:
        value = config.get(key)
        if not value:
            continue
        if key not in given:
            config[key] = paths.with_rank(value, rank, seed if seed != own_seed else None)
        elif (named := paths.rank_in(value)) and named[0] != rank:
            raise UserError(f"{key}={value} names rank {named[0]}, but the requested rank is {rank}")
    _check_folder(recipe, config)
    return config


def phase_of(config: dict) -> str:
    """`finetune` for a recipe that collects (resumes from a checkpoint and saves every step), else `pretrain`."""
    return "finetune" if config.get("resume_from_checkpoint") and config.get("save_steps") == 1 else "pretrain"


def run_folder(recipe: Path, config: dict) -> Path:
    """The absolute path of a rendered recipe's run folder. For a link (to a larger disk), it is the link's target."""
    folder = resolve(recipe, config["output_dir"])
    return folder.resolve() if folder.is_symlink() else folder


def resolve(recipe: Path, path: str) -> Path:
    """The absolute path of a path in a recipe, which is relative to the recipe's folder."""
    return Path(os.path.normpath(recipe.parent.resolve() / os.path.expanduser(path)))


def temporary_path(recipe: Path, config: dict) -> Path:
    """The path of the rendered recipe during the training: `<recipe>_temp_rank_<rank>.yaml`, beside the recipe."""
    named = paths.rank_in(config["output_dir"])
    seed = f"_seed-{named[1]}" if named and named[1] is not None else ""
    return recipe.absolute().with_name(f"{recipe.stem}_temp_rank_{config['lora_rank']}{seed}.yaml")


def dump(config: dict) -> str:
    """A rendered recipe as YAML text that every YAML parser reads as the same values."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000)


def parse_overrides(overrides: Sequence[str]) -> dict:
    """The keys and values of `key=value` texts. Raises UserError for a text of another form."""
    return copy.deepcopy(_parse_overrides(tuple(overrides)))


@cache
def _parse_overrides(overrides: tuple[str, ...]) -> dict:
    """The same for overrides that many cells have, which are parsed once."""
    for text in overrides:
        if not re.match(r"[A-Za-z_]\w*=", text):
            raise UserError(f"{text!r} is not key=value; recipe keys are overridden like learning_rate=1e-4")
    try:
        given = _resolved(OmegaConf.from_cli(list(overrides)), " ".join(overrides))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{' '.join(overrides)[:200]}: {_first_line(error)}") from None
    assert isinstance(given, dict)  # as from_cli makes a mapping of its keys
    return given


def _check_own_ranks(recipe: Path, own: dict) -> None:
    """Raise UserError where `lora_rank` contradicts the paths: stock LLaMA-Factory would fill the wrong folder."""
    rank = own.get("lora_rank", keys.OMITTED_RANK)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise UserError(f"{recipe}:{line_of(recipe, 'lora_rank')}: lora_rank {rank!r} is not a positive whole number")
    for key in keys.RUN_PATHS:
        named = paths.rank_in(own[key]) if isinstance(own.get(key), str) else None
        if named and named[0] != rank:
            found = f"lora_rank is {rank}" if "lora_rank" in own else f"lora_rank is not set (so {keys.OMITTED_RANK})"
            place = f"{recipe}:{line_of(recipe, key)}"
            raise UserError(f"{place}: {key} names rank {named[0]} but {found}; make them agree")
        seed = own.get("seed", keys.OMITTED_SEED)
        if named and named[1] not in (None, seed):
            raise UserError(f"{recipe}:{line_of(recipe, key)}: {key} names seed {named[1]} but seed is {seed}")


def _check_folder(recipe: Path, config: dict) -> None:
    """Raise UserError where a run folder's name says another phase than the one that would fill it."""
    folder = run_folder(recipe, config)
    for kept in (recipe.parent.resolve(), paths.SAVES.resolve(), Path.home().resolve()):
        if kept.is_relative_to(folder):
            _refuse(recipe, "output_dir", f"{config['output_dir']!r} holds {kept}: name a folder for this run alone")
    name, phase = Path(config["output_dir"]).name, phase_of(config)
    if name.endswith("_pretrain") and phase == "finetune":
        reason = "is a pretrain's, but this run resumes and saves every step: let the folder end in _finetune"
        _refuse(recipe, "output_dir", f"{name} {reason}")
    if not name.endswith("_finetune") or phase == "finetune":
        return
    if config.get("resume_from_checkpoint"):
        reason = (
            f"{config.get('save_steps')!r} would collect nothing in {name}: a finetune saves every step; set it to 1"
        )
        _refuse(recipe, "save_steps", reason)
    reason = f"is missing, but {name} is for a finetune: it resumes from a checkpoint of its pretrain"
    _refuse(recipe, "resume_from_checkpoint", reason)


def _refuse(recipe: Path, key: str, reason: str) -> None:
    line = line_of(recipe, key)
    raise UserError(f"{recipe}{f':{line}' if line else ''}: {key} {reason}")


def _check_keys(recipe: Path, config: dict) -> None:
    """Raise UserError for settings with which the run is not a LoRA adapter in a run folder."""
    refuse = partial(_refuse, recipe)
    for key in keys.REQUIRED:
        value = config.get(key)
        if not value or not isinstance(value, str):
            refuse(key, "is missing" if value is None else f"{value!r} is not a text")
    resume = config.get("resume_from_checkpoint")
    if not (resume is None or resume is False or isinstance(resume, str)):
        refuse("resume_from_checkpoint", f"{resume!r} is not false, null or a checkpoint's path")
    if config.get("finetuning_type", "lora") != "lora":
        refuse("finetuning_type", f"{config['finetuning_type']!r} has no rank: only lora can be collected")
    if config.get("do_train") is not True:
        refuse("do_train", "is not true, so nothing would be trained")
    for key, reason in keys.REFUSED.items():
        if config.get(key):
            refuse(key, reason)
    for key, reasons in keys.REFUSED_AT.items():
        value = str(config.get(key)).lower()
        if value in reasons:
            refuse(key, f"{value} {reasons[value]}")
    for key in config:
        if key.endswith("_token") and config[key]:
            refuse(key, "is no place for a token; log in with .venv/bin/hf auth login, or set HF_TOKEN")
    for key in keys.PATHS:
        value = config.get(key)
        if isinstance(value, str) and not _is_path(value):
            refuse(key, f"{value[:80]!r} is no path")
    if not isinstance(config.get("template") or "", str):
        refuse("template", f"{config['template']!r} is not a text")
    if not isinstance(config.get("dataset_dir", ""), str):
        refuse("dataset_dir", f"{config['dataset_dir']!r} is not a folder's path")
    for key in keys.NUMBERS:
        value = config.get(key)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            refuse(key, f"{value!r} is not a number")
    for key in keys.WHOLE_NUMBERS:
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            refuse(key, f"{value!r} is not a whole number")
        if value is not None and value < 1 and key not in keys.ANY_SIGN:
            refuse(key, f"{value} is less than 1")
    if (steps := config.get("max_steps")) is not None and steps < 1 and steps != keys.EPOCHS_DECIDE:
        refuse("max_steps", f"{steps} trains nothing: set it to the number of the last step")


def _is_path(text: str) -> bool:
    """Whether a text can be a path: without a zero byte or half a character, and no part too long for a file's name."""
    try:
        return "\0" not in text and len(text) < 4000 and all(len(part.encode()) <= 255 for part in text.split("/"))
    except UnicodeEncodeError:
        return False


def line_of(recipe: Path, key: str) -> int | None:
    """The line (from 1) on which a recipe sets a key, or None."""
    with open(recipe, encoding="utf-8") as file:
        root = yaml.compose(file, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return None
    return next((name.start_mark.line + 1 for name, _ in root.value if name.value == key), None)
