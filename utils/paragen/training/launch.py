"""Runs process.py once per device, through torchrun without its tracebacks: each process records how it ended.

    python -m paragen.training.launch JOB.json COUNT

The status is 0, or 128 and the signal that ended a process, or 1.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from paragen.training import process


def main() -> int:
    job, count = sys.argv[1:]
    logging.disable()  # in this process alone
    torchrun = ["--standalone", f"--nproc-per-node={count}", "--module", process.__name__, job]
    try:
        run.run(run.parse_args(torchrun))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return 1 if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
