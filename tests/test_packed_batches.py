"""Which recipes can be packed, how adapters are assigned to groups, and how rows are laid out in a batch."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import fork_server, packed_project

from paragen.common.cli import UserError
from paragen.recipes.run import run_of
from paragen.training import engines


def why(cell: packed_project.Cell, devices: tuple[str, ...] = ("cpu",)) -> str | None:
    return engines.why_not_packed(run_of(cell.pretrain, cell.rank, cell.overrides), list(devices))


@pytest.fixture
def packable(tmp_path, model_folder) -> packed_project.Packable:
    return packed_project.Packable(tmp_path / "my project", model_folder)


def test_supported_recipes_are_packed(packable):
    assert why(packable.cell()) is None
    every_setting = {
        "warmup_ratio": 0.1, "weight_decay": 0.01, "lora_alpha": 3, "use_rslora": True, "max_grad_norm": 0.5,
        "adam_beta2": 0.95, "seed": 3, "data_seed": 4, "lora_dropout": 0.1, "val_size": 0, "packing": False,
        "optim": "adamw_torch", "flash_attn": "auto", "report_to": "none", "disable_gradient_checkpointing": False,
        "lr_scheduler_type": "linear", "train_on_prompt": True, "num_train_epochs": 2,
    }  # fmt: skip
    assert why(packable.cell(pretrain=every_setting)) is None


REFUSED = {
    "use_dora": True, "pissa_init": True, "val_size": 0.1, "packing": True, "neat_packing": True,
    "report_to": "tensorboard", "optim": "adafactor", "quantization_bit": 4, "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5, "finetuning_type": "full", "stage": "pt", "pure_bf16": True, "flash_attn": "eager",
    "loraplus_lr_ratio": 16.0, "group_by_length": True, "additional_target": "embed_tokens", "surprise": 1,
    "disable_shuffling": True, "save_strategy": "epoch", "dataloader_drop_last": True,
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_an_unsupported_setting_is_named(packable, key):
    cell = packable.cell()
    run = run_of(cell.pretrain, 4)
    assert key in engines.why_not_packed(replace(run, config=run.config | {key: REFUSED[key]}), ["cpu"])


def test_several_devices_and_models_with_processors_are_not_packed(packable):
    assert "one device" in why(packable.cell(), ("cpu", "cpu"))
    model = (packable.top / "models" / packed_project.MODEL).resolve()
    (packable.top / "models" / packed_project.MODEL).unlink()
    (packable.top / "models" / packed_project.MODEL).mkdir()
    for file in model.iterdir():
        (packable.top / "models" / packed_project.MODEL / file.name).symlink_to(file)
    (packable.top / "models" / packed_project.MODEL / "preprocessor_config.json").write_text("{}")
    assert "processor" in why(packable.cell())


def test_an_unknown_engine_is_refused(monkeypatch):
    monkeypatch.setenv("ENGINE", "fast")
    with pytest.raises(UserError, match="ENGINE is packed or stock"):
        engines.requested_engine()
    monkeypatch.setenv("ENGINE", "")
    assert engines.requested_engine() is None


@pytest.mark.parametrize("ranks", [[1], [2, 4, 8, 16, 32, 64], [64] * 5, [200, 3, 7], [2] * 100, [128, 128, 1]])
def test_every_adapter_has_rows_of_its_own_in_a_stack(ranks):
    from paragen.packed.step_context import GROUP_WIDTH, WIDTH_MULTIPLE, AdapterGroups

    groups = AdapterGroups(ranks)
    taken = np.zeros((groups.count, groups.width), int)
    for adapter, rank in enumerate(ranks):
        number, rows = groups.place_of(adapter)
        assert rows.stop - rows.start == rank
        taken[number, rows] += 1
    assert taken.max() == 1 and taken.sum() == sum(ranks)
    assert groups.width % WIDTH_MULTIPLE == 0 and groups.width <= max(GROUP_WIDTH, max(ranks) + WIDTH_MULTIPLE)
    assert taken.any(axis=1).all(), "no stack is empty"


def row(length: int, learned: int, first: int = 5):
    """A row whose last tokens are learned."""
    from paragen.packed.batches import IGNORED, Row

    tokens = np.arange(first, first + length)
    labels = np.where(np.arange(length) >= length - learned, tokens, IGNORED)
    return Row(tokens, labels)


def test_each_step_has_a_bucket_that_covers_it():
    from paragen.packed.batches import ROUND_TO, Shape, choose_buckets

    draw = np.random.default_rng(0)
    for count in (1, 2, 6):
        for steps in (1, 3, 200):
            shapes = [Shape(*(int(value) for value in draw.integers(1, 200, 4))) for _ in range(steps)]
            found = choose_buckets(shapes, count)
            assert 1 <= len(found) <= count
            assert all(any(bucket.covers(shape) for bucket in found) for shape in shapes)
            assert all(bucket.tokens % ROUND_TO == 0 and bucket.row_length % ROUND_TO == 0 for bucket in found)
            assert found == sorted(found), "the runner takes the first that covers, the smallest"


def test_no_other_buckets_of_that_number_need_fewer_tokens():
    """Compared with every other choice."""
    from itertools import combinations

    from paragen.packed.batches import ROUND_TO, Shape, choose_buckets

    draw = np.random.default_rng(0)
    for count in (1, 2, 3, 5):
        for _ in range(5):
            tokens = [ROUND_TO * int(value) for value in draw.integers(1, 30, 12)]
            found = [bucket.tokens for bucket in choose_buckets([Shape(one, 1, 1, 1) for one in tokens], count)]
            sizes = sorted(set(tokens))
            others = [(*some, sizes[-1]) for some in combinations(sizes[:-1], min(count, len(sizes)) - 1)]
            totals = [sum(min(end for end in ends if end >= one) for one in tokens) for ends in (found, *others)]
            assert totals[0] == min(totals)


def test_a_few_long_steps_pad_no_others():
    """Equal numbers of steps per bucket would pad a half of all to the longest."""
    from paragen.packed.batches import Shape, choose_buckets

    shapes = [Shape(160, 8, 32, 20)] * 98 + [Shape(1600, 8, 800, 10)] * 2
    assert choose_buckets(shapes, 2) == [Shape(160, 8, 32, 20), Shape(1600, 8, 800, 10)]


def test_a_graph_is_captured_for_so_many_steps():
    from paragen.packed.batches import Shape
    from paragen.packed.step_runners import MAX_BUCKETS, STEPS_PER_BUCKET, buckets_of

    for steps, expected in ((1, 1), (2 * STEPS_PER_BUCKET, 2), (1000 * STEPS_PER_BUCKET, MAX_BUCKETS)):
        shapes = [Shape(1 + 16 * (step % 100), 8, 32, 20) for step in range(steps)]
        assert len(buckets_of(shapes)) == expected


def laid_out(roomy: bool):
    """Four adapters in two groups, the training of one complete, laid out in the smallest shape or a larger one."""
    from paragen.packed.batches import Shape, Step, lay_out
    from paragen.packed.step_context import AdapterGroups

    groups = AdapterGroups([64, 64, 8, 4])
    step = Step([[row(7, 3), row(4, 2)], [], [row(5, 5)], [row(9, 1), row(3, 2), row(6, 4)]])
    shape = step.shape(groups)
    if roomy:
        shape = Shape(shape.tokens + 13, shape.rows + 2, shape.row_length + 5, shape.learned + 9)
    return step, groups, shape, lay_out(step, groups, shape)


@pytest.mark.parametrize("roomy", [False, True])
def test_every_token_is_in_its_adapters_group_and_comes_back_from_its_row(roomy):
    step, groups, shape, out = laid_out(roomy)
    tokens, places, owner = out["tokens"][0], out["positions"][0], out["adapter"]
    assert groups.count == 2 and len(tokens) == shape.tokens * groups.count
    for adapter, rows in enumerate(step.rows):
        mine = np.flatnonzero(owner == adapter)
        assert set(mine // shape.tokens) <= {groups.group_of[adapter]}
        assert list(tokens[mine]) == [token for each in rows for token in each.tokens]
        assert list(places[mine]) == [place for each in rows for place in range(len(each.tokens))]
    real = np.flatnonzero(owner < len(step.rows))
    assert (out["to_rows"][out["to_tokens"][real]] == real).all()


@pytest.mark.parametrize("roomy", [False, True])
def test_padding_is_exchanged_with_padding_only(roomy):
    """So no value and no gradient of padding reaches a token."""
    step, _, shape, out = laid_out(roomy)
    padding = out["adapter"] == len(step.rows)
    real_places = np.zeros(shape.rows * shape.row_length, bool)
    real_places[out["to_tokens"][~padding]] = True
    assert padding[out["to_rows"][~real_places]].all(), "a row is padded with a padding token"
    assert not real_places[out["to_tokens"][padding]].any(), "a padding token takes its value from a row's padding"
    within = np.arange(shape.rows * shape.row_length).reshape(shape.rows, shape.row_length)
    ends = real_places[within]
    assert (np.diff(ends.astype(int), axis=1) <= 0).all(), "padding follows a row's tokens, which do not see it"


@pytest.mark.parametrize("roomy", [False, True])
def test_each_row_is_a_sequence_and_padding_is_in_others(roomy):
    step, _, shape, out = laid_out(roomy)
    starts, size = out["sequences"], len(out["adapter"])
    assert starts[0] == 0 and starts[-1] == size
    lengths, owners = np.diff(starts), out["adapter"]
    assert lengths.min() >= 0 and lengths.max() <= shape.row_length
    rows = []
    for start, length in zip(starts, lengths, strict=False):
        inside = set(owners[start : start + length])
        assert len(inside) <= 1, "of one adapter, or of padding"
        if inside - {len(step.rows)}:
            assert list(out["positions"][0][start : start + length]) == list(range(length))
            rows.append(int(length))
    assert sorted(rows) == sorted(len(each.tokens) for adapter in step.rows for each in adapter)


@pytest.mark.parametrize("roomy", [False, True])
def test_an_adapters_losses_are_weighted_as_by_the_trainer(roomy):
    from paragen.packed.batches import IGNORED

    step, _, shape, out = laid_out(roomy)
    for adapter, rows in enumerate(step.rows):
        here = (out["loss_adapter"] == adapter) & (out["weights"] > 0)
        labelled = sum((each.labels != IGNORED).sum() for each in rows)
        learned = sum((each.labels[1:] != IGNORED).sum() for each in rows)
        assert here.sum() == learned
        assert np.isclose(out["weights"][here].sum(), learned / labelled if rows else 0)
        assert (out["adapter"][out["predicting"][here]] == adapter).all()
        assert (out["tokens"][0][out["predicting"][here] + 1] == out["targets"][here]).all()
    assert (out["weights"] > 0).sum() == sum((r.labels[1:] != IGNORED).sum() for rows in step.rows for r in rows)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked, as on a GPU", "sliced, as on a CPU"])
def test_packed_layers_compute_what_each_adapter_alone_computes(stacked):
    """Forward and backward pass, compared with one adapter after the other."""
    from dataclasses import replace

    import torch

    from paragen.packed.batches import to_batch
    from paragen.packed.layers import PackedLinear
    from paragen.packed.step_context import StepContext

    step, groups, shape, out = laid_out(True)
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 10).requires_grad_(False)
    context = StepContext(groups, [0.5, 1.0, 2.0, 0.25], torch.device("cpu"))
    layer = PackedLinear(base, context, torch.float32)
    for factor in (layer.a, layer.b):
        torch.nn.init.normal_(factor)
    batch = to_batch(step, groups, torch.device("cpu"), shape)
    context.begin_step(replace(batch, spans=None) if stacked else batch)
    x = torch.randn(1, shape.tokens * groups.count, 12, requires_grad=True)
    y = layer(x)
    pull = torch.randn_like(y)
    y.backward(pull)
    for adapter, scaling in enumerate([0.5, 1.0, 2.0, 0.25]):
        here = torch.from_numpy(out["adapter"] == adapter)
        a, b = (layer.block(f.detach(), adapter).clone().requires_grad_() for f in (layer.a, layer.b))
        mine = x.detach()[0, here].requires_grad_()
        alone = base(mine) + scaling * (mine @ a.T) @ b
        alone.backward(pull[0, here])
        assert torch.allclose(y[0, here], alone, atol=1e-4)
        assert torch.allclose(x.grad[0, here], mine.grad, atol=1e-4)
        for factor, own in ((layer.a, a), (layer.b, b)):
            assert torch.allclose(layer.block(factor.grad, adapter), own.grad, atol=1e-4)


def test_a_step_padded_for_cuda_graphs_has_the_losses_and_gradients_of_the_unpadded_step():
    """CUDA graphs need a larger fixed shape, fixed addresses and stacked products."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from paragen.packed.adapter import Adapter
    from paragen.packed.batches import Shape, Step, lay_out, to_batch
    from paragen.packed.engine import Engine
    from paragen.packed.step_runners import StaticBatch

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    step = Step([[row(7, 3), row(4, 2)], [row(5, 5)], []])
    names = [name for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    adapters = []
    for rank in (2, 8, 4):
        shapes = {name: model.get_submodule(name).weight.shape for name in names}
        factors = {name: (torch.randn(rank, ins), torch.randn(outs, rank)) for name, (outs, ins) in shapes.items()}
        plain = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        adapters.append(Adapter(factors, 0.5, [0.01], plain, 1.0))
    learned = []
    for in_bucket in (False, True):
        engine = Engine(model, adapters, torch.float32)
        groups, own = engine.groups, step.shape(engine.groups)
        batch = to_batch(step, groups, engine.device)
        if in_bucket:
            shape = Shape(own.tokens + 13, own.rows + 2, own.row_length + 5, own.learned + 9)
            static = StaticBatch(lay_out(Step([[], [], []]), groups, shape), shape, engine.device)
            static.fill(lay_out(step, groups, shape))
            batch = static.batch
        engine.rates.fill_(0.01)
        engine.step(batch)
        learned.append([engine.losses.clone(), *(gradient.clone() for gradient in engine.gradients)])
        engine.close()
    for mine, theirs in zip(*learned, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("most", [0.0, -1.0])
def test_a_norm_of_zero_or_less_does_not_clip_gradients(most):
    """As in the trainer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from paragen.packed.adapter import Adapter
    from paragen.packed.batches import Step
    from paragen.packed.engine import Engine

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    ).requires_grad_(False)
    name = "model.layers.0.self_attn.q_proj"
    plain = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    made = []
    for norm in (most, 1e9):
        torch.manual_seed(1)
        factors = {name: (torch.randn(2, 32), torch.randn(32, 2))}
        engine = Engine(model, [Adapter(factors, 1.0, [0.1], plain, norm)], torch.float32)
        list(engine.train([Step([[row(7, 3)]])], lambda number: None))
        made.append(engine.vectors[0].detach().clone())
        engine.close()
    assert torch.equal(*made)


def test_a_packed_cell_equals_the_ordinary_paths(trained_once, tmp_path):
    """With the recipes that most tests use; test_packed_train.py has others."""
    project = trained_once.copy(tmp_path / "packed")
    theirs = (project.top / "saves").rename(tmp_path / "theirs")
    cell = packed_project.Cell(project.pretrain, project.finetune)
    run = fork_server.start(
        "paragen.packed.packed_train", cell.arguments(), {"ENGINE": "packed"}, tmp_path / "log.txt"
    ).wait()
    assert run.status == 0, run.output
    packed_project.assert_same_adapters(project.top / "saves", theirs)
    manifest = json.loads((project.run_folder("finetune") / "manifest.json").read_text())
    assert (manifest["engine"], manifest["packed_with"]) == ("packed", 1)


def test_a_loaded_model_whose_layers_cannot_be_packed_is_refused(every_model):
    """GPT-2's layers are not nn.Linear, which only the loaded model shows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from paragen.packed import layers, peft_comparison

    model = AutoModelForCausalLM.from_pretrained(every_model / "gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM"))
    with pytest.raises(layers.NotPackable, match="is not a linear layer with plain LoRA"):
        peft_comparison.check_packable(adapted, torch.float32)


def test_a_tokens_place_among_the_losses_is_known():
    """So that a loss's gradient is gathered, and none is added up."""
    for roomy in (False, True):
        step, _, shape, out = laid_out(roomy)
        real = out["weights"] > 0
        assert (out["to_losses"][out["predicting"][real]] == np.flatnonzero(real)).all()
        assert (out["to_losses"] < shape.learned).sum() == real.sum(), "a token without a loss gets no gradient"


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_bfloat16_run_computes_what_peft_does_whatever_dtype_the_base_is_stored_in(every_model, stored):
    """SmolLM2's file is float32, its recipes say bf16."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from paragen.packed import frozen_base, initial_adapter, memory, peft_comparison
    from paragen.packed.engine import Engine

    model = AutoModelForCausalLM.from_pretrained(every_model / "smollm2-135m", dtype=getattr(torch, stored))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    peft_comparison.check_packable(adapted, torch.bfloat16)
    first = initial_adapter.initial_adapter_of(adapted)
    rows = [row(40, 9), row(25, 12)]
    expected = peft_comparison.peft_gradient(adapted, rows, torch.bfloat16)
    plain = frozen_base.unload_adapter(adapted)
    peft_comparison.check_against_peft(plain, first.factors, first.scaling, rows, expected, torch.bfloat16)
    settings = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    adapter = peft_comparison.Adapter(first.factors, first.scaling, [0.0], settings, 0.0)
    engine = Engine(plain, [adapter], torch.bfloat16)
    copied = sum(map(memory.bytes_of_copies, engine.layers.values()))
    engine.close()
    weights = sum(plain.get_submodule(name).weight.numel() for name in first.factors)
    assert copied == (2 * weights if stored == "float32" else 0), "the base's weights in bfloat16, beside its own"
