"""Print a recipe as it is rendered for a rank: the plain LLaMA-Factory config that is trained. Writes nothing.

    python utils/rank_config.py RECIPE.yaml RANK [key=value ...]

Rendering sets `lora_rank` and the `_lora-rank_<r>_` part of `output_dir` and `resume_from_checkpoint` (with a seed
other than the recipe's: `_lora-rank_<r>_seed-<s>_`); `key=value` arguments override recipe keys as in LLaMA-Factory.
Where no rank is named, make's targets take DEFAULT_RANK of paragen/common/settings.py.
"""

from pathlib import Path

from paragen.common import cli
from paragen.recipes import render


def main() -> None:
    parser = cli.ArgumentParser(description="Print a recipe as it would be trained at a rank.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("rank")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    print(render.dump(render.render(args.recipe, render.parse_rank(args.rank), args.overrides)), end="")


if __name__ == "__main__":
    cli.run(main)
