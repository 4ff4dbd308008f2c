"""Whether scores depend on what computes them: this repository or PEFT, on the GPU in the recipe's dtype or on the CPU.

    DATASET=ARC-c RANK=8 python bench/score_agreement.py [ROWS]          on a machine with a GPU and one such collection

The base model and the last checkpoint make ROWS (200) rows of the collection's test split. The reference is PEFT in
float32 on the CPU, a forward pass per option. The table says how far the others' losses per token are from it, over all
rows together and in the worst row, in how many rows another option is the likeliest, and the largest margin (the
difference between the two likeliest options' log-likelihoods by the reference, in nats) of such a row.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from paragen.collection import adapter_config, evaluation, index
from paragen.common import cli, devices

WAYS = [(who, where) for where in ("cpu", "0") for who in ("peft", "here")]  # the first is the reference


def main() -> None:
    if len(sys.argv) > 2:
        return compute(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    rows = sys.argv[1] if len(sys.argv) > 1 else "200"
    found = score_each_way(rows, WAYS if devices.nvidia_driver() else WAYS[:2])
    reference = found[WAYS[0]]
    table = []
    for (who, where), one in found.items():
        for number, name in enumerate(("base", "last")):
            columns = compare(one["models"][number], reference["models"][number])
            table.append((who, where, one["dtype"], name, *columns))
    head = ("by", "on", "dtype", "model", "loss per token", "off", "worst row", "other option", "its margin")
    cli.print_table(head, table)


def score_each_way(rows: str, ways: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """What `compute` finds in a process per way, all at once."""
    with tempfile.TemporaryDirectory() as folder:
        results = {way: Path(folder, "-".join(way)) for way in ways}
        own = {
            "LLAMAFACTORY_VERBOSITY": "WARN",
            "OMP_NUM_THREADS": str(max(1, devices.cpu_cores() // len(ways))),
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait would keep the cores from each other
        }
        running = [
            subprocess.Popen(
                [sys.executable, __file__, rows, who, results[who, where]],
                env={**own, **os.environ, "DEVICES": where},
            )
            for who, where in ways
        ]
        if any([process.wait() for process in running]):
            raise cli.UserError("one of the ways failed; see above")
        return {way: json.loads(result.read_text()) for way, result in results.items()}


def compare(found: dict[str, list], reference: dict[str, list]) -> tuple[str, ...]:
    """The columns of the table on one model."""
    tokens = sum(found["tokens"])
    loss, right = sum(found["losses"]) / tokens, sum(reference["losses"]) / tokens
    each = zip(found["losses"], reference["losses"], found["tokens"], strict=True)
    worst = max(abs(one - other) / count for one, other, count in each)
    margins = []
    for mine, theirs in zip(found["likelihoods"], reference["likelihoods"], strict=True):
        if mine.index(max(mine)) != theirs.index(max(theirs)):
            first, second = sorted(theirs, reverse=True)[:2]
            margins.append(first - second)
    largest = f"{max(margins):.3f}" if margins else ""
    return f"{loss:.5f}", f"{loss - right:+.5f}", f"{worst:.4f}", f"{len(margins)} of {len(found['tokens'])}", largest


def compute(rows: int, who: str, result: Path) -> None:
    """Score the base model and the last checkpoint in this process, and write what was found as JSON."""
    devices.pin(devices.choose()[:1])
    import torch

    from paragen.scoring import base_model, questions
    from paragen.scoring.collection_scorer import CollectionScorer

    chosen = index.chosen()[0][0]
    base = base_model.base_for(chosen.manifest, None)
    split = questions.first_rows(questions.split_for(chosen.manifest, ""), rows)
    scorer = CollectionScorer(chosen, base, split, "choice")
    with torch.inference_mode():
        models = by_peft(scorer) if who == "peft" else by_this(scorer)
    dtype = str(base.dtype).removeprefix("torch.")
    result.write_text(json.dumps({"dtype": dtype, "models": models}))


def by_this(scorer: Any) -> list[dict[str, list]]:
    """What `make evaluate` computes: per model the log-likelihoods of the options and the losses."""
    from paragen.scoring.stacked_model import StackedModel

    scorer.base.use_fused_kernels()
    stacked = StackedModel(scorer.base.model, scorer.reader.layers)
    found = scorer.scorer_of(stacked, scorer.questions).score(
        scorer.reader.stack([evaluation.BASE, scorer.reader.compared])
    )
    return [
        {
            "likelihoods": [one.likelihoods for one in results],
            "losses": [one.loss for one in results],
            "tokens": [one.token_count for one in results],
        }
        for results in found
    ]


def by_peft(scorer: Any) -> list[dict[str, list]]:
    """The same by PEFT's own layers."""
    import contextlib

    from peft import PeftModel, set_peft_model_state_dict

    config = adapter_config.lora_config(scorer.reader.config)
    model = PeftModel(scorer.base.model, config, autocast_adapter_dtype=False).eval()
    set_peft_model_state_dict(model, scorer.reader.read(scorer.reader.compared))
    models = []
    for without in (model.disable_adapter, contextlib.nullcontext):
        found: dict[str, list] = {"likelihoods": [], "losses": [], "tokens": []}
        with without():
            for question in scorer.questions:
                texts = [tokens_of(model, question.tokens, option.tokens) for option in question.continuations]
                likelihoods = [
                    sum(text[: option.text_length]) for text, option in zip(texts, question.continuations, strict=True)
                ]
                found["likelihoods"].append(likelihoods)
                found["losses"].append(-sum(texts[question.right]))
                found["tokens"].append(len(texts[question.right]))
        models.append(found)
    return models


def tokens_of(model: Any, prompt: list[int], response: list[int]) -> list[float]:
    """The log-probability of each token of a response."""
    import torch

    from paragen.scoring import peft_comparison

    logits = peft_comparison.plain_logits(model, prompt, response).double()
    chosen = torch.tensor(response, device=logits.device)[:, None]
    return torch.log_softmax(logits, -1).gather(1, chosen)[:, 0].tolist()


if __name__ == "__main__":
    cli.run(main)
