"""Greedy generation with vLLM, for a base model and any number of LoRA adapters of it, all in one engine.

    <python> utils/vllm_generate.py JOB.json

Run by generation_vllm.py in a process of its own, with whatever Python has vLLM: it pins other versions of torch and
transformers than this repository. So nothing but the standard library and vLLM is imported here. JOB.json holds
    model            the base model's folder
    dtype            bfloat16 or float16 (vLLM has no LoRA in float32)
    max_new_tokens   at most so many tokens per prompt
    stop_token_ids   a token of these ends an answer; no other does
    max_lora_rank    the largest rank, as vLLM takes it: 1, 8, 16, 32, 64, 128, 256, 320 or 512
    prompts          a list of token ids per prompt, at least one
    adapters         {"name": "36", "folder": a PEFT folder} each; {"name": "base", "folder": null} is the bare model
    out              where results go, JSON lines: {"name": .., "tokens": [[..], ..]}, in the order of `prompts`
A line is written as soon as its adapter is done, tokens without the one that ended the answer. Adapters that `out` has
already are skipped, so that a killed run goes on where it stopped.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

# So many answers at once keep a large GPU busy; a small test split is generated for several adapters together.
REQUESTS = 2048
# Adapters that lie on the GPU at once: 8 of rank 64, fewer of larger ranks (they take the same memory).
MOST_ADAPTERS, RANKS_TOGETHER = 8, 512


def main(path: Path) -> None:
    """Generate what a job asks for and is not there yet.

    Raises ValueError when `out` is of another job; what vLLM raises otherwise.
    """
    job = json.loads(path.read_text(encoding="utf-8"))
    out, prompts = Path(job["out"]), job["prompts"]
    done = finished(out, len(prompts))
    numbered = [(number, one) for number, one in enumerate(job["adapters"], start=1) if one["name"] not in done]
    if not numbered:
        return
    size = adapters_together(len(prompts), job["max_lora_rank"], len(numbered))
    llm = engine(job, size)
    for start in range(0, len(numbered), size):
        group = numbered[start : start + size]
        answers = generated(llm, job, group)
        for place, (_, one) in enumerate(group):
            append(out, {"name": one["name"], "tokens": answers[place * len(prompts) :][: len(prompts)]})


def finished(out: Path, prompts: int) -> set[str]:
    """The adapters whose results are in `out`; a last line that a killed run left unfinished is cut off.

    Raises ValueError for results of another number of prompts.
    """
    data = out.read_bytes() if out.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(out, len(whole))
    results = [json.loads(line) for line in whole.splitlines()]
    for result in results:
        if (found := len(result["tokens"])) != prompts:
            raise ValueError(f"{out}: has {found} answers of {result['name']}, not {prompts}; remove it")
    return {result["name"] for result in results}


def adapters_together(prompts: int, rank: int, adapters: int) -> int:
    """How many adapters to generate for in one go."""
    fitting = max(1, min(MOST_ADAPTERS, RANKS_TOGETHER // rank))
    return min(adapters, fitting, max(1, REQUESTS // prompts))


def engine(job: dict[str, Any], adapters: int) -> Any:
    """A vLLM engine for a job, with room for so many adapters at once."""
    from vllm import LLM

    lora = {"enable_lora": True, "max_loras": adapters, "max_lora_rank": job["max_lora_rank"]}
    return LLM(
        model=job["model"],
        dtype=job["dtype"],
        # no longer than needed: a model's own limit may take more memory for one row than there is
        max_model_len=max(map(len, job["prompts"])) + job["max_new_tokens"],
        **(lora if any(one["folder"] for one in job["adapters"]) else {}),
    )


def generated(llm: Any, job: dict[str, Any], group: list[tuple[int, dict[str, Any]]]) -> list[list[int]]:
    """The answers' tokens for some adapters, each with its number in the job: the first one's in the order of the
    prompts, then the second one's, and so on."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompts, stops = job["prompts"], job["stop_token_ids"]
    # ignore_eos: what the model's own settings call an end must not come on top of the job's
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_new_tokens"], stop_token_ids=stops, ignore_eos=True, detokenize=False
    )
    loras = [LoRARequest(one["name"], number, one["folder"]) if one["folder"] else None for number, one in group]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for _ in group for prompt in prompts],
        sampling,
        lora_request=[lora for lora in loras for _ in prompts],
        use_tqdm=False,
    )
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return [answer[:-1] if answer and answer[-1] in stops else answer for answer in answers]


def append(out: Path, result: dict[str, Any]) -> None:
    """Add a line to `out`, on disk when this returns."""
    with open(out, "ab") as file:
        file.write((json.dumps(result) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def without_own_folder(search: list[str]) -> list[str]:
    """Python's search path without this script's folder: its modules (`files`, `index`, ..) are not those that the
    packages of another environment may mean by such names."""
    own = Path(__file__).resolve().parent
    return [entry for entry in search if Path(entry).resolve() != own]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: <python> utils/vllm_generate.py JOB.json")
    sys.path[:] = without_own_folder(sys.path)
    try:
        main(Path(sys.argv[1]))
    except Exception as error:  # whoever reads the log finds the whole of it, and last what it comes to, in one line
        traceback.print_exc()
        sys.exit(f"error: {type(error).__name__}: {' '.join(str(error).split())}")
