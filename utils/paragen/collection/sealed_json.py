"""JSON files that name their format and carry the hash of their content, such as generated.json and benchmark.json.

`manifest.sealed` gives the content its hash. All of these files may come from a stranger.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paragen.collection import manifest_kinds
from paragen.collection.manifest import sealed
from paragen.collection.manifest_kinds import Kind, Section, Unfit
from paragen.common import files, paths
from paragen.common.cli import UserError

LARGEST_FILE = 2**28  # bytes
DEEPEST = 16  # levels of lists and objects


def read(path: Path, format_name: str, kinds: Mapping[str, Kind], way_out: str) -> dict[str, Any] | None:
    """The content of a sealed JSON file; None where there is no file.

    Args:
        path: of the file.
        format_name: what its `format` is.
        kinds: what the values of other keys have to be; each of these keys has to be there.
        way_out: how messages end: what the user can do.

    Raises UserError where the file cannot be read, is no such file, or was edited.
    """
    try:
        data = files.read_up_to(path, LARGEST_FILE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{paths.relative(path)}: cannot be read: {error.strerror}") from None
    try:
        if len(data) > LARGEST_FILE:
            raise Unfit(f"has more than {LARGEST_FILE} bytes")
        content = json.loads(data)
        if not manifest_kinds.is_flat(content, DEEPEST):
            raise Unfit(f"nested more than {DEEPEST} levels deep")
        if not isinstance(content, dict) or content.get("format") != format_name:
            raise Unfit(f"not of format {format_name}")
        if content.get("sha256") != sealed(content)["sha256"]:
            raise Unfit("was edited after it was written")
        for key, kind in kinds.items():
            Section(content).get(key, kind)
    except (ValueError, RecursionError) as error:  # Unfit is a ValueError
        raise UserError(f"{paths.relative(path)}: broken ({error}); {way_out}") from None
    return content
