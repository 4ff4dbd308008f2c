"""The same optimizer steps in other micro-batches: rows spread over several devices, or fewer rows at a time.

A step's loss is the mean over the same rows as before. A model with a processor (one that reads pictures) averages its
loss over micro-batches, so other micro-batches would be another objective: for such models only the accumulation may
be divided.
"""

from typing import Any

from paragen.common.cli import UserError, say
from paragen.recipes import keys


def share_batch(config: dict[str, Any], count: int, halved: bool, has_processor: bool) -> dict[str, int]:
    """Recipe keys that keep the effective batch on several devices, or with less memory.

    Args:
        config: the rendered recipe.
        count: the number of devices; 0 where torch chooses the one that it finds.
        halved: whether each device takes half the rows at a time, because memory was too small before.
        has_processor: whether the model reads more than text.

    Raises UserError when the devices cannot share the batch.
    """
    shared = split_batch(config, count, has_processor) if count > 1 else {}
    return shared | (halve_batch(config | shared, has_processor) if halved else {})


def split_batch(config: dict[str, Any], count: int, has_processor: bool) -> dict[str, int]:
    """Recipe keys that keep the effective batch when it is spread over `count` devices.

    The accumulation is divided where it can be, otherwise the rows per device. Raises UserError when neither can be.
    """
    rows, accumulated = rows_and_accumulation(config)
    if accumulated % count == 0:
        return {"gradient_accumulation_steps": accumulated // count}
    if rows % count == 0 and not has_processor:
        return {"per_device_train_batch_size": rows // count}
    shared = f"{accumulated}" if has_processor else f"{accumulated} or {rows}"
    raise UserError(
        f"{count} devices cannot share a batch of {rows} rows x {accumulated} accumulated; "
        f"use a number of devices that divides {shared}"
    )


def halve_batch(config: dict[str, Any], has_processor: bool) -> dict[str, int]:
    """Recipe keys for half the rows at a time and twice the accumulation: the same objective with less memory.

    Empty for a model with a processor, and for an odd number of rows.
    """
    rows, accumulated = rows_and_accumulation(config)
    if has_processor or rows % 2:
        return {}
    say(f"out of memory before: {rows // 2} rows x {2 * accumulated} accumulated instead of {rows} x {accumulated}")
    return {"per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2 * accumulated}


def rows_and_accumulation(config: dict[str, Any]) -> tuple[int, int]:
    """(rows in a micro-batch on each device, micro-batches in an optimizer step) of a recipe."""
    rows = keys.value_of(config, "per_device_train_batch_size", keys.OMITTED_BATCH_SIZE)
    return rows, keys.value_of(config, "gradient_accumulation_steps", keys.OMITTED_ACCUMULATION)
