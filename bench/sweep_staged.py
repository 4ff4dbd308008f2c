"""bench/sweep.py --staged: how many bytes cells take to nodes that share no storage, and back (STAGE=1).

Two nodes of two slots each are pretended on this machine (tests/helpers/ray_nodes.py). The driver's file server counts
the bytes of all files that it sends and receives; what Ray adds to a message is not among them. With --kill, the first
node is killed while it trains a finetune: only then is a pretrain run sent, to where the cell is repeated.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "utils"), str(ROOT / "tests")]

from paragen.common import cli, paths  # noqa: E402
from paragen.sweep.file_server import FileServer  # noqa: E402

COUNTS = "bytes.json"  # in the driver's repository
NODES, SLOTS = 2, 2
SENT = {"models": "base model", "data": "rows", "collect_scripts": "recipes", "saves": "pretrain run"}  # by folder
DRIVE = "import sys, sweep_staged; sweep_staged.drive(sys.argv.pop(1))"


class CountingServer(FileServer):
    """A file server that counts, and writes its counts where it closes."""

    def __init__(self, node: str):
        super().__init__(node)
        self.counts: Counter = Counter()
        self.counting = threading.Lock()

    def count(self, way: str, what: str, size: int) -> None:
        with self.counting:
            self.counts[f"{way}: {what}"] += size

    def read(self, name: str, offset: int) -> bytes:
        data = super().read(name, offset)
        self.count("sent", SENT[Path(name).parts[0]], len(data))
        return data

    def write(self, attempt: str, phase: str, name: str, offset: int, data: bytes) -> None:
        super().write(attempt, phase, name, offset, data)
        self.count("back", f"{phase} run", len(data))

    def report(self, attempt: str, output: bytes, phase: str, progress: bytes) -> None:
        super().report(attempt, output, phase, progress)
        self.count("back", "log and progress", len(output) + len(progress))

    def close(self) -> None:
        super().close()
        (paths.ROOT / COUNTS).write_text(json.dumps(self.counts))


def drive(category: str) -> None:
    """Run a sweep of a category with a file server that counts; called in the driver's repository."""
    import collect_all
    from paragen.sweep import stage

    stage.FileServer = CountingServer
    sys.argv = ["collect_all.py", category]
    cli.run(collect_all.main)


def measure(top: Path, category: str, cells: int, environment: dict[str, str], kill: bool) -> None:
    """Sweep a repository's cells on pretended nodes, and print the bytes.

    Args:
        top: the repository.
        category: of its cells.
        cells: how many there are.
        environment: of the sweep.
        kill: kill the first node while it trains a finetune.
    """
    from helpers import ray_nodes

    if not ray_nodes.are_allowed(top):
        cli.fail("mount namespaces are not allowed on this machine, so that no nodes can be pretended")
    found = os.pathsep.join([str(top / "utils"), str(ROOT / "bench")])
    os.environ |= {**ray_nodes.TOKEN, "PYTHONPATH": found}
    own = {**ray_nodes.TOKEN, "PYTHONPATH": found, "STAGE": "1", "STAGE_DIR": ""}
    with tempfile.TemporaryDirectory(prefix="nodes") as folder:
        cluster = ray_nodes.Cluster(top, Path(folder))
        try:
            stages = [cluster.add(SLOTS) for _ in range(NODES)]
            if kill:
                threading.Thread(target=kill_in_finetune, args=(cluster, stages[0]), daemon=True).start()
            environment = {**environment, **own, "RAY_ADDRESS": cluster.address}
            command = [sys.executable, "-c", DRIVE, category]
            done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True)
        finally:
            cluster.end()
    if done.returncode:
        cli.fail(f"the sweep failed:\n{done.stdout}{done.stderr}")
    again = done.stdout.count("will try again: ")
    runs = sum(path.stat().st_size for path in top.glob(f"saves/{category}/*/*/**/*") if path.is_file())
    cli.say(f"{cells} cells on {NODES} nodes of {SLOTS} slots each; their runs have {runs:,} bytes; {again} repeated")
    cli.print_table(("", "bytes", "per node", "per cell"), rows_of(json.loads((top / COUNTS).read_text()), cells))


def kill_in_finetune(cluster: Any, stage: Path) -> None:
    """Kill the first node as soon as it trains a finetune, by what is in its STAGE_DIR."""
    while not any(stage.glob("*/saves/*/*/.*_finetune.staging*")):
        time.sleep(0.05)
    cluster.kill(1)


def rows_of(counts: dict[str, int], cells: int) -> list[tuple[str, ...]]:
    """The rows of the table: the bytes of each kind in all, by node and by cell."""
    return [
        (what, f"{count:,}", f"{count / NODES:,.0f}", f"{count / cells:,.0f}")
        for what, count in sorted(counts.items(), reverse=True)
    ]
