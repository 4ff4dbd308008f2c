"""Check recipes without training them: names against contents, keys, templates, LoRA targets, a pair's agreement.

    python utils/check_recipes.py                     all recipes under collect_scripts/       (make check-recipes)
    python utils/check_recipes.py RECIPE.yaml ...     these, each with its other half

Reads the recipes, models/models.yaml, data/dataset_info.json and data/sources.yaml; writes nothing. Prints a line with
file, line and key on stderr for each fault; the status is 1 when there is one.
"""

from pathlib import Path

from paragen.common import cli, settings
from paragen.common.cli import UserError, say
from paragen.recipes import check, recipe_file


def main() -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE.yaml")
    named = parser.parse_args().recipes or [Path(name) for name in [settings.text("FILE")] if name]
    chosen = [path.absolute().parent.resolve() / path.name for path in named]
    chosen += [half for half in map(recipe_file.other_half, chosen) if half.is_file()]
    recipes = sorted(set(chosen)) or recipe_file.all_recipes()
    messages, faulty = check.check(recipes)
    for message in messages:
        cli.complain(message)
    if messages:
        raise UserError(f"faults: {len(messages)}, in {faulty} of {len(recipes)} recipes")
    say(f"{len(recipes)} recipes, no faults")


if __name__ == "__main__":
    cli.run(main)
