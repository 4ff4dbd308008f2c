"""The dataset card of a published repository: its README.md, with the metadata that the hub reads.

card.md beside this file is its Jinja template; the metadata is huggingface_hub's DatasetCardData.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from paragen.collection import evaluation, index, prompts, quality_warnings, task_descriptions
from paragen.collection.manifest import TrainedData
from paragen.common import paths
from paragen.publishing import licenses

if TYPE_CHECKING:
    import pyarrow as pa

TEMPLATE = Path(__file__).with_name("card.md")
TAGS = ["lora", "peft", "parameter-generation", "weight-space", "llama-factory", "safetensors"]
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


def render(
    repository: str,
    chosen: list[index.Chosen],
    table: "pa.Table",
    marks: dict[str, Any],
    data_dir: Path,
    models_dir: Path,
) -> str:
    """The card of a repository; equal collections have equal cards.

    Args:
        repository: user/name.
        chosen: the published collections.
        table: their rows of the index.
        marks: as published_tree.build returns them.
        data_dir, models_dir: data/ and models/, which record the licences.
    """
    import jinja2
    from huggingface_hub import DatasetCard

    data, bases = data_facts(chosen, data_dir), base_facts(chosen, models_dir)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=in_a_table)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=repository.split("/")[1],
        repository=repository,
        checkpoints=table.num_rows,
        collections=collection_rows(table),
        scores=(scores := score_rows(chosen, table)),
        metrics={name: evaluation.METRICS[name] for name in sorted({row[5] for row in scores})},
        datasets=data,
        tasks=task_rows(chosen, data_dir),
        warnings=sorted({line for item in chosen for line in quality_warnings.about_data(item.manifest, data_dir)}),
        pictures=sorted({part.name for part in parts_of(chosen) if part.pictures}),
        unknown_data=sorted({item.manifest.dataset for item in chosen if item.manifest.data is None}),
        bases=bases,
        custom=[base for base in bases if base["gated"] or is_custom(base["license"])],
        versions=versions_of(chosen),
        recipes=recipe_rows(chosen, table),
        raw=marks["layout"] == "raw",
    )
    metadata = metadata_of(
        repository, table.num_rows, data, bases, unknown=any(i.manifest.data is None for i in chosen)
    )
    return str(DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}"))


def in_a_table(value: Any) -> Any:
    """A value for a table's cell: on one line, its bars escaped."""
    return " ".join(value.split()).replace("|", "\\|") if isinstance(value, str) else value


def metadata_of(repository: str, rows: int, data: list[dict], bases: list[dict], unknown: bool) -> Any:
    """The card's metadata, a huggingface_hub.DatasetCardData. `unknown`: the data of some collections are unknown."""
    from huggingface_hub import DatasetCardData

    languages = sorted({part["language"] for part in data if part["language"]})
    spelled = {licenses.spelled(part["license"]) for part in [*data, *bases]} | ({"unknown"} if unknown else set())
    known = sorted({name for names in spelled for name in names.split("-and-")})
    extra: dict[str, Any] = {}
    if len(known) > 1 or known[0] in licenses.CUSTOM:
        extra = {"license_name": "-and-".join(known), "license_link": "README.md#on-what"}
    return DatasetCardData(
        language=languages or None,
        license="other" if extra else known[0],
        pretty_name=repository.split("/")[1],
        size_categories=[next((name for limit, name in SIZES.items() if rows < limit), "other")],
        tags=TAGS,
        configs=[
            {
                "config_name": "index",
                "data_files": [{"split": "train", "path": paths.INDEX}],
                "default": True,
            }
        ],
        **extra,
    )


def parts_of(chosen: list[index.Chosen]) -> list[TrainedData]:
    """The elements of the manifests' `data`."""
    return [part for item in chosen for part in item.manifest.data or ()]


def data_facts(chosen: list[index.Chosen], data_dir: Path) -> list[dict[str, Any]]:
    """A dict per data file in the tree, test splits included.

    Each has `name`, `file`, `rows` (how many are in the file), `trained` (how many of its first rows were trained on, a
    text), and the keys that licenses.of_file returns.
    """
    trained: dict[tuple[str, str], set[int]] = {}
    for part in parts_of(chosen):
        trained.setdefault((part.name, part.file), set()).add(part.rows)
        if paired := licenses.test_split(part, data_dir):
            trained.setdefault((paired[0], paired[1]["file_name"]), set())
    return [
        {
            "name": name,
            "file": file,
            "rows": (rows := len(prompts.rows_in(Path(data_dir) / file))),
            "trained": trained_text(counts, rows),
            **licenses.of_file(name, file, data_dir),
        }
        for (name, file), counts in sorted(trained.items(), key=lambda item: item[0][::-1])
    ]


def task_rows(chosen: list[index.Chosen], data_dir: Path) -> list[tuple[str, str, int]]:
    """(Dataset, its first description, how many it has) of each dataset whose task is described."""
    found = {item.manifest.dataset: task_descriptions.of_collection(item.manifest, data_dir) for item in chosen}
    return [(name, texts[0], len(texts)) for name, texts in sorted(found.items()) if texts]


def trained_text(counts: set[int], rows: int) -> str:
    """How many of a file's first rows its collections were trained on, as the card says it.

    Args:
        counts: of each collection; empty for a file that none was trained on.
        rows: how many the file has.
    """
    words = ["all" if count == rows else f"the first {count:,}" for count in sorted(counts)]
    return " or ".join(words) or "none: held out"


def base_facts(chosen: list[index.Chosen], models_dir: Path) -> list[dict[str, Any]]:
    """A dict per base model, as licenses.of_base returns it, and its `link` for the card."""
    found = {}
    for item in chosen:
        base = licenses.of_base(item.manifest.base_model, models_dir)
        link = f"[{base['hub_id']}](https://huggingface.co/{base['hub_id']})" if base["hub_id"] else "–"
        if base["made_from"]:
            link = f"made from [{base['made_from']}](https://huggingface.co/{base['made_from']})"
        found[base["name"] or "", base["revision"] or ""] = {**base, "link": link}
    return [found[key] for key in sorted(found)]


def is_custom(license_name: str | None) -> bool:
    """Whether a licence is a model's own and not a common one."""
    names = (license_name or "").lower().split("-and-")
    return any(name.startswith(licenses.CUSTOM) for name in names)


def collection_rows(table: "pa.Table") -> list[dict[str, str]]:
    """A row per collection for the card."""
    keys = ["collection", "category", "dataset", "model", "rank", "seed"]
    figures = [("step", "min"), ("step", "max"), ("step", "count"), ("loss", "mean"), ("bytes", "sum")]
    return [
        {
            **{key: "–" if row[key] is None else str(row[key]) for key in keys},
            "count": str(row["step_count"]),
            "steps": f"{row['step_min']}–{row['step_max']}",
            "loss": "–" if row["loss_mean"] is None else f"{row['loss_mean']:.4f}",
            "mb": f"{row['bytes_sum'] / 1e6:.1f}",
        }
        for row in table.group_by(keys).aggregate(figures).sort_by("collection").to_pylist()
    ]


def score_rows(chosen: list[index.Chosen], table: "pa.Table") -> list[tuple[str, ...]]:
    """A row per evaluation for the card: the rows, and the scores of the base, the best and the last checkpoint."""
    models = dict(zip(table["collection"].to_pylist(), table["model"].to_pylist(), strict=True))
    rows = []
    for item in chosen:
        for found in evaluation.read(item.folder, item.manifest):
            if not found["checkpoints"]:
                continue
            best, last = evaluation.best_of(found), found["checkpoints"][-1]
            texts = [evaluation.text_of(found, score) for score in (found["base"], best, last)]
            steps = ["", f"step {best['step']}: " if best else "", f"step {last['step']}: "]
            named = (item.manifest.dataset, models[item.name], item.manifest.rank, item.manifest.seed)
            facts = (*named, evaluation.rows_text(found), found["metric"])
            scores = [step + text if text else None for step, text in zip(steps, texts, strict=True)]
            rows.append(tuple("–" if fact is None else str(fact) for fact in (*facts, *scores)))
    return rows


def recipe_rows(chosen: list[index.Chosen], table: "pa.Table") -> list[tuple[str, ...]]:
    """The main settings of each recipe for the card, each distinct row once."""
    models = dict(zip(table["collection"].to_pylist(), table["model"].to_pylist(), strict=True))
    rows = []
    for item in chosen:
        recipe = item.manifest.recipe or {}
        batch = recipe.get("per_device_train_batch_size")
        batch = batch and f"{batch} x {recipe.get('gradient_accumulation_steps', 1)}"
        figures = (
            item.manifest.dataset, models[item.name], item.manifest.rank, recipe.get("learning_rate"),
            recipe.get("lr_scheduler_type"), batch, recipe.get("max_steps"), recipe.get("lora_target"),
            recipe.get("template"), item.manifest.precision,
        )  # fmt: skip
        rows.append(tuple("–" if figure is None else str(figure) for figure in figures))
    return list(dict.fromkeys(rows))


def versions_of(chosen: list[index.Chosen]) -> str:
    """The package versions that the collections were made with, as one phrase."""
    found: dict[str, set[str]] = {}
    for item in chosen:
        for name, version in (item.manifest.versions or {}).items():
            found.setdefault(name, set()).add(version)
    shown = ("llamafactory", "transformers", "peft", "torch")
    known = [f"{name} {' or '.join(sorted(found[name]))}" for name in shown if found.get(name)]
    return ", ".join(known) or "versions not recorded"
