"""The recipe in a manifest, which may come from a stranger: the kinds of its values, and what scoring takes from it.

Scoring gives LLaMA-Factory the keys of MODEL and TEXT and no other: what the base model is, and how prompts become
tokens. `trust_remote_code` is not among them, so that no code in a model's folder runs for a manifest's sake.
"""

from typing import Any

from paragen.collection import manifest_kinds as kinds
from paragen.collection.manifest_kinds import Kind, Section, Unfit
from paragen.common.cli import UserError

DEEPEST = 6  # levels of lists and objects in a recipe's value


def _is_plain(value: Any) -> bool:
    """Whether a value is flat, and its numbers are finite."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is not None:
        return kinds.is_flat(value, DEEPEST) and all(map(_is_plain, inner))
    return value is None or isinstance(value, str | bool) or kinds.is_number(value)


PLAIN = Kind(f"finite numbers and texts, nested at most {DEEPEST} levels deep", _is_plain)


def one_of(*values: Any) -> Kind:
    """One of some values; true is not 1."""
    return Kind(
        " or ".join(map(str, values)), lambda value: any(type(value) is type(one) and value == one for one in values)
    )


def _is_figure(value: Any) -> bool:
    """Whether a value is a finite number, or a text of one, which LLaMA-Factory takes, too."""
    try:
        return kinds.is_number(float(value) if isinstance(value, str) else value)
    except ValueError:
        return False


PROSE = Kind("a text", lambda value: isinstance(value, str))
WORD = Kind("a text of one line", lambda value: isinstance(value, str) and value.strip().isprintable())
SWITCH = Kind("true or false", lambda value: isinstance(value, bool) or (type(value) is int and value in (0, 1)))
# What LLaMA-Factory makes of a base model's weights and tokenizer when it loads them.
MODEL = {
    **dict.fromkeys(("use_fast_tokenizer", "split_special_tokens", "resize_vocab", "double_quantization"), SWITCH),
    "add_tokens": PROSE,
    "add_special_tokens": PROSE,
    "rope_scaling": one_of("linear", "dynamic", "yarn", "llama3"),
    "quantization_bit": one_of(1, 2, 3, 4, 5, 6, 8),
    "quantization_method": one_of("bnb", "hqq", "eetq"),
    "quantization_type": one_of("nf4", "fp4"),
}
TEXT = {
    "template": WORD,
    "default_system": PROSE,
    "tool_format": WORD,
    "enable_thinking": SWITCH,
    "preserve_thinking": SWITCH,
}
DTYPE = dict.fromkeys(("bf16", "fp16"), SWITCH)
# What cards, tables and checks read besides.
SHOWN = {
    "dataset": WORD,
    "lr_scheduler_type": WORD,
    "learning_rate": Kind("a finite number", _is_figure),
    "max_steps": kinds.NUMBER,
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit"), kinds.COUNT),
    "lora_target": Kind(
        "a text of one line or a list of them", lambda value: WORD.fits(value) or kinds.LINES.fits(value)
    ),
}
KINDS = MODEL | TEXT | DTYPE | SHOWN
# Keys with which the trained model was another than the base model on disk, loaded by the keys of MODEL.
NOT_SCORED = ("mixture_of_depths", "train_from_scratch", "shift_attn", "new_special_tokens_config")


def check_recipe(section: Section) -> dict[str, Any]:
    """A manifest's recipe. Raises Unfit for a value that its key cannot have, or that is nested too deeply."""
    for key, value in section.value.items():
        if key in KINDS:
            section.get(key, KINDS[key], nullable=True)
        else:
            kinds.check(value, PLAIN, section.place + key)
    return section.value


def check_trainable(recipe: dict[str, Any], name: str) -> None:
    """Raise UserError, naming a recipe, where a manifest could not record it: before it is trained, not after."""
    try:
        check_recipe(Section(recipe))
    except Unfit as error:
        raise UserError(f"{name}: {error}") from None


def loading_settings(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys of a manifest's recipe that decide what the base model is; collections where they are equal share it.

    Raises UserError, calling the collection `name`, where the recipe trained another model than these keys load.
    """
    if other := [key for key in NOT_SCORED if recipe.get(key)]:
        raise UserError(
            f"{name}: its recipe sets {other[0]}: {recipe[other[0]]!r}, with which it cannot be scored here"
        )
    return {key: recipe[key] for key in MODEL if key in recipe}


def text_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """The keys of a manifest's recipe that decide how prompts become tokens."""
    return {key: recipe[key] for key in TEXT if key in recipe}
