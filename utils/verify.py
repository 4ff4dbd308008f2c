"""Re-read collections: hashes, keys, shapes, steps, finite values, and that PEFT loads them.

    python utils/verify.py [FOLDER ...]                            all collections below the folders (default: saves/)
    python utils/verify.py --recipe RECIPE.yaml RANK [key=value ...]     the collection of one recipe (again for others)
    DATASET=... python utils/verify.py                             those of one dataset (make verify)

Prints a line for each; status 1 when one is not whole. Quality warnings (worse than its base, a rising loss, equal
checkpoints) are printed in lines of their own, marked DOUBTFUL, and change no status.
"""

import argparse
import os
from pathlib import Path

from paragen.collection import discovery, quality_warnings, verification
from paragen.collection.manifest import Manifest, read_manifest
from paragen.common import cli, files, paths
from paragen.common.cli import UserError, say
from paragen.model import base_models
from paragen.recipes import render


def main() -> int:
    parser = argparse.ArgumentParser(description="Verify collections on disk.")
    parser.add_argument(
        "--recipe", nargs="+", action="append", metavar=("RECIPE", "RANK"), help="verify the collection of this recipe"
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[])
    args = parser.parse_args()
    if args.recipe:
        found = [of_recipe(*given) for given in args.recipe]
    else:
        found = [(folder, None) for folder in asked_for(args.folders, os.environ.get("DATASET", ""))]
    if not found:
        say("no collections yet")
        return 0
    return 1 if sum(not verify(folder, base) for folder, base in found) else 0


def of_recipe(recipe: str, rank: str = "", *overrides: str) -> tuple[Path, Path]:
    """The run folder and the base model's folder of a recipe."""
    if not rank:
        raise UserError("--recipe needs a recipe and a rank")
    config = render.render(Path(recipe), render.parse_rank(rank), list(overrides))
    folder = render.run_folder(Path(recipe), config)
    return folder, render.resolve(Path(recipe), config["model_name_or_path"])


def asked_for(folders: list[Path], dataset: str) -> list[Path]:
    """The finetune run folders below some folders, or those of a dataset."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    found = discovery.find_collections(folders or [paths.SAVES])
    if dataset:
        name = paths.choose(dataset, {folder.parent.name for folder in found}, "collected dataset")
        found = [folder for folder in found if folder.parent.name == name]
    return found


def verify(folder: Path, base: Path | None = None) -> bool:
    """Check one collection, print how it is and what is doubtful about it, and tell whether it is whole.

    `base` is the base model's folder (default: the one under models/ that the manifest names).
    """
    name = paths.relative(folder)
    try:
        manifest = read_manifest(folder) if folder.is_dir() else None
        if manifest is None:
            faults = ["has no manifest.json: no finished collection (make clean-checkpoints makes one of a stock run)"]
            faults = faults if folder.is_dir() else ["does not exist"]
        else:
            faults = verification.faults_of(folder, manifest) or peft_faults(folder, manifest, base)
    except UserError as error:
        faults = [str(error)]
    for fault in faults:
        print(f"FAULTY {name}: {fault}", flush=True)
    if not faults:
        steps = manifest.steps
        size = files.size_of(folder.iterdir()) / 1e6
        say(f"whole  {name}: {len(steps)} checkpoints, steps {steps[0]}-{steps[-1]}, {size:.1f} MB")
        for warning in quality_warnings.find_warnings(folder, manifest):
            say(f"DOUBTFUL {name}: {warning}")
    return not faults


def peft_faults(folder: Path, manifest: Manifest, base: Path | None) -> list[str]:
    """What PEFT says to the collection's last checkpoint."""
    base = base or paths.MODELS / (manifest.base_name or "unknown")
    if not (base / "config.json").is_file():
        way = base_models.how_to_get(base)
        return [f"cannot be loaded with PEFT here, models/{base.name} is missing; bring it with: {way}"]
    return verification.peft_faults(folder, manifest.steps[-1], base)


if __name__ == "__main__":
    cli.run(main)
