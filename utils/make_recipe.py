"""Write a new pair of recipes, pretrain and finetune, that agree with each other, for you to edit.

    MODEL=qwen2.5-0.5b DATASET=ARC-c python utils/make_recipe.py       (make recipe MODEL=.. DATASET=..)

FROM=     take the figures of another pair: a model of this dataset, a dataset with this model, or DATASET/MODEL
TEMPLATE= the prompt template; needed for a model that models/models.yaml does not list
CATEGORY= needed where neither data/sources.yaml nor the place of the dataset's file states it

Reads collect_scripts/figures.yaml, models/, data/dataset_info.json and data/sources.yaml; writes two new files
collect_scripts/<category>/<dataset>/<model>_<dataset>_{pretrain,finetune}.yaml, never over an existing one.
"""

import itertools

from paragen.common import cli, paths, settings
from paragen.common.cli import UserError, say
from paragen.model import base_models
from paragen.recipes import figures, new_pair, pair_writer, vocabulary


def main() -> None:
    models, datasets, source = settings.values("MODEL"), settings.values("DATASET"), settings.text("FROM")
    if not (models and datasets):
        known = f"models: {', '.join(base_models.table())}; datasets: {', '.join(vocabulary.trainable())}"
        raise UserError(f"name both: make recipe MODEL=... DATASET=...; {known}")
    template, category = settings.text("TEMPLATE"), settings.category()
    pairs = [new_pair.requested_pair(*names, template, category) for names in itertools.product(models, datasets)]
    for pair in pairs:
        numbers = figures.figures_from(source, pair) if source else figures.figures_for(pair)
        for path in pair_writer.write_pair(pair, numbers):
            say(paths.relative(path))
        say("look at both, then: make check-recipes; " + pair_writer.command("collect", pair, numbers["lora_rank"]))


if __name__ == "__main__":
    cli.run(main)
