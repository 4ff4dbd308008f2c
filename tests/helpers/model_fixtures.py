"""Tiny models with random adapters to be scored, and what transformers and PEFT compute for the same questions.

The code under test and PEFT have a model each, so that neither can change the other's.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from paragen.collection import adapter_config, checkpoints, lora_config
from paragen.scoring import questions
from paragen.scoring.factors import Factors, stack_checkpoints
from paragen.scoring.questions import Question
from paragen.scoring.scorer import Scorer
from paragen.scoring.stacked_model import StackedModel

STOPS = [2]
ENDS = [2, 7]  # what a template may write after a response: a token that ends it, and a line break
WORDS = range(10, 150)  # tokens that every tiny model has and that end nothing
LONGEST = 8  # tokens that are generated
CLOSE = 1e-5


class Scene:
    """A tiny model and adapters for it. Adapter 0 is the base model.

    Args:
        folder: the model's.
        count: of adapters; their factors are so large that each generates something else.
        lora: what the adapters' LoraConfig differs in.
        config: what the model's config of text differs in.
        dtype: of both; in float64 a difference is an error, not one of rounding.
        fused: as StackedModel takes it.
        device: of both models.
    """

    def __init__(
        self, folder: Path, count: int = 2, lora: dict[str, Any] | None = None, config: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float64, fused: bool | None = None, device: str = "cpu",
    ):  # fmt: skip
        self.folder, self.config, self.dtype, self.device = folder, config or {}, dtype, device
        self.answers: dict[tuple[int, ...], list[int]] = {}
        settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | (lora or {})
        self.model = self.fresh()
        self.peft = get_peft_model(self.fresh(), LoraConfig(**settings)).eval()
        self.adapters: list[dict[str, Tensor] | None] = [None]
        torch.manual_seed(1)
        for _ in range(count):
            shapes = {key: tensor.shape for key, tensor in get_peft_model_state_dict(self.peft).items()}
            drawn = {key: (torch.randn(shape) * 0.6).to(dtype) for key, shape in shapes.items()}
            self.adapters.append(drawn)
        self.layers = checkpoints.layers_of(drawn)
        self.scaling = lora_config.scaling_of(self.peft.peft_config["default"].to_dict(), self.layers[0])
        self.stacked = StackedModel(self.model, self.layers, fused)

    def fresh(self) -> nn.Module:
        """The model as it lies in its folder."""
        pictures = (self.folder / "processor_config.json").exists()
        auto = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
        config = AutoConfig.from_pretrained(self.folder)
        for key, value in self.config.items():
            setattr(config.get_text_config(), key, value)
        return auto.from_pretrained(self.folder, config=config, dtype=self.dtype).eval().to(self.device)

    def scorer(self, questions: list[Question]) -> Scorer:
        return Scorer(self.stacked, questions, STOPS, 0)

    def factors(self, *numbers: int) -> Factors:
        """The factors of some adapters, all by default."""
        chosen = [self.adapters[number] for number in numbers or range(len(self.adapters))]
        where = self.layers, self.scaling, self.model.device, self.dtype
        if chosen == [None]:
            return stack_checkpoints([None, self.adapters[1]], *where).select([0])
        return stack_checkpoints(chosen, *where)

    @contextmanager
    def by_peft(self, number: int) -> Iterator[nn.Module]:
        """PEFT's model with one adapter."""
        with torch.inference_mode():
            if number == 0:
                with self.peft.disable_adapter():
                    yield self.peft
            else:
                set_peft_model_state_dict(self.peft, self.adapters[number])
                yield self.peft

    def likelihoods(self, number: int, question: Question) -> tuple[list[float], float]:
        """The log-likelihood of each option's text and the loss of the right response, each in its own forward pass."""
        with self.by_peft(number) as model:
            texts = [
                log_likelihood(model, question.tokens, option.tokens[: option.text_length])
                for option in question.continuations
            ]
            return texts, -log_likelihood(model, question.tokens, question.continuations[question.right].tokens)

    def greedy(self, number: int, prompt: list[int], most: int = LONGEST) -> list[int]:
        """An adapter's answer by transformers' greedy generation, with the token that ends it."""
        if (number, most, *prompt) in self.answers:
            return self.answers[number, most, *prompt]
        settings = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=STOPS, pad_token_id=0)
        tokens = torch.tensor([prompt], device=self.device)
        with self.by_peft(number) as model:
            answer = model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
            )
        self.answers[number, most, *prompt] = answer[0, len(prompt) :].tolist()
        return self.answers[number, most, *prompt]

    def questions_for(self, prompts: list[list[int]], seed: int = 0) -> list[Question]:
        """Questions with these prompts whose options are often what one of the adapters generates.

        Their options share beginnings: the second differs from the first in the last token alone.
        """
        some, found = random.Random(seed), []
        for place, prompt in enumerate(prompts):
            answer = [token for token in self.greedy(place % len(self.adapters), prompt) if token not in STOPS]
            first = [*answer[: some.randint(1, 5)], *(some.choices(WORDS) if place % 4 == 3 or not answer else [])]
            second = [*first[:-1], next(word for word in WORDS if word != first[-1])]
            others = [some.choices(WORDS, k=some.randint(1, 6)) for _ in range(some.randint(0, 3))]
            others = [other for other in others if other[0] not in (first[0], second[0])]
            options = [first, second, *{other[0]: other for other in others}.values()]
            some.shuffle(options)
            found.append(question(prompt, options, some.randrange(len(options))))
        return found


def config_in(folder: Path) -> dict[str, Any]:
    """The checked content of the adapter_config.json that PEFT wrote into a folder."""
    return adapter_config.read(folder / "adapter_config.json")


def question(prompt: list[int], options: list[list[int]], right: int = 0) -> Question:
    """A question made of tokens."""
    continuations = [
        questions.Continuation(f"[{place}]", [*option, *ENDS], len(option)) for place, option in enumerate(options)
    ]
    return Question(prompt, continuations, right, continuations[right].text, "")


def prompts(lengths: list[int], shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Random prompts of so many tokens after a shared prefix of `shared` tokens."""
    some = random.Random(seed)
    beginning = some.choices(WORDS, k=shared)
    return [[*beginning, *some.choices(WORDS, k=length)] for length in lengths]


def log_likelihood(model: nn.Module, prompt: list[int], response: list[int]) -> float:
    """The log-likelihood of a response to a prompt, by one forward pass over both."""
    tokens = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None]).sum())
