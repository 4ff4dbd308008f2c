"""One cell from nothing to a verified collection: pretrain if it is missing, finetune, verify (make collect).

    DATASET=ARC-c [MODEL=..] [RANK=8] [KEEP=..] [SEED=..] [FORCE=1] [DEVICES=..] python utils/collect.py

Calls train_with_rank.sh for each phase that has something to do. What is complete is not done again; after a crash it
goes on where it was. A complete collection needs no pretrain folder any more, but one that is there must be up to date.
"""

import os
import sys
from pathlib import Path

import cells
import cli
import collection
import rank_config
import run_identity

UTILS = Path(__file__).resolve().parent


def main() -> int:
    dataset, model = os.environ.get("DATASET", ""), os.environ.get("MODEL")
    rank = rank_config.parse_rank(os.environ.get("RANK") or "8")
    seed = [f"seed={value}"] if (value := os.environ.get("SEED")) else []
    keep = [f"save_total_limit={value}"] if (value := os.environ.get("KEEP")) else []
    pretrain, finetune = (cells.find(dataset, model, phase) for phase in ("pretrain", "finetune"))
    if run_identity.force_asked() or not is_done(pretrain, finetune, rank, seed, keep):
        for recipe, overrides in ((pretrain, seed), (finetune, seed + keep)):
            status = cli.call(["bash", UTILS / "train_with_rank.sh", recipe, rank, *overrides])
            if status:
                return status
    return cli.call([sys.executable, UTILS / "verify.py", "--recipe", finetune, rank, *seed, *keep])


def is_done(pretrain: Path, finetune: Path, rank: int, seed: list[str], keep: list[str]) -> bool:
    """Whether the collection is complete and its pretrain, where it is still there, is the recipe's."""
    finetune_state = state_of(finetune, rank, seed + keep)
    return finetune_state == "complete" and state_of(pretrain, rank, seed) in ("complete", "missing")


def state_of(recipe: Path, rank: int, overrides: list[str]) -> str:
    """How the run folder of a recipe stands to it (see collection.state_of)."""
    config = rank_config.render(recipe, rank, overrides)
    identity = run_identity.identity_of(recipe, config)
    return collection.state_of(rank_config.run_folder(recipe, config), identity)[0]


if __name__ == "__main__":
    cli.run(main)
