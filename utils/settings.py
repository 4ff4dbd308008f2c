"""Check what a user typed after `make`, and explain the settings of a target.

    python3 utils/settings.py check TARGET ...       every target does this first
    python3 utils/settings.py explain TARGET         (make help FOR=collect)
    python3 utils/settings.py table                  all settings, as the README's table

Reads the table in paragen/common/settings.py, the Makefile's lines of help and the environment; writes nothing. Needs
no package, as it runs before .venv exists.
"""

import re
import sys

from paragen.common import cli, paths, settings
from paragen.common.cli import UserError, say


def main() -> None:
    command, *targets = sys.argv[1:] or [""]
    if command == "check":
        settings.check(targets)
    elif command == "explain" and len(targets) == 1:
        explain(targets[0])
    elif command == "table":
        say("\n".join(settings.table()))
    else:
        raise UserError("usage: settings.py check TARGET ... | explain TARGET | table")


def explain(target: str) -> None:
    """Print what a target does and which settings it takes."""
    taken = settings.lines(target)
    text = (paths.UTILS.parent / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(target)}:.*?## (.*)$", text, re.MULTILINE)
    say(f"make {target}: {found[1] if found else ''}")
    for line in taken or ["  it takes no settings"]:
        say(line)


if __name__ == "__main__":
    cli.run(main)
