"""FORMAT=archive of make export: one lossless file per collection, OUT/<category>/<dataset>/<run folder>.archive.

Called by export.py. `make import FILE=x.archive` brings a collection back, bit for bit. With DTYPE the checkpoints are
cast first: the archive's manifest is then another one, whose key `converted` says so, and scores do not go along.
"""

from pathlib import Path

from paragen.archives import archive
from paragen.collection import evaluation, exported, index
from paragen.collection.manifest import Manifest


def export(chosen: list[index.Chosen], out: Path, dtype: str | None) -> None:
    """Write an archive of each collection below `out`, cast to `dtype` where one is given."""
    for name, folder, manifest in chosen:
        source = {"format": f"archive {archive.FORMAT}", "manifest": manifest.sha256, "dtype": dtype}
        source |= evaluation.mark_of(folder)

        def make(path: Path, folder: Path = folder, manifest: Manifest = manifest) -> None:
            archive.write(folder, archive.converted(folder, manifest, dtype) if dtype else manifest, path)

        exported.part(out, f"{name}{archive.SUFFIX}", source, make)
