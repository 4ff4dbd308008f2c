"""A collection as one small file, lossless to the bit, from which any step is read without reading all.

An archive is a safetensors file of three uint8 tensors:
    blocks   one after another: adapter_config.json, manifest.json and the other small files; the distinct headers of
             the checkpoints; per checkpoint its byte planes (byte_planes.py)
    index    zstd-compressed JSON: where each block lies, how it is stored, its sha256
    seal     the SHA-256 of the file's first HEAD bytes and of `index`
so that a hash covers every byte. A plane is stored as it is (`raw`), compressed (`zstd`), or as the compressed XOR
with the same plane of an earlier step (`xor`); a plane that does not shrink stays raw. Every GROUP-th checkpoint is
stored alone. In between, every STRIDE-th is stored against the one STRIDE steps before, and the others against the step
before, so that reading a plane takes at most 7 blocks. A collection may be split into parts: archives of some of its
steps, each readable alone. bench/archive.py measures it.
"""

import hashlib
import secrets
from pathlib import Path

from paragen.archives.read import FORMAT, load_step, manifest_in, opened, read_all, read_files, sizes_of, steps_of
from paragen.archives.write import SUFFIX, converted, write
from paragen.collection import copies, derived, evaluation, replacing, run_files, run_identity, verification
from paragen.collection.manifest import CheckpointEntry, Manifest, read_manifest, require_manifest
from paragen.common import files, locks, paths
from paragen.common.cli import UserError, say

__all__ = [
    "FORMAT", "SUFFIX", "converted", "load_step", "opened", "manifest_in", "read_all", "read_files",
    "restore", "sizes_of", "steps_of", "verify", "write",
]  # fmt: skip

LONGEST_NAME = 200  # bytes; file systems take 255, and a staging folder's name is longer than its run folder's


def verify(path: Path) -> None:
    """Read all of an archive. Raises UserError naming the first part that is damaged or differs from its manifest."""
    entries = {entry.step: entry for entry in manifest_in(path).checkpoints}
    read_files(path)
    for step, data in read_all(path):
        check_recorded(path, entries, step, data)


def check_recorded(path: Path, entries: dict[int, CheckpointEntry], step: int, data: bytearray) -> None:
    """Raise UserError unless a checkpoint of an archive is the one that the manifest's entries record."""
    entry = entries.get(step)
    if entry is None or entry.bytes != len(data) or entry.sha256 != hashlib.sha256(data).hexdigest():
        raise UserError(f"{paths.relative(path)}: checkpoint {step} is not the one that its manifest records")


def restore(archives: list[Path], saves: Path) -> Path:
    """Restore a collection from its archive, or from all of its parts: the same files with the same bytes.

    Args:
        archives: the archives of one collection, in any order.
        saves: the folder in which `<category>/<dataset>/<run folder>/` is made, as the manifest names them.

    Returns the collection's folder. Where the same collection exists anywhere below `saves` and is whole, it stays
    there, and gets the archive's evaluation.json unless that would lose a score. Raises UserError, with nothing
    changed, when a part is damaged or missing, or when its folder holds something else (FORCE=1 replaces that, and
    scores that the archive's differ from).
    """
    manifest = manifest_in(archives[0])
    for path in archives:
        if manifest_in(path).sha256 != manifest.sha256:
            raise UserError(f"{paths.relative(path)}: is of another collection than {paths.relative(archives[0])}")
    entries = {entry.step: entry for entry in manifest.checkpoints}
    held = [step for path in archives for step in steps_of(path)]
    if missing := sorted(entries.keys() - set(held)):
        raise UserError(
            f"{paths.relative(archives[0])}: lacks {len(missing)} of {len(entries)} checkpoints, such as step "
            f"{missing[0]}; give the folder that holds all parts"
        )
    for path in archives:
        for step, size in sizes_of(path).items():
            if step not in entries or entries[step].bytes != size:
                raise UserError(f"{paths.relative(path)}: checkpoint {step} is not the one that its manifest records")
    small = read_files(archives[0])
    if foreign := sorted(small.keys() - {paths.MANIFEST, *run_files.BESIDE}):
        raise UserError(f"{paths.relative(archives[0])}: holds {foreign[0]!r}, which belongs to no collection")
    if scores := _fullest_scores(archives, manifest):
        small[evaluation.FILE] = scores
    place = saves / place_of(manifest, paths.relative(archives[0]))
    folder = copies.find(saves, [manifest.sha256]).get(manifest.sha256, place)
    folder = folder.resolve() if folder.is_symlink() else folder
    try:
        with locks.lock(files.beside(folder, "lock")):
            files.recover_folder(folder)
            if not _exists_already(folder, manifest, small):
                derived.check_room(saves, sum(entry.bytes for entry in manifest.checkpoints), "or import less")
                _unpack(archives, entries, small, folder)
    except locks.Busy as busy:
        raise UserError(f"{paths.relative(folder)}: is being trained or imported (by what holds {busy})") from None
    return folder


def _fullest_scores(archives: list[Path], manifest: Manifest) -> bytes | None:
    """The evaluation.json with most scores in a collection's archives; parts of different ages may differ in it."""
    found = None
    for path in archives:
        other = read_files(path).get(evaluation.FILE)
        if evaluation.adds_scores(other, found, manifest, f"{paths.relative(path)}: {evaluation.FILE}"):
            found = other
    return found


def place_of(manifest: Manifest, name: str) -> Path:
    """A collection's path below saves/: its category (if it has one), dataset and run folder.

    Raises UserError, calling the manifest `name`, for a pretrain run, and where saves/ keeps something else there.
    """
    for part in (manifest.dataset, manifest.run):
        if len(part.encode()) > LONGEST_NAME or part == paths.INDEX:
            raise UserError(f"{name}: its manifest names the folder {part!r}, which saves/ cannot have")
    if manifest.category is None and manifest.dataset in (*paths.CATEGORIES, *paths.DERIVED):
        raise UserError(f"{name}: its manifest names no category and the dataset {manifest.dataset!r}")
    if manifest.phase != "finetune":
        raise UserError(f"{name}: holds a {manifest.phase} run, not a collection")
    return Path(copies.named_place(manifest))


def _exists_already(folder: Path, manifest: Manifest, small: dict[str, bytes]) -> bool:
    """Whether the collection exists and is whole; then it gets the archive's scores. Raises UserError where something
    else exists, unless FORCE=1."""
    if not folder.exists():
        return False
    try:
        fault = _fault_of(folder, manifest, small)
    except UserError:
        if not run_identity.force_requested():
            raise
        return False
    if fault is None:
        say(f"there already: {paths.relative(folder)}")
        evaluation.import_scores(folder, manifest, small.get(evaluation.FILE))
        return True
    if not run_identity.force_requested():
        raise UserError(f"{paths.relative(folder)}: {fault}; FORCE=1 replaces it by the archive's")
    return False


def _fault_of(folder: Path, manifest: Manifest, small: dict[str, bytes]) -> str | None:
    """Why an existing folder is not the archive's collection, or not whole; None where it is both. Raises UserError for
    a manifest that cannot be read."""
    there = read_manifest(folder)
    if there is None:
        return f"is there already, without a {paths.MANIFEST}"
    if there.sha256 != manifest.sha256:
        dtypes = [f" (in {one.converted.to_dtype})" if one.converted else "" for one in (there, manifest)]
        return f"another collection{dtypes[0]} than the archive's{dtypes[1]} is there already"
    faults = verification.faults_of(folder, manifest)
    beside = [file for file in small if file != evaluation.FILE]
    faults += [f"{file} differs" for file in beside if not _holds(folder / file, small[file])]
    return f"is there already, but {faults[0]}" if faults else None


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _unpack(archives: list[Path], entries: dict[int, CheckpointEntry], small: dict[str, bytes], folder: Path) -> None:
    """Restore a collection into a staging folder, verify it there, and rename the folder."""
    staging = files.beside(folder, f"staging-{secrets.token_hex(4)}")
    staging.mkdir()
    try:
        for path in archives:
            for step, data in read_all(path):
                check_recorded(path, entries, step, data)
                files.write_atomically(staging / run_files.checkpoint_name(step), memoryview(data))
        for name in (*run_files.BESIDE, paths.MANIFEST):
            if name in small:
                files.write_atomically(staging / name, small[name])
        if faults := verification.faults_of(staging, require_manifest(staging)):
            raise UserError(f"{paths.relative(archives[0])}: what it holds is no whole collection: {faults[0]}")
        replacing.publish(staging, folder)
    finally:
        files.remove_folder(staging)
    say(f"imported: {paths.relative(folder)}, {len(entries)} checkpoints")
