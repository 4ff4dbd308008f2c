"""A worker that reports its GPUs in place of training. As a script: a sweep of six cells with it."""

import os
import sys
import time

from paragen.collection import clean_up
from paragen.recipes.run import Cell
from paragen.sweep import jobs, sweep
from paragen.training.outcome import Outcome


class Reporter:
    def __init__(self, settings, devices):
        assert devices is None

    def ready(self):
        return ""

    def collect(self, pack, packed, halved):
        time.sleep(1)  # so that all workers run at the same time
        return [Outcome("failed", f"{os.getpid()}:{os.environ['CUDA_VISIBLE_DEVICES']}")] * len(pack)

    def stop(self):
        pass


if __name__ == "__main__":
    from helpers import gpu_slots

    jobs.claim_runs, jobs.release_runs = lambda job: True, lambda job: None
    cells = [Cell("X", "x", rank, (None, None)) for rank in range(1, 7)]
    locked = []  # whether `make clean-up` sees that a sweep is at work

    def note(event, *_):
        if event != "ray":  # nothing is at work before Ray is
            locked.append(bool(clean_up.locks_in_use()))

    outcomes = sweep.run(cells, note, gpu_slots.Reporter)
    assert locked and all(locked)
    print(*sorted({outcome.cause for outcome in outcomes.values()}), file=sys.stderr)
