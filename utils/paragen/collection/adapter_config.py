"""adapter_config.json, which may come from a stranger: PEFT gets a LoraConfig made of checked keys, never the file.

PEFT would import the module that `megatron_core` names, evaluate regular expressions that backtrack for hours, and
initialise layers as often as the file says. LISTED has the keys that decide what an adapter computes, with their types
and bounds; a key that is not listed may only be null or have PEFT's default.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from paragen.collection.manifest_kinds import Kind, Unfit, check, is_number
from paragen.common import files, paths
from paragen.common.cli import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

LARGEST_FILE = 4_000_000  # bytes; a list of 10,000 modules has 1,000,000
MOST_NAMES = 20_000
LARGEST_RANK = 2**16
MOST_LAYERS = 256  # that layer_replication may make
MOST_ITERATIONS = 64  # of pissa_niter_<n>
LARGEST_COST = 200_000  # of all regular expressions, see `_pattern_cost`
NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
# One element of a regular expression, perhaps repeated: a character, `.`, `\.`, `\d`, a class such as [0-9].
ELEMENT = re.compile(r"(?:[\w-]|\\[.dw]|\.|\[\^?[\w.-]+\])([*+?]?)|\((?:\?:)?|\)|\||\^|\$", re.ASCII)
VISION_LEFT_OUT = re.compile(r"\^\(\?!\.\*[\w.]+\)", re.ASCII)  # how LLaMA-Factory's expressions began once
LONGEST_REPEAT = 100  # what a repeated element counts in `_pattern_cost`: about the length of a module's name


class Key(NamedTuple):
    """A listed key: the kind of its values, and PEFT's default."""

    kind: Kind
    default: Any


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 500 and bool(NAME.fullmatch(value))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_NAMES and all(map(_is_name, value))


def _is_whole(value: Any, first: int = 0, last: int = 2**31) -> bool:
    return type(value) is int and first <= value <= last


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_NAMES and all(map(_is_whole, value))


def _pattern_cost(pattern: Any) -> float:
    """About how many steps a backtracking matcher takes for a regular expression, at worst, on a module's name.

    Infinite for one with other elements than ELEMENT's. No group can be repeated, so that the cost is the product of
    the repeated elements, LONGEST_REPEAT each, and of the alternatives in each group.
    """
    if not isinstance(pattern, str) or len(pattern) > 2000:
        return math.inf
    start = VISION_LEFT_OUT.match(pattern)  # which is tried once
    place, cost, alternatives = start.end() if start else 0, 1.0, [1]
    while place < len(pattern):
        found = ELEMENT.match(pattern, place)
        if found is None:
            return math.inf
        place = found.end()
        if found[1]:
            cost *= 2 if found[1] == "?" else LONGEST_REPEAT
        elif found[0].startswith("("):
            alternatives.append(1)
        elif found[0] == "|":
            alternatives[-1] += 1
        elif found[0] == ")" and len(alternatives) > 1:
            cost *= alternatives.pop()
    return cost * alternatives[0] if len(alternatives) == 1 and _compiles(pattern) else math.inf


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _by_pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test of an object whose keys are names or simple regular expressions and whose values fit."""

    def test(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and len(value) <= MOST_NAMES
            and all(map(fits, value.values()))
            and sum(map(_pattern_cost, value)) <= LARGEST_COST
        )

    return test


def _is_initialisation(value: Any) -> bool:
    named = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal")
    if not isinstance(value, str):
        return isinstance(value, bool)
    found = re.fullmatch(r"pissa_niter_([0-9]{1,9})", value)
    return int(found[1]) <= MOST_ITERATIONS if found else value in named


def _is_replication(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_LAYERS
        and all(isinstance(one, list) and len(one) == 2 and all(map(_is_whole, one)) for one in value)
        and sum(abs(last - first) for first, last in value) <= MOST_LAYERS
    )


YES_OR_NO = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text of one line", lambda value: isinstance(value, str) and value.isprintable() and len(value) <= 4096)
RANK = Kind(f"a rank from 1 to {LARGEST_RANK}", lambda value: _is_whole(value, 1, LARGEST_RANK))
ALPHA = Kind("a finite number", is_number)
PROBABILITY = Kind("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
NAMES = Kind("a list of modules' names", _are_names)
MODULES = Kind(
    "a list of modules' names or a simple regular expression (no repeated groups, at most two repeats)",
    lambda value: _are_names(value) or _pattern_cost(value) <= LARGEST_COST,
)
INDEXES = Kind("whole numbers", lambda value: _is_whole(value) or _are_whole(value))
TOKENS = Kind(
    "lists of token ids",
    lambda value: (
        _are_whole(value)
        or (
            isinstance(value, dict)
            and len(value) <= 64
            and all(map(_is_name, value))
            and all(map(_are_whole, value.values()))
        )
    ),
)

LISTED = {
    "task_type": Key(
        Kind(
            "a task type of PEFT",
            lambda value: (
                value in ["SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
            ),
        ),
        None,
    ),
    "base_model_name_or_path": Key(TEXT, None),
    "revision": Key(TEXT, None),
    "peft_version": Key(TEXT, None),
    "inference_mode": Key(YES_OR_NO, False),
    "r": Key(RANK, 8),
    "lora_alpha": Key(ALPHA, 8),
    "lora_dropout": Key(PROBABILITY, 0.0),
    "use_rslora": Key(YES_OR_NO, False),
    "use_dora": Key(YES_OR_NO, False),
    "use_qalora": Key(YES_OR_NO, False),
    "qalora_group_size": Key(Kind("a whole number from 1 to 65536", lambda value: _is_whole(value, 1, 2**16)), 16),
    "lora_bias": Key(YES_OR_NO, False),
    "fan_in_fan_out": Key(YES_OR_NO, False),
    "ensure_weight_tying": Key(YES_OR_NO, False),
    "bias": Key(Kind("none, all or lora_only", lambda value: value in ["none", "all", "lora_only"]), "none"),
    "init_lora_weights": Key(
        Kind(f"true, false or an initialisation of PEFT, pissa_niter_{MOST_ITERATIONS} at most", _is_initialisation),
        True,
    ),
    "target_modules": Key(MODULES, None),
    "exclude_modules": Key(MODULES, None),
    "modules_to_save": Key(NAMES, None),
    "target_parameters": Key(NAMES, None),
    "layers_to_transform": Key(INDEXES, None),
    "layers_pattern": Key(Kind("names", lambda value: _is_name(value) or _are_names(value)), None),
    "rank_pattern": Key(Kind("an object of ranks by simple regular expressions", _by_pattern(RANK.fits)), {}),
    "alpha_pattern": Key(Kind("an object of numbers by simple regular expressions", _by_pattern(is_number)), {}),
    "trainable_token_indices": Key(TOKENS, None),
    "alora_invocation_tokens": Key(Kind("a list of token ids", _are_whole), None),
    "layer_replication": Key(Kind(f"pairs of layers, {MOST_LAYERS} layers in all at most", _is_replication), None),
}
# Keys that say how an adapter was initialised or which class its base model had; nothing reads them afterwards.
IGNORED = ("auto_mapping", "eva_config", "corda_config", "loftq_config", "runtime_config")
DEFAULTS = {"megatron_config": None, "megatron_core": "megatron.core", "arrow_config": None}  # of unlisted keys


def read(path: Path, name: str = "") -> dict[str, Any]:
    """The content of an adapter_config.json, checked; messages call it `name` (default: its path).

    Raises UserError when it is gone, broken or refused.
    """
    name = name or paths.relative(path)
    try:
        data = files.read_up_to(path, LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"{name}: is missing") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    return parse(data, name)


def parse(data: bytes, name: str) -> dict[str, Any]:
    """The content of an adapter_config.json, checked, with PEFT's defaults for the keys of LISTED that it lacks or
    that are null.

    Args:
        data: the file's bytes.
        name: what messages call the file.

    Raises UserError naming the key and its value for what is not as LISTED says.
    """
    if len(data) > LARGEST_FILE:
        raise UserError(f"{name}: has {len(data)} bytes, more than any adapter's settings")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: broken ({error}); put it back, or collect again with FORCE=1") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: is not a JSON object; put it back, or collect again with FORCE=1")
    if content.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{name}: holds no LoRA adapter: its peft_type is {str(content['peft_type'])[:80]!r}")
    try:
        for key, value in content.items():
            if value is not None and key in LISTED:
                check(value, LISTED[key].kind, key)
            elif key not in ("peft_type", *IGNORED) and value not in (None, DEFAULTS.get(key)):
                check(
                    value,
                    Kind("null or PEFT's default: adapters with it are not loaded here", lambda value: False),
                    key,
                )
    except Unfit as error:
        raise UserError(f"{name}: {error}") from None
    return content | {key: known.default for key, known in LISTED.items() if content.get(key) is None}


def lora_config(content: dict[str, Any]) -> "LoraConfig":
    """PEFT's LoraConfig of what `parse` returned. Raises ValueError or TypeError for keys that exclude each other."""
    from peft import LoraConfig

    given = {key: content[key] for key in LISTED if content.get(key) is not None}
    if given.get("init_lora_weights") in ("eva", "gaussian", "orthogonal"):
        given["init_lora_weights"] = True  # random values, which a checkpoint's replace
    return LoraConfig(**{**given, "inference_mode": True})
