"""Score the base model and each checkpoint of collections on prompts that they were not trained on.

    DATASET=ARC-c [MODEL=..] [RANK=..] [SPLIT=..] [STEPS=all|last|every:10] [LIMIT=n] [FORCE=1]
        python utils/evaluate.py [--show N]                                                      (make evaluate)

Reads collections, data/ and models/; writes evaluation.json into each collection after every few checkpoints, so that
the next call continues after a stop. Several collections are shared out over all devices. SPLIT names another
registered dataset than the one paired with the collection's; LIMIT takes its first rows. --show prints the answers of
the base and of the last checkpoint. A broken collection is named and left out, and the status is 1.
"""

from paragen.collection import index
from paragen.common import cli
from paragen.scoring import evaluate
from paragen.sweep import shared_scoring


def main() -> int:
    parser = cli.ArgumentParser(description="Score collections on held-out prompts.")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the answers to the first N questions")
    args = parser.parse_args()
    evaluate.check_requested()
    chosen, broken = index.chosen()
    return shared_scoring.score_all(chosen, args.show) or min(broken, 1)


if __name__ == "__main__":
    cli.run(main)
