"""What PEFT reads out of a collection's adapter_config.json for one layer: its rank and its scaling."""

import math
import re
from typing import Any

from paragen.collection.checkpoints import PEFT_PREFIX

BEYOND_PLAIN = (  # keys that make an adapter something else than plain LoRA of one rank and one scaling
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "use_qalora", "lora_bias",
    "layer_replication", "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip


def beyond_plain(config: dict[str, Any]) -> dict[str, Any]:
    """The settings by which an adapter is more than plain LoRA; empty for plain LoRA.

    Args:
        config: the content of adapter_config.json.
    """
    return {key: config[key] for key in BEYOND_PLAIN if config.get(key) not in (None, False, "none", {}, [])}


def rank_of(config: dict[str, Any], layer: str) -> int:
    """The rank of a layer's factors: `r`, unless `rank_pattern` gives the layer a rank of its own.

    Args:
        config: the content of adapter_config.json.
        layer: the layer's name, with or without the prefix that PEFT's keys have.
    """
    return _value_for(layer, config.get("rank_pattern"), config["r"])


def scaling_of(config: dict[str, Any], layer: str) -> float:
    """The number that PEFT multiplies a layer's B·A by.

    It is alpha / rank, or alpha / sqrt(rank) with `use_rslora`. alpha is `lora_alpha`, unless `alpha_pattern` gives the
    layer an alpha of its own.

    Args:
        config: the content of adapter_config.json.
        layer: the layer's name, with or without the prefix that PEFT's keys have.
    """
    alpha, rank = _value_for(layer, config.get("alpha_pattern"), config["lora_alpha"]), rank_of(config, layer)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _value_for(layer: str, patterns: dict[str, Any] | None, default: Any) -> Any:
    """The value of the first pattern that matches a layer's name, as PEFT's get_pattern_key matches it."""
    name = layer.removeprefix(PEFT_PREFIX)
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(found, default)
