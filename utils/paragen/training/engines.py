"""Which engine trains a run: the packed one, or the ordinary path through LLaMA-Factory's own loop.

A recipe with any setting that the packed engine does not support exactly is trained the ordinary way.
"""

from paragen.common import settings
from paragen.common.cli import UserError, say
from paragen.model import base_models
from paragen.recipes import keys
from paragen.recipes.run import Run


def requested_engine() -> str | None:
    """The engine that ENGINE requests, `packed` or `stock`, or None. Raises UserError for an unknown one."""
    return settings.text("ENGINE") or None


def why_not_packed(run: Run, devices: list[str]) -> str | None:
    """Why the packed engine cannot train a run on some devices, or None where it can.

    Properties of the model itself (its layers, its attention, its own dropout) are checked later, when it is loaded.
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


def announce_fallback(run: Run, reason: str) -> None:
    """Print why a run is trained the ordinary way. Raises UserError where ENGINE=packed forbids that."""
    text = f"{run}: not for the packed engine: {reason}"
    if requested_engine() == "packed":
        raise UserError(f"{text}; omit ENGINE to train it the ordinary way")
    say(f"{text}; it is trained the ordinary way")
