"""Check recipes without training them: names against contents, keys, templates, LoRA targets, a pair's agreement.

    python utils/check_recipes.py                     all recipes under collect_scripts/       (make check-recipes)
    python utils/check_recipes.py RECIPE.yaml ...     these, each with its other half

Reads the recipes, models/models.yaml, data/dataset_info.json and data/sources.yaml; writes nothing. Prints a line with
file, line and key on stderr for each fault; the status is 1 when there is one. Where the model's tokenizer is here, the
first row of the dataset is rendered with the recipe's template; of the recipes that were named it is also printed.
Notes tell how many rows `cutoff_len` cuts, where the data is here, too.
"""

import shlex
from pathlib import Path

from paragen.common import cli, paths, settings
from paragen.common.cli import UserError, say
from paragen.recipes import check, cutoff, recipe_file
from paragen.recipes.rendered_row import RenderedRow

SHOWN = 2000  # characters of a text


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE.yaml")
    named = parser.parse_args().recipes or [Path(name) for name in [settings.text("FILE")] if name]
    chosen = [path.absolute().parent.resolve() / path.name for path in named]
    chosen += [half for half in map(recipe_file.other_half, chosen) if half.is_file()]
    recipes = sorted(set(chosen)) or recipe_file.all_recipes()
    report = check.check(recipes)
    for message in report.messages:
        cli.complain(message)
    if chosen:
        show_rows(report)
    if report.missing:
        models = shlex.quote(" ".join("".join(name.split()) for name in report.missing))
        say(f"no row was rendered with models that are not in models/: make model MODEL={models}")
    if report.messages:
        raise UserError(f"faults: {len(report.messages)}, in {report.faulty} of {len(recipes)} recipes")
    for note in cutoff.notes(map(recipe_file.read_recipe, recipes)):
        say(f"note: {note}")
    say(f"{len(recipes)} recipes, no faults")


def show_rows(report: check.Report) -> None:
    """Print each rendered row once: `|` before what is masked, `>` before what is learned."""
    shown: list[RenderedRow] = []
    for path, row in report.rows.items():
        if row in shown or not row.parts:
            continue
        shown.append(row)
        say(f"{paths.relative(path)}: {row.source} as the model reads it (`>`: what is learned)")
        for text, learned in row.parts:
            cut = f" ... ({len(text) - SHOWN} more characters)" if len(text) > SHOWN else ""
            for line in f"{text[:SHOWN]}{cut}".split("\n"):
                say(f"  {'>' if learned else '|'} {line}")


if __name__ == "__main__":
    cli.run(main)
