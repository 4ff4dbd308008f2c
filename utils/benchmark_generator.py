"""Measure how good the adapters are that a generator writes for datasets that it has not seen.

    [DATASET=..] [CATEGORY=..] [MODEL=..] [RANK=..] [BY=family|dataset] [LIMIT=n] [REPEATS=3] [SAMPLES=4] [PROMPTS=16]
        python utils/benchmark_generator.py                                                  (make benchmark-generator)
    CATEGORY=made VARIANTS="1 3 6 12" [HOLD=4] python utils/benchmark_generator.py

Each fold holds a family of datasets out (`family` in data/dataset_info.json; BY=dataset: a single one; VARIANTS: HOLD
of each family, and trains on so many of the others, REPEATS random subsets each), trains REPEATS generators on the
collections of the rest, and scores what they generate from the held-out datasets' training prompts (and
description), beside what there is without a generator. TRAIN_STEPS and the like are those of make generator.
BASELINES="again union few context" names what is trained or computed besides, or none;
LOSS_ONLY="math" leaves out generated answers of that metric.

Reads collections, data/ and models/; writes saves/benchmarks/<name>/: parts, each whole and used again by the next
call, benchmark.json and benchmark.png. PER_DEVICE processes share a device.
"""

from paragen.benchmark import plan, run
from paragen.common import cli


def main() -> None:
    cli.ArgumentParser(description="Measure a generator on held-out datasets; the settings say which.").parse_args()
    run.make(plan.of_settings())


if __name__ == "__main__":
    cli.run(main)
