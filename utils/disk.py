"""Print what collections, models and all that is made from them take on the disk, and what of it can go.

    [JSON=1] python utils/disk.py        (make disk)

Reads names and sizes of saves/, models/, data/ and .venv/; writes nothing. JSON=1 prints the same for programs. What
`make clean-up` would free is a column of its own; it never deletes what the table calls by another name.
"""

import shutil

from paragen.collection import clean_up, disk_usage
from paragen.collection.disk_usage import size_text
from paragen.common import cli, paths, settings
from paragen.common.cli import say


def main() -> None:
    found = clean_up.find()
    usage = disk_usage.measure(found)
    free = shutil.disk_usage(paths.ROOT).free
    if settings.switch("JSON"):
        print_json(usage, found, free)
        return
    total = sum(use.bytes for use in usage.kinds.values())
    rows = [
        (kind, size_text(use.bytes), str(use.files), size_text(use.clean_up) if use.clean_up else "", made_again)
        for kind, made_again in disk_usage.KINDS.items()
        if (use := usage.kinds.get(kind))
    ]
    freed = sum(use.clean_up for use in usage.kinds.values())
    rows.append(("total", size_text(total), str(sum(use.files for use in usage.kinds.values())), size_text(freed), ""))
    cli.print_table(("what", "size", "files", "clean-up", "made again by"), rows)
    say(f"free on this disk: {size_text(free)}")
    if usage.links:
        say(f"not counted: what {len(usage.links)} links lead to, such as {paths.relative(usage.links[0])}")
    if found.left_overs:
        count = len(found.left_overs)
        say(f"make clean-up deletes {count} files and folders, {size_text(freed)}; DRY_RUN=1 lists them")


def print_json(usage: disk_usage.Usage, found: clean_up.Found, free: int) -> None:
    """Print the same as one JSON object; sizes are bytes, paths are relative to the repository."""
    kinds = {
        kind: {**use._asdict(), "made_again_by": disk_usage.KINDS[kind]} for kind, use in usage.kinds.items()
    }  # fmt: skip
    left_overs = [{"path": paths.relative(one.path), "bytes": one.bytes, "why": one.why} for one in found.left_overs]
    content = {
        "kinds": kinds,
        "total_bytes": sum(use.bytes for use in usage.kinds.values()),
        "free_bytes": free,
        "clean_up": left_overs,
        "in_use": [paths.relative(path) for path in found.in_use],
        "links_not_counted": [paths.relative(path) for path in usage.links],
    }
    cli.print_json(content)


if __name__ == "__main__":
    cli.run(main)
