"""Measure statistics of collections: how far the adapters of the steps differ, in which layers and directions.

    [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] python utils/stats.py                  (make stats)

Reads collections, writes saves/stats/<category>/<dataset>/<run folder>/ and prints a table per collection:
    stats.parquet           a row per factor tensor and a row per layer's update; COLUMNS describes each column
    importance.safetensors  a float32 scalar per layer, and per factor tensor: Drag-and-Drop LLMs' loss weight
    steps.safetensors       per step: sketch, norm and change of each layer's update; ARRAYS describes each
    stats.json              what it was made from; the layers in the order of the arrays
Measured once, and again when the collection or METHOD changed (FORCE=1: always). An update is B·A times PEFT's scaling.

Importance of a layer (or of one factor) = m / M, with m the mean over its entries of the standard deviation across the
steps, and M that mean over the entries of all layers. The deviation is the population's, of factors that were first
standardised within each step (mean 0, standard deviation 1 over the factor; a constant factor is 0). So the mean of
the importances over all entries is 1; without any variation every importance is 1. Drag-and-Drop LLMs computes the
same per token, which is a block of columns of a factor; here it is per factor and per layer.
"""

from paragen.analysis import measures
from paragen.collection import index
from paragen.common import cli


def main() -> None:
    measures.update(index.chosen())


if __name__ == "__main__":
    cli.run(main)
