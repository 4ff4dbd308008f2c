"""Export collections in the formats of other tools.

    FORMAT=dnd|peft|canonical|loragen|text-to-lora|table|w2t|archive [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK=..] \\
        [SEED=..] [OUT=..] [DTYPE=..] [STEPS=..] [PARTS=..] [VAL=..] [SLICE=1] [COPY=1] [DRY_RUN=1] \\
        python utils/export.py                                                                        (make export)

Each selection is optional; none means all collections. OUT defaults to saves/exports/<format>. Collections are verified
before anything is written; a broken one is named and left out, and the status is 1. A part that was made from the same
collection before is not made again, unless FORCE=1; OUT/export.json records what each part was made from. DRY_RUN=1
lists what would be written. Which format takes STEPS, PARTS, VAL, SLICE and COPY: saves/README.md.
"""

import importlib
import os

from paragen.collection import index
from paragen.common import cli, paths, settings
from paragen.common.cli import UserError
from paragen.exports import parts, verified

# The formats that take a setting, of those settings that not all formats take.
TAKEN_BY = {
    "STEPS": ("peft", "loragen", "text-to-lora", "table", "w2t"),
    "PARTS": ("canonical",),
    "VAL": ("loragen", "text-to-lora"),
    "SLICE": ("loragen",),
    "COPY": ("table",),
}


def main() -> int:
    format_name, dtype = (settings.text(name) for name in ("FORMAT", "DTYPE"))
    if not format_name:
        raise UserError(
            f"name a format: make export FORMAT=...; known: {', '.join(settings.SETTINGS['FORMAT'].choices)}"
        )
    for name, formats in TAKEN_BY.items():
        value = os.environ.get(name, "").strip()
        if value and format_name not in formats:
            known = " and ".join(f"FORMAT={known}" for known in formats)
            raise UserError(f"{name}={value}: {known} alone {'take' if len(formats) > 1 else 'takes'} it; omit it")
    out = parts.out_folder(settings.text("OUT") or str(paths.SAVES / "exports" / format_name))
    chosen, broken = index.chosen()
    whole = verified.whole_of(chosen, out)
    # a format is a module of paragen.exports, imported when it is requested
    importlib.import_module(f"paragen.exports.{format_name.replace('-', '_')}").export(whole, out, dtype or None)
    return 1 if broken or len(whole) < len(chosen) else 0


if __name__ == "__main__":
    cli.run(main)
