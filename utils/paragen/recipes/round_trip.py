"""Whether a model's tokenizer and template give a sample of text back as it was.

transformers 5 builds some tokenizers anew from their vocabulary, by the class that tokenizer_config.json names: a
byte-level vocabulary that is said to be Llama's loses all spaces. Training would go on with such text unnoticed.
"""

from pathlib import Path
from typing import Any

from paragen.common import paths
from paragen.model import base_models, model_files
from paragen.recipes import rendered_row
from paragen.recipes.recipe_file import Recipe

PROMPT = 'Is 12 × 3 = 36? Naïve café, €5.\n\tTwo  spaces, {braces} and "quotes"; isn\'t it?'
RESPONSE = "Yes: def f(x):\n    return x ** 2  # [A]"
# Classes that take tokenizer.json as it is, so that the tokenizers library alone reads it as transformers does.
AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")


def warnings_of(folder: Path) -> list[str]:
    """What is wrong with the text that a model on disk would read, a line each; empty where it is as it was.

    Where transformers builds the tokenizer, LLaMA-Factory loads it, which takes seconds, and the sample also goes
    through the template that models/models.yaml names for the model.

    Args:
        folder: a whole model (see base_models.local_folder).
    """
    try:
        texts = _through_tokenizer(folder) if _is_taken_as_it_is(folder) else _through_template(folder)
    except rendered_row.ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        return [f"{folder.name}: its tokenizer cannot read a sample of text: {type(error).__name__}: {reason}"]
    return [
        f"{folder.name}: its tokenizer or template changes text: {_shown(sent, back)}; see tokenizer_class in "
        f"{paths.relative(folder / 'tokenizer_config.json')}, and look at a row with make check-recipes"
        for sent, back, is_same in texts
        if not is_same
    ][:1]


def _is_taken_as_it_is(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    named = model_files.read_json(path).get("tokenizer_class") if path.is_file() else None
    return named in AS_IT_IS and (folder / "tokenizer.json").is_file()


def _through_tokenizer(folder: Path) -> list[tuple[str, str, bool]]:
    """(what was sent, what came back, whether both are the same) for each text of the sample."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = []
    for text in (PROMPT, RESPONSE):
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
        found.append((text, back, _is_in(text, back, tokenizer)))
    return found


def _through_template(folder: Path) -> list[tuple[str, str, bool]]:
    """The same by LLaMA-Factory, as it encodes a row of a training."""
    entry = base_models.table().get(base_models.short_name(folder), {})
    config = {"model_name_or_path": str(folder), "template": entry.get("template") or "empty"}
    example = {
        "_prompt": [{"role": "user", "content": PROMPT}],
        "_response": [{"role": "assistant", "content": RESPONSE}],
        "_system": "",
    }
    input_ids, labels, tokenizer = rendered_row.encode(Recipe(folder / "a recipe", config, {}, []), None, example)
    back = "".join(text for text, _ in rendered_row.parts_of(input_ids, labels, tokenizer))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [(text, back, _is_in(text, back, backend)) for text in (PROMPT, RESPONSE)]


def _is_in(sent: str, back: str, backend: Any) -> bool:
    """Whether a text is in what came back; for WordPiece, whose words lose case and spaces, as far as it keeps them."""
    if sent in back:
        return True
    if type(getattr(backend, "model", None)).__name__ != "WordPiece":
        return False

    def kept(text: str) -> str:
        return "".join((backend.normalizer.normalize_str(text) if backend.normalizer else text).split())

    return kept(sent) in kept(back)


def _shown(sent: str, back: str) -> str:
    return f"{sent!r} comes back as {back[:120]!r}"
