"""Train one recipe at one rank with LLaMA-Factory. A finetune recipe becomes a collection.

    bash utils/train_with_rank.sh RECIPE.yaml RANK [key=value ...]     calls this script

Reads the recipe, its data and its base model; writes saves/.../<run folder>. FORCE=1 redoes a complete or stale run,
DEVICES chooses devices (see paragen/common/devices.py). All that a run needs is on disk before it starts.
"""

from pathlib import Path

from paragen.common import cli, settings
from paragen.recipes import render
from paragen.recipes.run import run_of
from paragen.training import ordinary


def main() -> None:
    parser = cli.ArgumentParser(description="Train one recipe at one LoRA rank.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("rank", help=f"LoRA rank; an empty text means {settings.DEFAULT_RANK}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the recipe")
    args = parser.parse_args()
    rank = render.parse_rank(args.rank or str(settings.DEFAULT_RANK))
    ordinary.train(run_of(args.recipe, rank, tuple(args.overrides)))


if __name__ == "__main__":
    cli.run(main)
