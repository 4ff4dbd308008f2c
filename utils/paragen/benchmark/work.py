"""What one process of the benchmark measures: the methods of single datasets, or those of a fold.

Imports torch: the process pins its device first (run.py).
"""

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paragen.benchmark import rows, trainings
from paragen.benchmark.plan import Fold, Plan, drawn_rows
from paragen.benchmark.rows import Scored
from paragen.collection import adapter_config, checkpoints, prompts, run_identity, task_descriptions, vectors
from paragen.collection.evaluation import BASE
from paragen.collection.index import Chosen
from paragen.common import devices, files, paths
from paragen.common.cli import say
from paragen.generator import conditions, generate, saved, sources, train
from paragen.generator.options import Options, deciding
from paragen.scoring import base_model, collection_scorer
from paragen.scoring.base_model import BaseModel
from paragen.scoring.checkpoint_scores import CheckpointScore
from paragen.scoring.collection_scorer import AdapterScorer
from paragen.scoring.factor_reader import MemoryReader
from paragen.scoring.questions import Split
from paragen.training import deterministic

Adapter = dict[str, Tensor]
TEMPERATURES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the similarity-weighted mean; one is chosen on training tasks
TUNED = 6  # training tasks on which it is chosen
TUNED_ROWS = 24  # of the rows of each
POOL = 256  # prompts of a dataset that similarities are taken over
HISTORY = {"prompt": "prompt", "response": "response", "system": "system", "history": "history"}


class Worker:
    """Scores with one base model, which it keeps.

    Args:
        plan: the benchmark.
        options: those of the generators.
    """

    def __init__(self, plan: Plan, options: Options):
        self.plan, self.options = plan, options
        self.base: BaseModel | None = None
        self.last: dict[str, Adapter] = {}
        self.pools: dict[str, Tensor] = {}
        self._reader: conditions.Reader | None = None
        some = next(iter(plan.chosen.values()))
        self.config = adapter_config.parse(
            checkpoints.adapter_config_bytes(some.folder, some.manifest), paths.relative(some.folder)
        )

    # ------------------------------------------------------------------------------------------------ what is shared

    def base_for(self, dataset: str) -> BaseModel:
        """The base model of a dataset's collection."""
        self.base = base_model.base_for(self.plan.chosen[dataset].manifest, self.base)
        return self.base

    def own(self, dataset: str) -> Adapter:
        """The last checkpoint of a dataset's collection."""
        if dataset not in self.last:
            self.last[dataset] = generate.last_checkpoint(self.plan.chosen[dataset])
        return self.last[dataset]

    @property
    def reader(self) -> conditions.Reader:
        """How the base model reads prompts.

        Fused kernels replace a function that all models of an architecture share. They are there before the first text
        is read, so that it does not depend on what was scored before.
        """
        if self._reader is None:
            dataset, some = next(iter(self.plan.chosen.items()))
            self.base_for(dataset).use_fused_kernels()
            self._reader = conditions.Reader.of(some.manifest)
        return self._reader

    def pool(self, dataset: str) -> Tensor:
        """Embedded training prompts of a dataset, read as the generator reads them: [prompts, hidden] float32."""
        if dataset not in self.pools:
            known = prompts.of_collection(self.plan.chosen[dataset].manifest)
            drawn = random.Random(f"pool {dataset}").sample(range(len(known)), min(POOL, len(known)))
            self.pools[dataset] = self.reader.embed([known[place] for place in drawn], self.options.answers)
        return self.pools[dataset]

    def score(self, dataset: str, adapters: Mapping[str, Adapter | None], scored: Scored) -> dict[str, dict[str, Any]]:
        """What adapters make of a dataset's rows, by their names; None is the base model."""
        found = collection_scorer.score_adapters(
            list(adapters.values()), self.config, self.base_for(dataset), scored.split, scored.metric, dataset
        )
        return dict(zip(adapters, map(per_row, found), strict=True))

    def inputs_of(self, held: Sequence[str], trained: Sequence[str], more: dict[str, Any]) -> dict[str, Any]:
        """What decides a part's result, as `rows.inputs_of`, with the dtype in which this device computes it."""
        recipes = {name: self.plan.chosen[name].manifest.recipe or {} for name in (*held, *trained)}
        dtypes = {name: str(base_model.dtype_of(one)).removeprefix("torch.") for name, one in recipes.items()}
        return rows.inputs_of(self.plan, held, trained, {**more, "dtype": dtypes})

    # ------------------------------------------------------------------------------------------------ single datasets

    def measure_dataset(self, dataset: str) -> None:
        """Score the methods that no fold changes: base, own, again, few and context; writes the dataset's part."""
        path = self.plan.folder / "datasets" / f"{dataset}.json"
        extra = self.trained(dataset)
        hashes = {kind: chosen.manifest.sha256 for kind, chosen in extra.items()}
        context = "context" in self.plan.wanted.baselines
        more = {"trained": hashes, "context": self.plan.wanted.prompts if context else 0}
        inputs = self.inputs_of([dataset], [], more)
        if rows.read_part(path, inputs, run_identity.force_requested()) is not None:
            say(f"measured already: {dataset}")
            return
        started, scored = time.monotonic(), rows.scored_rows(self.plan, dataset)
        adapters: dict[str, Adapter | None] = {"base": None, "own": self.own(dataset)}
        adapters |= {kind: generate.last_checkpoint(chosen) for kind, chosen in extra.items()}
        methods = {name: [one] for name, one in self.score(dataset, adapters, scored).items()}
        facts: dict[str, Any] = {"left_out": scored.left_out}
        if context:
            count, result = self.in_context(dataset, scored)
            facts["context_rows"] = count
            if result is not None:
                methods["context"] = [result]
        rows.write_part(path, inputs, {**part_of(dataset, scored, methods, facts), "device": devices.describe()})
        say(f"{dataset}: {len(scored.clusters)} rows, {len(methods)} methods, {time.monotonic() - started:.0f} s")

    def trained(self, dataset: str) -> dict[str, Chosen]:
        """The collections of the adapters that the benchmark trained for a dataset, by kind."""
        kinds = [kind for kind in (trainings.AGAIN, trainings.FEW) if kind in self.plan.wanted.baselines]
        like = self.plan.chosen[dataset]
        return {kind: trainings.trained(self.plan, f"{dataset}.{kind}", like) for kind in kinds}

    def in_context(self, dataset: str, scored: Scored) -> tuple[int, dict[str, Any] | None]:
        """What the base model makes of rows behind training rows with their answers, as turns before the question.

        Returns how many training rows fit before the longest row, and the result; None where not even one fits, and for
        conversations.
        """
        known = prompts.of_collection(self.plan.chosen[dataset].manifest)
        drawn = [known[at] for at in drawn_rows(dataset, self.plan.wanted.prompts, len(known), 0)]
        if any("messages" in text for text in [*drawn, *scored.split.texts]):
            return 0, None  # a conversation has turns of its own before its question
        base, own = self.base_for(dataset), {1: self.own(dataset)}
        while drawn:
            history = [[row["prompt"], row["response"]] for row in drawn]
            split = with_history(scored.split, history)
            scorer = AdapterScorer(MemoryReader(own, self.config, base, dataset), base, split, scored.metric)
            longest = max(
                len(one.tokens) + max(len(way.tokens) for way in one.continuations) for one in scorer.questions
            )
            if longest < base.max_tokens:
                (found,) = (some[BASE] for some in scorer.scores([BASE]))
                return len(drawn), per_row(found)
            drawn = drawn[: len(drawn) // 2]
        return 0, None

    # ---------------------------------------------------------------------------------------------------------- a fold

    def measure_fold(self, fold: Fold) -> None:
        """Train a fold's generators and score its methods on the datasets that it holds out; writes the fold's part."""
        path = self.plan.folder / "folds" / f"{fold.name}.json"
        union = self.union_of(fold)
        wanted, trained = self.plan.wanted, [self.plan.chosen[name] for name in fold.trained]
        more = {
            "held": list(fold.held), "seeds": list(fold.seeds), "generator": deciding(vars(self.options)),
            "union": None if union is None else union.manifest.sha256, "group": fold.group, "prompts": wanted.prompts,
            "samples": wanted.samples, "pairs": sources.records_of(trained, self.options.steps_of),
            "families": {name: self.plan.families[name] for name in (*fold.held, *fold.trained)},
            "description": {name: files.sha256_of_value(self.description_of(name)) for name in fold.held},
        }  # fmt: skip
        inputs = self.inputs_of(fold.held, fold.trained, more)
        if rows.read_part(path, inputs, run_identity.force_requested()) is not None:
            say(f"measured already: {fold.name}")
            return
        started = time.monotonic()
        adapters, facts = self.without_generator(fold, union)
        say(f"{fold.name}: averages of the others made, {time.monotonic() - started:.0f} s")
        generators = {}
        for seed in fold.seeds:
            generators[seed] = self.generator(fold, seed)
            say(f"{fold.name}: generator {seed} trained, {time.monotonic() - started:.0f} s")
        parts = self.scored_parts(adapters, facts, generators)
        result = {"fold": fold.name, "group": fold.group, "datasets": parts, "device": devices.describe()}
        rows.write_part(path, inputs, result)
        say(f"{fold.name}: {len(fold.held)} datasets measured, {time.monotonic() - started:.0f} s")

    def scored_parts(
        self, adapters: dict[str, dict[str, Adapter | None]], facts: dict[str, dict[str, Any]],
        generators: Mapping[int, saved.Generator],
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        """The results of a fold's held-out datasets, one after the other: what is generated for all of them would take
        too much memory. What the generators get is read before the first is scored, so that it does not depend on that.

        Args:
            adapters, facts: as `without_generator` returns them; `adapters` is emptied.
            generators: by seed.
        """
        given = {name: {"generated": name, "swapped": one["other"]} for name, one in facts.items()}
        names = dict.fromkeys(name for both in given.values() for name in both.values())
        read = {name: self.condition_of(name) for name in names}
        parts = {}
        for dataset, by_kind in given.items():
            made, scored = adapters.pop(dataset), rows.scored_rows(self.plan, dataset)
            for seed, generator in generators.items():
                made |= generated(generator, seed, {kind: read[name] for kind, name in by_kind.items()})
            methods: dict[str, list[dict[str, Any]]] = {}
            for name, one in self.score(dataset, made, scored).items():
                kind, _, run = name.partition(" ")
                methods.setdefault(kind, []).append({**one, "run": run})
            parts[dataset] = part_of(dataset, scored, methods, facts[dataset])
        return parts

    def without_generator(
        self, fold: Fold, union: Chosen | None
    ) -> tuple[dict[str, dict[str, Adapter | None]], dict[str, dict[str, Any]]]:
        """What a fold's held-out datasets can have without a generator: (adapters by method, facts), each by dataset.

        Args:
            fold: which.
            union: the collection of the adapter trained on the union of the others' rows, where there is one.
        """
        others = Others({name: self.own(name) for name in fold.trained})
        shared: dict[str, Adapter | None] = {"mean": others.mean()}
        if union is not None:
            shared["union"] = generate.last_checkpoint(union)
        temperature = self.choose_temperature(fold, others)
        adapters, facts = {}, {}
        for dataset in fold.held:
            near = self.similarities(dataset, fold.trained)
            nearest = max(near, key=lambda name: near[name])
            facts[dataset] = {
                "nearest": nearest, "temperature": temperature, "other": self.other_prompts(fold, dataset)
            }  # fmt: skip
            adapters[dataset] = {
                **shared, "nearest": self.own(nearest), "weighted": others.weighted(near, temperature)
            }  # fmt: skip
        return adapters, facts

    def union_of(self, fold: Fold) -> Chosen | None:
        """The collection of the adapter trained on the union of the other datasets' rows; None without it."""
        if trainings.UNION not in self.plan.wanted.baselines:
            return None
        return trainings.trained(self.plan, f"{fold.name}.{trainings.UNION}", self.plan.chosen[fold.held[0]])

    def similarities(self, dataset: str, others: Sequence[str]) -> dict[str, float]:
        """How alike the prompts of a dataset and of others are, by the others' names."""
        pools = conditions.standardise({name: self.pool(name) for name in (dataset, *others)})
        return {name: float(conditions.similarity(pools[dataset], pools[name])) for name in others}

    def choose_temperature(self, fold: Fold, others: "Others") -> float:
        """The temperature of the weighted mean with the least loss on some training tasks, each left out like the held
        ones (`Plan.others_of`).

        Args:
            fold: which.
            others: the adapters of the datasets that it trains on.
        """
        tuned = random.Random(f"temperature {fold.name}").sample(fold.trained, min(TUNED, len(fold.trained)))
        losses = dict.fromkeys(TEMPERATURES, 0.0)
        for dataset in tuned:
            near = self.similarities(dataset, self.plan.others_of(dataset, fold.trained))
            made = [others.weighted(near, temperature) for temperature in TEMPERATURES]
            (entry, known), *_ = prompts.parts(self.plan.chosen[dataset].manifest)
            split = Split(dataset, True, [(entry, list(known[:TUNED_ROWS]))])
            base = self.base_for(dataset)
            found = collection_scorer.score_adapters(made, self.config, base, split, "loss", dataset)
            for temperature, one in zip(TEMPERATURES, found, strict=True):
                losses[temperature] += one.score["loss"]
        return min(losses, key=lambda temperature: losses[temperature])

    def other_prompts(self, fold: Fold, dataset: str) -> str:
        """The dataset whose prompts and description the generator gets in place of the right ones: of another family,
        where it can."""
        names = [name for name in (*fold.held, *fold.trained) if name != dataset]
        far = [name for name in names if self.plan.families[name] != self.plan.families[dataset]] or names
        return random.Random(f"other {fold.name} {dataset}").choice(far)

    def generator(self, fold: Fold, seed: int) -> saved.Generator:
        """A fold's generator of one seed, which is trained unless it is there; its weights are in main memory."""
        folder = self.plan.folder / "generators" / f"{fold.name}_{seed}"
        options = Options(**{**vars(self.options), "seed": seed})
        seen = [self.plan.chosen[name] for name in fold.trained]
        with deterministic.chosen_kernels():
            train.train(seen, folder, options, quiet=True, reader=self.reader, naming="OUT")
        generator = saved.load(folder)
        generator.reader = self.reader
        generator.move(torch.device("cpu"))
        return generator

    def description_of(self, dataset: str) -> str | None:
        """The description that a generator gets with a dataset's prompts, as `make generate` gives it."""
        return next(iter(task_descriptions.of_collection(self.plan.chosen[dataset].manifest)), None)

    def condition_of(self, dataset: str) -> "Condition":
        """What generators get for a dataset."""
        known, wanted = prompts.of_collection(self.plan.chosen[dataset].manifest), self.plan.wanted
        drawn = [drawn_rows(dataset, wanted.prompts, len(known), number) for number in range(wanted.samples)]
        flat = self.reader.embed([known[at] for some in drawn for at in some], self.options.answers)
        text = self.description_of(dataset)
        return Condition(
            list(flat.split([len(some) for some in drawn])), self.reader.embed_texts([text]) if text else None
        )


class Condition(NamedTuple):
    """What generators get for a dataset, embedded."""

    samples: list[Tensor]  # the training rows behind each sample, [rows, hidden size]
    description: Tensor | None  # [1, hidden size]


def generated(generator: saved.Generator, seed: int, known: Mapping[str, Condition]) -> dict[str, Adapter]:
    """What a generator writes, by method: single samples and their mean. Its weights are on the device meanwhile.

    Args:
        generator: which.
        seed: its own.
        known: by kind of method, what it gets: of the dataset itself, and of another one in its place.
    """
    made: dict[str, Adapter] = {}
    generator.move(devices.own())
    for kind, one in known.items():
        samples = [generate.generate(generator, rows, 1, seed, len(rows), one.description)[0] for rows in one.samples]
        made |= {f"{kind} {seed}.{number}": adapter for number, adapter in enumerate(samples)}
        made[f"{kind}-mean {seed}"] = generate.mean_of(samples)
    generator.move(torch.device("cpu"))
    return made


class Others:
    """Adapters of several datasets on the device, to be averaged.

    Args:
        adapters: float32, by dataset.
    """

    def __init__(self, adapters: Mapping[str, Adapter]):
        self.names, device = list(adapters), devices.own()
        self.layout = vectors.layout_of(next(iter(adapters.values())))
        flat = [vectors.to_vector(one) for one in adapters.values()]
        self.stacked = torch.stack(flat).to(device)  # [adapters, values]

    def mean(self, weights: Mapping[str, float] | None = None) -> Adapter:
        """Their mean; with weights by name (0 for those without one) the sum of the weighted adapters."""
        shares = [weights.get(name, 0.0) if weights is not None else 1 / len(self.names) for name in self.names]
        return vectors.to_dict((torch.tensor(shares, device=self.stacked.device) @ self.stacked).cpu(), self.layout)

    def weighted(self, similarity: Mapping[str, float], temperature: float) -> Adapter:
        """The mean weighted by the softmax of similarities over a temperature, of the adapters that have one."""
        shares = torch.softmax(torch.tensor([*similarity.values()]) / temperature, 0)
        return self.mean(dict(zip(similarity, shares.tolist(), strict=True)))


def with_history(split: Split, history: list[list[str]]) -> Split:
    """The same questions behind some turns, each a prompt and its response."""
    texts = [
        {"prompt": text["prompt"], "response": text["response"], "system": text["system"], "history": history}
        for text in split.texts
    ]
    return Split(split.name, split.paired, [({"columns": HISTORY}, texts)], split.all_parts)


def per_row(one: CheckpointScore) -> dict[str, Any]:
    """What an adapter makes of each row: the loss in nats and whether the answer is right."""
    return {
        "losses": [round(loss, 5) for loss in one.losses], "tokens": one.token_counts,
        "right": [int(right) for right in one.right],
    }  # fmt: skip


def part_of(
    dataset: str, scored: Scored, methods: dict[str, list[dict[str, Any]]], facts: dict[str, Any]
) -> dict[str, Any]:
    """The result of one dataset as a part has it."""
    return {
        "dataset": dataset, "split": scored.split.name, "metric": scored.metric, "clusters": scored.clusters,
        "chance": chance_of(scored), "methods": methods, "facts": facts,
    }  # fmt: skip


def chance_of(scored: Scored) -> float:
    """The share of the most frequent response: what always saying the same gets right."""
    responses = [text["response"].strip() for text in scored.split.texts]
    return max(map(responses.count, set(responses))) / len(responses)
