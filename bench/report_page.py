"""How big the report's page is and how fast a browser shows it, with many made-up collections.

    python bench/report_page.py [--collections 210] [--steps 100] [--layers 168] [--out PAGE.html]

Renders the page that `make report` would for that many collections of 3 base models, opens it in headless Chromium, and
prints size, time to load and time from a click to a collection's three pictures. Nothing of saves/ is read or written.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

import numpy as np

from paragen.analysis import report, report_cells, report_data
from paragen.common import cli

MODELS = {"qwen2.5-0.5b": "Qwen2.5-0.5B-Instruct", "smollm2-135m": "SmolLM2-135M-Instruct", "gpt2": "gpt2"}
DATASETS = ("ARC-c", "ARC-e", "BoolQ", "HellaSwag", "OBQA", "PIQA", "WinoGrande", "GSM8K", "MATH", "CodeAlpaca-20K",
            "Rosetta-Code", "Mu-Math", "MathV360K", "Python-Codes-25K")  # fmt: skip
RANKS = (2, 4, 8, 16, 64)
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
         "mlp.down_proj")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the report's page.")
    parser.add_argument("--collections", type=int, default=210)
    parser.add_argument("--steps", type=int, default=100, help="checkpoints of a collection")
    parser.add_argument("--layers", type=int, default=168)
    parser.add_argument("--out", type=Path, help="keep the page here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = (args.out or Path(folder, "index.html")).absolute()
        started = time.perf_counter()
        page.write_text(report.render(facts_of(args.collections, args.steps, args.layers)), encoding="utf-8")
        print(f"made in        {time.perf_counter() - started:.1f} s (without statistics)")
        print(f"size           {page.stat().st_size / 1e6:.1f} MB")
        for name, value in look(page, Path(folder, "profile")).items():
            print(f"{name:14} {value}")


def facts_of(count: int, steps: int, layers: int) -> dict:
    """What report.gather would find: a dict of collections, grid, map and totals."""
    rows = [made_up(number, steps, layers, count * steps) for number in range(count)]
    pairs = {}
    for row in rows:
        pair = pairs.setdefault((row["dataset"], row["model"]), {**row, "seed": None, "bytes": 0, "cells": {}})
        pair["bytes"] += row["bytes"]
        pair["cells"][row["rank"]] = {key: row[key] for key in ("state", "reason", "bytes", "id", "anchor")}
    return {
        "collections": rows,
        "pairs": list(pairs.values()),
        "no_pairs": "",
        "ranks": list(RANKS),
        "map": report.checkpoint_map(rows),
        "totals": report.totals(rows, list(pairs.values())),
        "balance": report_cells.balance(rows, list(pairs.values())),
        "benchmarks": [],
        "selection": None,
        "faults": [],
    }


def made_up(number: int, steps: int, layers: int, total: int) -> dict:
    """One collection: a random walk that slows down, in a place that depends on its dataset and rank."""
    random = np.random.default_rng(number)
    model = list(MODELS)[number // (len(DATASETS) * len(RANKS)) % len(MODELS)]
    dataset, rank = DATASETS[number // len(RANKS) % len(DATASETS)], RANKS[number % len(RANKS)]
    place = np.random.default_rng(DATASETS.index(dataset)).normal(size=1024) * (3 + RANKS.index(rank))
    pace = np.cos(np.linspace(0, np.pi / 2, steps)) + 0.01
    sketch = (place + np.cumsum(random.normal(size=(steps, 1024)) * pace[:, None], 0)).astype(np.float32)
    numbers = np.arange(100, 100 + steps)
    change = 0.01 * pace * random.lognormal(0, 0.3, (layers, steps)) * random.lognormal(0, 0.5, (layers, 1))
    change[:, 0] = np.nan
    shown = report_data.chosen_places(steps, total)
    run = f"{MODELS[model]}_lora-rank_{rank}_finetune"
    name = f"common-sense-reasoning/{dataset}/{run}"
    loss = [0.3 + float(value) for value in random.normal(0, 0.03, steps)]
    return {
        "id": number,
        **report.named(name),
        "model": model,
        "base_model": MODELS[model],
        "seed": 42,
        "state": "stale" if number % 17 == 3 else "complete",
        "reason": "learning_rate (0.0001 -> 0.0002)" if number % 17 == 3 else "",
        "kept": steps, "first": 100, "last": 99 + steps, "loss": sum(loss) / steps,
        "scores": None, "data_warnings": [],
        "bytes": steps * rank * 2_200_000, "each": rank * 2_200_000,
        "rows": 1119, "device": "cuda", "precision": "bfloat16",
        "file": f'"saves/{name}/checkpoint-{99 + steps}.safetensors"',
        "pictures": {
            "curve": {
                "lines": [
                    {"name": "pretrain", "step": list(range(1, 101)), "rate": [1e-4] * 100,
                     "loss": [report_data.short(0.3 + 2 * float(np.exp(-step / 20))) for step in range(100)]},
                    {"name": "finetune", "step": numbers.tolist(), "rate": [report_data.short(1e-4 * p) for p in pace],
                     "loss": [report_data.short(value) for value in loss]},
                ],
                "kept": [100, 99 + steps], "resumed": 99, "notes": [], "label": "made up",
            },
            "trajectory": report_data.trajectory(numbers, sketch),
            "heat": report_data.heat([f"layers.{n // 7}.{KINDS[n % 7]}" for n in range(layers)], numbers, change),
        },
        "sketch": (numbers[shown], sketch[shown]),
    }  # fmt: skip


def look(page: Path, profile: Path) -> dict[str, str]:
    """Open the page in headless Chromium; the times of what a user waits for."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                     f"--user-data-dir={profile}", "--window-size=1280,900"):  # fmt: skip
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(executable_path="/usr/bin/chromedriver"))
    try:
        times = []
        for _ in range(4):
            browser.get(page.as_uri())
            while not (ended := browser.execute_script("return performance.timing.loadEventEnd")):
                time.sleep(0.01)
            times.append(ended - browser.execute_script("return performance.timing.navigationStart"))
        started = time.perf_counter()
        browser.execute_script("document.querySelector('#collection-table [data-open]').click()")
        while browser.execute_script("return document.querySelectorAll('article .main-svg').length") < 3:
            time.sleep(0.01)
        opened = time.perf_counter() - started
        typed = browser.execute_script(
            "const box = document.querySelector('input[data-for=collection-table]'), begun = performance.now();"
            "box.value = 'rank 8'; box.dispatchEvent(new Event('input', {bubbles: true}));"
            "document.body.offsetHeight; return performance.now() - begun"
        )
        return {
            "loaded in": f"{times[0] / 1e3:.2f} s first, {sorted(times[1:])[1] / 1e3:.2f} s again (median of 3)",
            "opened in": f"{opened:.2f} s (a collection, first pictures drawn)",
            "filtered in": f"{typed:.0f} ms",
        }
    finally:
        browser.quit()


if __name__ == "__main__":
    cli.run(main)
