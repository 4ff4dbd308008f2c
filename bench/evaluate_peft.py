"""Transformers with PEFT, one checkpoint after another: what scoring is measured against.

    python bench/evaluate_peft.py RESULT.json CHECKPOINTS SIZE ..       the last checkpoints of the only collection

Started by evaluate.py. Rows sorted by length; of each batch a forward pass gives the likeliest option (whole prompts,
padded on the right, the output layer at one place per row), and greedy generation (padded on the left) its answer. Of
all sizes, the fastest on part of the rows is used.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from paragen.collection import checkpoints, evaluation, index
from paragen.collection.manifest import CheckpointEntry
from paragen.common import cli, devices
from paragen.scoring import answers
from paragen.scoring.questions import Question

PART = 8  # batches of each size that is tried


def main() -> None:
    result, count, *sizes = sys.argv[1:]
    devices.pin(devices.choose()[:1])
    noted: dict[str, Any] = {"began": time.time()}
    chosen = index.chosen()[0][0]
    peft = Peft(chosen, noted)
    peft.choose_size([int(size) for size in sizes])
    for entry in chosen.manifest.checkpoints[-int(count) :]:
        peft.score(entry)
        Path(result).write_text(json.dumps(noted))


class Peft:
    """A collection's base with PEFT's layers.

    Args:
        chosen: the collection.
        noted: takes when the model was `loaded`, the `sizes` tried (rows/s), the `best`, and a dict per checkpoint.
    """

    def __init__(self, chosen: index.Chosen, noted: dict[str, Any]):
        import torch
        from peft import LoraConfig, PeftModel
        from transformers import AutoModelForCausalLM

        from paragen.scoring import base_model, questions

        os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
        self.folder, self.noted, self.torch = chosen.folder, noted, torch
        base = base_model.base_for(chosen.manifest, None)  # for its tokens alone
        encoder = questions.Encoder(base.tokenizer_module, base.data_args, base.max_tokens)
        self.tokenizer, self.stops = encoder.tokenizer, encoder.stops
        self.questions = encoder.questions(questions.split_for(chosen.manifest, ""), "choice")
        self.questions.sort(key=lambda question: len(question.tokens))
        self.device = "cuda:0" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=base.dtype).to(self.device)
        config = LoraConfig.from_pretrained(chosen.folder)
        config.inference_mode = True
        self.model = PeftModel(model, config, autocast_adapter_dtype=False).eval()  # factors in the base's dtype
        self.size = 1
        noted |= {"loaded": time.time(), "rows": len(self.questions), "sizes": {}, "checkpoints": []}

    def choose_size(self, sizes: list[int]) -> None:
        """Take the batch size that is fastest, or the first; ends where a size is much slower or out of memory."""
        self.batch(self.questions[-sizes[0] :])
        rates: dict[int, float] = {}
        for size in sizes:
            stride = max(1, len(self.questions) // (PART * size))
            part = self.questions[stride // 2 :: stride]  # of all lengths
            began = time.monotonic()
            try:
                for start in range(0, len(part), size):
                    self.batch(part[start : start + size])
            except self.torch.OutOfMemoryError:
                devices.free_memory()
                break
            rates[size] = len(part) / (time.monotonic() - began)
            if rates[size] < 0.8 * max(rates.values()) or size >= len(self.questions):
                break
        self.size = max(rates, key=rates.__getitem__)
        self.noted |= {"sizes": rates, "best": self.size}

    def score(self, entry: CheckpointEntry) -> dict[str, Any]:
        """Score one of the manifest's checkpoints on all rows; notes `step`, `seconds`, `score`, `likelihood_score`."""
        from peft import set_peft_model_state_dict

        began, right, likelier = time.monotonic(), 0, 0
        path = self.folder / entry.file_name
        set_peft_model_state_dict(self.model, checkpoints.load(path, entry.bytes, entry.sha256))
        for start in reversed(range(0, len(self.questions), self.size)):
            part = self.questions[start : start + self.size]
            best, said = self.batch(part)
            for question, option, text in zip(part, best, said, strict=True):
                likelier += option == question.right
                right += answers.chosen_option(text, question.options) == question.options[question.right]
        rows, seconds = len(self.questions), time.monotonic() - began
        one = {"step": entry.step, "seconds": seconds, "score": right / rows, "likelihood_score": likelier / rows}
        self.noted["checkpoints"].append(one)
        return one

    def batch(self, part: list[Question]) -> tuple[list[int], list[str]]:
        """Of each question the likeliest option and the text that is generated."""
        with self.torch.inference_mode():
            return self._likeliest(part), self._said(part)

    def _likeliest(self, part: list[Question]) -> list[int]:
        """By the first token in which the options differ, behind those that they begin with alike.

        That is the whole of `[A]`'s likelihood but for its last bracket, of which only an untrained model is unsure.
        """
        shared = [os.path.commonprefix([option.tokens for option in question.continuations]) for question in part]
        rows = [question.tokens + start for question, start in zip(part, shared, strict=True)]
        tokens, there = self._padded(rows, left=False)
        hidden = self.model.get_base_model().model(input_ids=tokens, attention_mask=there).last_hidden_state
        ends = there.sum(1) - 1
        logits = self.model.get_base_model().lm_head(hidden[self.torch.arange(len(rows), device=self.device), ends])
        found = logits.float().log_softmax(-1)
        numbers = [
            [option.tokens[len(start)] for option in question.continuations]
            for question, start in zip(part, shared, strict=True)
        ]
        wide = max(map(len, numbers))
        options = self.torch.tensor([row + row[:1] * (wide - len(row)) for row in numbers], device=self.device)
        return found.gather(1, options).argmax(1).tolist()

    def _said(self, part: list[Question]) -> list[str]:
        tokens, there = self._padded([question.tokens for question in part], left=True)
        whole = self.model.generate(
            input_ids=tokens, attention_mask=there, max_new_tokens=evaluation.MOST["choice"], do_sample=False,
            eos_token_id=self.stops, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        return self.tokenizer.batch_decode(whole[:, tokens.shape[1] :], skip_special_tokens=True)

    def _padded(self, rows: list[list[int]], left: bool) -> tuple[Any, Any]:
        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        fill = [longest - len(row) for row in rows]
        tokens = [[pad] * n + row if left else row + [pad] * n for n, row in zip(fill, rows, strict=True)]
        there = [[0] * n + [1] * (longest - n) if left else [1] * (longest - n) + [0] * n for n in fill]
        return self.torch.tensor(tokens, device=self.device), self.torch.tensor(there, device=self.device)


if __name__ == "__main__":
    cli.run(main)
