"""Prompt-checkpoint pairs for PyTorch: a Dataset over saves/index.parquet.

    from pairs import Pairs                                                              (with PYTHONPATH=utils)
    pairs = Pairs(prompts=8, dataset="Demo", rank=8)
    prompts, checkpoint, row = pairs[0]

Reads the index that `make index` wrote, the collections in it and the data files below data/. Writes nothing.
"""

from paragen.collection.pairs import Pair, Pairs, Tensors, collate

__all__ = ["Pair", "Pairs", "Tensors", "collate"]
