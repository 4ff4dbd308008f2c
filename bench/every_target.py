"""Every target once, as a user types them, from `make data` to `make report`: the wall time and the status of each.

    PARAGEN_DATA_SOURCE=FOLDER python bench/every_target.py [--datasets ARC-c ARC-e OBQA] [--ranks 2 8] [--keep 100]

In a copy of what git holds, in a temporary folder, with the embedded model. PARAGEN_DATA_SOURCE: see data/README.md.
PY=python3 in the environment has the targets run that Python; else .venv is made there. The status is 1 where a command
failed; what the commands print goes to --log. With --folder the copy stays there, and a call with the same folder goes
on behind the last command that succeeded.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from shapes import ROOT

from paragen.common import cli

MODEL = "smollm2-135m"
NOT_INHERITED = ("OUT", "DATASET", "RANK", "MODEL", "KEEP")


def main() -> int:
    args = parse_arguments()
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="every target ") as folder:
        top = (args.folder or Path(folder)).absolute() / "copy"
        record = top.with_name("done.json")
        if record.exists():
            rows = json.loads(record.read_text())
        else:
            copy_repository(top)
            args.log.write_text("")
        with open(args.log, "a") as log:
            for command in commands(args.datasets, args.ranks, args.keep)[len(rows) :]:
                rows.append(run(command, top, environment, log))
                if rows[-1][-1] == "0":
                    record.write_text(json.dumps(rows))
    cli.print_table(("make", "seconds", "status"), rows)
    tracebacks = args.log.read_text().count("Traceback (most recent call last)")
    cli.say(f"{tracebacks} tracebacks in {args.log}")
    return 1 if tracebacks or any(status != "0" for *_, status in rows) else 0


def run(command: list[str], top: Path, environment: dict[str, str], log: IO[str]) -> list[str]:
    """Run a target in a copy of the repository; returns it, its seconds and its status."""
    print("#", *command, file=log, flush=True)
    if "FILE=ARCHIVES" in command:
        command = [*command[:-1], f"FILE={set_aside(top)}"]
    began = time.monotonic()
    done = subprocess.run(["make", *command], cwd=top, env=environment, stdout=log, stderr=log)
    row = [" ".join(command), f"{time.monotonic() - began:.1f}", str(done.returncode)]
    cli.say("  ".join(reversed(row)))
    return row


def parse_arguments() -> argparse.Namespace:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", default=["ARC-c", "ARC-e", "OBQA"], help="with a test split each")
    parser.add_argument("--ranks", nargs="+", default=["2", "8"])
    parser.add_argument("--keep", default="100")
    parser.add_argument("--folder", type=Path, help="where the copy stays")
    parser.add_argument("--log", type=Path, default=Path("every_target.log"))
    args = parser.parse_args()
    args.log = args.log.absolute()
    return args


def commands(datasets: list[str], ranks: list[str], keep: str) -> list[list[str]]:
    """The targets with their settings, in order."""
    data = f"DATASET={' '.join(datasets)}"
    cells = [f"MODEL={MODEL}", data, f"RANK={' '.join(ranks)}", f"KEEP={keep}"]
    chosen = [data, f"MODEL={MODEL}", f"RANK={ranks[-1]}"]
    fetched = [["data", data]] if datasets != ["Demo"] else []
    return [
        *([] if os.environ.get("PY") else [["setup"]]),
        ["model", f"MODEL={MODEL}"],
        *fetched,
        ["plan", *cells],
        ["collect", "DATASET=Demo", f"MODEL={MODEL}", "RANK=8"],
        ["collect-all", "CATEGORY=common-sense-reasoning", *cells],
        ["collect-all", "CATEGORY=common-sense-reasoning", *cells],
        ["status"],
        ["verify"],
        ["evaluate", data, f"RANK={ranks[-1]}", "STEPS=every:20"],
        ["index"],
        ["stats"],
        ["report"],
        *(["export", f"FORMAT={name}", *chosen] for name in ("peft", "dnd", "canonical", "archive")),
        ["import", "FILE=ARCHIVES"],
        ["status"],
        ["made-tasks"],
        ["check-recipes"],
        ["disk"],
        ["clean-up", "DRY_RUN=1"],
    ]


def copy_repository(top: Path) -> None:
    """What git holds, as it is in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    names = listed.split("\0") if listed else [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    for name in filter(None, names):
        first = Path(name).parts[0]
        if first.startswith(".") or first in ("models", "saves", "shared") and name != "models/models.yaml":
            continue
        if (ROOT / name).is_file():
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, top / name)
    (top / "saves").mkdir(exist_ok=True)


def set_aside(top: Path) -> Path:
    """Move the exported collections away, so that the import brings them; the folder with their archives."""
    archives = top / "saves" / "exports" / "archive"
    for archive in archives.rglob("*.archive"):
        name = archive.relative_to(archives).with_suffix("")
        shutil.rmtree(top / "saves" / name)
    return archives


if __name__ == "__main__":
    cli.run(main)
