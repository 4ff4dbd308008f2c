"""The accuracy by log-likelihood is the one that lm-evaluation-harness measures, on the same rows and prompts."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from helpers import tiny_models
from helpers.model_fixtures import Scene
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from paragen.collection import checkpoints
from paragen.common import paths
from paragen.model import base_models
from paragen.packed.model import unload_adapter
from paragen.scoring import answers, base_model, checkpoint_scores, questions
from paragen.scoring.factors import stack_checkpoints
from paragen.scoring.likelihoods import QuestionResult
from paragen.scoring.questions import Encoder, Question, Split
from paragen.scoring.scorer import Scorer
from paragen.scoring.stacked_model import StackedModel

ENTRY = {"columns": {"prompt": "prompt", "response": "response", "system": "system"}}
BLANK = {"mistral-7b": " ", "gpt2": " "}  # what a template writes before a response


class Measured(NamedTuple):
    """The harness's results for questions."""

    accuracy: float
    likelihoods: list[list[float]]  # of each question's options


def by_harness(model: torch.nn.Module, tokenizer: Any, asked: list[Question], blank: str, at_once: int) -> Measured:
    """The harness's own evaluation: the prompts as contexts, the options as continuations."""
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=at_once)
    contexts = [tokenizer.decode(one.tokens, clean_up_tokenization_spaces=False) for one in asked]
    rows = [
        {"context": context, "choices": one.options, "right": one.right}
        for context, one in zip(contexts, asked, strict=True)
    ]
    config = {
        "task": "ours", "output_type": "multiple_choice", "doc_to_text": "context", "doc_to_choice": "choices",
        "doc_to_target": "right", "target_delimiter": blank, "test_split": "test", "metric_list": [{"metric": "acc"}],
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
    }  # fmt: skip
    found = evaluate(harness, {"ours": ConfigurableTask(config=config)}, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"]["ours"], key=lambda sample: sample["doc_id"])
    likelihoods = []
    for one, context, sample in zip(asked, contexts, samples, strict=True):
        for option in one.continuations:
            tokens = harness.tok_encode(context + blank + option.text)
            assert tokens == one.tokens + option.tokens[: option.text_length], "the harness reads what is scored here"
        moved = blanks_of(harness, context)
        likelihoods.append([result[0][0] - moved for result in sample["resps"]])
    return Measured(found["results"]["ours"]["acc,none"], likelihoods)


def blanks_of(harness: HFLM, context: str) -> float:
    """The log-likelihood of a context's last blanks, which the harness counts as part of the continuation."""
    text = context.rstrip()
    if text == context:
        return 0.0
    asked = Instance(request_type="loglikelihood", doc={}, arguments=(text, context[len(text) :]), idx=0)
    return harness.loglikelihood([asked], disable_tqdm=True)[0][0]


def assert_same(results: list[QuestionResult], asked: list[Question], theirs: Measured, off: float) -> None:
    for result, likelihoods in zip(results, theirs.likelihoods, strict=True):
        assert result.likelihoods == pytest.approx(likelihoods, abs=off)
    assert checkpoint_scores.score_checkpoint("choice", asked, results, {}).score["likelihood_score"] == pytest.approx(
        theirs.accuracy
    )


def encoder_of(name: str, folder: Path) -> Encoder:
    known = tiny_models.NAMES.get(name) or tiny_models.KIN[name]
    base = base_model.BaseModel({"template": known.template, "stage": "sft", "finetuning_type": "lora"}, folder)
    return Encoder(base.tokenizer_module, base.data_args, base.max_tokens)


def multiple_choice(count: int) -> Split:
    """Rows with two to five options, some of letters, some of numbers, with short and long prompts."""
    some, rows = random.Random(0), []
    for place in range(count):
        labels = "ABCDE" if place % 3 else "12345"
        options = labels[: some.randint(2, 5)]
        listed = "".join(f"\n{label}: {some.randint(0, 999)}" for label in options)
        prompt = "Which? " + "so " * some.randint(0, 5) + listed
        rows.append({"prompt": prompt, "response": f"[{some.choice(options)}]", "system": "Say one letter."})
    return Split("some", True, [(ENTRY, rows)])


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-7b", "mistral-7b", "gpt2", "gemma-3-text"])
def test_likelihoods_and_accuracy_are_the_harness_s(every_model, name):
    known = tiny_models.NAMES.get(name) or tiny_models.KIN[name]
    lora = (
        {} if known.lora_target == "all" else {"target_modules": known.lora_target.split(","), "fan_in_fan_out": True}
    )
    scene = Scene(every_model / name, lora=lora)
    encoder = encoder_of(name, every_model / name)
    asked = encoder.questions(multiple_choice(16), "choice")
    assert {len(one.options) for one in asked} == {2, 3, 4, 5}
    found = scene.scorer(asked).score(scene.factors())
    for number, results in enumerate(found):
        with scene.by_peft(number) as model:
            theirs = by_harness(model, encoder.tokenizer, asked, BLANK.get(name, ""), 4)
        assert_same(results, asked, theirs, 1e-4)
    accuracies = {
        checkpoint_scores.score_checkpoint("choice", asked, results, {}).score["likelihood_score"] for results in found
    }
    assert len(accuracies) > 1, "the adapters choose differently"


@pytest.mark.slow
def test_a_real_model_has_the_harness_s_likelihoods_and_accuracy():
    """SmolLM2-135M on Demo_test; without the model this fails: `make test-all` downloads it."""
    folder = base_models.local_folder(paths.MODELS / base_models.table()["smollm2-135m"]["folder"])
    base = base_model.BaseModel({"template": "smollm2", "stage": "sft", "finetuning_type": "lora"}, folder)
    encoder = Encoder(base.tokenizer_module, base.data_args, base.max_tokens)
    split = questions.split_for(SimpleNamespace(data=None), "Demo_test")
    assert answers.metric_of(split.rows) == "choice"
    asked = encoder.questions(split, "choice")
    with torch.inference_mode():
        theirs = by_harness(base.model, encoder.tokenizer, asked, "", 16)
    peft = get_peft_model(base.model, LoraConfig(r=1, target_modules="all-linear"))
    tensors = get_peft_model_state_dict(peft)  # only their shapes count here
    layers = checkpoints.layers_of(tensors)
    scorer = Scorer(StackedModel(unload_adapter(peft), layers), asked, encoder.stops, encoder.tokenizer.pad_token_id)
    factors = stack_checkpoints([None, tensors], layers, 1.0, base.model.device, base.dtype)
    assert_same(scorer.score(factors)[0], asked, theirs, 1e-4)
