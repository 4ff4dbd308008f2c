"""A worker that tells which GPUs it was given, not training; run as a script, it prints what a sweep of it says."""

import os
import sys
import time

from paragen.recipes.run import Cell
from paragen.sweep import sweep
from paragen.training.outcome import Outcome


class Teller:
    def __init__(self, settings, devices):
        assert devices is None

    def ready(self):
        return ""

    def collect(self, pack, packed, smaller):
        time.sleep(1)  # so that all workers are at work at once
        return [Outcome("failed", f"{os.getpid()}:{os.environ['CUDA_VISIBLE_DEVICES']}")] * len(pack)

    def stop(self):
        pass


if __name__ == "__main__":
    from helpers import gpu_slots

    sweep.claim, sweep.release = lambda job: True, lambda job: None
    cells = [Cell("X", "x", rank, (None, None)) for rank in range(1, 7)]
    outcomes = sweep.run(cells, lambda *event: None, gpu_slots.Teller)
    print(*sorted({outcome.cause for outcome in outcomes.values()}), file=sys.stderr)
