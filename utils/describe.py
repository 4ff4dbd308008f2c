"""Add descriptions of a registered dataset's task to its entry in data/dataset_info.json, or list those that it has.

    DATASET=MySet TEXT="Answer questions about ..." python utils/describe.py                         (make describe)
    DATASET=MySet FILE=descriptions.txt [SOURCE="written by ..."] python utils/describe.py
    DATASET=MySet python utils/describe.py                                                           lists them

FILE holds a description a line (.txt), or a list (.json, .yaml), which may stand under the key `descriptions`.
Generators that read a description in place of prompts (Text-to-LoRA, LoRAGen) are trained on them. They make no run
stale.
"""

from pathlib import Path

from paragen.common import cli, paths, settings
from paragen.common.cli import UserError, say
from paragen.dataset import dataset_info, descriptions, registration

OWN = "own"


def main() -> None:
    wanted, text, file = settings.values("DATASET"), settings.text("TEXT"), settings.text("FILE")
    source = settings.text("SOURCE") or (Path(file).name if file else OWN)
    if not wanted:
        raise UserError('name a dataset: make describe DATASET=MySet TEXT="..", or FILE=descriptions.txt')
    if len(wanted) > 1:
        raise UserError(f"DATASET={' '.join(wanted)}: name one dataset: descriptions say what its own task is")
    if text and file:
        raise UserError("TEXT and FILE: give one of them")
    name = paths.choose(wanted[0], dataset_info.read_info(paths.DATA), "registered dataset")
    if not text and not file:
        show(name)
        return
    texts = [text] if text else descriptions.read_file(registration.find_file(file, paths.DATA))
    try:
        added, count = registration.describe(name, texts, source, paths.DATA)
    except UserError as error:
        raise UserError(f"{file}: {error}" if file and str(error).startswith("description") else str(error)) from None
    there = f", {len(texts) - added} are there already" if added < len(texts) else ""
    say(f"{name}: {added} descriptions added{there}; it has {count}")


def show(name: str) -> None:
    """Print the descriptions of a dataset by where they come from."""
    found = descriptions.by_source(dataset_info.entry_of(name, paths.DATA))
    if not found:
        raise UserError(f"{name}: has no descriptions; {descriptions.way_to_add(name)}")
    for source, texts in found.items():
        say(f"{source}:")
        for text in texts:
            say(f"  {text}")


if __name__ == "__main__":
    cli.run(main)
