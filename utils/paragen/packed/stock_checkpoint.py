"""A pretrain's checkpoint folders, as transformers' trainer writes and resumes them, from and to adapter vectors."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed

from paragen.collection import checkpoints, run_files
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.packed.adapter import Adapter
from paragen.packed.layers import NotPackable
from paragen.packed.schedule import TrainingSchedule
from paragen.training import collector


def prepare_save(
    schedule: TrainingSchedule, adapter: Adapter, vector: Tensor, moments: dict[str, Tensor], config: Any
) -> Callable[[], None]:
    """Prepare a stock, resumable checkpoint folder of the trainer's current step.

    Args:
        schedule: the run's.
        adapter: the run's, for the layout of its vector.
        vector, moments: the adapter and AdamW's state after that step, on the CPU (see Adapter).
        config: PEFT's LoraConfig.

    Returns the function that writes the files; it can be called in any thread.
    """
    step = schedule.trainer.state.global_step
    folder = schedule.attempt.staging / run_files.checkpoint_folder(step)
    folder.mkdir()
    set_seed(schedule.args.seed)
    schedule.trainer._save_rng_state(str(folder))
    state = copy.deepcopy(schedule.trainer.state)
    groups, scheduler_state = schedule.optimizer_states[step - schedule.first]

    def write() -> None:
        save_file(peft_tensors(adapter, vector), folder / paths.ADAPTER, {"format": "pt"})
        collector.save_config(config, folder)
        torch.save(scheduler_state, folder / "scheduler.pt")
        torch.save(optimizer_state(adapter, moments, groups), folder / "optimizer.pt")
        state.save_to_json(str(folder / "trainer_state.json"))
        files.sync_tree(folder)

    return write


def optimizer_state(adapter: Adapter, moments: dict[str, Tensor], groups: list[dict]) -> dict[str, Any]:
    """AdamW's state_dict as the trainer saves it.

    Args:
        adapter: says how vectors are laid out.
        moments: `step`, and `exp_avg` and `exp_avg_sq` as vectors like the adapter's.
        groups: the optimizer's parameter groups without their parameters, all of which are in the first group.
    """
    averages = [_in_one_storage([*peft_tensors(adapter, moments[name]).values()]) for name in ("exp_avg", "exp_avg_sq")]
    steps = moments["step"].repeat(len(averages[0]))
    state = {
        number: {"step": step, "exp_avg": first, "exp_avg_sq": second}
        for number, (step, first, second) in enumerate(zip(steps, *averages, strict=True))
    }
    numbers_by_group = [list(range(len(state))), *([] for _ in groups[1:])]
    groups = [{**group, "params": numbers} for group, numbers in zip(groups, numbers_by_group, strict=True)]
    return {"state": state, "param_groups": groups}


def _in_one_storage(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors in one storage: torch.save and torch.load take twice as long for as many storages."""
    parts = torch.cat([one.reshape(-1) for one in tensors]).split([one.numel() for one in tensors])
    return [part.view(one.shape) for part, one in zip(parts, tensors, strict=True)]


def peft_tensors(adapter: Adapter, vector: Tensor) -> dict[str, Tensor]:
    """An adapter's vector as PEFT's tensors, contiguous, by PEFT's names in the order of the model's parameters."""
    tensors = {}
    for part in adapter.parts:
        tensors[f"{checkpoints.PEFT_PREFIX}{part.layer}.lora_A.weight"] = vector[part.a].view(adapter.rank, -1)
        tensors[f"{checkpoints.PEFT_PREFIX}{part.layer}.lora_B.weight"] = (
            vector[part.b].view(adapter.rank, -1).t().contiguous()
        )
    return tensors


def load_factors(checkpoint: Path, layers: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_A and lora_B of a stock checkpoint folder, by layer. Raises UserError where it adapts other layers.

    The folder's files were verified by run_identity.pretrain_of when the attempt began.
    """
    stored = load_file(checkpoint / paths.ADAPTER)
    keys = [
        (f"{checkpoints.PEFT_PREFIX}{layer}.lora_A.weight", f"{checkpoints.PEFT_PREFIX}{layer}.lora_B.weight")
        for layer in layers
    ]
    if {key for pair in keys for key in pair} != set(stored):
        raise UserError(
            f"{checkpoint / paths.ADAPTER}: adapts other layers than the recipe; train it again with FORCE=1"
        )
    return {layer: (stored[a], stored[b]) for layer, (a, b) in zip(layers, keys, strict=True)}


def moments_of(state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """AdamW's state by parameter, as a stock checkpoint's optimizer.pt has it, laid out as Adapter takes it.

    Raises NotPackable where the parameters took different numbers of steps.
    """
    entries = [state[number] for number in sorted(state)]
    if len({float(entry["step"]) for entry in entries}) != 1:
        raise NotPackable("the parameters of its pretrain took different numbers of steps")
    vectors = {}
    for name in ("exp_avg", "exp_avg_sq"):
        of_a = [entry[name].reshape(-1) for entry in entries[::2]]
        of_b = [entry[name].t().reshape(-1) for entry in entries[1::2]]
        vectors[name] = torch.cat([*of_a, *of_b]).float()
    return {"step": entries[0]["step"].float().reshape(()), **vectors}
