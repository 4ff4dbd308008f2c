"""Print the state of every cell of which something is there: pretrained, collecting, complete, stale or broken.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK="2 8"] [SEED=..] [ALL=1] [JSON=1] python utils/status.py  (make status)

A cell is a dataset, a model, a rank and a seed; without RANK and SEED, those collected at other ones are shown, too.
Files are compared by names and lengths; `make verify` reads them. ALL=1 also shows the missing cells; JSON=1 prints all
cells as a JSON document.
"""

from paragen.common import cli, settings
from paragen.recipes import lookup
from paragen.training import status


def main() -> None:
    as_json = settings.switch("JSON")
    with cli.messages_on_stderr(as_json):
        states = status.states_of(lookup.with_collected(lookup.chosen_cells()))
    if as_json:
        cli.print_json(status.content_of(states))
    else:
        status.show(states, settings.switch("ALL"))


if __name__ == "__main__":
    cli.run(main)
