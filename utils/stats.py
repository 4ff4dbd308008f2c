"""Measure statistics of collections: how far the adapters of the steps differ, in which layers and directions.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] [DEVICES=cpu] python utils/stats.py    (make stats)

Reads collections, writes saves/stats/<category>/<dataset>/<run folder>/ and prints a table per collection:
    stats.parquet           a row per factor tensor and a row per layer's update; COLUMNS describes each column
    importance.safetensors  a float32 scalar per layer, and per factor tensor: Drag-and-Drop LLMs' loss weight
    steps.safetensors       per step: sketch, norm and change of each layer's update; ARRAYS describes each
    stats.json              what it was made from; the layers in the order of the arrays
Measured once, and again when the collection or METHOD changed (FORCE=1: always), on the GPU where there is one
(DEVICES=cpu: on the CPU). An update is B·A times PEFT's scaling. A broken collection is named and left out, and the
status is 1.
"""

from paragen.analysis import stats_files
from paragen.collection import index
from paragen.common import cli


def main() -> int:
    chosen, broken = index.chosen()
    return 1 if stats_files.update(chosen) or broken else 0


if __name__ == "__main__":
    cli.run(main)
