"""A collection's scores: groups of checkpoints, those that wait on a GPU, and the comparison with PEFT."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from helpers.model_fixtures import Scene, config_in, prompts, question

from paragen.collection.evaluation import BASE
from paragen.common.cli import UserError
from paragen.scoring import attention, collection_scorer, peft_comparison
from paragen.scoring.collection_scorer import CollectionScorer
from paragen.scoring.factor_reader import FactorReader, MemoryReader
from paragen.scoring.questions import Question


class SceneReader(FactorReader):
    """Stacks a scene's adapters, whose numbers are the steps; 0 is the base.

    Args:
        broken: a step whose checkpoint cannot be read.
    """

    def __init__(self, scene: Scene, on_gpu: bool, broken: int | None):
        self.scene, self.on_gpu, self.broken, self.compared = scene, on_gpu, broken, 1
        self.layers, self.config, self.name = scene.layers, {}, "adapters"
        self.sizes = []  # of the groups that were stacked

    def stack(self, steps):
        self.sizes.append(len(steps))
        if self.broken in steps:
            raise UserError(f"checkpoint {self.broken} is broken")
        return self.scene.factors(*[0 if step == BASE else step for step in steps])

    def verify(self, steps):
        pass

    def read(self, step):
        return self.scene.adapters[step]


class SceneScorer(CollectionScorer):
    """Scores a scene's adapters on choices."""

    def __init__(self, scene: Scene, questions: list[Question], on_gpu: bool, broken: int | None = None):
        self.reader = SceneReader(scene, on_gpu, broken)
        self.base, self.questions, self.metric = (
            SimpleNamespace(
                model=scene.model,
                dtype=scene.dtype,
                use_fused_kernels=lambda: None,
                another=lambda: SimpleNamespace(model="loaded again"),
            ),
            questions,
            "choice",
        )
        tokenizer = SimpleNamespace(pad_token_id=3)
        self.encoder, self.scene = SimpleNamespace(decode=str, stops=[1], tokenizer=tokenizer), scene

    def groups(self) -> Iterator[dict]:
        return self._score_all(self.scene.scorer(self.questions), [BASE, 1, 2, 3, 4, 5, 6])

    def check(self, compared: list[Question], expected: list[list[float]]) -> None:
        self._check(self.scene.scorer(compared), expected)


def test_groups_wait_for_each_other_on_a_gpu_and_get_the_same_scores(every_model, monkeypatch):
    scene = Scene(every_model / "smollm2-135m", count=6)
    questions = scene.questions_for(prompts([5, 20, 11, 30]))
    monkeypatch.setattr(collection_scorer, "GROUP_SIZE", 2)
    monkeypatch.setattr(collection_scorer, "MAX_WAITING", 2)
    cpu, gpu = SceneScorer(scene, questions, False), SceneScorer(scene, questions, True)
    plain, waiting = list(cpu.groups()), list(gpu.groups())
    assert [[*one] for one in plain] == [[BASE, 1], [2, 3], [4, 5], [6]] and cpu.reader.sizes == [2, 2, 2, 1]
    assert [[*one] for one in waiting] == [[BASE, 1, 2, 3], [4, 5, 6]] and gpu.reader.sizes == [2, 2, 2, 1]
    merged = [{step: score for one in both for step, score in one.items()} for both in (plain, waiting)]
    assert merged[0] == merged[1]
    assert len({str(score) for score in merged[0].values()}) > 3
    answers = [answer for score in merged[0].values() for answer in score.answers]
    assert any("," in answer for answer in answers), "some are generated tokens"
    assert any(answer in questions[0].options for answer in answers), "some stay among the options"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_was_scored_before_a_broken_checkpoint_is_kept(every_model, monkeypatch, on_gpu):
    scene = Scene(every_model / "smollm2-135m", count=6)
    monkeypatch.setattr(collection_scorer, "GROUP_SIZE", 2)
    found = []
    with pytest.raises(UserError, match="checkpoint 5 is broken"):
        for group in SceneScorer(scene, scene.questions_for(prompts([5, 20])), on_gpu, broken=5).groups():
            found += group
    assert found == [BASE, 1, 2, 3]


@pytest.mark.parametrize(("times", "is_enough"), [(1, True), (2, False)])
def test_adapters_that_do_not_fit_are_tried_once_more_with_free_memory(times, is_enough):
    failures = [torch.OutOfMemoryError()] * times

    def work():
        if failures:
            raise failures.pop()
        return "factors"

    if is_enough:
        assert collection_scorer.retry_with_free_memory(work, work) == "factors"
    else:
        with pytest.raises(UserError, match="^out of device memory for the adapters; score on another device$"):
            collection_scorer.retry_with_free_memory(work, work)


def test_a_model_that_our_attention_gets_wrong_continues_with_its_own(every_model, tmp_path, monkeypatch):
    scene = Scene(every_model / "qwen2.5-0.5b", count=1, dtype=torch.float32, fused=True)
    scene.peft.save_pretrained(tmp_path)
    compared = [question(prompt, [[*range(20, 30)], [21]]) for prompt in prompts([5, 40], 12)]
    expected = peft_comparison.peft_losses(scene.fresh(), config_in(tmp_path), scene.adapters[1], compared)
    scorer = SceneScorer(scene, compared, False)
    scorer.check(compared, expected)
    assert attention.has_shared_attention(scene.model)
    monkeypatch.setattr(attention.PrefixLayer, "update", lambda _, keys, values, *more: (keys, values))
    scorer.check(compared, expected)
    assert not attention.has_shared_attention(scene.model)
    with pytest.raises(UserError, match="the scores of this model would be wrong"):
        scorer.check(compared, [[one + 1 for one in losses] for losses in expected])


OFF = {  # by how much of itself the loss of each of many questions is off, from the shortest to the longest
    "rounding": [0.5, 0, 0, -0.5, *[0] * 28], "everywhere": [0.5, -0.5] * 16, "to one side": [0.5, *[0.1] * 31],
}  # fmt: skip


@pytest.mark.parametrize("how", OFF)
def test_where_rounding_moves_a_short_response_many_are_compared_together(every_model, monkeypatch, how):
    """Of large adapters bfloat16 rounds so much that a short response is off by half a nat, here and by PEFT itself."""
    scene = Scene(every_model / "llama-7b", count=1, dtype=torch.float32)
    questions = [question(prompt, [[*range(20, 22)], [21]]) for prompt in prompts([*range(5, 45)])]
    scorer, compared = SceneScorer(scene, questions, False), []
    scorer.base.dtype = torch.bfloat16

    def losses(model, _config, _tensors, some, _name):
        compared.append((len(some), "as it was" if model is scene.model else model))
        both = scene.scorer(some).score(scene.factors())
        return [[one.loss * (1 + off) for one, off in zip(results, OFF[how], strict=False)] for results in both]

    monkeypatch.setattr(peft_comparison, "peft_losses", losses)
    if how == "rounding":
        assert next(scorer.scores([1])).keys() == {1}
    else:
        with pytest.raises(UserError, match="the scores of this model would be wrong"):
            next(scorer.scores([1]))
    assert compared == [(2, "as it was"), (peft_comparison.MANY, "loaded again")]
    scorer.base.dtype = torch.float32
    with pytest.raises(UserError, match="the scores of this model would be wrong"):
        next(scorer.scores([1]))
    assert compared[2:] == [(2, "as it was")], "float32 does not round so much"


def test_of_adapters_in_memory_the_smallest_is_compared_with_peft():
    """A wild one, as a generator can write it, is not: it amplifies what bfloat16 rounds."""
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    adapters = {
        number: {key.format("A"): torch.full((2, 4), size), key.format("B"): torch.full((4, 2), size)}
        for number, size in ((1, 3.0), (2, 0.5), (3, 90.0))
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    reader = MemoryReader(adapters, config, SimpleNamespace(), "adapters")
    assert reader.compared == 2 and len(reader.layers) == 1
