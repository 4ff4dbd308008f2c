"""Trains a generator: first towards collected factors, then, where asked, through the base model's own loss.

What a step draws depends on the seed and its number alone, so that a killed training, continued from its last saved
state, ends with the weights of one that was not: on the CPU, and with deterministic kernels on the same kind of GPU.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paragen.analysis import stats_files
from paragen.collection.index import Chosen
from paragen.common import cli, devices, files, locks, paths
from paragen.common.cli import UserError, say
from paragen.generator import conditions, hashed_tensors, saved, sources
from paragen.generator.checkpoint_data import CheckpointData
from paragen.generator.conditions import Reader
from paragen.generator.factor_layout import FactorLayout
from paragen.generator.network import Network
from paragen.generator.options import Options
from paragen.generator.second_stage import BaseLoss
from paragen.training import deterministic

STATE, EMBEDDED = "state.hashed", "embedded.hashed"  # in a staging folder alone
SAVE_SECONDS = 60  # between two saved states
SAY_SECONDS = 10
MEASURED = 20  # every so many steps are timed, because a GPU has to be waited for
LOGGED = 10  # every so many steps have a line in the log
WARMUP = 0.1  # of a stage's steps, in which the learning rate rises; then it falls along a cosine
NOISE = 0.05  # standard deviation of what is added to a condition
DESCRIBED = 0.5  # how often a condition has a description, where a task has some
MIXED = 0.4  # both parameters of the Beta distribution of a mixture's share
WEIGHT_DECAY = 0.01


def train(
    chosen: Sequence[Chosen], folder: Path, wanted: Options, place: str = "", quiet: bool = False,
    reader: Reader | None = None, naming: str = "NAME",
) -> Path:  # fmt: skip
    """Train a generator on collections, unless `folder` holds it already; a killed training is continued.

    Args:
        chosen: the collections.
        folder: where the generator is put, whole or not at all.
        wanted: the settings.
        place: where checkpoints are kept, see checkpoint_data.PLACES; it does not change the result.
        quiet: print no progress.
        reader: of the collections' base model, where a process that trains several generators has one already.
        naming: the setting with which a user takes another folder.

    Returns `folder`. Raises UserError where the collections are not alike, where `folder` holds another generator and
    not FORCE=1, and where another process is training it.
    """
    sources.check_alike(chosen)
    identity = saved.identity_of(chosen, wanted)
    staging = files.beside(folder, f"staging-{files.sha256_of_value(identity)[:8]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locks.lock(files.beside(folder, "lock")):
            files.recover_folder(folder, staging)
            if saved.is_there(folder, identity, naming):
                if not quiet:
                    say(f"there already: {paths.relative(folder)}")
                return folder
            staging.mkdir(exist_ok=True)
            with cli.writing_to(folder):
                training = Training(chosen, staging, wanted, place, quiet, reader)
                with deterministic.naming_missing_kernel():
                    training.run()
                saved.write(staging, folder.name, identity, training)
                files.sync_tree(staging)  # before what a killed training is continued from is gone
                for name in (STATE, EMBEDDED):
                    (staging / name).unlink()
                files.publish_folder(staging, folder)
    except locks.Busy:
        raise UserError(f"{paths.relative(folder)}: another process is training it; wait for it") from None
    if not quiet:
        say(f"trained: {paths.relative(folder)}, {training.speed()}")
    return folder


class Training:
    """One training, in a staging folder; arguments as for `train`."""

    def __init__(
        self, chosen: Sequence[Chosen], staging: Path, wanted: Options, place: str, quiet: bool, reader: Reader | None
    ):
        self.chosen, self.staging, self.wanted, self.quiet = chosen, staging, wanted, quiet
        self.said_at = 0.0
        self.device = devices.own()
        self.layout = FactorLayout(sources.layout_of(chosen[0]))
        self.reader = reader or Reader.of(chosen[0].manifest)
        pools, described = self._embedded()
        self.condition_mean, self.condition_std = conditions.statistics(torch.cat(pools))
        self.pool, self.pools = self._joined(pools)
        self.texts, self.described = self._joined(described)
        self.data = CheckpointData(chosen, self.layout, self.device, wanted.form, wanted.steps_of, place)
        self.weights = self._importance()
        self.total = wanted.steps + wanted.base_steps
        self.log: list[dict[str, Any]] = []
        self.times: list[tuple[float, float]] = []  # seconds of measured steps, and of their loading
        torch.manual_seed(wanted.seed)
        width = 2 * self.pool.shape[1] + 1
        self.network = Network(width, wanted.width, self.layout.kinds).to(self.device)

    # ------------------------------------------------------------------------------------------------- preparation

    def _embedded(self) -> tuple[list[Tensor], list[Tensor]]:
        """The embeddings of each task's prompts, and of its descriptions; computed once for a training."""
        count = len(self.chosen)
        if known := hashed_tensors.read(self.staging / EMBEDDED):
            found, _ = known
            return [found[f"{n}.prompts"] for n in range(count)], [found[f"{n}.texts"] for n in range(count)]
        found = {}
        for number, one in enumerate(self.chosen):
            both = self.reader.of_task(one.manifest, self.wanted.pool, self.wanted.answers)
            found[f"{number}.prompts"], found[f"{number}.texts"] = both
            self._say(f"read the prompts of {number + 1} of {count} tasks", number + 1 == count)
        hashed_tensors.write(self.staging / EMBEDDED, found)
        return self._embedded()

    def _joined(self, embeddings: Sequence[Tensor]) -> tuple[Tensor, list[range]]:
        """(Embeddings of all tasks, standardised, on the device; which of them are each task's)."""
        ends = list(itertools.accumulate(map(len, embeddings), initial=0))
        joined = (torch.cat(list(embeddings)) - self.condition_mean) / self.condition_std
        return joined.to(self.device), [range(*part) for part in itertools.pairwise(ends)]

    def _importance(self) -> list[Tensor]:
        """The weight of each tensor's error by kind, [layers]; their mean is 1."""
        kinds = self.layout.kinds
        if not self.wanted.importance:
            return [torch.ones(len(kind.keys), device=self.device) for kind in kinds]
        found, folder = [], paths.SAVES / "stats"
        for one in stats_files.missing_of(list(self.chosen), folder):
            raise UserError(f"{one.name}: has no statistics for IMPORTANCE=1; run make stats with this selection")
        for one in self.chosen:
            by_key = load_file(folder / one.name / "importance.safetensors")
            found.append([torch.stack([by_key[key] for key in kind.keys]) for kind in kinds])
        means = [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]
        overall = torch.cat(means).mean()
        return [(part / overall).to(self.device) for part in means]

    # ------------------------------------------------------------------------------------------------------- steps

    def run(self) -> None:
        """Both stages, from the last saved state on."""
        wanted = self.wanted
        stages = [(wanted.steps, wanted.learning_rate), (wanted.base_steps, wanted.base_learning_rate)]
        state = self._saved_state()
        at = 0 if state is None else state[0]
        self.began, self.saved_at, self.begun_at = time.monotonic(), time.monotonic(), at
        first = 0
        for stage, (steps, rate) in enumerate(stages):
            if first <= at < first + steps:
                optimizer = self._optimizer(rate)
                if state is not None and at > first:
                    optimizer.load_state_dict(restored(optimizer, state[1]))
                with contextlib.ExitStack() as stack:
                    base = None
                    if stage:
                        self.data.release()  # a step's activations need the memory, and nothing reads checkpoints here
                        base = BaseLoss(self.chosen, self.reader, self.layout, steps, wanted.seed)
                        stack.callback(base.close)
                    for step in range(at, first + steps):
                        for group in optimizer.param_groups:
                            group["lr"] = rate * scheduled((step - first) / steps)
                        self._step(step, optimizer, base)
                at = first + steps
            first += steps
        self._save_state(self.total, None)

    def _step(self, step: int, optimizer: torch.optim.Optimizer, base: BaseLoss | None) -> None:
        """One step of a stage, with its log, its saved state and its line of progress."""
        cli.check_stopped()
        is_measured = base is None and step % MEASURED == MEASURED - 1
        started, self.loading = self._now(is_measured), 0.0
        loss = self._factor_loss(step, is_measured) if base is None else self._base_loss(step, base)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        optimizer.step()
        if is_measured:
            self.times.append((self._now(True) - started, self.loading))
        done = step + 1
        if done % LOGGED == 0 or done == self.total:
            value = loss.item()
            if not math.isfinite(value):
                raise UserError(f"the training diverged at step {done}: its loss is {value}; take a smaller WIDTH")
            self.log.append(
                {"current_steps": done, "total_steps": self.total, "loss": value, "stage": 1 if base is None else 2}
            )
            seconds = (time.monotonic() - self.began) / (done - self.begun_at) * (self.total - done)
            left = timedelta(seconds=round(seconds))
            self._say(f"step {done} of {self.total}, loss {value:.4f}, {left} left", done == self.total)
        if time.monotonic() - self.saved_at >= SAVE_SECONDS and done < self.total:
            self._save_state(done, optimizer)

    def _factor_loss(self, step: int, is_measured: bool) -> Tensor:
        """The mean squared error of the standardised factors of a batch."""
        tasks, numbers, shares = self._drawn(step)
        inputs = self._conditions(tasks, numpy.random.default_rng((self.wanted.seed, step, 1)))
        started = self._now(is_measured)
        checkpoints = self.data.batch(numbers)
        self.loading = self._now(is_measured) - started
        targets = self.data.standardise(checkpoints)
        if step + 1 < self.wanted.steps:
            self.data.prefetch(self._drawn(step + 1)[1])
        if shares is not None:
            targets, inputs = mixed(targets, shares), mixed(inputs, shares)
        with self._autocast():
            outputs = self.network(inputs)
        losses = [
            ((output.float() - target).square().mean((0, 2)) * weights).sum()
            for output, target, weights in zip(outputs, self.layout.split(targets), self.weights, strict=True)
        ]
        return torch.stack(losses).sum() / sum(map(len, self.weights))

    def _base_loss(self, step: int, base: BaseLoss) -> Tensor:
        """The base model's loss with the adapters of some tasks."""
        number = step - self.wanted.steps
        inputs = self._conditions(base.tasks[number], numpy.random.default_rng((self.wanted.seed, step, 2)))
        with self._autocast():
            outputs = self.network(inputs)
        vectors = self.data.restore(self.layout.join([output.float() for output in outputs]))
        return base.loss(vectors, number)

    def _drawn(self, step: int) -> tuple[list[int], list[int], Tensor | None]:
        """(Tasks, a checkpoint of each, the shares of their mixtures) of a step; for mixtures, twice as many tasks."""
        draws = numpy.random.default_rng((self.wanted.seed, step, 0))
        size = self.wanted.batch
        tasks = draws.integers(len(self.chosen), size=2 * size if self.wanted.mix else size).tolist()
        numbers = [int(draws.integers(self.data.tasks[task].start, self.data.tasks[task].stop)) for task in tasks]
        if not self.wanted.mix:
            return tasks, numbers, None
        shares = torch.tensor(draws.beta(MIXED, MIXED, size), dtype=torch.float32, device=self.device)
        return tasks, numbers, shares[:, None]

    def _conditions(self, tasks: Sequence[int], draws: numpy.random.Generator) -> Tensor:
        """A condition for each of some tasks, [tasks, inputs]: prompts and perhaps a description, with noise."""
        pools, described = [self.pools[task] for task in tasks], [self.described[task] for task in tasks]
        drawn = numpy.stack([draws.integers(part.start, part.stop, self.wanted.prompts) for part in pools])
        prompts = self.pool[torch.from_numpy(drawn).to(self.device)].mean(1)
        wanted = [part if draws.random() < DESCRIBED else range(0) for part in described]
        texts = torch.tensor([int(draws.integers(part.start, part.stop)) if part else -1 for part in wanted])
        inputs = conditions.joined(prompts, self.texts, texts.to(self.device))
        noise = torch.from_numpy(draws.standard_normal(tuple(inputs.shape), dtype=numpy.float32))
        return inputs + NOISE * noise.to(self.device)

    def _optimizer(self, rate: float) -> torch.optim.Optimizer:
        is_gpu = self.device.type == "cuda"
        return torch.optim.AdamW(self.network.parameters(), rate, weight_decay=WEIGHT_DECAY, fused=is_gpu)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    # ------------------------------------------------------------------------------------------- state and progress

    def _saved_state(self) -> tuple[int, dict[str, Tensor]] | None:
        """(The step after which it was saved, the optimizer's tensors), with the network's loaded; None without one."""
        known = hashed_tensors.read(self.staging / STATE)
        if known is None:
            return None
        tensors, about = known
        self.network.load_state_dict(part_of(tensors, "network."))
        self.log = about["log"]
        self._say(f"continued after step {about['step']}", True)
        return about["step"], part_of(tensors, "optimizer.")

    def _save_state(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Write all that a continued training needs."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for number, values in (optimizer.state_dict()["state"] if optimizer else {}).items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        hashed_tensors.write(self.staging / STATE, tensors, {"step": step, "log": self.log})
        self.saved_at = time.monotonic()

    def _now(self, is_exact: bool) -> float:
        """The time; where it is to be exact, after what was queued on a GPU."""
        if is_exact and self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def _say(self, line: str, is_last: bool) -> None:
        """Print a line of progress, unless the one before is recent."""
        if not self.quiet and (is_last or time.monotonic() - self.said_at >= SAY_SECONDS):
            say(f"  {self.staging.name[1:].rpartition('.')[0]}: {line}")
            self.said_at = time.monotonic()

    def speed(self) -> str:
        """What a step took, and the share of it that loading checkpoints took."""
        whole, loading = (sum(part) for part in zip(*self.times, strict=True)) if self.times else (0.0, 0.0)
        if not whole:
            return f"checkpoints kept on: {self.data.place}"
        share = f"{loading / whole:.0%} of them loading from {self.data.place}"
        return f"{1e3 * whole / len(self.times):.1f} ms a step, {share}"


def mixed(values: Tensor, shares: Tensor) -> Tensor:
    """Mixtures of the first and the second half of some rows [2 n, ...]; `shares` [n, 1] of the first."""
    first, second = values.chunk(2)
    return shares * first + (1 - shares) * second


def scheduled(progress: float) -> float:
    """The share of the largest learning rate after a share of a stage's steps: a linear rise, then half a cosine."""
    if progress < WARMUP:
        return max(progress / WARMUP, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names have a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def restored(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An optimizer's state_dict with saved tensors."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    return {**optimizer.state_dict(), "state": state}
