"""evaluate.py whole: a collection of a random-weight model scored by this project, by PEFT and by LLaMA-Factory.

The first is run whole, from the start of its process to its exit; PEFT and LLaMA-Factory's prediction score a few of
the checkpoints, and their seconds per checkpoint are extrapolated.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import scratch
import shapes
from omegaconf import OmegaConf

from paragen.collection import evaluation
from paragen.collection.manifest import read_manifest
from paragen.common import cli, devices
from paragen.common.cli import UserError, say
from paragen.recipes import render
from paragen.scoring import answers

DATASET = "ARC-c"
LIKE = "qwen2.5-0.5b"  # the model whose recipes are taken
MADE_UP = {"train": 1119, "test": 1172}  # rows, where ARC-c's own are not there
SYSTEM = "Answer the question by picking one of the given choices, and reply with its letter alone in brackets. " * 2
WORDS = ("the", "a", "of", "which", "best", "when", "water", "plant", "light", "rock", "heat", "likely", "energy")
# What the host does in evaluate.py, by the functions whose time it is, with their waits for a GPU. Some overlap.
PARTS = {"load": "load_model", "tokens": "__init__", "stacking": "stack", "launching": "begin", "reading": "finish",
         "generation": "generate", "grading": "score_checkpoint", "writing": "write"}  # fmt: skip


def run(args: argparse.Namespace, top: Path) -> int:
    """Measure, print, and write the raw numbers to args.out as they come."""
    os.environ |= {"DATASET": "", "MODEL": "", "RANK": "", "CATEGORY": "", "SPLIT": "", "LIMIT": "", "STEPS": ""}
    results: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(args).items()}}

    def keep(name: str, found: Any) -> None:
        results[name] = found
        scratch.write_json(args.out, results)

    recipes = prepare(args, top)
    cell = ["--cell", *recipes, args.rank, f"learning_rate={args.learning_rate}"]
    keep("collected", scratch.timed(top, "collecting", "timed.py", "packed", *cell, ENGINE="packed"))
    folder = next((top / "saves").glob("*/*/*_finetune"))
    keep("first", scratch.timed(top, "evaluate.py", "timed.py", "evaluate"))
    keep("ours", results["first"] if on_cpu() else again(top, folder))
    entry = evaluation.read(folder, read_manifest(folder))[0]
    keep("evaluation", entry)
    keep("ours parts", parts_of(results["ours"], args, len(entry["checkpoints"])))
    first = parts_of(results["first"], args, len(entry["checkpoints"]))["window"]
    show_ours(results["ours parts"], results["ours"], entry)
    say(f"the first run, from the loaded model on: {first:.2f} s")
    count = min(args.baseline_checkpoints, args.checkpoints)
    keep("peft", scratch.timed(top, "PEFT", "evaluate_peft.py", count, *args.sizes.split()))
    show_agreement(entry, results["peft"])
    if problem := why_no_prediction(args):
        say(f"LLaMA-Factory's prediction is not measured: {problem}")
    else:
        for name, found in predictions(args, top, recipes[1]):
            keep(name, found)
    show(args, results)
    return 0


def again(top: Path, folder: Path) -> dict[str, Any]:
    """What a second run of evaluate.py notes: the first compiles Triton's kernels, which stay on the machine's disk."""
    (folder / evaluation.FILE).unlink()
    return scratch.timed(top, "evaluate.py, again", "timed.py", "evaluate")


def on_cpu() -> bool:
    """Whether there is no GPU to run on."""
    return devices.choose()[:1] in (["cpu"], [])


def prepare(args: argparse.Namespace, top: Path) -> tuple[Path, Path]:
    """A repository with rows, a random model and recipes; the recipes."""
    files = {}
    for part, path in (("train", args.train), ("test", args.data)):
        if not path.is_file():
            say(f"{path}: is not there; {MADE_UP[part]} MADE-UP rows of ARC-c's lengths in its place")
            path = top.parent / f"made up {part}.json"
            path.write_text(json.dumps(made_up(MADE_UP[part], part)))
        else:
            say(f"{part} rows: {path}")
        files[part] = path.absolute()
    scratch.make(top, DATASET, files["train"], files["test"])
    model = f"{args.model_shape}-random"
    recipes = scratch.write_recipes(top, LIKE, DATASET, model, args.steps, args.checkpoints)
    tokenizer = str(shapes.tokenizer_source())
    scratch.in_process(shapes.write_random, args.model_shape, str(top / "models" / model), tokenizer)
    return recipes


def made_up(count: int, seed: str) -> list[dict[str, str]]:
    """Rows with four options, their lengths in characters distributed as ARC-c's."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        words, length = [], min(max(draw.lognormvariate(5.47, 0.46), 60), 920)
        while sum(map(len, words)) + len(words) < length - 14:
            words.append(draw.choice(WORDS))
        cuts = [len(words) * (4 + part) // 8 for part in range(5)]
        options = [f"{'ABCD'[part]}: {' '.join(words[cuts[part] : cuts[part + 1]])}" for part in range(4)]
        prompt = "\n".join([" ".join(words[: cuts[0]]), *options])
        rows.append({"prompt": prompt, "response": f"[{draw.choice('ABCD')}]", "system": SYSTEM})
    return rows


def parts_of(noted: dict[str, Any], args: argparse.Namespace, count: int) -> dict[str, Any]:
    """Seconds of evaluate.py by part, and how well it used the device; `count`: checkpoints, beside the base."""
    spans = noted["spans"]
    ends = {name: end for name, _, end in spans}  # the last of each
    compared = ends["_check"]
    seconds = {"import": noted["imported"] - noted["started"]}
    for part, name in PARTS.items():
        own = [(began, end) for other, began, end in spans if other == name]
        if part in ("stacking", "launching", "reading"):
            own = [(began, end) for began, end in own if began > compared]
        seconds[part] = sum(end - began for began, end in own)
    seconds["device: forward passes"] = sum(noted["passes"][1:])  # the first are the comparison's
    seconds["comparison with PEFT"] = compared - next(began for name, began, _ in spans if name == "peft_losses")
    window = seconds["tokens"] + ends["write"] - ends["load_model"]
    scoring = ends["write"] - compared
    whole = noted["exited"] - noted["started"]
    models, peak = count + 1, shapes.peak_of(noted["device"])
    work = shapes.Seen(*noted["work"])
    flops = {name: shapes.forward_flops(args.model_shape, shapes.Seen(*noted[name])) for name in ("work", "computed")}
    taken = {"from the loaded model on": window, "from the first checkpoint's reading on": scoring,
             "forward passes alone": seconds["device: forward passes"]}  # fmt: skip
    used = peak and {name: {part: models * flops[name] / time / peak for part, time in taken.items()} for name in flops}
    return {
        "seconds": seconds, "whole": whole, "window": window, "models": models, "checkpoints": count,
        "tokens": work.tokens, "rows": noted["rows"], "generated": noted["generated"],
        "TFLOP": {name: each / 1e12 for name, each in flops.items()}, "tokens_per_s": models * work.tokens / window,
        "checkpoints_per_s": models / window, "device": noted["device"], "scoring": scoring, "MFU": used,
    }  # fmt: skip


def show_ours(found: dict[str, Any], noted: dict[str, Any], entry: dict[str, Any]) -> None:
    """Print where evaluate.py's time went."""
    say(f"\nevaluate.py: {found['rows']} rows, the base and {found['checkpoints']} checkpoints, {found['device']}")
    rows = [(part, f"{seconds:.2f}") for part, seconds in found["seconds"].items()]
    rows += [("from the loaded model on", f"{found['window']:.2f}"), ("of it, scoring", f"{found['scoring']:.2f}"),
             ("whole process", f"{found['whole']:.2f}")]  # fmt: skip
    cli.print_table(("part", "seconds"), rows)
    answered = found["models"] * found["rows"]
    say(f"answers that left the options and were generated: {found['generated']} of {answered}")
    say(f"peak memory {noted['peak_GB']:.1f} GB; {noted['budget']} tokens at once; base {entry['base']['score']:.3f}")
    each = found["TFLOP"]
    say(f"{found['tokens']} tokens, {each['work']:.1f} TFLOP per checkpoint, of them computed {each['computed']:.1f}: "
        f"{found['tokens_per_s']:.0f} tokens/s, {found['checkpoints_per_s']:.2f} checkpoints/s")  # fmt: skip
    if used := found["MFU"]:
        cli.print_table(("share of the device's peak", "MFU", "computed"), [
            (part, *(f"{100 * used[name][part]:.1f} %" for name in ("work", "computed"))) for part in used["work"]
        ])  # fmt: skip


def show_agreement(entry: dict[str, Any], peft: dict[str, Any]) -> None:
    """Print both ways' accuracies of the same checkpoints."""
    ours = {one["step"]: one for one in entry["checkpoints"]}
    say("\naccuracies of the same checkpoints, as generated and by likelihood")
    cli.print_table(("step", "ours", "PEFT", "ours, likelihood", "PEFT, likelihood"), [
        (str(one["step"]), *(f"{way[key]:.4f}" for key in ("score", "likelihood_score")
                             for way in (ours[one["step"]], one))) for one in peft["checkpoints"]
    ])  # fmt: skip


def why_no_prediction(args: argparse.Namespace) -> str | None:
    """Why LLaMA-Factory cannot predict here; None where it can."""
    tried = subprocess.run(
        [sys.executable, "-c", "import jieba, llamafactory, nltk, rouge_chinese"],
        capture_output=True,
        env=environment(args),
    )
    return f"it {tried.stderr.decode().splitlines()[-1]}; see --metrics" if tried.returncode else None


def environment(args: argparse.Namespace) -> dict[str, str]:
    """What LLaMA-Factory's process finds: a device, and the packages of args.metrics."""
    found = devices.choose()[:1]
    visible = {} if not found else {"CUDA_VISIBLE_DEVICES": "" if found[0] == "cpu" else found[0]}
    folders = [str(args.metrics.absolute()), *filter(None, [os.environ.get("PYTHONPATH")])] if args.metrics else []
    more = {"PYTHONPATH": os.pathsep.join(folders)} if folders else {}
    return {**os.environ, **visible, **more}


def predictions(args: argparse.Namespace, top: Path, recipe: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """LLaMA-Factory's prediction with the last checkpoint: (name, what was found) of each trial, then at the best."""
    out = top.parent / "exported"
    export = [sys.executable, shapes.ROOT / "utils" / "export.py"]
    asked = {**os.environ, "FORMAT": "peft", "STEPS": "last", "OUT": str(out), "DTYPE": ""}
    subprocess.run(export, env=asked, check=True, stdout=subprocess.DEVNULL)
    adapter = next(out.glob("*/*/*/checkpoint-*"))
    tried = {}
    for size in map(int, args.predict_sizes.split()):
        tried[size] = predict(args, top, recipe, adapter, size, args.predict_tried)
        if tried[size] is not None:
            yield f"prediction, {size} at once", tried[size]
    best = max((size for size in tried if tried[size]), key=lambda size: tried[size]["rows_per_s"], default=None)
    if best is not None and (found := predict(args, top, recipe, adapter, best, args.predict_rows)):
        yield "prediction", found


def predict(
    args: argparse.Namespace, top: Path, recipe: Path, adapter: Path, size: int, limit: int
) -> dict[str, Any] | None:
    """One process of `llamafactory-cli train` that predicts; None where it fails (out of memory, say)."""
    rendered = render.render(recipe, args.rank)
    out = top.parent / f"predicted {size} {limit}"
    config = {
        "model_name_or_path": str(render.resolve(recipe, rendered["model_name_or_path"])),
        "adapter_name_or_path": str(adapter), "stage": "sft", "do_predict": True, "predict_with_generate": True,
        "finetuning_type": "lora", "dataset_dir": str(top / "data"), "eval_dataset": f"{DATASET}_test",
        "template": rendered["template"], "cutoff_len": rendered["cutoff_len"], "output_dir": str(out),
        "per_device_eval_batch_size": size, "max_new_tokens": evaluation.MOST["choice"], "do_sample": False,
        "report_to": "none", **({"max_samples": limit} if limit else {}),
        **(devices.CPU_SETTINGS if on_cpu() else {"bf16": True}),
    }  # fmt: skip
    file, log, began = top.parent / f"{out.name}.yaml", top.parent / f"{out.name}.log", time.monotonic()
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    with open(log, "wb") as output:
        command = [sys.executable, "-m", "llamafactory.cli", "train", str(file)]
        status = subprocess.run(command, env=environment(args), stdout=output, stderr=output).returncode
    whole = time.monotonic() - began
    if status:
        say(f"LLaMA-Factory's prediction, {size} rows at once, failed:\n{log.read_text(errors='replace')[-1500:]}")
        return None
    say(f"LLaMA-Factory's prediction, {size} rows at once: {whole:.1f} s")
    took = json.loads((out / "predict_results.json").read_text())["predict_runtime"]
    said = [json.loads(line) for line in (out / "generated_predictions.jsonl").read_text().splitlines()]
    options = [f"[{name}]" for name in "ABCDE12345"]
    right = sum(answers.chosen_option(one["predict"], options) == one["label"].strip() for one in said)
    return {"size": size, "rows": len(said), "whole": whole, "predicting": took, "start": whole - took,
            "rows_per_s": len(said) / took, "score": right / len(said)}  # fmt: skip


def show(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Print the table of the three ways."""
    ours, peft, prediction = results["ours parts"], results["peft"], results.get("prediction")
    count, rows = ours["checkpoints"], ours["rows"]
    per = sum(one["seconds"] for one in peft["checkpoints"]) / len(peft["checkpoints"])
    start = peft["loaded"] - peft["started"]
    sizes = ", ".join(f"{size}: {rate:.0f}" for size, rate in peft["sizes"].items())
    say(f"\nPEFT, rows/s by rows at once: {sizes}; {peft['best']} taken; start-up {start:.1f} s\n")
    if peak := shapes.peak_of(ours["device"]):
        say(f"PEFT's MFU with the model loaded: {100 * ours['TFLOP']['work'] * 1e12 / per / peak:.1f} %\n")
    found = [
        ("this project, whole process", ours["whole"] / count, "measured, with the base model's score"),
        ("this project, model loaded", ours["window"] / ours["models"], "measured"),
        ("PEFT, whole process", (start + count * per) / count, f"EXTRAPOLATED from {len(peft['checkpoints'])}"),
        ("PEFT, model loaded", per, f"mean of {len(peft['checkpoints'])} checkpoints"),
    ]
    if prediction:
        scale = rows / prediction["rows"]
        predicting = prediction["predicting"] * scale
        how = f"1 checkpoint, {prediction['size']} at once" + (f", EXTRAPOLATED x {scale:.1f}" if scale > 1 else "")
        found += [
            ("LLaMA-Factory, whole process", prediction["start"] + predicting, f"{how}; answers alone"),
            ("LLaMA-Factory, model loaded", predicting, f"start-up {prediction['start']:.1f} s"),
        ]
    cli.print_table(("way", "s per checkpoint", "times ours, whole", "times ours, loaded", "how"), [
        (name, f"{seconds:.3f}", f"{seconds / found[0][1]:.1f}", f"{seconds / found[1][1]:.1f}", how)
        for name, seconds, how in found
    ])  # fmt: skip
    results["seconds per checkpoint"] = {name: seconds for name, seconds, _ in found}
    scratch.write_json(args.out, results)
    if prediction:
        last = results["evaluation"]["checkpoints"][-1]["score"]
        say(f"the last checkpoint's accuracy: ours {last:.4f}, LLaMA-Factory's {prediction['score']:.4f} "
            f"({prediction['rows']} rows)")  # fmt: skip
    if not found or len(results["evaluation"]["checkpoints"]) != args.checkpoints:
        raise UserError("not all checkpoints were scored")
