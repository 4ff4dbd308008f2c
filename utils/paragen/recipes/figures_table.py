"""The table collect_scripts/figures.yaml: batch sizes, steps and learning rates from which new recipes are made."""

from typing import Any

import yaml

from paragen.common import paths
from paragen.common.cli import UserError

FIGURES = paths.SCRIPTS / "figures.yaml"


def read_figures() -> dict[str, dict[str, Any]]:
    """The table; the comment at its top explains it. Raises UserError when it is not such a table."""
    try:
        table = yaml.safe_load(FIGURES.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{paths.relative(FIGURES)}: cannot be read: {' '.join(str(error).split())}") from None
    parts = ("models", "categories", "datasets")
    if not isinstance(table, dict) or not all(isinstance(table.get(part), dict) for part in parts):
        raise UserError(f"{paths.relative(FIGURES)}: a mapping with {', '.join(parts)} is expected")
    return table
