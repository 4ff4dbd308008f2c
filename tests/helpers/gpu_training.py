"""Trains both phases of a cell, or of a pack, on a GPU, in a process of its own.

    python tests/helpers/gpu_training.py graphs|eager|ordinary --cell PRETRAIN FINETUNE RANK [--cell ...]

`graphs` is the packed engine as it is, `eager` the same without CUDA graphs, `ordinary` LLaMA-Factory's trainer.
"""

import sys


def main() -> int | None:
    how, *arguments = sys.argv[1:]
    from paragen.packed import packed_train

    if how == "ordinary":
        from paragen.common import paths
        from paragen.training import ordinary

        _, *words = arguments
        for phase in paths.PHASES:
            ordinary.train(packed_train.cell_of(*words).run(phase))
        return None
    sys.argv = ["packed_train.py", *arguments]
    if how == "eager":
        from paragen.common import devices

        devices.pin(devices.choose())
        from paragen.packed import engine

        engine.GraphRunner = engine.EagerRunner
    return packed_train.main()


if __name__ == "__main__":
    from paragen.common import cli

    cli.run(main)
