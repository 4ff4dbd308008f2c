"""A `python` whose scripts run in processes forked from one that has imported LLaMA-Factory, also below make or bash.

`PYTHON` is a command that takes a script, `-m module` or `-c code`, as Python does. The process that forks runs this in
a child with the caller's arguments, environment, folder and stdin, stdout, stderr. The command passes signals on to the
child and ends as it does; when the command is killed, so is the child. Called with anything else, or in an environment
that differs in what libraries read when they are imported, it becomes an ordinary Python.
"""

import array
import atexit
import contextlib
import marshal
import os
import runpy
import select
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

from helpers import fork_server

# What libraries read when they are imported: where one differs, the process that imported them cannot stand in.
READ_EARLY = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONHASHSEED", "TRITON_INTERPRET")
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
# Started without site-packages, in some 10 ms.
CLIENT = """import array, marshal, os, resource, sys
import _signal as signal, _socket as socket  # what wraps them takes 10 ms to import
arguments = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]  # forked, it writes lines at once anyway
early = {{name: os.environ.get(name) or None for name in {names!r}}}
hub = socket.socket(socket.AF_UNIX)
try:
    if not arguments or (arguments[0][0] == "-" and arguments[0] not in ("-c", "-m")) or early != {early!r}:
        raise OSError
    if "/ray/" in arguments[0] or resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
        raise OSError  # Ray's workers have to be children of its own; limits are not passed on
    hub.connect({address!r})
except OSError:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
received = []


def pass_on(number):  # Ctrl-C goes to what the child has started, too, as a terminal sends it
    (os.killpg if number == signal.SIGINT else os.kill)(child, number)


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: received.append(number) or started and pass_on(number))
started = False
ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
request = marshal.dumps([arguments, dict(os.environ), os.getcwd(), ignored])
files = []
for number in (0, 1, 2):
    try:
        os.fstat(number)
        files.append(number)
    except OSError:
        break
hub.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
hub.sendall(request)
child = int.from_bytes(hub.recv(4), "big")
if not child:  # the process that forks is gone; 0 would stand for this one's whole group
    os._exit(255)
started = True
for number in received:
    pass_on(number)
for number in files:
    os.close(number)
status = int.from_bytes(hub.recv(4) or b"\\0\\0\\0\\xff", "big", signed=True)
if status < 0:
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def make() -> str:
    """The command to call as Python. The process that forks is started by the first call."""
    folder = Path(tempfile.mkdtemp(prefix="python-"))
    atexit.register(remove, folder, os.getpid())
    address, command = str(folder / "socket"), folder / "python"
    early = {name: os.environ.get(name) or None for name in READ_EARLY}
    client = folder / "client.py"
    client.write_text(CLIENT.format(python=sys.executable, names=READ_EARLY, early=early, address=address))
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SE "{client}" "$@"\n')
    command.chmod(0o755)
    plain = folder / "plain"
    plain.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    plain.chmod(0o755)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    threading.Thread(target=start_when_called, args=(listening, str(command)), daemon=True).start()
    return str(command)


def start_when_called(listening: socket.socket, command: str) -> None:
    """Wait for the first call, and have the process that forks take it."""
    select.select([listening], [], [])
    fork_server.ready()
    fork_server.context.Process(target=serve, args=(listening, command), daemon=True).start()
    listening.close()


def remove(folder: Path, maker: int) -> None:
    """At the end of the process that made it, not of one forked from it."""
    if os.getpid() == maker:
        shutil.rmtree(folder, ignore_errors=True)


def serve(listening: socket.socket, command: str) -> None:
    """Fork for each call until the process that started this ends."""
    from paragen.common import cli

    cli.end_with_parent()
    for name in [name for name in sys.modules if name.split(".")[0] in ("paragen", "conftest")]:
        del sys.modules[name]  # the scripts have their own
    path = [entry for entry in sys.path if entry.startswith((sys.prefix, sys.base_prefix))]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    waiting = selectors.DefaultSelector()
    for source in (listening, woken):
        waiting.register(source, selectors.EVENT_READ)
    calls: dict[int, socket.socket] = {}  # by the child's number
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listening:
                call, _ = listening.accept()
                request, files = received(call)
                if request is None:
                    call.close()
                    continue
                if (child := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    waiting.close()
                    for other in (listening, call, *calls.values()):
                        other.close()
                    run(request, files, path, command)
                os.setpgid(child, child)  # here, too, before its client hears of it
                for file in files:
                    os.close(file)
                calls[child] = call
                waiting.register(call, selectors.EVENT_READ)
                answer(call, child)
            elif key.fileobj == woken:
                os.read(woken, 4096)
                for child in [child for child in calls if os.waitid(os.P_PID, child, ENDED)]:
                    call = calls.pop(child)
                    if call in {key.fileobj for key in waiting.get_map().values()}:
                        waiting.unregister(call)
                    answer(call, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
                    call.close()
            elif gone := [child for child, call in calls.items() if call is key.fileobj]:  # its client was killed
                waiting.unregister(key.fileobj)
                os.kill(gone[0], signal.SIGKILL)


def answer(call: socket.socket, number: int) -> None:
    """Send a client a number, unless it is gone."""
    with contextlib.suppress(OSError):
        call.sendall(number.to_bytes(4, "big", signed=True))


def received(call: socket.socket) -> tuple[list | None, list[int]]:
    """What a client sent: [arguments, environment, folder, whether SIGINT is ignored], or None, and its files."""
    size, ancillary, _, _ = call.recvmsg(4, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    files = array.array("i")
    for _, _, data in ancillary:
        files.frombytes(data)
    request = b""
    while len(request) < int.from_bytes(size, "big") and (part := call.recv(1 << 20)):
        request += part
    return (marshal.loads(request) if request else None), list(files)


def run(request: list, files: list[int], path: list[str], command: str) -> None:
    """Be the Python that was called; does not return."""
    arguments, environment, folder, ignores_interrupt = request
    status = 1
    try:
        for number, file in enumerate(files):
            os.dup2(file, number)
        for file in files:
            os.close(file)
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignores_interrupt else signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None  # found anew, as TMPDIR may be another
        sys.executable = command
        own = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
        sys.path[:] = [str(Path(arguments[0]).resolve().parent) if arguments[0][0] != "-" else "", *own, *path]
        if any(name.startswith("HF_") for name in environment):
            for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
                del sys.modules[name]  # so that it reads them when it is imported again
        if "ray._raylet" in sys.modules:
            sys.modules["ray._raylet"].Config.initialize("")  # Ray reads its settings from the environment again
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        status = status_of(*arguments)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(status)


def status_of(first: str, *rest: str) -> int:
    """Run a script, module or code as __main__; the status with which Python would end."""
    try:
        if first == "-c":
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), vars(main))
        elif first == "-m":
            sys.argv = list(rest)
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        return end.code & 0xFF if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


# Made once: what is started from here, the process that forks for helpers.fork_server among it, finds it in MADE.
MADE = "FORKED_PYTHON"
PYTHON = os.environ[MADE] = os.environ.get(MADE) or make()
PLAIN = str(Path(PYTHON).with_name("plain"))  # an ordinary Python at a path without blanks, which PY needs
