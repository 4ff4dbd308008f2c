"""Which tokens are masked and which are learned with each template of the model table; and templates that users add."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import CATEGORY
from helpers import tiny_models
from helpers.forked_python import PYTHON
from test_readmes import blocks_of

from paragen.recipes import templates

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

    templates.register()
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


# --- templates that users add

NAME = "your_template_name"
FOLDER = f"collect_scripts/{CATEGORY}/To-y"


def readme_example() -> str:
    """The template that README.md shows."""
    (example,) = [block for block in blocks_of("README.md", "python") if "register_template" in block]
    return example


def add(repository: Path, code: str) -> None:
    with open(repository / "utils" / "prompt_templates.py", "a") as file:
        file.write(f"\n{code}")


def run(repository: Path, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    command = [PYTHON, repository / "utils" / script, *arguments]
    return subprocess.run(command, env={**os.environ, **settings}, cwd="/", capture_output=True, text=True)


def output_of(repository: Path, script: str, *arguments: str, **settings: str) -> str:
    done = run(repository, script, *arguments, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def hash_in(repository: Path, name: str = NAME) -> str:
    """The hash of a template in a copy of the repository; nothing heavy is imported for it."""
    code = f"import sys\nfrom paragen.recipes import templates\nprint(templates.hash_of({name!r}))\n"
    code += "assert not {'torch', 'transformers', 'llamafactory'} & sys.modules.keys()"
    settings = {**os.environ, "PYTHONPATH": str(repository / "utils")}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def with_template(repository: Path) -> None:
    """Add the README's template to a copy of the repository and name it in the recipes of To-y."""
    add(repository, readme_example())
    (repository / "data" / "sources.yaml").write_text("repository: a/b\ncommit: c\nfiles: {}\n")
    for recipe in (repository / FOLDER).glob("*.yaml"):
        recipe.write_text(recipe.read_text().replace("template: qwen", f"template: {NAME}"))


def test_the_hashes_of_our_templates_are_those_in_existing_manifests():
    """Another hash would make every collection with the template stale."""
    hashes = {name: templates.hash_of(name)[:16] for name in templates.recorded()}
    assert hashes == {"question_answer": "80f3fd3b48de24f1", "gpt2": "63170a46e57c0fbf", "bert": "1bf95d70c41592b2"}
    assert templates.hash_of("qwen") is None and templates.hash_of(None) is None


def test_a_hash_changes_with_what_a_template_is_and_not_with_how_it_is_written(repository):
    file = repository / "utils" / "prompt_templates.py"
    before = file.read_text()
    add(repository, readme_example())
    first = hash_in(repository)
    written = readme_example().replace('"Question: ', '"Question" ": ').replace(f'"{NAME}",', "NAME,  # mine")
    file.write_text(f"{before}\nNAME = {NAME!r}\n{written}")
    assert hash_in(repository) == first
    file.write_text(f"{before}\nSLOTS = ['Q: {{{{content}}}}']\nregister_template(name={NAME!r}, stop_words=SLOTS)\n")
    second = hash_in(repository)
    file.write_text(file.read_text().replace("'Q: ", "'q: "))
    assert len({first, second, hash_in(repository)}) == 3, "what a variable holds counts, too"


def test_the_readmes_template_is_known_to_recipe_and_check_recipes_which_renders_a_row(repository):
    with_template(repository)
    info = repository / "data" / "dataset_info.json"
    rows = [{"prompt": "Is 7 odd?", "response": "[A]", "system": "Be short."}] * 20
    (repository / "data" / CATEGORY / "Sums.json").write_text(json.dumps(rows))
    entries = json.loads(info.read_text())
    info.write_text(json.dumps({**entries, "Sums": {**entries["To-y"], "file_name": f"{CATEGORY}/Sums.json"}}))
    figures = Path(__file__).resolve().parent.parent / "collect_scripts" / "figures.yaml"
    (repository / "collect_scripts" / "figures.yaml").write_text(figures.read_text())
    output_of(repository, "make_recipe.py", MODEL="tiny-one", DATASET="Sums", TEMPLATE=NAME)
    recipe = repository / "collect_scripts" / CATEGORY / "Sums" / "tiny-one_Sums_pretrain.yaml"
    assert "utils/prompt_templates.py" in recipe.read_text()
    told = output_of(repository, "check_recipes.py", str(recipe))
    row = "the first row of Sums as the model reads it (`>`: what is learned)"
    text = "  | Be short.\n  | \n  | Question: Is 7 odd?\n  | Answer: \n  > [A]<|im_end|>\n2 recipes, no faults\n"
    assert told.endswith(f"{row}\n{text}"), told


@pytest.mark.runs
def test_the_readmes_template_is_trained_scored_and_verified(repository):
    """In one process of the packed engine, which needs it for every cell and phase, and in ordinary ones."""
    with_template(repository)
    cell = {"DATASET": "To-y", "MODEL": "tiny-one"}
    output_of(repository, "collect.py", **cell, RANKS="2 4", ENGINE="packed")
    output_of(repository, "collect.py", **cell, RANK="8")
    assert "3 checkpoints" not in (told := output_of(repository, "verify.py")) and told.count("whole ") == 3
    assert output_of(repository, "status.py", **cell, RANKS="2 4 8").count("complete") >= 3
    info = repository / "data" / "dataset_info.json"
    entries = json.loads(info.read_text())
    info.write_text(
        json.dumps({**entries, "To-y_test": {**entries["To-y"], "file_name": f"{CATEGORY}/To-y_test.json"}})
    )
    rows = [{"prompt": f"Is {n} odd?", "response": f"[{'AB'[n % 2]}]", "system": "Be short."} for n in range(4)]
    (repository / "data" / CATEGORY / "To-y_test.json").write_text(json.dumps(rows))
    assert "4 rows" in output_of(repository, "evaluate.py", **cell, RANK="2", STEPS="last")
    file = repository / "utils" / "prompt_templates.py"
    file.write_text(file.read_text().replace('"Question: {{content}}\\nAnswer: "', '"Q: {{content}}\\nA: "'))
    assert "template_sha256" in output_of(repository, "status.py", **cell, RANKS="2")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("register_template(name='x', format_user=Formatter())", ": NameError: name 'Formatter' is not defined"),
        ("register_template(name='x'", ": SyntaxError: "),
        ("register_template(stop_words=['x'])", "a template needs a name"),
        ("register_template(name='gpt2')", "template 'gpt2' is there twice"),
        ("register_template(name='qwen')", "template 'qwen' is one of LLaMA-Factory's; give yours another name"),
        (f"register_template(name={NAME!r}, format_usr=1)", f"template {NAME!r}: LLaMA-Factory refuses it: "),
        (
            f"register_template(name={NAME!r}, format_user=StringFormatter(slots=['no placeholder']))",
            f"template {NAME!r}: LLaMA-Factory refuses it: A placeholder is required",
        ),
    ],
)
def test_a_broken_template_is_one_error_line(repository, code, said):
    with_template(repository)
    file = repository / "utils" / "prompt_templates.py"
    file.write_text(file.read_text().replace(readme_example(), code if NAME in code else readme_example() + code))
    done = run(repository, "check_recipes.py", str(next((repository / FOLDER).glob("tiny-one_*_pretrain.yaml"))))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: utils/prompt_templates.py") and said in last, done.stderr
