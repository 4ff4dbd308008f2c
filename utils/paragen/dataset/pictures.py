"""Checks and hashes the pictures that a dataset's rows show, before a training starts.

LLaMA-Factory itself only warns of a missing picture, and fails in the middle of the training. Readable pictures are
remembered in `.hashes.json` in the media folder, so that each is decoded once.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from paragen.common import devices, files, paths
from paragen.common.cli import UserError, say
from paragen.dataset import dataset_info, row_faults

CACHE = ".hashes.json"
NAMED = 3  # faulty rows that an error names
MANY = 500  # from this many pictures on, a line announces that reading them takes a while


def identity_of(rows: list[dict[str, Any]], entry: dict[str, Any], file: Path, media: Path) -> dict[str, Any] | None:
    """The `count` of pictures that the rows show and a `sha256` over their names and contents; None without pictures.

    Args:
        rows: the rows of `file` that are trained on, from its first.
        entry: the dataset's entry in dataset_info.json.
        file: the data file, for messages.
        media: the folder that the rows' picture paths are relative to: the recipe's media_dir, or data/.

    Raises UserError naming the first faulty rows and how many there are. Faults are a path that leaves `media`, also
    through a link; a picture that is missing or cannot be decoded; another number of pictures than of <image> marks.
    """
    columns = dataset_info.columns_of(entry)
    if "images" not in columns:
        return None
    names = [dataset_info.pictures_of(row, columns["images"]) for row in rows]
    faults = {number: fault for number, row in enumerate(rows, 1) if (fault := row_faults.picture_fault(row, columns))}
    sound = {name for number, shown in enumerate(names, 1) if number not in faults for name in shown}
    read = hashes_of(sound, media)
    for number, shown in enumerate(names, 1):
        wrong = [] if number in faults else [name for name in shown if isinstance(read[name], Fault)]
        if wrong:
            faults[number] = f"the picture {wrong[0]!r:.200} {read[wrong[0]]}"
    if faults:
        first = "; ".join(f"row {number}: {faults[number]}" for number in sorted(faults)[:NAMED])
        total = f"; {len(faults)} of {len(rows)} rows" if len(faults) > NAMED else ""
        way_out = f"the pictures belong below {paths.relative(media)}, or below the recipe's media_dir"
        raise UserError(f"{paths.relative(file)}: {first}{total}; {way_out}")
    return {"count": len(sound), "sha256": files.sha256_of_value(read)}


class Fault(str):
    """What is wrong with a picture, as a phrase that follows its name."""


def hashes_of(names: Iterable[str], media: Path) -> dict[str, str]:
    """The SHA-256 of each picture below `media`, or a Fault. A file that did not change is not read again."""
    top = Path(os.path.realpath(media))
    cache = files.read_cache(top / CACHE)
    found: dict[str, str] = {}
    unread = {}
    for name in sorted(names):
        path = Path(os.path.realpath(top / name.replace("\0", "")))
        if not path.is_relative_to(top):
            found[name] = Fault(f"leads out of {paths.relative(media)}, to {str(path)!r}")
        elif "\0" in name or not os.path.isfile(path):
            found[name] = Fault("is not a file" if os.path.exists(path) else "is not there")
        else:
            stat = path.stat()
            state = list(files.stamp_of(stat))
            known = cache.get(name)
            if isinstance(known, list) and known[:-1] == state:
                found[name] = known[-1]
            else:
                unread[name] = (path, state)
    if unread:
        if len(unread) >= MANY:
            say(f"reading {len(unread)} pictures once; later runs read only those that change")
        _read_into(found, cache, unread)
        _write_cache(top / CACHE, cache)
    return found


def _read_into(found: dict[str, str], cache: dict[str, list], unread: dict[str, tuple[Path, list]]) -> None:
    """Read pictures on all cores (decoding releases the interpreter's lock) and record each hash or Fault."""
    pool = ThreadPoolExecutor(devices.cpu_cores())
    try:
        read = pool.map(hash_of_picture, [path for path, _ in unread.values()])
        for (name, (_, state)), sha256 in zip(unread.items(), read, strict=True):
            found[name] = sha256
            if not isinstance(sha256, Fault):
                cache[name] = [*state, sha256]
    finally:
        pool.shutdown(cancel_futures=True)


def hash_of_picture(path: Path) -> str:
    """The SHA-256 of a picture file, or a Fault when it cannot be decoded to the end, as LLaMA-Factory will do."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            picture.convert("RGB")
    except Exception as error:  # each of the many decoders has exceptions of its own for a broken file
        return Fault(f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}"[:120])
    return hashlib.sha256(data).hexdigest()


def check_not_cut(dataset: Any, collator: Any) -> None:
    """Raise UserError when cutoff_len cut off tokens of a picture in a tokenised row.

    Args:
        dataset: LLaMA-Factory's training set, with `input_ids` and `images`.
        collator: the data loader's collate_fn, which holds template, tokenizer and processor.

    The model could not place the remaining tokens. The error names the number of such rows.
    """
    plugin = collator.template.mm_plugin
    if plugin.image_token is None or "images" not in (dataset.column_names or []):
        return
    lengths = [len(ids) for ids in dataset["input_ids"]]
    longest = max(lengths)
    token = collator.tokenizer.convert_tokens_to_ids(plugin.image_token)
    cut = []
    for index in (index for index, length in enumerate(lengths) if length == longest):  # every row that was cut is
        row = dataset[index]
        shown = row["images"] or []
        messages = [{"role": "user", "content": "<image>" * len(shown)}]
        (whole,) = plugin.process_messages(messages, shown, [], [], collator.processor)
        if row["input_ids"].count(token) != whole["content"].count(plugin.image_token):
            cut.append(index + 1)
    if cut:
        raise UserError(
            f"cutoff_len {longest} cuts pictures short in {len(cut)} rows, first in row {cut[0]}; "
            "raise cutoff_len, or lower image_max_pixels"
        )


def _write_cache(path: Path, cache: dict[str, list]) -> None:
    """Remember the pictures that are still there; a folder that cannot be written to only costs time later."""
    if os.access(path.parent, os.W_OK):
        kept = {name: known for name, known in cache.items() if (path.parent / name).is_file()}
        files.write_atomically(path, json.dumps(kept).encode())
