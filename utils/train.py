"""Train one recipe at one rank with LLaMA-Factory; a finetune recipe ends as a collection.

    bash utils/train_with_rank.sh RECIPE.yaml RANK [key=value ...]     is the way to call it

Reads the recipe, its data and its base model; fills saves/.../<run folder>. FORCE=1 redoes a complete or stale run,
DEVICES chooses devices (see devices.py). HF_HUB_OFFLINE is set: everything a run needs is on disk before it starts.
"""

import argparse
from pathlib import Path

from paragen.collection import run_identity
from paragen.common import cli, files
from paragen.common.cli import UserError
from paragen.recipes import keys, render
from paragen.training import ordinary


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one recipe at one LoRA rank.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("rank", help=f"LoRA rank; an empty text is {keys.DEFAULT_RANK}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the recipe")
    args = parser.parse_args()
    config = render.render(args.recipe, render.parse_rank(args.rank or str(keys.DEFAULT_RANK)), args.overrides)
    folder = render.run_folder(args.recipe, config)
    identity = run_identity.identity_of(args.recipe, config)
    try:
        with files.lock(files.beside(folder, "lock")), ordinary.rendered(args.recipe, config):
            files.recover_folder(folder)
            if not ordinary.already_there(folder, identity, render.phase_of(config)):
                ordinary.check_pretrain(args.recipe, config)
                ordinary.run(args.recipe, config, folder, identity)
            ordinary.drop_claim(folder)
    except files.Busy as busy:
        raise UserError(f"{args.recipe} at rank {config['lora_rank']} is running already (it holds {busy})") from None


if __name__ == "__main__":
    cli.run(main)
