"""Writes a new pair of recipes, pretrain and finetune, that agree with each other, for you to edit.

    MODEL=qwen2.5-0.5b DATASET=ARC-c python utils/make_recipe.py       (make recipe MODEL=.. DATASET=..)

FROM=     take the figures of another pair: a model of this dataset, a dataset with this model, or DATASET/MODEL
TEMPLATE= the prompt template; needed for a model that models/models.yaml does not list
CATEGORY= needed where neither data/sources.yaml nor the place of the dataset's file tells it

Reads collect_scripts/figures.yaml, models/, data/dataset_info.json and data/sources.yaml; writes two new files
collect_scripts/<category>/<dataset>/<model>_<dataset>_{pretrain,finetune}.yaml, never over one that is there.
"""

import os

from paragen.common import cli
from paragen.common.cli import UserError, say
from paragen.model import base_models
from paragen.recipes import new_pair, vocabulary


def main() -> None:
    asked = {name: os.environ.get(name) for name in ("MODEL", "DATASET", "FROM", "TEMPLATE", "CATEGORY")}
    known = f"models: {', '.join(base_models.table())}; datasets: {', '.join(vocabulary.trainable())}"
    for name in ("MODEL", "DATASET"):
        if not asked[name]:
            raise UserError(f"say which: make recipe MODEL=... DATASET=...; {known}")
    cell = new_pair.cell_of(asked["MODEL"], asked["DATASET"], asked["TEMPLATE"], asked["CATEGORY"])
    figures = new_pair.figures_from(asked["FROM"], cell) if asked["FROM"] else new_pair.figures_for(cell)
    new_pair.write_pair(cell, figures)
    say("look at both, then: make check-recipes; " + new_pair.command("collect", cell, figures["lora_rank"]))


if __name__ == "__main__":
    cli.run(main)
