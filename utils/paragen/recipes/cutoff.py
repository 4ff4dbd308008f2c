"""How many rows a recipe's `cutoff_len` cuts, as far as that can be seen without LLaMA-Factory."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import comparison, data_warnings, dataset_info, row_texts
from paragen.recipes import keys
from paragen.recipes.recipe_file import Recipe, is_positive

TOKENIZER = "tokenizer.json"
AT_ONCE = 500  # texts that are tokenised together


def notes(recipes: Iterable[Recipe]) -> Iterator[str]:
    """A line for each dataset, model and `cutoff_len` of some recipes where rows are cut.

    Only recipes whose tokenizer and data are on disk are looked at. Counted are the texts of a row without what the
    template adds, so that more rows may be cut. Raises UserError for a tokenizer that cannot be read.
    """
    seen, texts_of = set(), cache(texts_of_dataset)
    for recipe in recipes:
        limit, most = recipe.config.get("cutoff_len", keys.OMITTED_CUTOFF), recipe.config.get("max_samples")
        folder = recipe.resolved("model_name_or_path")
        if folder is None or not (folder / TOKENIZER).is_file() or not is_positive(limit):
            continue
        for name in map(str.strip, str(recipe.config.get("dataset")).split(",")):
            if (what := (folder, name, limit, most)) in seen:
                continue
            seen.add(what)
            texts = texts_of(name)[: most if is_positive(most) else None]
            if cut := count_longer(texts, limit, folder / TOKENIZER):
                counted = data_warnings.share(cut, len(texts))
                yield f"{recipe.place('cutoff_len')}: {limit} cuts at least {counted} of {name}"


def texts_of_dataset(name: str) -> tuple[str, ...]:
    """The texts of each row of a dataset, joined; none where its file is not there, or where its rows have faults."""
    info = {known: entry for known, entry in dataset_info.read_info(paths.DATA).items() if known == name}
    read = [
        data_warnings.read(name, file, info[name]) for file in comparison.registered_files(info, paths.DATA).values()
    ]
    return tuple("".join(row_texts.all_of(row, rows.entry)) for rows in read for row in rows.rows)


def count_longer(texts: Sequence[str], limit: int, tokenizer: Path) -> int:
    """How many of some texts have more than `limit` tokens. A text with fewer bytes is not tokenised."""
    long = [text for text in texts if len(text.encode()) > limit]
    if not long:
        return 0
    read = tokenizer_in(tokenizer)
    batches = (long[start : start + AT_ONCE] for start in range(0, len(long), AT_ONCE))
    return sum(
        len(found.ids) > limit for batch in batches for found in read.encode_batch_fast(batch, add_special_tokens=False)
    )


@cache
def tokenizer_in(path: Path) -> Any:
    """The tokenizers.Tokenizer in a tokenizer.json. Raises UserError where it cannot be read."""
    from tokenizers import Tokenizer

    try:
        read = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class for it
        raise UserError(
            f"{paths.relative(path)}: cannot be read: {error}; run: make model MODEL={path.parent.name}"
        ) from None
    read.no_truncation()
    read.no_padding()
    return read
