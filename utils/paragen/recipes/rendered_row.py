"""The first row of a recipe's dataset as its model reads it: rendered by LLaMA-Factory with the recipe's template."""

import copy
import os
from collections import defaultdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from paragen.common import paths
from paragen.dataset import dataset_info
from paragen.model import model_files
from paragen.recipes import keys, templates
from paragen.recipes.recipe_file import Fault, Recipe

EXAMPLE = {  # where the dataset is not here, or its rows have pictures
    "_prompt": [{"role": "user", "content": "What is the question?"}],
    "_response": [{"role": "assistant", "content": "This is the response."}],
    "_system": "This is the system prompt.",
}
# LLaMA-Factory's data arguments that decide how a row is rendered.
ARGUMENTS = (*keys.TEXT, "cutoff_len", "train_on_prompt", "mask_history")
MASKED = -100  # the label of a token that is not learned
ERRORS = (ValueError, TypeError, LookupError, AttributeError, ImportError, OSError, RuntimeError)


class RenderedRow(NamedTuple):
    """A row as text."""

    source: str  # what was rendered: `the first row of Demo`
    parts: list[tuple[str, bool]]  # the texts in their order, each with whether it is learned
    faults: list[Fault]


def is_possible(recipe: Recipe) -> bool:
    """Whether the tokenizer of a recipe's model is here."""
    folder = recipe.resolved("model_name_or_path")
    return bool(folder and (folder / "config.json").is_file() and model_files.tokenizer_files(folder))


def key_of(recipe: Recipe) -> tuple:
    """A key that is equal for recipes whose row is rendered in the same way."""
    taken = [repr(recipe.config.get(key)) for key in (*ARGUMENTS, "resize_vocab")]
    return recipe.resolved("model_name_or_path"), first_row(recipe) and recipe.config["dataset"], *taken


def render_row(recipe: Recipe) -> RenderedRow:
    """Render a row for a recipe whose tokenizer is here. Imports LLaMA-Factory, which takes seconds.

    Faults are returned: a template that does not fit the tokenizer, a row of which nothing is learned. Raises UserError
    for a broken utils/prompt_templates.py.
    """
    row = first_row(recipe)
    source = f"the first row of {recipe.config['dataset']}" if row else "an example row"
    try:
        input_ids, labels, tokenizer = encode(recipe, row)
    except ERRORS as error:
        return RenderedRow(source, [], [("template", f"{source} cannot be rendered: {type(error).__name__}: {error}")])
    faults = faults_of(recipe, source, input_ids, labels)
    return RenderedRow(source, parts_of(input_ids, labels, tokenizer), faults)


def first_row(recipe: Recipe) -> dict[str, Any] | None:
    """The first row of a recipe's dataset; None where it is not here, or where its rows have pictures."""
    entry = dataset_info.read_info().get(str(recipe.config.get("dataset")))
    if not isinstance(entry, dict) or dataset_info.entry_faults(entry) or "images" in dataset_info.columns_of(entry):
        return None
    path = paths.DATA / entry["file_name"]
    return _first_row_in(path) if path.is_file() else None


@cache
def _first_row_in(path: Path) -> dict[str, Any]:
    return dataset_info.load_rows(path)[0]


def encode(
    recipe: Recipe, row: dict[str, Any] | None, example: dict[str, Any] = EXAMPLE
) -> tuple[list[int], list[int], Any]:
    """(token ids, labels, the tokenizer) of a row, as LLaMA-Factory's supervised training makes them.

    Args:
        recipe: names the model, the template and the other keys that decide the text.
        row: of the recipe's dataset; None stands for `example`.
        example: a row in the form into which LLaMA-Factory converts rows.
    """
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import get_dataset_list
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import TEMPLATES, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    templates.register()
    name = recipe.config["template"]
    data_args = DataArguments(**{key: recipe.config[key] for key in ARGUMENTS if key in recipe.config})
    loaded = load_tokenizer(recipe.resolved("model_name_or_path"), name)
    before = copy.copy(TEMPLATES[name])
    try:
        template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    finally:
        TEMPLATES[name] = before  # a recipe's default_system would stay in it
    converted = dict(example)
    if row is not None:
        (attributes,) = get_dataset_list([recipe.config["dataset"]], str(paths.DATA))
        complete = defaultdict(lambda: None, row)
        converted = get_dataset_converter(attributes.formatting, attributes, data_args)(complete)
    absent = dict.fromkeys(("_system", "_tools", "_images", "_videos", "_audios"))
    encoder = SupervisedDatasetProcessor(template, loaded["tokenizer"], loaded["processor"], data_args)
    encoded = encoder.preprocess_dataset({key: [value] for key, value in {**absent, **converted}.items()})
    if not encoded["input_ids"]:
        raise ValueError("LLaMA-Factory drops it: it does not end in a response")
    return encoded["input_ids"][0], encoded["labels"][0], loaded["tokenizer"]


@lru_cache(maxsize=4)
def load_tokenizer(folder: Path | None, template: str) -> dict[str, Any]:
    """LLaMA-Factory's tokenizer and processor of a model, one for each template, which may add tokens to them."""
    from llamafactory.hparams import ModelArguments
    from llamafactory.model import load_tokenizer

    return load_tokenizer(ModelArguments(model_name_or_path=str(folder)))


def parts_of(input_ids: list[int], labels: list[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """A tokenised row as texts, split where the learned tokens begin and end."""
    parts: list[tuple[list[int], bool]] = []
    for token, label in zip(input_ids, labels, strict=True):
        learned = label != MASKED
        if not parts or parts[-1][1] != learned:
            parts.append(([], learned))
        parts[-1][0].append(token)
    return [(tokenizer.decode(tokens, clean_up_tokenization_spaces=False), learned) for tokens, learned in parts]


def faults_of(recipe: Recipe, source: str, input_ids: list[int], labels: list[int]) -> list[Fault]:
    """What is wrong with a tokenised row: nothing to learn, or tokens that the model does not have."""
    found: list[Fault] = []
    if all(label == MASKED for label in labels):
        length = recipe.config.get("cutoff_len")
        found.append(("cutoff_len", f"{length} cuts the response off {source}: nothing of it is learned"))
    folder = recipe.resolved("model_name_or_path")
    assert folder is not None, "is_possible"
    size = vocabulary_size(folder)
    if size is not None and max(input_ids) >= size and not recipe.config.get("resize_vocab"):
        reason = f"adds tokens to the tokenizer for which {folder.name} has no embedding; use one of its own family"
        found.append(("template", f"{recipe.config['template']!r} {reason}"))
    return found


def vocabulary_size(folder: Path) -> int | None:
    """How many tokens a model on disk has embeddings for, as its config states; None where it does not."""
    config = model_files.read_json(folder / "config.json")
    return {**config, **config.get("text_config", {})}.get("vocab_size")
