"""Print the state of every cell: missing, pretrained, collecting, complete, stale or broken.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK="2 8"] [SEED=..] python utils/status.py        (make status)

Reads recipes, run folders and their manifests; writes nothing. A cell is a dataset, a model and a rank.
"""

from paragen.common import cli
from paragen.common.cli import say
from paragen.recipes import lookup
from paragen.training import status


def main() -> None:
    chosen = lookup.chosen_cells()
    by_pair: dict[tuple[str, str], dict[int, str]] = {}
    reasons: list[str] = []
    for cell in chosen:
        state, reason = status.state_of(cell)
        by_pair.setdefault((cell.dataset, cell.model), {})[cell.rank] = state
        if reason:
            reasons.append(f"{state}: {cell}: {reason}")
    ranks = sorted({cell.rank for cell in chosen})
    cli.print_table(
        ("dataset", "model", *(f"rank {rank}" for rank in ranks)),
        [(dataset, model, *(states[rank] for rank in ranks)) for (dataset, model), states in by_pair.items()],
    )
    for reason in reasons:
        say(reason)


if __name__ == "__main__":
    cli.run(main)
