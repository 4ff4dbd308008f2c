"""Models with random weights in the shapes of real ones, and the arithmetic that training a LoRA adapter on them needs.

Imported by the benchmarks.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# As Qwen2Config takes them. "tiny" is for rehearsals; "smollm2-135m" has SmolLM2's sizes under Qwen2's names.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip


class Work(NamedTuple):
    """What an adapter saw, over any number of steps, padding left out."""

    tokens: int
    squares: int  # the sum of the rows' squared lengths
    learned: int  # tokens with a loss

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Seen(NamedTuple):
    """What one forward pass over rows has to compute, padding left out."""

    tokens: int
    keys: int  # the sum, over the tokens, of how many tokens each attends to
    picks: int  # places where the output layer is needed


# FLOPS without sparsity in bfloat16, by a part of the name that torch gives a device; the first that fits.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak_of(device: str) -> float | None:
    """The peak of a device; None where it is not known, as for a CPU."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def forward_flops(shape: str, seen: Seen) -> int:
    """Floating-point operations that scoring needs: 2 x (weights of the blocks' linear layers) per token, attention
    (4 x hidden size per layer, token and key) and the output layer (2 x hidden size x vocabulary) where it is needed.
    LoRA's own products, norms and whatever generation adds are not counted."""
    one = SHAPES[shape]
    attention = 4 * one["num_hidden_layers"] * one["hidden_size"] * seen.keys
    return (
        2 * base_parameters(shape) * seen.tokens + attention + 2 * one["hidden_size"] * one["vocab_size"] * seen.picks
    )


def layer_sizes(shape: str) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of one block: q, k, v, o, gate, up, down."""
    one = SHAPES[shape]
    hidden, inner = one["hidden_size"], one["intermediate_size"]
    small = hidden // one["num_attention_heads"] * one["num_key_value_heads"]
    return [(hidden, hidden), (hidden, small), (hidden, small), (hidden, hidden),
            (hidden, inner), (hidden, inner), (inner, hidden)]  # fmt: skip


def base_parameters(shape: str) -> int:
    """Weights of all blocks' linear layers: the parameters without embeddings, head, norms and biases."""
    return SHAPES[shape]["num_hidden_layers"] * sum(rows * columns for rows, columns in layer_sizes(shape))


def adapter_parameters(shape: str, rank: int) -> int:
    """Parameters of a LoRA adapter on all linear layers."""
    return SHAPES[shape]["num_hidden_layers"] * rank * sum(rows + columns for rows, columns in layer_sizes(shape))


def flops(shape: str, rank: int, work: Work) -> int:
    """Floating-point operations that training one adapter cannot do without.

    Per token 4 x the base's parameters (forward, and backward by the input: the base is frozen) and 6 x the adapter's
    own; attention with itself and the tokens before, forward and backward; the head at learned tokens alone.
    """
    one = SHAPES[shape]
    per_token = 4 * base_parameters(shape) + 6 * adapter_parameters(shape, rank)
    attention = 6 * one["num_hidden_layers"] * one["hidden_size"] * work.squares
    head = 4 * one["hidden_size"] * one["vocab_size"] * work.learned
    return per_token * work.tokens + attention + head


def tokenizer_source() -> Path:
    """A folder with a tokenizer for a random model: TOKENIZER, or the embedded model's."""
    return Path(os.environ.get("TOKENIZER", ROOT / "models" / "SmolLM2-135M-Instruct-Q4_1"))


def random_model(shape: str, device: str, dtype: str) -> Any:
    """A causal language model of a shape with random weights, made on a device."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[shape]), dtype=getattr(torch, dtype))


def write_random(shape: str, folder: str, tokenizer: str) -> None:
    """Write random weights of a shape (bfloat16; float32 where there is no GPU) and a tokenizer to `folder`."""
    import torch
    from transformers import AutoTokenizer

    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    random_model(shape, device, dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
