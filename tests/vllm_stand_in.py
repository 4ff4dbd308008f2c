"""A package `vllm` for machines without a GPU: takes what vLLM 0.33.0 takes, checks it as that does, and answers from
hashes of the adapter's bytes and of the prompt. `python vllm_stand_in.py FOLDER` writes it to FOLDER/vllm.

STAND_IN_FAILS=<n>:<how> has its n-th call of generate fail: `killed`, `refused` (an exception of several lines) or
`engine` (the engine's process fails: the cause is in its output, the exception says nothing). STAND_IN_CALLS names a
file that gets a line per call: the requests' adapters.
"""

import hashlib
import importlib.util
import json
import os
import signal
import struct
import sys
from pathlib import Path

__version__ = "0.33.0"

# Parameters of LLM in vllm/entrypoints/llm.py and, of EngineArgs, those on length and LoRA that its `**kwargs` go to.
LLM_TAKES = (
    "model runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code tensor_parallel_size dtype "
    "quantization revision tokenizer_revision chat_template seed gpu_memory_utilization cpu_offload_gb enforce_eager "
    "disable_custom_all_reduce hf_token hf_overrides mm_processor_kwargs attention_config kv_cache_memory_bytes "
    "compilation_config logits_processors max_model_len enable_lora max_loras max_lora_rank default_mm_loras "
    "fully_sharded_loras max_cpu_loras lora_dtype lora_target_modules enable_tower_connector_lora"
)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class SamplingParams:
    def __init__(
        self, n=1, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0, temperature=1.0,
        watermarking=None, top_p=1.0, top_k=0, min_p=0.0, seed=None, stop=None, stop_token_ids=None, ignore_eos=False,
        max_tokens=16, min_tokens=0, logprobs=None, prompt_logprobs=None, *, detokenize=True, skip_special_tokens=True,
    ):  # fmt: skip
        assert isinstance(max_tokens, int) and max_tokens >= 1
        assert temperature == 0 and n == 1, "not greedy"
        self.stop_token_ids, self.max_tokens, self.ignore_eos = stop_token_ids or [], max_tokens, ignore_eos


class LoRARequest:
    def __init__(
        self, lora_name, lora_int_id, lora_path="", base_model_name=None, load_inplace=False, is_3d_lora_weight=False
    ):
        assert isinstance(lora_name, str) and isinstance(lora_int_id, int)
        if lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {lora_int_id}")
        assert lora_path, "lora_path cannot be empty"
        self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path


class Completion:
    def __init__(self, token_ids):
        self.token_ids = tuple(token_ids)  # a sequence, not always a list


class RequestOutput:
    def __init__(self, token_ids):
        self.outputs = [Completion(token_ids)]


class LLM:
    def __init__(self, model, **settings):
        assert not settings.keys() - set(LLM_TAKES.split()), settings
        assert importlib.util.find_spec("files") is None, "utils/ is in the way of other packages"
        assert Path(model).is_dir(), model
        assert settings.get("dtype", "auto") in ("auto", "half", "float16", "bfloat16", "float", "float32")
        self.lora = settings.get("enable_lora", False)
        self.rank, self.slots = settings.get("max_lora_rank", 16), settings.get("max_loras", 1)
        assert self.rank in RANKS and self.slots >= 1
        self.length, self.names, self.calls = settings["max_model_len"], {}, 0

    def generate(
        self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None,
        tokenization_kwargs=None, mm_processor_kwargs=None,
    ):  # fmt: skip
        loras = lora_request if isinstance(lora_request, list) else [lora_request] * len(prompts)
        if len(loras) != len(prompts):
            raise ValueError(
                f"The lengths of prompts ({len(prompts)}) and lora_request ({len(loras)}) must be the same."
            )
        self.calls += 1
        self.fail_as_told()
        if "STAND_IN_CALLS" in os.environ:
            names = sorted({lora.lora_name if lora else "base" for lora in loras})
            with open(os.environ["STAND_IN_CALLS"], "a") as calls:
                calls.write(" ".join([str(self.slots), str(self.rank), str(len(prompts)), *names]) + "\n")
        return [self.answer(prompt, sampling_params, lora) for prompt, lora in zip(prompts, loras, strict=True)]

    def answer(self, prompt, sampling, lora):
        ids = prompt["prompt_token_ids"]
        assert ids and all(isinstance(token, int) for token in ids) and len(ids) + sampling.max_tokens <= self.length
        mark = self.weights_of(lora) if lora else "no adapter"
        made = answer_of(mark, ids, sampling.max_tokens)
        ends = [place for place, token in enumerate(made) if token in sampling.stop_token_ids]
        return RequestOutput(made[: ends[0] + 1] if ends else made)

    def weights_of(self, lora):
        """The hash of an adapter's file, whose folder is checked as vllm/lora/peft_helper.py and lora_model.py do."""
        if not self.lora:
            raise ValueError(f"Got lora_request {lora} but LoRA is not enabled!")
        assert self.names.setdefault(lora.lora_int_id, lora.lora_name) == lora.lora_name, "an id of two adapters"
        folder = Path(lora.lora_path)
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > self.rank:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {self.rank}.")
        assert config["lora_alpha"] and config["target_modules"]
        data = (folder / "adapter_model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        assert any(key.endswith("lora_A.weight") for key in header)
        return hashlib.sha256(data).hexdigest()

    def fail_as_told(self):
        at, _, how = os.environ.get("STAND_IN_FAILS", "0:").partition(":")
        if self.calls != int(at):
            return
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "engine":
            print("(EngineCore pid=7) ERROR 11-22 [core.py:9] ValueError: Free memory (3 GiB) is small", flush=True)
            raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
        raise ValueError("1 validation error for ModelConfig\n  Value error, max_model_len is too large")


def answer_of(mark, ids, count):
    """The tokens that are generated, before anything stops them: bytes of a hash, so any of 256."""
    return list(hashlib.shake_128(f"{mark} {ids}".encode()).digest(count))


if __name__ == "__main__":
    package = Path(sys.argv[1], "vllm")
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_bytes(Path(__file__).read_bytes())
    (package / "lora" / "__init__.py").touch()
    (package / "lora" / "request.py").write_text("from vllm import LoRARequest  # noqa: F401\n")
