"""Delete what killed processes left, and the rows that sweeps have tokenised: what nobody needs or a run makes again.

    [DRY_RUN=1] python utils/clean_up.py        (make clean-up)

Prints a line per file or folder with its size. DRY_RUN=1 lists the same and deletes nothing. Collections, pretrains,
logs, models, data, and what is made from collections stay, as does everything that a running process may use.
"""

from paragen.collection import clean_up
from paragen.collection.disk_usage import size_text
from paragen.common import cli, locks, paths, settings
from paragen.common.cli import say


def main() -> int:
    if settings.switch("DRY_RUN"):
        found = clean_up.find()
        for one in found.left_overs:
            say(f"would delete: {described(one)}")
        print_in_use(found)
        say(f"make clean-up would free {size_text(sum(one.bytes for one in found.left_overs))}")
        return 0
    with locks.lock(paths.SAVES / clean_up.OWN_LOCK, waiting="another make clean-up is at work; waiting for it ..."):
        found = clean_up.find()
        freed, faults = 0, 0
        for one in found.left_overs:
            try:
                if clean_up.delete(one):
                    say(f"deleted: {described(one)}")
                    freed += one.bytes
                else:
                    say(f"in use since, and left: {paths.relative(one.path)}")
            except OSError as error:
                cli.complain(f"{paths.relative(one.path)}: cannot be deleted: {error.strerror}; delete it by hand")
                faults += 1
    print_in_use(found)
    say(f"{size_text(freed)} freed")
    return 1 if faults else 0


def described(one: clean_up.LeftOver) -> str:
    """A left-over in one line."""
    return f"{paths.relative(one.path)}  {size_text(one.bytes)}  ({one.why})"


def print_in_use(found: clean_up.Found) -> None:
    """Print what is not deleted because something is running."""
    for path in found.in_use:
        say(f"in use, and left: {paths.relative(path)}")


if __name__ == "__main__":
    cli.run(main)
