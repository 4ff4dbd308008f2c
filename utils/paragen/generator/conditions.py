"""What a generator is conditioned on: the frozen base model's hidden states over prompts, and over a description.

An embedding is the mean of the last layer's hidden states over a text's tokens. Prompts are built by the recipe's
template, as in training and in scoring.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paragen.collection import prompts, task_descriptions
from paragen.collection.manifest import Manifest
from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import row_texts
from paragen.packed.model import text_config
from paragen.scoring import questions
from paragen.scoring.questions import Question, Split
from paragen.training import llamafactory_output

Row = dict[str, Any]  # texts, as row_texts.texts_of gives them: prompt and, where there are some, system, response
PLAIN = {"columns": {"prompt": "prompt", "system": "system", "response": "response"}}  # how a Row is registered
LONGEST = 512  # tokens of a text that are read, its last ones
AT_ONCE = 4096  # tokens in a pass on the CPU; a GPU gets GPU_FACTOR as many
GPU_FACTOR = 16
MOST_DESCRIPTIONS = 32  # of a task that are embedded
POOL_SEED = 1  # tells the draw of a pool from those of batches


class Reader:
    """A frozen base model, and how it reads rows.

    Args:
        recipe: the keys of a recipe that decide what is loaded and how text becomes tokens.
        folder: the base model's.

    The model is loaded at its first use. Raises UserError for a recipe or a folder that cannot be loaded.
    """

    def __init__(self, recipe: dict[str, Any], folder: Path):
        llamafactory_output.reduce()
        from paragen.scoring import base_model  # imports LLaMA-Factory, which takes seconds

        self.base = base_model.BaseModel(recipe, folder)
        self.encoder = questions.Encoder(self.base.tokenizer_module, self.base.data_args, self.base.max_tokens)
        self.known: dict[tuple, tuple[Tensor, Tensor]] = {}  # what `of_task` returned

    @classmethod
    def of(cls, manifest: Manifest) -> "Reader":
        """The reader of a collection. Raises UserError where its base model is not on disk, or another one."""
        from paragen.scoring import base_model

        return cls(manifest.recipe or {}, base_model.folder_of(manifest))

    @property
    def model(self) -> Any:
        """The base model, on the device."""
        return self.base.model

    def questions(self, parts: Sequence[prompts.Part]) -> list[Question]:
        """Rows as tokens, with their responses."""
        return self.encoder.questions(Split("", True, list(parts)), "loss")

    def of_task(self, manifest: Manifest, most: int, answers: bool) -> tuple[Tensor, Tensor]:
        """The embeddings of a collection's prompts (`pool_of`) and of its task's descriptions; computed once.

        Args:
            manifest: the collection's.
            most: how many prompts at most.
            answers: as for `embed`.
        """
        texts = task_descriptions.of_collection(manifest, paths.DATA)[:MOST_DESCRIPTIONS]
        key = (manifest.sha256, most, answers, tuple(texts))
        if key not in self.known:
            self.known[key] = self.embed(pool_of(manifest, most), answers), self.embed_texts(texts)
        return self.known[key]

    def embed(self, rows: Sequence[Row], answers: bool = False) -> Tensor:
        """The embeddings of rows, [rows, hidden size] float32 on the CPU.

        Args:
            rows: texts.
            answers: whether each prompt is read with its response.

        Raises UserError for a row with pictures.
        """
        if any(row.get("images") for row in rows):
            raise UserError("some rows have pictures; a generator reads text alone: omit their dataset")
        plain = [{key: row.get(key) or "" for key in PLAIN["columns"]} for row in rows]
        found = self.questions([(PLAIN, plain)])
        return self._embed([one.tokens + (one.continuations[0].tokens if answers else []) for one in found])

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """The embeddings of plain texts such as descriptions, without a template; as `embed`."""
        return self._embed([self.encoder.tokenizer.encode(text, add_special_tokens=False) for text in texts])

    @torch.inference_mode()
    def _embed(self, sequences: Sequence[list[int]]) -> Tensor:
        """The mean hidden state of each sequence; those of similar lengths go through the model together."""
        model = self.model
        found = torch.zeros(len(sequences), text_config(model).hidden_size)
        limit = AT_ONCE * (GPU_FACTOR if model.device.type == "cuda" else 1)
        left = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
        while left:
            longest = min(LONGEST, len(sequences[left[-1]]))
            some = left[-max(1, limit // max(1, longest)) :]
            left = left[: -len(some)]
            tokens, mask = padded([sequences[number][-LONGEST:] for number in some], model.device)
            states = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state.float()
            weights = mask[..., None].float()
            found[some] = ((states * weights).sum(1) / weights.sum(1).clamp(min=1)).cpu()
        return found.clone()


def padded(sequences: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(Tokens, mask), [sequences, longest] int64: sequences with zeros behind their ends, and where they are."""
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    masks = [torch.ones_like(row) for row in rows]
    both = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device) for part in (rows, masks))
    return next(both), next(both)


def pool_of(manifest: Manifest, most: int) -> list[Row]:
    """The rows of a collection that conditions are drawn from: at most so many of those trained on, in file order."""
    rows = prompts.of_collection(manifest)
    order = random.Random(f"{POOL_SEED} {manifest.dataset}")
    return rows if len(rows) <= most else [rows[number] for number in sorted(order.sample(range(len(rows)), most))]


def texts_in(part: prompts.Part) -> list[Row]:
    """The rows of a part of a dataset as texts."""
    return [row_texts.texts_of(row, part[0]) for row in part[1]]


def joined(prompts: Tensor, texts: Tensor, numbers: Tensor) -> Tensor:
    """Conditions [n, 2 * hidden size + 1]: prompts, a description, and whether there is one.

    Args:
        prompts: [n, hidden size], each the mean over embedded prompts, standardised.
        texts: [m, hidden size], embedded descriptions, standardised.
        numbers: int64 [n], the description of each condition; -1 for none, which zeros stand for.
    """
    has_text = (numbers >= 0).to(prompts.dtype)[:, None]
    padded_texts = torch.cat([texts, texts.new_zeros(1, prompts.shape[1])])  # its last row is the one of number -1
    return torch.cat([prompts, padded_texts[numbers], has_text], 1)


def statistics(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """(Mean, standard deviation) of embeddings [n, hidden size], each [hidden size]."""
    return embeddings.mean(0), embeddings.std(0, correction=0) + 1e-6


def standardise(pools: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings of several datasets, standardised over all of their rows together."""
    mean, std = statistics(torch.cat(list(pools.values())))
    return {name: (pool - mean) / std for name, pool in pools.items()}


def similarity(own: Tensor, other: Tensor) -> float:
    """The cosine of the mean embeddings of two datasets, [n, hidden size] and [m, hidden size], standardised."""
    return torch.nn.functional.cosine_similarity(own.mean(0), other.mean(0), dim=0).item()
