"""Which engine trains a run: the packed one, or the ordinary path through LLaMA-Factory's own loop.

A recipe that says anything the packed engine does not know for
sure is left to the ordinary path: it is never trained differently.
"""

import os

from paragen.common.cli import UserError, say
from paragen.model import base_models
from paragen.recipes import keys
from paragen.recipes.run import Run

ENGINES = ("stock", "packed")


def requested_engine() -> str | None:
    """The engine that ENGINE forces, or None. Raises UserError for one that is not known."""
    name = os.environ.get("ENGINE") or None
    if name not in (None, *ENGINES):
        raise UserError(f"ENGINE={name}: is not known; {' or '.join(ENGINES)}")
    return name


def why_not_packed(run: Run, devices: list[str]) -> str | None:
    """Why the packed engine cannot train a run on some devices, or None where it can.

    What only the model itself tells (its layers, its attention, dropout) is seen when it is loaded.
    """
    for key, value in run.config.items():
        if key in keys.PACKED:
            continue
        allowed = keys.PACKED_AT.get(key)
        if allowed is None or not any(value is one or (value == one and type(value) is type(one)) for one in allowed):
            return f"{key} is {value!r}" if allowed else f"{key} is not known to it"
    if len(devices) > 1:
        return "it trains on one device"
    if base_models.has_processor(run.base):
        return "the model has a processor, with which the loss is another mean"
    if run.config.get("report_to") not in (None, "none", []):
        return f"report_to is {run.config['report_to']!r}"
    return None


def announce_fallback(run: Run, why: str) -> None:
    """One line that tells why the ordinary path runs; with ENGINE=packed that is an error."""
    text = f"{run}: not for the packed engine: {why}"
    if requested_engine() == "packed":
        raise UserError(f"{text}; leave ENGINE away to train it the ordinary way")
    say(f"{text}; it is trained the ordinary way")
