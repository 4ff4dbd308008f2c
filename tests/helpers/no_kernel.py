"""Trains a model that has an operation without a deterministic kernel: `fork_server.start("helpers.no_kernel", ...)`.

NO_KERNEL names the script that trains: train or paragen.packed.packed_train.
"""

import importlib
import os

import torch
from transformers.models.llama.modeling_llama import LlamaMLP


def main() -> int | None:
    forward = LlamaMLP.forward

    def with_put(layer, x):
        torch.zeros(1).put_(torch.tensor([0]), torch.tensor([1.0]))
        return forward(layer, x)

    LlamaMLP.forward = with_put
    return importlib.import_module(os.environ["NO_KERNEL"]).main()
