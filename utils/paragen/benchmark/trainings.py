"""Adapters that the benchmark trains itself, by the project's own collect path, in a project of its own.

    <benchmark>/trained/    a folder like the repository: models (a link), data, collect_scripts, saves

Its collections are no part of saves/, of the index or of the report. The recipes are those of the measured dataset with
other rows (few, union) or another order of the rows (again).
"""

import json
import os
import random
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from paragen.benchmark.plan import Fold, Plan, drawn_rows
from paragen.collection import prompts, run_identity
from paragen.collection.index import Chosen
from paragen.collection.manifest import read_manifest, require_manifest
from paragen.common import cli, files, paths, settings
from paragen.common.cli import UserError, say
from paragen.recipes import keys, lookup, render

AGAIN, UNION, FEW = "again", "union", "few"
DATA_SEED = 1  # of the adapters that see the rows in another order; recipes have 42 unless they state one
FEW_STEPS = 50  # of a few-shot adapter before the last ones: about 25 epochs of 16 rows, 8 at a time
FEW_LAST = 10  # its last steps
# Keys of a recipe that the benchmark sets itself or that only manifests have, and the one that KEEP sets.
REPLACED = frozenset(("dataset", "max_samples", "lora_rank", "seed", "template_sha256"))
OF_KEEP = frozenset(("save_total_limit",))
COLUMNS = {"prompt": "prompt", "response": "response", "system": "system"}


class Training(NamedTuple):
    """An adapter to train."""

    name: str  # the dataset's in the project of its own
    kind: str  # AGAIN, UNION or FEW
    like: Chosen  # the collection whose recipes are taken
    rows: list[dict[str, Any]]  # system, prompt and response


def needed(plan: Plan) -> list[Training]:
    """The adapters that a benchmark needs, in the order of `settings.BASELINES`.

    Raises UserError where the rows that a dataset was trained on have changed, or are conversations.
    """
    found, kinds = [], plan.wanted.baselines
    used = plan.chosen if UNION in kinds else plan.held if {AGAIN, FEW} & set(kinds) else ()
    rows = {name: rows_of(plan, name) for name in used}
    if AGAIN in kinds:
        found += [Training(f"{name}.{AGAIN}", AGAIN, plan.chosen[name], rows[name]) for name in plan.held]
    if UNION in kinds:
        found += [union_of(plan, fold, rows) for fold in plan.folds]
    if FEW in kinds:
        for name in plan.held:
            drawn = drawn_rows(name, plan.wanted.prompts, len(rows[name]), 0)
            found.append(Training(f"{name}.{FEW}", FEW, plan.chosen[name], [rows[name][place] for place in drawn]))
    return found


def rows_of(plan: Plan, dataset: str) -> list[dict[str, Any]]:
    """The rows that a dataset's collection was trained on: system, prompt and response."""
    rows = prompts.of_collection(plan.chosen[dataset].manifest)
    if any("messages" in row or row["images"] for row in rows):
        raise UserError(
            f"{dataset}: has conversations or pictures; the benchmark's own trainings take rows of one prompt and one "
            "response (BASELINES=none measures without them)"
        )
    return [{key: row[key] for key in COLUMNS} for row in rows]


def union_of(plan: Plan, fold: Fold, rows: dict[str, list[dict[str, Any]]]) -> Training:
    """The training on the rows of all datasets that a fold's generator sees: as many as its recipe's steps use.

    Args:
        plan: the benchmark.
        fold: which.
        rows: those that each collection was trained on.
    """
    like = plan.chosen[fold.held[0]]
    union = [row for name in fold.trained for row in rows[name]]
    random.Random(f"union {fold.name}").shuffle(union)
    return Training(f"{fold.name}.{UNION}", UNION, like, union[: rows_seen(like) or len(rows[fold.held[0]])])


def recipes_of(like: Chosen) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The model's name in the recipes of a collection's dataset and base model, the pretrain and the finetune recipe.

    Raises UserError where there are none, or others than the collection was trained with.
    """
    dataset, base = like.manifest.dataset, like.manifest.base_name
    for (name, short), pair in lookup.pairs_in("").items():
        pretrain, finetune = map(render.load, pair) if name == dataset else ({}, {})
        if base and Path(str(finetune.get("model_name_or_path"))).name == base:
            check_same_training(like, pretrain, finetune)
            return short, pretrain, finetune
    raise UserError(
        f"collect_scripts: no recipes of {dataset} for {base}, which the benchmark's own trainings take; write them "
        "with make recipe, or measure without these trainings (BASELINES=context, or none)"
    )


def check_same_training(like: Chosen, pretrain: dict[str, Any], finetune: dict[str, Any]) -> None:
    """Raise UserError where recipes train in another way than those that a collection was made with.

    Those of a pretrain whose run folder is gone are compared by the step that was resumed.
    """
    before = like.manifest.pretrain
    run = read_manifest(like.folder.parent / before.run) if before else None
    found = changed_keys(like.manifest.recipe, finetune, REPLACED | OF_KEEP)
    found += changed_keys(run.recipe if run else None, pretrain, REPLACED)
    resumed = Path(str(finetune.get("resume_from_checkpoint"))).name
    if before and resumed != f"checkpoint-{before.step}":
        found.append(f"the resumed step (checkpoint-{before.step} -> {resumed})")
    if found:
        raise UserError(
            f"{like.name}: its recipes have changed since it was made: {', '.join(dict.fromkeys(found))}; the "
            "benchmark's own trainings take them: put them back, collect again with FORCE=1, or measure without these "
            "trainings (BASELINES=context, or none)"
        )


def changed_keys(trained: dict[str, Any] | None, now: dict[str, Any], replaced: Set[str]) -> list[str]:
    """The keys, with their values, in which a manifest's recipe and today's train differently; none without the former.

    Args:
        trained: the recipe in a manifest.
        now: a recipe as it is in its file.
        replaced: keys that do not count.
    """
    both = [
        {"recipe": {key: value for key, value in recipe.items() if key not in keys.NOT_TRAINED | replaced}}
        for recipe in (trained or {}, now)
    ]
    other = {"data": None, "base_model": None, "tokenizer": None, "pretrain": None}
    return run_identity.changes({**both[0], **other}, {**both[1], **other}) if trained else []


def rows_seen(like: Chosen) -> int:
    """How many rows the steps of a collection's recipes see; 0 where epochs decide how many steps there are."""
    seen, before = 0, 0
    for recipe in recipes_of(like)[1:]:
        last = int(recipe.get("max_steps") or 0)
        rows = int(recipe.get("per_device_train_batch_size", 8)) * int(recipe.get("gradient_accumulation_steps", 1))
        seen, before = seen + max(0, last - before) * rows, last
    return seen


def place_of(plan: Plan) -> Path:
    """The folder of the project of its own."""
    return plan.folder / "trained"


def run(plan: Plan) -> None:
    """Train what is needed and not there yet, on all devices, by utils/collect_all.py.

    Raises UserError where a training fails; the log beside its run folder says why.
    """
    wanted = needed(plan)
    if not wanted:
        return
    write_project(plan, wanted)
    short = recipes_of(wanted[0].like)[0]
    environment = dict.fromkeys([*settings.SETTINGS, *settings.PLURALS], "")  # ours select what is measured
    environment |= {key: os.environ.get(key, "") for key in ("DEVICES", "DETERMINISTIC", "FORCE")}
    environment |= {
        "PARAGEN_TOP": str(place_of(plan)), "MODEL": short, "RANK": str(wanted[0].like.manifest.rank), "KEEP": "1",
        "PRUNE_PRETRAIN": "1", "MAKE_SETTINGS": "RANK MODEL KEEP",
    }  # fmt: skip
    say(f"training {len(wanted)} adapters to compare with, in {paths.relative(place_of(plan))}")
    names = [one.name for one in wanted]
    if cli.call([sys.executable, paths.UTILS / "collect_all.py", "all", *names], environment):
        raise UserError(f"{paths.relative(place_of(plan))}: not all adapters were trained; the lines above say why")


def write_project(plan: Plan, wanted: Sequence[Training]) -> None:
    """Write the project: a link to the models, the rows, dataset_info.json and the recipes. Unchanged files stay."""
    top = place_of(plan)
    for name in ("data", "collect_scripts", "saves"):
        (top / name).mkdir(parents=True, exist_ok=True)
    if not (top / "models").exists():
        (top / "models").unlink(missing_ok=True)  # a link to models that were elsewhere before
        (top / "models").symlink_to(paths.MODELS.absolute(), target_is_directory=True)
    info: dict[str, Any] = {}
    for one in wanted:
        file = f"{category_of(one)}/{one.name}.json"
        info[one.name] = {"file_name": file, "columns": COLUMNS}
        put(top / "data" / file, json.dumps(one.rows, ensure_ascii=False, indent=1))
        short, *configs = configs_of(one)
        for phase, config in zip(paths.PHASES, configs, strict=True):
            folder = top / "collect_scripts" / category_of(one) / one.name
            put(folder / f"{short}_{one.name}_{phase}.yaml", render.dump(config))
    put(top / "data" / "dataset_info.json", json.dumps(info, indent=2))


def put(path: Path, text: str) -> None:
    """Write a file unless it has this text already."""
    if not path.is_file() or path.read_bytes() != text.encode():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, text.encode())


def category_of(one: Training) -> str:
    """The category whose folders a training uses."""
    return one.like.manifest.category or paths.MADE


def configs_of(one: Training) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The model's name in recipes, and the two recipes of a training."""
    short, pretrain, finetune = recipes_of(one.like)
    rank, folder = one.like.manifest.rank, one.like.manifest.base_name
    runs = {
        phase: f"../../../saves/{category_of(one)}/{one.name}/{folder}_lora-rank_{rank}_{phase}"
        for phase in paths.PHASES
    }
    for phase, config in (("pretrain", pretrain), ("finetune", finetune)):
        config |= {
            "dataset": one.name, "dataset_dir": "../../../data", "model_name_or_path": f"../../../models/{folder}",
            "lora_rank": rank, "output_dir": runs[phase], "max_samples": len(one.rows),
        }  # fmt: skip
        if one.like.manifest.seed is not None:
            config["seed"] = one.like.manifest.seed
        if one.kind == AGAIN:
            config["data_seed"] = DATA_SEED
    resumed = Path(finetune["resume_from_checkpoint"]).name
    if one.kind == FEW:
        pretrain |= {"max_steps": FEW_STEPS, "save_steps": FEW_STEPS}
        finetune["max_steps"], resumed = FEW_STEPS + FEW_LAST, f"checkpoint-{FEW_STEPS}"
    finetune["resume_from_checkpoint"] = f"{runs['pretrain']}/{resumed}"
    finetune["save_total_limit"] = 1
    return short, pretrain, finetune


def trained(plan: Plan, dataset: str, like: Chosen) -> Chosen:
    """The collection of one of the trainings. Raises UserError where it is not there."""
    where = place_of(plan) / "saves"
    folder = f"{like.manifest.base_name}_lora-rank_{like.manifest.rank}_finetune"
    name = f"{like.manifest.category or paths.MADE}/{dataset}/{folder}"
    return Chosen(name, where / name, require_manifest(where / name))
