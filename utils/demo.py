"""The whole of this project once, for real, on this machine: `make demo`.

Brings the embedded model, trains SmolLM2-135M on Demo at rank 8, collects 16 checkpoints, verifies them, and shows what
the base and the last checkpoint answer to held-out questions; ends by naming the report, a page to open in a browser.
What is there already is not done again.
"""

import json
import sys
import time
from pathlib import Path

import cells
import cli
import collection
import files
import paths
import rank_config
import report
from cli import UserError, say

DATASET, MODEL, RANK = "Demo", "smollm2-135m", 8
UTILS = Path(__file__).parent
QUESTIONS = 2


def main() -> None:
    started = time.monotonic()
    step("bringing the base model")
    call([sys.executable, UTILS / "fetch_model.py", MODEL])
    step("training and collecting")
    settings = {"DATASET": DATASET, "MODEL": MODEL, "RANK": str(RANK), "KEEP": "", "SEED": ""}
    call([sys.executable, UTILS / "collect.py"], settings)
    recipe = cells.find(DATASET, MODEL, "finetune")
    config = rank_config.render(recipe, RANK)
    folder = rank_config.run_folder(recipe, config)
    manifest = collection.read_manifest(folder)
    step("asking the base model and the last checkpoint")
    show_answers(folder, manifest, rank_config.resolve(recipe, config["model_name_or_path"]))
    show_table(folder, manifest)
    step("drawing the report")
    call([sys.executable, UTILS / "report.py"])
    say(f"\nall of it took {time.monotonic() - started:.0f} s")
    say(f"look at it in a browser: {paths.relative(report.page_of())}")


def step(what: str) -> None:
    """Announce a part of the demo."""
    say(f"\n=== {what}")


def call(command: list, settings: dict[str, str] | None = None) -> None:
    """Run one of this repository's scripts; its own output tells what is going on."""
    if cli.call(command, settings):
        raise UserError("the demo stopped at this part; the cause stands above")


def show_answers(folder: Path, manifest: dict, base: Path) -> None:
    """Print what the base and the last checkpoint answer to questions that were not trained on."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel(model, PeftConfig.from_pretrained(folder))
    last = collection.checkpoint_name(manifest["checkpoints"][-1]["step"])
    set_peft_model_state_dict(adapted, load_file(folder / last))
    rows = json.loads((paths.DATA / "common-sense-reasoning" / "Demo_test.json").read_bytes())[:QUESTIONS]
    for row in rows:
        chat = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        length = inputs["input_ids"].shape[1]

        def answer(inputs=inputs, length=length) -> str:
            tokens = adapted.generate(**inputs, max_new_tokens=24, do_sample=False)[0][length:]
            return " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())

        with adapted.disable_adapter():
            before = answer()
        print(f"\n{row['prompt']}\n  right:      {row['response']}\n  base:       {before}\n  {last}: {answer()}")


def show_table(folder: Path, manifest: dict) -> None:
    """Print what was collected, where it is, how big, how the loss went, and how to load it."""
    entries = manifest["checkpoints"]
    steps = [entry["step"] for entry in entries]
    log = folder.with_name(manifest["pretrain"]["run"]) / collection.LOG
    first = json.loads(log.read_text().splitlines()[0]) if log.is_file() else {}
    table = {
        "collected": f"{len(entries)} checkpoints of rank {manifest['rank']}, steps {steps[0]} to {steps[-1]}",
        "of": f"{manifest['base_model']['name']} on {manifest['dataset']} ({manifest['trained_rows']} prompts)",
        "in": paths.relative(folder),
        "size": f"{files.size_of(folder.iterdir()) / 1e6:.1f} MB, {entries[0]['bytes'] / 1e6:.1f} MB each",
        "loss": f"{first.get('loss', entries[0]['loss']):.3f} first, {entries[-1]['loss']:.3f} last, "
        f"{sum(entry['loss'] for entry in entries) / len(entries):.3f} mean of the kept steps",
    }
    print()
    for name, value in table.items():
        print(f"{name:10} {value}")
    print(f"""
load one in Python:
  from safetensors.torch import load_file
  tensors = load_file("{paths.relative(folder)}/{collection.checkpoint_name(steps[-1])}")
  print(len(tensors), "tensors, such as", *next((name, tuple(t.shape)) for name, t in tensors.items()))""")


if __name__ == "__main__":
    cli.run(main)
