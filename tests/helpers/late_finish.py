"""The packed engine whose runs are complete only after another one is published, but no later than after SECONDS.

`fork_server.start("helpers.late_finish", ...)`, with that one's folder in LATE_FINISH.
"""

import os
import time
from pathlib import Path

from paragen.packed import packed_train

SECONDS = 10


def main() -> int:
    from paragen.training import completion

    finish, other = completion.finish, Path(os.environ["LATE_FINISH"])

    def finish_late(attempt, facts):
        end = time.monotonic() + SECONDS
        while attempt.run.folder != other and not other.is_dir() and time.monotonic() < end:
            time.sleep(0.01)
        return finish(attempt, facts)

    completion.finish = finish_late
    return packed_train.main()
