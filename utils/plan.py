"""Print what collecting some cells takes: cells, steps, disk and, where runs of their models exist, time.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK="2 8"] [SEED=..] [KEEP=..] [JSON=1] python utils/plan.py    (make plan)

Reads recipes, run folders and their manifests. What is not known before a model is there is shown as `?`. Too little
disk is an error. JSON=1 prints the same as a JSON document.
"""

from paragen.common import cli, settings
from paragen.recipes import lookup
from paragen.sweep import plan


def main() -> None:
    as_json = settings.switch("JSON")
    with cli.messages_on_stderr(as_json):
        planned = plan.make(lookup.chosen_cells())
    if as_json:
        cli.print_json(plan.content_of(planned))
    else:
        plan.show(planned)
    plan.check_disk(planned)


if __name__ == "__main__":
    cli.run(main)
