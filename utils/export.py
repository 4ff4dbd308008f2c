"""Bring collections into the form that another tool takes.

    FORMAT=dnd|peft|canonical|archive [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] [SEED=..] [OUT=..] [DTYPE=..] \\
        python utils/export.py                                                                       (make export)

Each selection is optional; none means all collections. OUT defaults to saves/exports/<format>. What is there already,
made from the same collection, is not made again (FORCE=1 does); OUT/export.json says what was made from what.
"""

import importlib
import os
from pathlib import Path

import cli
import index
import paths
from cli import UserError

FORMATS = {"dnd": "export_dnd", "peft": "export_peft", "canonical": "export_canonical", "archive": "export_archive"}
DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    asked = os.environ.get("FORMAT", "")
    if not asked:
        raise UserError(f"say which format: make export FORMAT=...; known: {', '.join(FORMATS)}")
    format_name = paths.choose(asked, FORMATS, "format")
    dtype = os.environ.get("DTYPE") or None
    if dtype is not None:
        dtype = paths.choose(dtype, DTYPES, "dtype")
    out = Path(os.environ.get("OUT") or paths.SAVES / "exports" / format_name)
    importlib.import_module(FORMATS[format_name]).export(index.chosen(), out, dtype)


if __name__ == "__main__":
    cli.run(main)
