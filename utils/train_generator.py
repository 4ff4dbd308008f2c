"""Train a small reference generator on collected pairs: prompts in, the LoRA factors of all layers out.

    MODEL=.. RANK=.. [CATEGORY=..] [DATASET=..] [SEED=..] [WITHOUT="OBQA ARC-c"] [NAME=..] [TRAIN_STEPS=1000] \\
        [BASE_STEPS=0] [TRAIN_SEED=0] [FORM=raw|canonical] [IMPORTANCE=1] [MIX=1] [ANSWERS=1] [PROMPTS=16] \\
        [WIDTH=512] [STEPS=all|last|every:10] [PLACE=device|pinned|disk] [DEVICES=..] [DETERMINISTIC=0] \\
        [FORCE=1] python utils/train_generator.py                                                     (make generator)

Reads the collections of one base model and rank that the index has, their prompts and the base model. Writes
saves/generators/<name>/ (paragen/generator/saved.py lists its files), whole or not at all. Killed, the next call goes
on. NAME defaults to the base model, the rank, the omitted datasets and the seed.
"""

import re
from collections.abc import Sequence

from paragen.collection.index import Chosen
from paragen.common import cli, devices, paths, settings
from paragen.common.cli import UserError
from paragen.generator import sources
from paragen.generator.options import Options
from paragen.training import deterministic

SHOWN = 3  # omitted datasets that a generator's name lists


def main() -> None:
    wanted, without = Options.of_settings(), settings.values("WITHOUT")
    chosen = sources.chosen(without)
    folder = paths.SAVES / "generators" / name_of(chosen, without, wanted)
    devices.pin(devices.choose()[:1])
    deterministic.choose_kernels()
    from paragen.generator import train  # imports torch: after the device is pinned

    train.train(chosen, folder, wanted, settings.text("PLACE"))


def name_of(chosen: Sequence[Chosen], without: Sequence[str], wanted: Options) -> str:
    """The generator's name: NAME, or one of what it was trained on. Raises UserError for one that is no folder name."""
    name = settings.text("NAME")
    if not name:
        manifest = chosen[0].manifest
        omitted = sources.named(without)
        shown = "-".join(omitted) if len(omitted) <= SHOWN else f"{len(omitted)}-datasets"
        omitted_part = f"_without-{shown}" if omitted else ""
        seed = f"_seed-{wanted.seed}" if wanted.seed else ""
        name = f"{manifest.base_name}_rank-{manifest.rank}{omitted_part}{seed}"
    if not re.fullmatch(r"[\w-][\w.+ -]{0,199}", name):
        raise UserError(f"NAME={name}: cannot be a folder's name; use letters, digits, -, _ and .")
    return name


if __name__ == "__main__":
    cli.run(main)
