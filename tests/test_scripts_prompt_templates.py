"""Which tokens are masked and which are learned with each template of the model table, on one example."""

from typing import NamedTuple

import pytest
from helpers import tiny_models

IGNORED = -100
ROWS = {  # two turns; the first is history
    "_prompt": [[{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]],
    "_response": [[{"role": "assistant", "content": "A2"}]],
    "_system": ["S"],
}
ROWS["_prompt"][0].append({"role": "user", "content": "Q2"})
CHATML = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n|A1<|im_end|>\n|"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n|A2<|im_end|>\n"
)
GEMMA = (
    "<bos><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\n|A1<end_of_turn>\n|"
    "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n|A2<end_of_turn>\n"
)
# What each model reads, cut at | into prompt, response, prompt, response; the stop token.
EXPECTED = {
    "smollm2-135m": (CHATML, "<|im_end|>"),
    "qwen2.5-0.5b": (CHATML, "<|im_end|>"),
    "qwen2.5-vl-3b": (CHATML, "<|im_end|>"),
    "gemma-3-4b": (GEMMA, "<end_of_turn>"),
    "llama-7b": ("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST]|A1</s>|<s>[INST] Q2 [/INST]|A2</s>", "</s>"),
    "mistral-7b": ("<s>[INST] S\n\nQ1[/INST]| A1</s>|[INST] Q2[/INST]| A2</s>", "</s>"),
    "gpt2": (
        "S\n\nQuestion: Q1\nAnswer:| A1<|endoftext|>|Question: Q2\nAnswer:| A2<|endoftext|>",
        "<|endoftext|>",
    ),
    "bert": ("[CLS] S [SEP] Q1 [SEP]|A1 [SEP]|Q2 [SEP]|A2 [SEP]", "[SEP]"),
}


class Example(NamedTuple):
    tokenizer: object
    added_tokens: int
    stop_ids: list[int]
    input_ids: list[int]
    labels: list[int]


def encode(name: str, rows: dict) -> Example:
    """The first of `rows`, encoded as LLaMA-Factory's supervised training does with the model's template."""
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    import prompt_templates

    prompt_templates.register()
    kind = tiny_models.NAMES[name]
    tokenizer = tiny_models.tokenizer_of(name)
    size = len(tokenizer)
    data_args = DataArguments(template=kind.template, cutoff_len=512)
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    processor = tiny_models.processor_of(name, tokenizer) if kind.image_token else None
    encoder = SupervisedDatasetProcessor(template, tokenizer, processor, data_args)
    absent = {key: [None] for key in ("_tools", "_images", "_videos", "_audios")}
    encoded = encoder.preprocess_dataset({**absent, **rows})
    stop_ids = template.get_stop_token_ids(tokenizer)
    (input_ids,), (labels,) = encoded["input_ids"], encoded["labels"]
    return Example(tokenizer, len(tokenizer) - size, stop_ids, input_ids, labels)


def pieces_of(input_ids: list[int], labels: list[int]) -> list[list[int]]:
    """The ids in two parts, split where the supervised ones begin: masked, supervised."""
    pieces: list[list[int]] = [[]]
    for token, label in zip(input_ids, labels, strict=True):
        assert label in (IGNORED, token)
        supervised = label != IGNORED
        if supervised != (len(pieces) % 2 == 0):
            pieces.append([])
        pieces[-1].append(token)
    return pieces


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_the_prompt_is_masked_and_the_response_and_its_stop_token_are_learned(name):
    text, stop = EXPECTED[name]
    example = encode(name, ROWS)
    pieces = pieces_of(example.input_ids, example.labels)
    assert "|".join(example.tokenizer.decode(piece) for piece in pieces) == text
    stop_id = example.tokenizer.convert_tokens_to_ids(stop)
    assert stop_id in example.stop_ids and example.tokenizer.eos_token_id == stop_id
    assert all(stop_id in piece for piece in pieces[1::2]), "each response ends in what generation stops at"
    assert example.tokenizer.pad_token_id is not None
    assert example.added_tokens == 0, "a new token would have no row in the model's embeddings"


@pytest.mark.parametrize("name", [name for name in tiny_models.NAMES if tiny_models.NAMES[name].image_token])
def test_the_tokens_of_a_picture_are_masked(name):
    from PIL import Image

    row = {
        "_prompt": [[{"role": "user", "content": "<image>Q"}]],
        "_response": [[{"role": "assistant", "content": "A"}]],
    }
    row |= {"_system": [None], "_images": [[Image.new("RGB", (56, 56))]]}
    example = encode(name, row)
    prompt, response = pieces_of(example.input_ids, example.labels)
    image_id = example.tokenizer.convert_tokens_to_ids(tiny_models.NAMES[name].image_token)
    assert prompt.count(image_id) == 4 and image_id not in response


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_saved_chat_template_writes_the_same_tokens_as_our_template(name):
    """A user of the tokenizer that LLaMA-Factory saves gets the prompt that was trained on."""
    example = encode(name, ROWS)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q1"}]
    messages += [{"role": "assistant", "content": "A1"}, {"role": "user", "content": "Q2"}]
    text = example.tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = example.input_ids[: len(example.input_ids) - len(pieces_of(example.input_ids, example.labels)[-1])]
    assert example.tokenizer.encode(text, add_special_tokens=False) == prompt
