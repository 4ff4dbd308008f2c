"""Score the base model and each checkpoint of collections on prompts that they were not trained on.

    DATASET=ARC-c [MODEL=..] [RANK=..] [SPLIT=..] [STEPS=all|last|every:10] [LIMIT=n] [FORCE=1]
        python utils/evaluate.py [--show N]                                                      (make evaluate)
    GENERATED=folder [DATASET=..] [MODEL=..] [SPLIT=..] [LIMIT=n] [FORCE=1] python utils/evaluate.py

Reads collections, data/ and models/; writes evaluation.json into each collection after every few checkpoints, so that
the next call continues after a stop. Several collections are shared out over all devices. SPLIT names another
registered dataset than the one paired with the collection's; LIMIT takes its first rows. --show prints the answers of
the base and of the last checkpoint.

With GENERATED, reads PEFT folders <dataset>/<sample>/ of a parameter generator in place of collections, and writes
scores.json beside the samples of each dataset.
"""

from pathlib import Path

from paragen.collection import index
from paragen.common import cli, devices, settings
from paragen.scoring import evaluate, generated
from paragen.sweep import shared_scoring


def main() -> int:
    parser = cli.ArgumentParser(description="Score collections on held-out prompts.")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the answers to the first N questions")
    args = parser.parse_args()
    if folder := settings.text("GENERATED"):
        if args.show:
            parser.error("--show prints answers of collections; GENERATED has none")
        devices.pin(devices.choose()[:1])
        generated.score_all(Path(folder).expanduser())
        return 0
    evaluate.check_requested()
    return shared_scoring.score_all(index.chosen(), args.show)


if __name__ == "__main__":
    cli.run(main)
