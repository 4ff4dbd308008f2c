"""Errors of a base model's files: what transformers and LLaMA-Factory raise for them becomes one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from paragen.common import cli, paths
from paragen.common.cli import UserError


@contextlib.contextmanager
def as_user_error(folder: Path, way_out: str) -> Iterator[None]:
    """While the body loads a model, a tokenizer or their settings, turn any error into a UserError naming `folder`.

    Libraries raise whatever a damaged file leads them to. Errors of the disk and of too little memory stay as they are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if cli.storage_fault(error) is not None or cli.is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{paths.relative(folder)}: cannot be loaded ({type(error).__name__}: {text}); {way_out}"
        ) from error
