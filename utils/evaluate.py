"""Score the base model and each checkpoint of collections on prompts that they were not trained on.

    DATASET=ARC-c [MODEL=..] [RANK=..] [SPLIT=..] [STEPS=all|last|every:10] [LIMIT=n] [FORCE=1]
        python utils/evaluate.py [--show N]                                                      (make evaluate)

Reads collections, data/ and models/; writes evaluation.json into each collection after every few checkpoints, so that
the next call continues after a stop. SPLIT names another registered dataset than the one paired with the
collection's; LIMIT takes its first rows. --show prints the answers of the base and of the last checkpoint.
"""

from paragen.collection import index
from paragen.common import cli, devices
from paragen.common.cli import UserError
from paragen.scoring import evaluate


def main() -> int:
    parser = cli.ArgumentParser(description="Score collections on held-out prompts.")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the answers to the first N questions")
    args = parser.parse_args()
    evaluate.check_requested()
    chosen = sorted(index.chosen(), key=lambda one: one.manifest.base_name or "")
    devices.pin(devices.choose_one())
    base, done = None, []
    for one in chosen:
        try:
            plan = evaluate.plan_for(one)
            base = evaluate.score(plan, base, args.show)
            done.append(plan)
        except UserError as error:
            if len(chosen) == 1:
                raise
            cli.complain(str(error) if one.name in str(error) else f"{one.name}: {error}")
    if done:
        index.update()  # so that pairs can be chosen by the new scores
    evaluate.show_scores(done)
    return 0 if len(done) == len(chosen) else 1


if __name__ == "__main__":
    cli.run(main)
