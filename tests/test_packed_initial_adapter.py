"""Initial adapters are drawn without PEFT's layers, to the bits that PEFT's own have."""

from types import SimpleNamespace

import pytest
import torch
from helpers import fork_server, packed_project
from transformers import set_seed


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_drawn_adapter_is_pefts(every_model, stored):
    """Of any rank and seed, from the one that PEFT made for the first run; its config, too."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from paragen.packed.initial_adapter import drawn, initial_adapter_of
    from paragen.packed.model import unload_adapter

    model = AutoModelForCausalLM.from_pretrained(every_model / "qwen2.5-0.5b", dtype=stored)
    first = None
    for seed, rank, alpha, dropout, rslora in (
        (42, 4, 8, 0.0, False), (42, 16, 3, 0.1, False), (7, 1, 2, 0.0, True), (0, 64, 16, 0.05, True),
    ):  # fmt: skip
        settings = {"lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora}
        set_seed(seed)
        config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
        adapted = get_peft_model(model, config)
        theirs = initial_adapter_of(adapted)
        model = unload_adapter(adapted)
        first = first or theirs
        ours = drawn(model, first, SimpleNamespace(lora_rank=rank, **settings), seed)
        assert ours.equals(theirs) and theirs.equals(ours)
        assert ours.config.to_dict() == theirs.config.to_dict()
        assert not ours.equals(drawn(model, first, SimpleNamespace(lora_rank=rank, **settings), seed + 1))
        resumed = drawn(model, first, SimpleNamespace(lora_rank=rank, **settings), seed, is_resumed=True)
        assert not resumed.factors and resumed.scaling == theirs.scaling


@pytest.mark.runs
@pytest.mark.slow
def test_where_they_are_not_pefts_own_are_used(tmp_path, model_folder):
    project = packed_project.Packable(tmp_path / "my project", model_folder)
    cells = [project.cell(rank=rank) for rank in (2, 8)]
    project.collect(*cells)
    expected = [packed_project.hashes(project.folder("finetune", rank=rank)) for rank in (2, 8)]
    project.set_aside("drawn")
    arguments = [text for cell in cells for text in cell.arguments()]
    run = fork_server.start("helpers.other_draws", arguments, {"ENGINE": "packed"}, tmp_path / "log.txt").wait()
    assert run.status == 0, run.output
    assert [packed_project.hashes(project.folder("finetune", rank=rank)) for rank in (2, 8)] == expected
