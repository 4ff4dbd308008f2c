"""Write 96 made text tasks, register them, and write recipes that learn them.

    [SEED=0] [ROWS=2000] [MODEL="smollm2-135m ..."] python utils/make_tasks.py       (make made-tasks)

TEMPLATE=  the prompt template of a model that models/models.yaml does not list
FORCE=1    replace files that are there with other content: of another SEED or ROWS, or edited recipes

Six rules with sixteen variants each (paragen/dataset/made_rules.py). Writes data/made/<task>_{train,test}.json, the
same in the format of Natural Instructions as data/made/tasks/<task>.json, the entries in data/dataset_info.json, and
collect_scripts/made/<task>/<model>_<task>_{pretrain,finetune}.yaml. What is there already stays.
"""

import dataclasses
from pathlib import Path

from paragen.common import cli, files, paths, settings
from paragen.common.cli import UserError, say
from paragen.dataset import made_tasks
from paragen.recipes import figures, new_pair, pair_writer, render


def main() -> None:
    seeds = settings.values("SEED") or ["0"]
    if len(seeds) > 1:
        raise UserError(f"SEED={' '.join(seeds)}: the tasks are made from one seed; give one")
    rows, force = settings.number("ROWS") or settings.MADE_ROWS, settings.switch("FORCE")
    models = settings.values("MODEL") or [settings.MADE_MODEL]
    template, seed = settings.text("TEMPLATE") or None, render.parse_seed(seeds[0])
    # All tasks have as many rows, so their recipes differ in the name alone.
    pairs = [new_pair.pair_of(model, "", paths.MADE, template, rows, rows) for model in models]
    numbers = [figures.figures_for(pair) for pair in pairs]
    made = made_tasks.write(seed, rows, force, paths.DATA)
    say(f"{len(made.tasks)} made tasks, of {rows:,} rows to train on and {made_tasks.TEST_ROWS} to score on each")
    say(f"{paths.relative(paths.DATA / paths.MADE)}: {made.written} files written, {made.unchanged} were there already")
    written: list[Path] = []
    for pair, figures_of_pair in zip(pairs, numbers, strict=True):
        for task in made.tasks:
            named = dataclasses.replace(pair, dataset=task.name)
            written += pair_writer.write_missing(named, figures_of_pair, force)
    files.sync_tree(paths.SCRIPTS / paths.MADE)
    there = len(paths.PHASES) * len(pairs) * len(made.tasks) - len(written)
    say(f"{paths.relative(paths.SCRIPTS / paths.MADE)}: {len(written)} recipes written, {there} were there already")
    say(f"next: make model MODEL={pairs[0].short}; make plan CATEGORY={paths.MADE} RANK=8")


if __name__ == "__main__":
    cli.run(main)
