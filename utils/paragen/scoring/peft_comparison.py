"""Makes sure that scores are right: PEFT's own forward pass on some questions has to give the same."""

from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from paragen.collection import adapter_config
from paragen.common import cli
from paragen.common.cli import UserError
from paragen.packed.model import unload_adapter
from paragen.scoring import decoding
from paragen.scoring.factors import Factors
from paragen.scoring.generation import before_stop
from paragen.scoring.likelihoods import QuestionResult
from paragen.scoring.questions import Question
from paragen.scoring.scorer import Scorer

MAX_TOKENS = 1024  # of a compared question; PEFT's forward pass computes the logits of all tokens
MANY = 32  # questions that are compared together where one of two was off
ANSWER_TOKENS = 8  # of an answer that are compared
# Nats per token. In bfloat16, of 48 short responses of SmolLM2-135M the worst is off by 0.12, here and by PEFT itself
# (bench/score_agreement.py, against float32); float16 has three bits more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.25}
TOGETHER = 4  # so many times less where many questions are compared together: rounding averages out, a mistake does not
TIE = {torch.float32: 1e-2, torch.float16: 0.2, torch.bfloat16: 1.0}  # nats between tokens that are as good as equal
LARGE_LOGIT = 32  # which bfloat16 rounds to an eighth


class WrongScores(UserError):
    """What is computed here is not what PEFT computes."""


def questions_to_compare(questions: list[Question], most: int = 2) -> list[Question]:
    """Some questions, from the shortest to the longest of at most MAX_TOKENS tokens; two, where there is one, too."""
    by_length = sorted(questions, key=_length)
    short = [question for question in by_length if _length(question) <= MAX_TOKENS] or by_length[:1]
    count = max(2, min(most, len(short)))
    return [short[number * (len(short) - 1) // (count - 1)] for number in range(count)]


def _length(question: Question) -> int:
    return len(question.tokens) + len(question.continuations[0].tokens)


def peft_losses(
    model: PreTrainedModel,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    questions: list[Question],
    name: str = "the adapter",
) -> list[list[float]]:
    """What PEFT computes for some questions: the negative log-likelihood of each right response, in nats.

    Args:
        model: the base model; it is left as it was.
        config: the content of its adapter_config.json, checked.
        tensors: an adapter by PEFT's keys.
        questions: the compared ones.
        name: what messages call the adapter.

    Returns two lists, for the base model and for the adapter. Raises UserError where PEFT does not load the adapter
    onto the base model.
    """
    try:
        adapted = PeftModel(model, adapter_config.lora_config(config))
        set_peft_model_state_dict(adapted, tensors)
    except (ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        if cli.storage_fault(error) is not None or cli.is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:300]
        raise UserError(f"{name}: PEFT does not load it onto its base model: {text}") from error
    adapted.eval()
    with adapted.disable_adapter():
        base = [plain_loss(adapted, question) for question in questions]
    both = [base, [plain_loss(adapted, question) for question in questions]]
    unload_adapter(adapted)
    return both


def check_losses(found: list[list[QuestionResult]], expected: list[list[float]], dtype: torch.dtype) -> None:
    """Raise WrongScores unless losses are PEFT's, within TOLERANCE: each of two questions; of more the median one, and
    all together within a share of it.

    Args:
        found: what the base model and a checkpoint make of the compared questions.
        expected: what `peft_losses` returned for them.
        dtype: what the model computes in.
    """
    for results, losses in zip(found, expected, strict=True):
        pairs = [(one.loss, loss, one.token_count) for one, loss in zip(results, losses, strict=True)]
        worst = max(pairs, key=_off) if len(pairs) <= 2 else sorted(pairs, key=_off)[len(pairs) // 2]
        together = sum(own for own, _, _ in pairs), sum(losses), sum(tokens for _, _, tokens in pairs)
        for pair, bound in ((worst, TOLERANCE[dtype]), (together, TOLERANCE[dtype] / TOGETHER)):
            if not _off(pair) <= bound and (pair is worst or len(pairs) > 2):
                raise _wrong_scores(abs(pair[0] - pair[1]) / pair[2], "PEFT's own forward pass")


def _off(pair: tuple[float, float, int]) -> float:
    """How far a loss is off, in nats per token; in parts of PEFT's own where that is above 1. Infinite for NaN.

    Args:
        pair: the loss, PEFT's, and over how many tokens both are summed.
    """
    own, loss, tokens = pair
    off = abs(own - loss) / tokens / max(1.0, loss / tokens)
    return off if off == off else float("inf")


def check_answers(scorer: Scorer, factors: Factors, dtype: torch.dtype) -> None:
    """Raise WrongScores unless a plain forward pass finds each token of generated answers the most likely, or a tie.

    Args:
        scorer: with the compared questions.
        factors: those of one adapter whose losses are known to be right.
        dtype: what the model computes in.
    """
    if not decoding.supports(scorer.model):
        return  # transformers generates
    prompts = [question.tokens for question in scorer.questions]
    with torch.inference_mode(), scorer.stacked.using(factors):
        rows = decoding.generate_greedily(scorer.model, prompts, ANSWER_TOKENS, scorer.stops, scorer.pad)
        for prompt, row in zip(prompts, rows, strict=True):
            answer = row[: len(before_stop(row, scorer.stops)) + 1]  # with the token that ends it
            off = greedy_gap(scorer.model, prompt, answer)
            if not off <= TIE[dtype]:
                raise _wrong_scores(off, "the forward pass behind the same tokens")


def plain_loss(model: PreTrainedModel | PeftModel, question: Question) -> float:
    """The negative log-likelihood of a question's right response in nats, by the model's plain forward pass."""
    response = question.continuations[question.right].tokens
    logits = plain_logits(model, question.tokens, response)
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(response, device=logits.device)[:, None])
    return -float(chosen.double().sum())


def greedy_gap(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """The largest difference, in nats, between the most likely token of a plain forward pass and an answer's token.

    Differences between logits above LARGE_LOGIT are scaled down, because so large logits are rounded more coarsely.
    """
    logits = plain_logits(model, prompt, answer)
    likeliest = logits.amax(-1)
    off = likeliest - logits.gather(1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
    return float((off / (likeliest.abs() / LARGE_LOGIT).clamp(min=1)).amax())


def plain_logits(model: PreTrainedModel | PeftModel, prompt: list[int], response: list[int]) -> Tensor:
    """The logits that predict each token of a response, by a plain forward pass: [tokens, vocabulary] float32."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + response], device=model.device)).logits
        return logits[0, len(prompt) - 1 : -1].float()


def _wrong_scores(off: float, against: str) -> WrongScores:
    return WrongScores(
        f"the scores of this model would be wrong (by {off:.1e} nats a token against {against}), so none are made; "
        "export with FORMAT=peft and score with another tool"
    )
