"""How scripts end when they are stopped, also where a library hides the cause."""

import errno
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from paragen.common import cli

SCRIPT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from paragen.common import cli

def main():
    try:
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(20)
    except BaseException as error:
        if sys.argv[3] == "itself":
            raise
        raise {"another": ValueError("of a library"), "an end": SystemExit(3)}[sys.argv[3]] from error

cli.run(main)
"""


@pytest.mark.parametrize("made", ["itself", "another", "an end"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_decides_the_status_whatever_a_library_makes_of_it(number, status, made):
    command = [sys.executable, "-c", SCRIPT, ROOT / "utils", str(int(number)), made]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, "Traceback" in ended.stderr) == (status, False), ended.stderr


@pytest.mark.parametrize(("end", "status"), [
    ("return 0", 0), ("raise cli.UserError('wrong')", 1), ("os.kill(os.getpid(), 15); time.sleep(20)", 143),
])  # fmt: skip
def test_what_is_done_at_the_end_is_done_however_a_command_ends(end, status):
    script = f"""
import os, sys, time
sys.path.insert(0, sys.argv[1])
from paragen.common import cli

def main():
    {end}

def fail():
    raise OSError("not told")

cli.AT_END.extend([fail, lambda: print("done")])
cli.run(main)
"""
    ended = subprocess.run([sys.executable, "-c", script, ROOT / "utils"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, "not told" in ended.stderr) == (status, "done\n", False), ended.stderr


def test_a_second_signal_waits_for_what_the_first_one_began():
    script = """
import os, sys, threading, time
sys.path.insert(0, sys.argv[1])
from paragen.common import cli

def main():
    try:
        os.kill(os.getpid(), 15)
        time.sleep(20)
    finally:
        with cli.unstoppable():
            os.kill(os.getpid(), 15)
            time.sleep(0.01)
            print("removed")

threading.Thread(target=time.sleep, args=(30,), daemon=True).start()  # may get the signal
cli.run(main)
"""
    ended = subprocess.run([sys.executable, "-c", script, ROOT / "utils"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (143, "removed\n"), ended.stderr


def test_ctrl_c_that_the_shell_ignores_stays_ignored():
    """So do shells for what they start in the background."""
    script = SCRIPT.replace("time.sleep(20)", "print('went on')")
    ignored = f'trap \'\' INT; exec "{sys.executable}" -c "$0" "$@"'
    command = ["bash", "-c", ignored, script, ROOT / "utils", str(int(signal.SIGINT)), "itself"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "went on\n"), ended.stderr


def test_a_signal_whose_exception_is_lost_still_ends_a_long_loop():
    """As one that arrives in a finalizer; training loops check between two steps."""
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
from paragen.common import cli

def main():
    try:
        os.kill(os.getpid(), 15)
    except SystemExit:
        pass  # lost
    for _ in range(3):
        print("a step")
        cli.check_stopped()

cli.run(main)
"""
    ended = subprocess.run([sys.executable, "-c", script, ROOT / "utils"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (143, "a step\n"), ended.stderr


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: full (os error 28)")]
)
def test_a_full_disk_is_named_by_what_was_written_there(error, tmp_path):
    """Neither writing to an open file nor a library written in Rust says which file it was."""
    assert cli.storage_fault(error).startswith("writing: No space left")
    with pytest.raises(type(error)) as raised, cli.writing_to(tmp_path / "outer"), cli.writing_to(tmp_path / "x.json"):
        raise error
    assert cli.storage_fault(raised.value).startswith(f"{tmp_path / 'x.json'}: No space left")


def test_a_file_that_cannot_be_written_whole_is_named(tmp_path):
    code = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom paragen.common import cli, files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "cli.run(lambda: files.write_atomically(Path(sys.argv[2]), bytes(100)))"
    )
    command = [sys.executable, "-c", code, ROOT / "utils", tmp_path / "index.parquet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path / 'index.parquet'}: File too large")
    assert list(tmp_path.iterdir()) == []
