"""The rows that a collection is scored on, as tokens: what LLaMA-Factory makes of them through the model's template.

Imported by evaluate.py. Rows come from prompts.py or a registered dataset, messages and tokens from LLaMA-Factory's
own converter and template, as in training.
"""

import dataclasses
from bisect import bisect_left
from typing import Any, NamedTuple

from paragen.collection import prompts
from paragen.collection.manifest import Manifest
from paragen.common.cli import UserError
from paragen.dataset import dataset_info
from paragen.scoring import answers

# Of a recipe, what decides how text becomes tokens, beside its template.
TEXT_KEYS = ("template", "default_system", "tool_format", "enable_thinking", "preserve_thinking")


class Path(NamedTuple):
    """One way to go on after a prompt."""

    text: str
    tokens: list[int]  # with what ends an answer
    length: int  # how many of the tokens are the text's


class Question(NamedTuple):
    """A row to be scored."""

    tokens: list[int]  # of the prompt
    paths: list[Path]  # the options; where there are none, the right response alone
    right: int  # which of them
    response: str  # as it stands in the row
    prompt: str

    @property
    def options(self) -> list[str]:
        return [path.text for path in self.paths]


class Split(NamedTuple):
    """Rows and what they are."""

    name: str  # a registered dataset, or a part of one: Demo[1000:1119]
    paired: bool
    parts: list[prompts.Part]
    whole: list[prompts.Part] | None = None  # all there are, where `parts` are its first rows

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for _, rows in self.parts for row in rows]

    @property
    def texts(self) -> list[dict[str, Any]]:
        """The rows as `prompts.texts_of` reads them."""
        return [prompts.texts_of(row, entry) for entry, rows in self.parts for row in rows]

    @property
    def responses(self) -> list[str]:
        """The distinct responses of the whole split, also where few of its rows are scored."""
        return answers.responses_of(self._replace(parts=self.whole or self.parts).texts)


def split_of(manifest: Manifest, asked: str) -> Split:
    """The rows of a registered dataset (`asked`), or, where none is asked for, those paired with a collection's.

    Raises UserError when there are none, or when they lack responses or have pictures.
    """
    data = manifest.data or ()
    if asked:
        name, part = prompts.registered(asked)
        found = Split(name, name in map(prompts.paired_name, data), [part])
    else:
        parts = prompts.parts(manifest, "test")
        found = Split("+".join(map(prompts.split_name, data)), True, parts)
    for entry, rows in found.parts:
        if entry.get(dataset_info.PROMPTS_ONLY):
            raise UserError(
                f"{found.name}: has prompts without responses, nothing to score against; name another dataset in SPLIT"
            )
        for number, row in enumerate(rows, 1):
            if fault := fault_of(row, entry):
                raise UserError(f"{found.name}: row {number}: {fault}; put it right, or name another SPLIT")
    return found


def fault_of(row: dict[str, Any], entry: dict[str, Any]) -> str | None:
    """Why a row cannot be scored. LLaMA-Factory would drop a conversation out of turn, and score it as an empty one."""
    columns, tags = dataset_info.columns_of(entry), dataset_info.tags_of(entry)
    if "messages" in columns:
        messages = row.get(columns["messages"])
        fault = dataset_info.messages_fault(messages, tags) or dataset_info.messages_gap(messages, tags, False)
    else:
        fault = dataset_info.alpaca_fault(row, columns)
    if fault := fault or dataset_info.text_fault(row, columns, ("system",)):
        return fault
    texts = prompts.texts_of(row, entry)
    if texts["images"]:
        return "it has pictures, and only text is scored"
    return "it has no response to score against" if dataset_info.is_blank(texts["response"]) else None


def limited(split: Split, limit: int | None) -> Split:
    """Its first rows."""
    if limit is None:
        return split
    parts, left = [], limit
    for entry, rows in split.parts:
        parts.append((entry, rows[:left]))
        left -= len(parts[-1][1])
    return split._replace(parts=[part for part in parts if part[1]], whole=split.whole or split.parts)


class Encoder:
    """Makes questions of rows.

    Args:
        tokenizer_module: what llamafactory.model.load_tokenizer gives.
        data_args: LLaMA-Factory's, with the template.
        longest: tokens that a prompt and its response may have together; LLaMA-Factory cuts what is longer.
    """

    def __init__(self, tokenizer_module: dict[str, Any], data_args: Any, longest: int):
        from llamafactory.data import get_template_and_fix_tokenizer
        from llamafactory.data.processor import SupervisedDatasetProcessor

        self.tokenizer = tokenizer_module["tokenizer"]
        self.data_args = dataclasses.replace(data_args, cutoff_len=longest)
        self.template = get_template_and_fix_tokenizer(self.tokenizer, data_args)
        self.processor = SupervisedDatasetProcessor(
            template=self.template,
            tokenizer=Remembering(self.tokenizer),
            processor=tokenizer_module["processor"],
            data_args=self.data_args,
        )
        self.stops = sorted(set(self.template.get_stop_token_ids(self.tokenizer)))

    def questions(self, split: Split, metric: str) -> list[Question]:
        """A question per row, in order."""
        everywhere = split.responses if metric == "choice" else []
        found = []
        for entry, rows in split.parts:
            for row in rows:
                text = prompts.texts_of(row, entry)
                options = answers.options_of(text, everywhere) if metric == "choice" else [text["response"]]
                found.append(self._question(converted(row, entry, self.data_args), options, text))
        return found

    def text_of(self, tokens: list[int]) -> str:
        """What generated tokens say, letter for letter."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _question(self, messages: dict[str, Any], options: list[str], text: dict[str, Any]) -> Question:
        encoded = [self._encoded(messages, option) for option in options]
        tokens = encoded[0][0]
        if any(other != tokens for other, _ in encoded):
            raise UserError(f"{text['prompt'][:60]!r}: its options need different prompts; it cannot be scored")
        paths = [
            Path(option, response, self._text_length(option, response))
            for option, (_, response) in zip(options, encoded, strict=True)
        ]
        right = options.index(text["response"].strip()) if len(options) > 1 else 0
        return Question(tokens, paths, right, text["response"], text["prompt"])

    def _encoded(self, messages: dict[str, Any], response: str) -> tuple[list[int], list[int]]:
        """The tokens before the last response, and those of the response with what ends it."""
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
        """How many tokens of a response are its text's; all, where they are merged with what ends it."""
        text = self.processor.tokenizer.encode(option, add_special_tokens=False)
        if response[: len(text)] == text:
            return len(text)
        # a template may begin a response with a blank: its first tokens are others then

        def is_said(length: int) -> bool:
            return option in self.tokenizer.decode(response[:length])

        return bisect_left(range(len(response)), True, key=is_said)


class Remembering:
    """A tokenizer that encodes a text once: a prompt comes with each option, what begins prompts with each row."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.known = tokenizer, {}

    def encode(self, text: str, **more: Any) -> list[int]:
        key = text, *more.items()
        if key not in self.known:
            self.known[key] = self.tokenizer.encode(text, **more)
        return [*self.known[key]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def converted(row: dict[str, Any], entry: dict[str, Any], data_args: Any) -> dict[str, Any]:
    """A row as LLaMA-Factory's converter gives it: _prompt and _response (messages), _system, _tools."""
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr

    attributes = DatasetAttr("file", dataset_name="split")
    attributes.join(entry)
    return get_dataset_converter(attributes.formatting, attributes, data_args)(row)
