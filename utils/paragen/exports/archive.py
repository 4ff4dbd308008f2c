"""FORMAT=archive of make export: one lossless file per collection, OUT/<category>/<dataset>/<run folder>.archive.

`make import FILE=x.archive` restores a collection bit for bit. With DTYPE the checkpoints are cast first: the archive
then has another manifest, whose key `converted` names both dtypes, and no scores.
"""

from pathlib import Path

from paragen.archives import archive
from paragen.collection import evaluation, index
from paragen.collection.manifest import Manifest
from paragen.exports import parts


def export(chosen: list[index.Chosen], out: Path, dtype: str | None) -> None:
    """Write an archive of each collection below `out`, cast to `dtype` where one is given."""
    for name, folder, manifest in chosen:
        source = {"format": f"archive {archive.FORMAT}", "manifest": manifest.sha256, "dtype": dtype}
        source |= evaluation.scores_mark(folder)

        def make(path: Path, folder: Path = folder, manifest: Manifest = manifest) -> None:
            archive.write(folder, archive.converted(folder, manifest, dtype) if dtype else manifest, path)

        parts.make(out, f"{name}{archive.SUFFIX}", source, make)
