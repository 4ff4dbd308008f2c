"""Ray nodes on this machine that share no storage, as machines of a sweep with STAGE=1.

A node runs in a mount namespace of its own, where the repository's path shows a folder with its scripts alone.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

# Runs a command that sees another folder at the repository's path.
ELSEWHERE = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"']
TOKEN = {"RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_AUTH_MODE": "token"}  # the environment of all who join


def are_allowed(repository: Path) -> bool:
    """Whether this machine allows mount namespaces."""
    return not subprocess.run([*ELSEWHERE, repository, repository, "true"], capture_output=True).returncode


class Cluster:
    """Ray nodes on loopback: the driver's, without a slot, and others with a copy of the repository's scripts only.

    Args:
        repository: the driver's.
        folder: an empty one, for everything of the nodes.

    The environment holds TOKEN.
    """

    def __init__(self, repository: Path, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.repository, self.folder, self.address = repository, folder, f"127.0.0.1:{port}"
        self.bare = folder / "bare"
        self.bare.mkdir()
        shutil.copytree(repository / "utils", self.bare / "utils")
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}", "--num-cpus=0"]
        self.nodes = [self.start([], head, {})]
        deadline = time.monotonic() + 60
        while not self.answers(port):
            assert time.monotonic() < deadline
            time.sleep(0.2)

    @staticmethod
    def answers(port: int) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", port)) == 0

    def add(self, slots: int = 1) -> Path:
        """One more node; returns its STAGE_DIR."""
        stage = self.folder / f"stage {len(self.nodes)}"
        prefix = [*ELSEWHERE, self.bare, self.repository]
        node = self.start(prefix, [f"--address={self.address}", f"--num-cpus={slots}"], {"STAGE_DIR": str(stage)})
        self.nodes.append(node)
        deadline = time.monotonic() + 60
        while (self.folder / "nodes.log").read_text().count("Ray runtime started") < len(self.nodes):
            assert node.poll() is None and time.monotonic() < deadline, (self.folder / "nodes.log").read_text()
            time.sleep(0.2)
        return stage

    def start(self, prefix: list, arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
        shared = ["--num-gpus=0", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
        command = [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *shared]
        with open(self.folder / "nodes.log", "ab") as log:
            return subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
            )

    def below(self, number: int) -> list[int]:
        """The numbers of the processes of a node, its runs included."""
        return [process.pid for process in psutil.Process(self.nodes[number].pid).children(recursive=True)]

    def kill(self, number: int) -> None:
        """SIGKILL a node's raylet and workers at once; their runs see it and end."""
        node = self.nodes[number]
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()

    def end(self) -> None:
        """Kill all nodes."""
        for number in range(len(self.nodes)):
            self.kill(number)
