"""Tokenised rows that the runs of a sweep share: a folder per key (run_identity.tokens_key) in saves/.tokens.

Each folder has a list of its files' hashes, which is checked before every use: with a flipped bit, a run would train on
other tokens than those of its data.
"""

import errno
import json
import secrets
from pathlib import Path

from paragen.common import files, paths
from paragen.common.cli import say

HASHES = "sha256.json"  # in each folder: the hash of every other file, by its path in the folder


def is_whole(cached: Path) -> bool:
    """Whether a folder of the cache can be used: every file in it was just read and has the hash of when it was made.

    A folder that is damaged is removed and named, so that the run makes its rows again; False there, and where there
    is none. Raises OSError where a file cannot be read.
    """
    if not cached.is_dir():
        return False
    try:
        fault = "" if json.loads((cached / HASHES).read_bytes()) == _hashes(cached) else "are damaged"
    except ValueError:
        fault = "are damaged"
    except FileNotFoundError:  # of an earlier version, or another process has just removed a damaged one
        fault = f"have no {HASHES}"
    if fault:
        say(f"{paths.relative(cached)}: these tokenised rows {fault}; they are made again")
        _remove(cached)
    return not fault


def keep(tokens: Path, cached: Path) -> None:
    """Move tokenised rows into the cache as the folder `cached`, with their hashes, unless another run has done so."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(tokens / HASHES, _hashes(tokens))
    files.sync_tree(tokens)
    try:
        tokens.rename(cached)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _hashes(folder: Path) -> dict[str, str]:
    """The hashes of the files in a folder and below, without the list of hashes."""
    return {name: sha256 for name, sha256 in files.hashes_below(folder).items() if name != HASHES}


def _remove(cached: Path) -> None:
    """Delete a folder of the cache. It gets another name first: no run sees a part of it."""
    removed = cached.with_name(f"{paths.REMOVED_TOKENS}{secrets.token_hex(4)}")
    try:
        cached.rename(removed)
    except FileNotFoundError:  # another run was faster
        return
    files.remove_folder(removed)
