"""Re-read collections: hashes, keys, shapes, steps, finite values, and that PEFT loads them; and their pretrain runs.

    python utils/verify.py [FOLDER ...]                            all collections below the folders (default: saves/)
    python utils/verify.py --recipe RECIPE.yaml RANK [key=value ...]     the collection of one recipe (again for others)
    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] python utils/verify.py     those selected (make verify)

Prints a line for each; the status is 1 when one is not whole. Quality warnings (worse than its base, a rising loss,
equal checkpoints) are printed as lines marked DOUBTFUL, files that are no part of a collection in a line marked KEPT;
neither changes the status. REHASH_MODELS=1 reads the base models anew: otherwise a file is taken for the one that was
read first while its size and times are the same. JSON=1 prints the same as a JSON document on stdout, and the lines on
stderr.
"""

from pathlib import Path

from paragen.collection import discovery, selection
from paragen.collection.verify import content_of, verify
from paragen.common import cli, devices, paths, settings
from paragen.common.cli import UserError, say
from paragen.recipes import render
from paragen.recipes.run import run_of


def main() -> int:
    parser = cli.ArgumentParser(description="Verify collections on disk.")
    parser.add_argument(
        "--recipe", nargs="+", action="append", metavar=("RECIPE", "RANK"), help="verify the collection of this recipe"
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[])
    args = parser.parse_args()
    found: list[tuple[Path, Path | None]]
    if args.recipe:
        found = [of_recipe(*given) for given in args.recipe]
    else:
        found = [(folder, None) for folder in requested_folders(args.folders)]
    as_json, rehash = settings.switch("JSON"), settings.switch("REHASH_MODELS")
    devices.let_threads_sleep()
    with cli.messages_on_stderr(as_json):
        if not found:
            say("no collections yet")
        verified = [verify(folder, base, rehash, pretrains=True) for folder, base in found]
    if as_json:
        cli.print_json(content_of(verified))
    return 1 if any(one.faults or one.pretrain_faults for one in verified) else 0


def of_recipe(recipe: str, rank: str = "", *overrides: str) -> tuple[Path, Path]:
    """The run folder and the base model's folder of a recipe."""
    if not rank:
        raise UserError("--recipe needs a recipe and a rank")
    run = run_of(Path(recipe), render.parse_rank(rank), overrides)
    return run.folder, run.base


def requested_folders(folders: list[Path]) -> list[Path]:
    """The collections below some folders, or those that CATEGORY, DATASET, MODEL, RANK and SEED select."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    found = discovery.find_collections(folders or [paths.SAVES])
    return found if folders else selection.selected_folders(found)


if __name__ == "__main__":
    cli.run(main)
