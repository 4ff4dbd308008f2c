"""Scores are those of the plain model: likelihoods as by PEFT row by row, answers as by transformers' generation."""

import pytest
import torch
from helpers import tiny_models
from helpers.model_fixtures import CLOSE, LONGEST, STOPS, Scene, config_in, prompts, question
from transformers import GenerationConfig
from transformers.models.llama.modeling_llama import LlamaMLP, apply_rotary_pos_emb

from paragen.common import devices
from paragen.common.cli import UserError
from paragen.scoring import attention, decoding, likelihoods, peft_comparison, stacked_model
from paragen.scoring.factors import check_plain_lora, stack_checkpoints
from paragen.scoring.generation import before_stop
from paragen.scoring.likelihoods import QuestionResult
from paragen.scoring.questions import Question
from paragen.scoring.scorer import MIN_TOKENS, Scorer
from paragen.scoring.stacked_model import StackedModel

LENGTHS = [1, 23, 4, 60, 17, 30]


def targets(name: str) -> dict:
    known = tiny_models.NAMES.get(name) or tiny_models.KIN[name]
    names = known.lora_target.split(",")
    return {} if names == ["all"] else {"target_modules": names, "fan_in_fan_out": name == "gpt2"}


def assert_right(scene: Scene, questions: list[Question], off: float = CLOSE) -> list[list[QuestionResult]]:
    """What is computed for all adapters at once is what PEFT and transformers make of each question alone."""
    scorer = scene.scorer(questions)
    found = scorer.score(scene.factors())
    open_numbers = [[number for number, result in enumerate(results) if result.needs_generation] for results in found]
    generated = scorer.generate(scene.factors(), open_numbers, LONGEST)
    for adapter, results in enumerate(found):
        assert list(generated[adapter]) != [] or not open_numbers[adapter]
        for number, (one, result) in enumerate(zip(questions, results, strict=True)):
            texts, loss = scene.likelihoods(adapter, one)
            assert result.likelihoods == pytest.approx(texts, abs=off)
            assert result.loss == pytest.approx(loss, abs=off) and result.token_count == len(
                one.continuations[one.right].tokens
            )
            said = scene.greedy(adapter, one.tokens)
            if result.needs_generation:
                assert result.answer is None
                assert generated[adapter][number] == before_stop(said, STOPS)
            else:
                assert result.answer == first_option(one, said)
    return found


def first_option(one: Question, said: list[int]) -> int | None:
    """The option that a text begins with."""
    return next(
        (
            number
            for number, option in enumerate(one.continuations)
            if said[: option.text_length] == option.tokens[: option.text_length]
        ),
        None,
    )


# Fused, one of each kind of block; `make test-all` has the others: biases and grouped heads, a window, Conv1D.
QUICK_FUSED = ("qwen2.5-0.5b", "gemma-3-4b", "gpt2")
# Plain, all but Gemma's text alone, which is scored below with a narrow window.
ARCHITECTURES = [
    pytest.param(
        name, fused, marks=[pytest.mark.slow] if (fused and name not in QUICK_FUSED) or name in tiny_models.KIN else []
    )
    for name in (*tiny_models.NAMES, *tiny_models.KIN)
    for fused in (False, True)
]


@pytest.mark.parametrize(("name", "fused"), ARCHITECTURES)
def test_every_architecture_gets_the_scores_and_answers_of_the_plain_model(every_model, name, fused):
    scene = Scene(every_model / name, lora=targets(name), fused=fused)
    for shared in (0, 12):
        found = assert_right(scene, scene.questions_for(prompts(LENGTHS, shared)))
        answers = [[result.answer for result in results] for results in found]
        assert len({tuple(one) for one in answers}) > 1, "the adapters answer differently"
        assert any(answer is not None for one in answers for answer in one)
        assert any(result.needs_generation for results in found for result in results)


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def test_layers_that_share_an_input_share_a_product(every_model, monkeypatch, name):
    """Also gate and up, which a GPU's small batches take one by one; and where only some of q, k and v are adapted."""
    monkeypatch.setattr(stacked_model, "is_gated_faster", lambda *_: False)
    for lora in ({}, {"target_modules": ["v_proj", "q_proj", "up_proj", "gate_proj", "down_proj"]}):
        scene = Scene(every_model / name, lora=lora, fused=True)
        assert {len(one.layers) for one in scene.stacked.input_groups} == {2 if lora else 3, 2}
        assert_right(scene, scene.questions_for(prompts(LENGTHS, 12)))
        assert all(one.x is None and one.hidden is None for one in scene.stacked.input_groups)


def test_rotary_positions_of_rows_joined_into_one_are_the_same():
    torch.manual_seed(0)
    query, key = torch.randn(3, 5, 4, 8).transpose(1, 2), torch.randn(3, 5, 2, 8).transpose(1, 2)
    for rows in (1, 3):
        cos, sin = torch.randn(2, rows, 5, 8)
        found = attention.as_one_row(apply_rotary_pos_emb)(query, key, cos, sin)
        for one, plain in zip(found, apply_rotary_pos_emb(query, key, cos, sin), strict=True):
            assert torch.equal(one, plain)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["mistral-7b", "gemma-3-text", pytest.param("gemma-3-4b", marks=pytest.mark.slow)])
def test_rows_longer_than_the_sliding_window_are_scored_with_it(every_model, name, fused):
    """All of Mistral's layers and one of Gemma's two see the last 7 tokens alone, also in prefixes and options."""
    narrow, wide = (Scene(every_model / name, config={"sliding_window": window}, fused=fused) for window in (7, 128))
    for shared in (0, 12):
        questions = narrow.questions_for(prompts([3, 40, 8], shared))
        questions.append(question(prompts([20], shared)[0], [[*range(50, 70)], [50, 51], [*range(50, 65)]]))
        assert_right(narrow, questions)
    assert abs(narrow.likelihoods(1, questions[1])[1] - wide.likelihoods(1, questions[1])[1]) > 0.01


def test_an_answer_that_ends_before_any_option_is_known_without_generating_it(every_model):
    scene = Scene(every_model / "smollm2-135m", count=1)
    questions = [question(prompt, [[20], [21]]) for prompt in prompts([30])]
    for adapter in (0, 1):
        first = scene.greedy(adapter, questions[0].tokens)[0]
        scorer = Scorer(scene.stacked, questions, [first], 0)
        (result,) = scorer.score(scene.factors(adapter))[0]
        assert (result.answer, result.needs_generation) == (None, False)
        assert scorer.generate(scene.factors(adapter), [[0]], LONGEST) == [{0: []}]


def test_unusual_questions_are_scored_as_any_other(every_model):
    scene = Scene(every_model / "smollm2-135m", count=1)
    some = prompts([30, 1, 5])
    sets = {
        "one row": [question(some[0], [[20], [21]])],
        "one row of one token": [question(some[1], [[20], [21, 22]], 1)],
        "one prompt for all": [question(some[0], [[20 + n], [30, 40 + n]]) for n in range(5)],
        "one prompt begins another": [question(some[0][:n], [[20, 21], [22]]) for n in (9, 10, 30)],
        "single tokens": [question(prompt, [[20], [21], [22]], 2) for prompt in some],
        "a stem": [question(prompt, [[*range(20, 29), last] for last in (60, 61, 62)], 1) for prompt in some],
        "of all lengths": [question(prompt, [[20], [21, 22], list(range(23, 40))], 1) for prompt in some],
        "many": [question(prompt, [[9, tens, ones] for tens in (30, 31) for ones in range(40, 45)]) for prompt in some],
        "long chains": [question(prompt, [[*range(20, 60), 20, 21]]) for prompt in some],
        "responses of one token": [question(prompt, [[20]]) for prompt in some],
    }  # fmt: skip
    for questions in sets.values():
        assert_right(scene, questions)


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 1, "lora_alpha": 1}, {"target_modules": ["v_proj"]}, {"r": 5, "lora_alpha": 3, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
    ids=["rank 1", "one kind of layer", "rank-stabilised", "some layers of one block"],
)  # fmt: skip
def test_every_shape_of_adapter_is_applied_as_peft_applies_it(every_model, lora):
    scene = Scene(every_model / "qwen2.5-0.5b", lora=lora)
    found = assert_right(scene, scene.questions_for(prompts(LENGTHS, 12)))
    losses = [sum(result.loss for result in results) for results in found]
    assert min(abs(losses[one] - losses[other]) for one, other in ((0, 1), (0, 2), (1, 2))) > 0.1


@pytest.fixture(scope="module")
def fifteen(every_model) -> Scene:
    """Fifteen adapters, in float32."""
    return Scene(every_model / "smollm2-135m", count=15, dtype=torch.float32)


@pytest.fixture(scope="module")
def answered(fifteen):
    """Questions with a shared prefix, and what each adapter answers when all go through the model together."""
    questions = fifteen.questions_for(prompts([1, 9, 3, 33, 2, 14, 5, 70, 21, 8], 10))
    return questions, everything(fifteen, questions)


def everything(
    scene: Scene, questions: list[Question], *adapters: int, token_limit: int | None = None
) -> list[list[tuple]]:
    """By adapter, by question: its result and the tokens of an answer, which is generated even where it is known."""
    scorer = scene.scorer(questions)
    scorer.passes.token_limit = token_limit or scorer.passes.token_limit
    results = scorer.score(scene.factors(*adapters))
    said = scorer.generate(scene.factors(*adapters), [list(range(len(questions)))] * len(results), LONGEST)
    return [
        [(result, answer[number]) for number, result in enumerate(of_one)]
        for of_one, answer in zip(results, said, strict=True)
    ]


def assert_same(found: list[tuple], expected: list[tuple]) -> None:
    for (result, said), (other, told) in zip(found, expected, strict=True):
        assert said == told
        assert result.likelihoods == pytest.approx(other.likelihoods, abs=1e-4)
        assert result.loss == pytest.approx(other.loss, abs=1e-4)
        assert (result.token_count, result.answer, result.needs_generation) == (
            other.token_count,
            other.answer,
            other.needs_generation,
        )


def test_a_checkpoint_alone_has_the_scores_it_has_among_others(fifteen, answered):
    questions, together = answered
    assert len({str(said) for said in together}) == 16, "no two say the same"
    for number in (0, 1, 7, 15):
        assert_same(everything(fifteen, questions, number)[0], together[number])
    for one, number in zip(everything(fifteen, questions, 9, 0, 3), (9, 0, 3), strict=True):
        assert_same(one, together[number])


@pytest.mark.parametrize("token_limit", [32, 100, 1000, 10**6])
def test_how_much_goes_through_the_model_at_once_changes_no_score(fifteen, answered, token_limit):
    questions, together = answered
    for one, number in zip(everything(fifteen, questions, 2, 0, token_limit=token_limit), (2, 0), strict=True):
        assert_same(one, together[number])


def test_the_order_and_the_number_of_rows_change_no_score(fifteen, answered):
    questions, together = answered
    some = [7, 2, 0, 9, 5]
    found = everything(fifteen, [questions[number] for number in some], 4, 11)
    for one, adapter in zip(found, (4, 11), strict=True):
        assert_same(one, [together[adapter][number] for number in some])
    for number in (7, 0):
        assert_same(everything(fifteen, [questions[number]], 4)[0], [together[4][number]])


def test_few_logits_at_once_change_no_score(fifteen, answered, monkeypatch):
    questions, together = answered
    monkeypatch.setattr(likelihoods, "MAX_LOGITS", {"cpu": 1})
    monkeypatch.setattr(likelihoods, "LOGIT_ROWS", 1)
    assert_same(everything(fifteen, questions, 6)[0], together[6])


def test_each_adapter_answers_its_own_questions(fifteen, answered):
    questions, together = answered
    wanted = [[3], [], [9, 0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 2]]
    found = fifteen.scorer(questions).generate(fifteen.factors(1, 2, 3, 4), wanted, LONGEST)
    for adapter, (numbers, said) in enumerate(zip(wanted, found, strict=True), 1):
        assert said == {number: together[adapter][number][1] for number in numbers}


def test_a_model_that_wants_to_be_sampled_or_penalised_answers_greedily(every_model):
    scene = Scene(every_model / "qwen2.5-0.5b")
    scene.model.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, top_k=3, repetition_penalty=4.0, no_repeat_ngram_size=2, min_new_tokens=5,
        eos_token_id=[11, 12], bad_words_ids=[[one] for one in range(20, 90)], num_beams=2, max_length=7,
    )  # fmt: skip
    assert_right(scene, scene.questions_for(prompts(LENGTHS)))


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_an_answer_ends_where_the_model_does(every_model, name):
    """Both have learned positions for 128 tokens, and would fail at later ones."""
    scene = Scene(every_model / name, lora=targets(name))
    questions = [question(prompt, [[20], [21]]) for prompt in prompts([127, 124, 122, 124, 30, 10])]
    some = [list(range(len(questions))), [4, 1], [5]]
    found = scene.scorer(questions).generate(scene.factors(), some, LONGEST)
    for adapter, (numbers, answers) in enumerate(zip(some, found, strict=True)):
        assert answers.keys() == set(numbers)
        for number, said in answers.items():
            room = min(LONGEST, 128 - len(questions[number].tokens))
            assert said == before_stop(scene.greedy(adapter, questions[number].tokens, room), STOPS)


@pytest.mark.parametrize("name", ["llama-7b", "gemma-3-text", "gpt2", "bert"])
def test_eager_attention_gives_the_same(every_model, name):
    """Some models have no other."""
    scene = Scene(every_model / name, lora=targets(name), dtype=torch.float32)
    scene.model.set_attn_implementation("eager")
    assert_right(scene, scene.questions_for(prompts([30, 4, 22], 10)), 1e-4)


class LimitedMemory:
    """A device that is out of memory when more than `most` tokens go into a model at once."""

    def __init__(self, model: torch.nn.Module, most: int):
        self.most, self.sizes = most, []
        self.hook = model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, _model, _inputs, named) -> None:
        self.sizes.append(named["input_ids"].numel())
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError(f"{self.sizes[-1]} tokens")


def test_without_memory_for_a_batch_smaller_ones_give_the_same(fifteen, answered):
    questions, together = answered
    scorer = fifteen.scorer(questions)
    memory = LimitedMemory(fifteen.model, 300)
    try:
        results = scorer.score(fifteen.factors(5, 6))
        said = scorer.generate(fifteen.factors(5, 6), [list(range(len(questions)))] * 2, LONGEST)
    finally:
        memory.hook.remove()
    assert max(memory.sizes) > 300 and scorer.passes.token_limit < likelihoods.MAX_TOKENS["cpu"]
    for adapter, one, answer in zip((5, 6), results, said, strict=True):
        assert_same([(result, answer[number]) for number, result in enumerate(one)], together[adapter])


def test_without_memory_for_a_row_of_two_adapters_they_are_scored_one_after_the_other(fifteen, answered):
    questions, together = answered
    longest = max(len(one.tokens) + len(one.continuations[0].tokens) for one in questions)
    scorer = fifteen.scorer(questions)
    scorer.passes.token_limit = 2 * MIN_TOKENS
    memory = LimitedMemory(fifteen.model, longest + LONGEST + 8)
    try:
        results = scorer.score(fifteen.factors(5, 6))
        said = scorer.generate(fifteen.factors(5, 6), [list(range(len(questions)))] * 2, LONGEST)
    finally:
        memory.hook.remove()
    assert max(memory.sizes) > longest + LONGEST + 8
    for adapter, one, answer in zip((5, 6), results, said, strict=True):
        assert_same([(result, answer[number]) for number, result in enumerate(one)], together[adapter])


def test_without_memory_for_one_row_one_line_says_so(fifteen, answered):
    scorer = fifteen.scorer(answered[0])
    scorer.passes.token_limit = 2 * MIN_TOKENS
    memory = LimitedMemory(fifteen.model, 40)
    try:
        with pytest.raises(UserError, match="^out of device memory, even with single rows; score on another device$"):
            scorer.score(fifteen.factors(5))
        with pytest.raises(UserError, match="^out of device memory"):
            scorer.generate(fifteen.factors(5), [[7]], LONGEST)
    finally:
        memory.hook.remove()
    assert_same(everything(fifteen, answered[0], 5)[0], answered[1][5])  # the adapters of the failed run are gone


@pytest.fixture
def compared(every_model, tmp_path):
    """A collection's base and checkpoint, and what PEFT makes of two questions by them."""
    scene = Scene(every_model / "llama-7b", count=1, dtype=torch.float32)
    scene.peft.save_pretrained(tmp_path)
    questions = [question(prompt, [[*range(20, 30)], [21]]) for prompt in prompts([5, 40])]
    return (
        scene,
        questions,
        peft_comparison.peft_losses(scene.fresh(), config_in(tmp_path), scene.adapters[1], questions),
    )


def test_what_peft_computes_too_is_accepted(compared):
    scene, questions, theirs = compared
    peft_comparison.check_losses(scene.scorer(questions).score(scene.factors()), theirs, torch.float32)
    assert theirs == [
        pytest.approx([scene.likelihoods(number, one)[1] for one in questions], abs=1e-4) for number in (0, 1)
    ]


@pytest.mark.parametrize("how", ["scaling", "a layer", "a factor", "the base", "not a number"])
def test_what_peft_computes_otherwise_is_refused(compared, how):
    scene, questions, theirs = compared
    factors = scene.factors()
    last = list(factors.b)[-1]
    if how == "scaling":
        factors = stack_checkpoints(scene.adapters, scene.layers, scene.scaling * 1.05, scene.model.device, scene.dtype)
    elif how == "a layer":
        factors.b[last].zero_()
    elif how == "a factor":
        factors.a[last][1] = factors.a[last][1].flip(0)
    elif how == "the base":
        factors.b[last][0] = 0.1
        factors.a[last][0] = 0.1
    else:
        factors.b[last][1, 0, 0] = torch.nan
    with pytest.raises(UserError, match="the scores of this model would be wrong .* so none are made"):
        peft_comparison.check_losses(scene.scorer(questions).score(factors), theirs, torch.float32)


@pytest.fixture
def answering(every_model):
    """A scorer and an adapter, whose answers are generated by our own decoding."""
    scene = Scene(every_model / "qwen2.5-0.5b", count=1, dtype=torch.float32, fused=True)
    scorer = scene.scorer(scene.questions_for(prompts([5, 40])))
    peft_comparison.check_answers(scorer, scene.factors(1), torch.float32)
    return scorer, scene.factors(1)


@pytest.mark.parametrize("how", ["a token late", "every third token", "ends at once", "ends later"])
def test_answers_that_no_forward_pass_gives_are_refused(answering, monkeypatch, how):
    mask, greedy = decoding.GeneratedRows._mask, decoding.generate_greedily
    off = {"a token late": (1, 1), "every third token": (3, 0)}.get(how, (1, 0))
    monkeypatch.setattr(
        decoding.GeneratedRows, "_mask", lambda rows, at, places: mask(rows, at, off[0] * places + off[1])
    )
    if how.startswith("ends"):
        keep = 0 if how == "ends at once" else 2
        monkeypatch.setattr(
            decoding, "generate_greedily", lambda *given: [row[:keep] + STOPS for row in greedy(*given)]
        )
    with pytest.raises(UserError, match="the scores of this model would be wrong .* the same tokens"):
        peft_comparison.check_answers(answering[0], answering[1], torch.float32)


def test_scores_of_peft_leave_the_model_as_it_was(every_model, compared, tmp_path):
    scene, questions, theirs = compared
    model = scene.fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        assert peft_comparison.peft_losses(model, config_in(tmp_path), scene.adapters[1], questions) == theirs
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_closed_model_has_its_own_layers_again(every_model, fused):
    scene = Scene(every_model / "smollm2-135m", count=1, fused=fused)
    before = dict(scene.fresh().named_modules())
    assert (scene.model.config._attn_implementation == "sdpa") != fused
    scene.stacked.close()
    assert scene.model.config._attn_implementation == "sdpa"
    assert {name: type(module) for name, module in scene.model.named_modules()} == {
        name: type(module) for name, module in before.items()
    }


GATED = {"llama-7b", "smollm2-135m", "mistral-7b", "qwen2.5-0.5b", "qwen2.5-vl-3b"}


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.KIN])
def test_silu_gated_blocks_apply_their_factors_in_the_activation(every_model, name):
    scene = Scene(every_model / name, count=1, lora=targets(name), fused=True)
    assert len(scene.stacked.gated) == (2 if name in GATED else 0)


def test_an_activation_that_does_more_is_left_as_it_is(every_model):
    class Scaled(LlamaMLP):
        def forward(self, x):
            return 1.1 * super().forward(x)

    scene = Scene(every_model / "llama-7b", count=1)
    model = scene.fresh()
    model.model.layers[1].mlp.__class__ = Scaled
    assert [*StackedModel(model, scene.layers, fused=True).gated] == ["model.layers.0.mlp"]


def test_an_activation_with_an_adapter_on_part_of_it_is_left_as_it_is(every_model):
    lora = {"target_modules": ["gate_proj", "down_proj", "q_proj"]}
    scene = Scene(every_model / "qwen2.5-0.5b", lora=lora, fused=True)
    assert not scene.stacked.gated
    assert_right(scene, scene.questions_for(prompts(LENGTHS, 12)))


def test_answers_that_have_ended_are_not_continued(every_model):
    scene = Scene(every_model / "smollm2-135m", fused=True)
    some = prompts([30, 4, 11])
    said = [scene.greedy(1, prompt)[0] for prompt in some]
    passes = []
    hook = scene.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with torch.inference_mode(), scene.stacked.using(scene.factors(1)):
        long = decoding.generate_greedily(scene.model, some, 64, [199], 0)
        assert len(passes) == 64 and all(len(set(row)) > 1 for row in long)
        assert decoding.generate_greedily(scene.model, some, 64, [199], 199) == long, "padding that ends answers"
        passes.clear()
        short = decoding.generate_greedily(scene.model, some, 64, said, 0)
    hook.remove()
    assert len(passes) == decoding.CHECK_EVERY
    assert [row[0] for row in short] == said == [row[0] for row in long]


def test_answers_are_generated_for_as_many_rows_as_their_cache_has_room(every_model, monkeypatch):
    scene = Scene(every_model / "smollm2-135m", fused=True)
    config = scene.model.config
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 8
    questions = [question(prompt, [[20], [21]]) for prompt in prompts([30, 4, 11, 20])]
    sizes = []
    plain = decoding.GeneratedRows.__init__

    def noted(rows, model, texts, *more):
        sizes.append(len(texts))
        plain(rows, model, texts, *more)

    monkeypatch.setattr(decoding.GeneratedRows, "__init__", noted)
    for room in (2 * 2 * (30 + LONGEST), 30, 2**20):
        monkeypatch.setattr(devices, "free_bytes", lambda _, room=room: 2 * each * room)
        said = scene.scorer(questions).generate(scene.factors(1, 2), [list(range(4))] * 2, LONGEST)
        for adapter, answers in zip((1, 2), said, strict=True):
            expected = [before_stop(scene.greedy(adapter, one.tokens), STOPS) for one in questions]
            assert [answers[number] for number in range(4)] == expected
    assert sizes == [4, 4, *[1] * 8, 8]


def test_an_adapter_of_another_model_is_refused(every_model):
    with pytest.raises(UserError, match="model.layers.2.mlp: is adapted, but the base model has no such layer"):
        StackedModel(Scene(every_model / "smollm2-135m", count=1).fresh(), ["model.layers.2.mlp"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("rank_pattern", {"q_proj": 2}), ("alpha_pattern", {"q_proj": 2}), ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
    ],
)  # fmt: skip
def test_another_kind_of_lora_is_refused(key, value):
    with pytest.raises(UserError, match=f"adapter_config.json: {key} is .*; only plain LoRA is scored here"):
        check_plain_lora({"r": 4, "lora_alpha": 8, key: value})


def test_factors_of_several_dtypes_keep_their_values():
    key, exact = "base_model.model.q.lora_{}.weight", 1 + 2**-20  # which neither float16 nor bfloat16 holds
    values = {"A": torch.tensor([[exact, 2.0]]), "B": torch.tensor([[3.0], [exact]])}
    dtypes = [(torch.float16, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)]
    adapters = [
        {key.format(half): values[half].to(dtype) for half, dtype in zip("AB", pair, strict=True)} for pair in dtypes
    ]
    where = ["base_model.model.q"], 1.0, torch.device("cpu"), torch.float32
    found = stack_checkpoints([*adapters, None], *where)
    assert [(a[0, 0].item(), b[0, 1].item()) for a, b in zip(found.a["q"], found.b["q"], strict=True)] == [
        (1.0, exact), (exact, 1.0), (1.0, 1.0), (0.0, 0.0),
    ]  # fmt: skip


def test_the_scaling_is_peft_s(every_model):
    for lora in ({"r": 3, "lora_alpha": 5}, {"r": 3, "lora_alpha": 5, "use_rslora": True}, {"r": 8, "lora_alpha": 16}):
        scene = Scene(every_model / "smollm2-135m", count=1, lora=lora)
        layer = scene.peft.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        assert scene.scaling == layer.scaling["default"]
