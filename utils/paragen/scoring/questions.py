"""The rows that a collection is scored on, and their tokens.

Rows come from the collection's test split or from a registered dataset; messages and tokens come from LLaMA-Factory's
own converter and template, as in training.
"""

import dataclasses
from bisect import bisect_left
from typing import Any, NamedTuple

from paragen.collection import prompts
from paragen.collection.manifest import Manifest
from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, names, row_faults, row_texts
from paragen.scoring import answers


class Continuation(NamedTuple):
    """A response that may follow a prompt."""

    text: str
    tokens: list[int]  # of the text and of what ends a response
    text_length: int  # how many of the tokens belong to the text


class Question(NamedTuple):
    """A row to be scored."""

    tokens: list[int]  # of the prompt
    continuations: list[Continuation]  # the options of a multiple choice; else the right response alone
    right: int  # the number of the right one
    response: str  # the right response, as it is in the row
    prompt: str

    @property
    def options(self) -> list[str]:
        """The texts of the continuations."""
        return [option.text for option in self.continuations]


class Split(NamedTuple):
    """The rows to score on."""

    name: str  # a registered dataset, or a part of one: Demo[1000:1119]
    paired: bool  # whether it is the test split of the dataset that the collection was trained on
    parts: list[prompts.Part]
    all_parts: list[prompts.Part] | None = None  # before `first_rows`, where that has removed rows

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows as they are in the data files."""
        return [row for _, rows in self.parts for row in rows]

    @property
    def texts(self) -> list[dict[str, Any]]:
        """The rows as `row_texts.texts_of` reads them."""
        return [row_texts.texts_of(row, entry) for entry, rows in self.parts for row in rows]

    @property
    def responses(self) -> list[str]:
        """The distinct responses of the whole split, also where only its first rows are scored."""
        return answers.distinct_responses(self.whole.texts)

    @property
    def whole(self) -> "Split":
        """The split as it was before `first_rows`."""
        return self._replace(parts=self.all_parts or self.parts, all_parts=None)

    @property
    def metric(self) -> str:
        """What the rows are scored by, a key of evaluation.METRICS: what all their entries state, or else what the
        responses of the whole split tell, also where only its first rows are scored."""
        if all(entry.get(dataset_info.METRIC) == dataset_info.EXACT for entry, _ in self.parts):
            return "exact"
        return answers.metric_of(self.whole.texts)


def split_for(manifest: Manifest, requested: str) -> Split:
    """The rows that a collection is scored on.

    Args:
        manifest: the collection's.
        requested: the name of a registered dataset; empty for the test split of the collection's own dataset.

    Raises UserError where there are no rows, or where they lack responses or have pictures.
    """
    data = manifest.data or ()
    if requested:
        name, part = prompts.registered(requested)
        split = Split(name, name in map(prompts.paired_name, data), [part])
    else:
        parts = prompts.parts(manifest, "test")
        split = Split("+".join(map(prompts.split_name, data)), True, parts)
    return _checked(split)


def split_of(dataset: str, requested: str) -> Split:
    """The rows that adapters for a dataset are scored on of which there is no collection.

    Args:
        dataset: a registered dataset.
        requested: as for `split_for`. Empty: the registered test split, or else the rows that its entry holds out.

    Raises UserError like `split_for`.
    """
    paired = names.test_split_name(dataset)
    if requested or paired in dataset_info.read_info(paths.DATA):
        name, part = prompts.registered(requested or paired)
        return _checked(Split(name, name == paired, [part]))
    _, (entry, rows) = prompts.registered(dataset)
    count = entry.get(dataset_info.HELD_OUT)
    if not count or count > len(rows):
        raise UserError(f"{dataset}: has no {paired} in dataset_info.json; register rows to score with as {paired}")
    return _checked(Split(f"{dataset}[{len(rows) - count}:{len(rows)}]", True, [(entry, rows[-count:])]))


def _checked(split: Split) -> Split:
    """A split. Raises UserError where it cannot be scored."""
    for entry, rows in split.parts:
        if entry.get(dataset_info.PROMPTS_ONLY):
            raise UserError(
                f"{split.name}: has prompts without responses, nothing to score against; name another dataset in SPLIT"
            )
        for number, row in enumerate(rows, 1):
            if fault := fault_of(row, entry):
                raise UserError(f"{split.name}: row {number}: {fault}; put it right, or name another SPLIT")
    return split


def fault_of(row: dict[str, Any], entry: dict[str, Any]) -> str | None:
    """Why a row cannot be scored, None where it can.

    A conversation out of turn is such a row: LLaMA-Factory would drop its messages and score an empty conversation.
    """
    columns, tags = dataset_info.columns_of(entry), dataset_info.tags_of(entry)
    if "messages" in columns:
        messages: Any = row.get(columns["messages"])
        fault = row_faults.messages_fault(messages, tags) or row_faults.messages_gap(messages, tags, False)
    else:
        fault = row_faults.alpaca_fault(row, columns)
    if fault := fault or row_faults.text_fault(row, columns, ("system",)):
        return fault
    texts = row_texts.texts_of(row, entry)
    if texts["images"]:
        return "it has pictures, and only text is scored"
    return "it has no response to score against" if dataset_info.is_blank(texts["response"]) else None


def first_rows(split: Split, limit: int | None) -> Split:
    """A split's first rows; all of them where the limit is None."""
    if limit is None:
        return split
    parts, left = [], limit
    for entry, rows in split.parts:
        parts.append((entry, rows[:left]))
        left -= len(parts[-1][1])
    return split._replace(parts=[part for part in parts if part[1]], all_parts=split.all_parts or split.parts)


class Encoder:
    """Turns rows into questions, and generated tokens into text.

    Args:
        tokenizer_module: what llamafactory.model.load_tokenizer returns.
        data_args: LLaMA-Factory's DataArguments, with the template.
        max_tokens: the length of a prompt with its response above which LLaMA-Factory truncates them.

    `stops` are the ids of the tokens that end a response, sorted.
    """

    def __init__(self, tokenizer_module: dict[str, Any], data_args: Any, max_tokens: int):
        from llamafactory.data import get_template_and_fix_tokenizer
        from llamafactory.data.processor import SupervisedDatasetProcessor

        self.tokenizer = tokenizer_module["tokenizer"]
        self.data_args = dataclasses.replace(data_args, cutoff_len=max_tokens)
        self.template = get_template_and_fix_tokenizer(self.tokenizer, data_args)
        self.processor = SupervisedDatasetProcessor(
            template=self.template,
            tokenizer=CachingTokenizer(self.tokenizer),
            processor=tokenizer_module["processor"],
            data_args=self.data_args,
        )
        self.stops = sorted(set(self.template.get_stop_token_ids(self.tokenizer)))

    def questions(self, split: Split, metric: str) -> list[Question]:
        """A question per row, in order.

        Args:
            split: the rows.
            metric: a key of evaluation.METRICS; for "choice", questions have all options.
        """
        responses = split.responses if metric == "choice" else []
        found = []
        for entry, rows in split.parts:
            for row in rows:
                text = row_texts.texts_of(row, entry)
                options = answers.options_of(text, responses) if metric == "choice" else [text["response"]]
                found.append(self._question(convert_row(row, entry, self.data_args), options, text))
        return found

    def decode(self, tokens: list[int]) -> str:
        """The text of generated tokens, with its blanks as they are and without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _question(self, messages: dict[str, Any], options: list[str], text: dict[str, Any]) -> Question:
        encoded = [self._encode(messages, option) for option in options]
        tokens = encoded[0][0]
        if any(other != tokens for other, _ in encoded):
            raise UserError(f"{text['prompt'][:60]!r}: its options need different prompts; it cannot be scored")
        continuations = [
            Continuation(option, response, self._text_length(option, response))
            for option, (_, response) in zip(options, encoded, strict=True)
        ]
        right = options.index(text["response"].strip()) if len(options) > 1 else 0
        return Question(tokens, continuations, right, text["response"], text["prompt"])

    def _encode(self, messages: dict[str, Any], response: str) -> tuple[list[int], list[int]]:
        """The tokens before the last response, and the tokens of `response` in its place with what ends it."""
        from llamafactory.extras.constants import IGNORE_INDEX

        last = [{**messages["_response"][-1], "content": response}]
        tokens, labels = self.processor._encode_data_example(
            messages["_prompt"], last, messages["_system"], messages["_tools"], [], [], []
        )
        start = len(labels)
        while start and labels[start - 1] != IGNORE_INDEX:
            start -= 1
        return tokens[:start], tokens[start:]

    def _text_length(self, option: str, response: list[int]) -> int:
        """How many tokens of a response belong to its text; all of them where text and end are merged in one token."""
        text = self.processor.tokenizer.encode(option, add_special_tokens=False)
        if response[: len(text)] == text:
            return len(text)
        # a template may begin a response with a blank, and then the first tokens differ

        def has_text(length: int) -> bool:
            return option in self.tokenizer.decode(response[:length])

        return bisect_left(range(len(response)), True, key=has_text)


class CachingTokenizer:
    """A tokenizer that encodes each text once: prompts recur with each option, system prompts with each row."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.cache: dict[tuple, list[int]] = {}

    def encode(self, text: str, **more: Any) -> list[int]:
        key = text, *more.items()
        if key not in self.cache:
            self.cache[key] = self.tokenizer.encode(text, **more)
        return [*self.cache[key]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def convert_row(row: dict[str, Any], entry: dict[str, Any], data_args: Any) -> dict[str, Any]:
    """A row as LLaMA-Factory's converter returns it: _prompt and _response (messages), _system, _tools."""
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr

    attributes = DatasetAttr("file", dataset_name="split")
    attributes.join(entry)
    row = dict.fromkeys(dataset_info.columns_of(entry).values()) | row  # as the datasets library fills what a row lacks
    return get_dataset_converter(attributes.formatting, attributes, data_args)(row)
