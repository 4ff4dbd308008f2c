"""The collections that a generator is trained on: which are selected, and whether they may be learned from together.

Factors of different starts have nothing in common but the starts' mean, so that all collections have to have one base
model, one rank, the same adapted layers, and initial factors of one seed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from paragen.collection import checkpoints, index, manifest_recipe, task_descriptions
from paragen.collection.index import Chosen
from paragen.collection.manifest import read_manifest
from paragen.common import files, paths, safetensors_header
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, families
from paragen.exports import peft

FEWEST = 2  # collections
START = ("lora_alpha", "use_rslora", "init_lora_weights")  # of adapter_config.json: what an initial update depends on


def chosen(without: Sequence[str] = ()) -> list[Chosen]:
    """The collections that the settings select, as `index.chosen` does, but those of some datasets.

    Args:
        without: names of datasets as a user types them.

    Raises UserError for a name that is not known, and where a collection is broken or is not like the others.
    """
    found = selected()
    omitted = set(named(without))
    left = [one for one in found if omitted.isdisjoint(datasets_of(one))]
    check_alike(left)
    return left


def selected() -> list[Chosen]:
    """The collections that the settings select. Raises UserError also where one of them is broken."""
    found, broken = index.chosen()
    if broken:
        raise UserError(
            f"{broken} of the selected collections are broken (see above), and a generator would not see them: collect "
            "them again, or select others"
        )
    return found


def named(datasets: Sequence[str]) -> list[str]:
    """The registered or indexed datasets that a user names. Raises UserError for one that is not known."""
    known = {*dataset_info.read_info(paths.DATA), *index.read(paths.SAVES)[0]["dataset"].to_pylist()}
    return [paths.choose(name, known, "dataset") for name in datasets]


def datasets_of(one: Chosen) -> set[str]:
    """The datasets that a collection was trained on."""
    return {name.strip() for name in one.manifest.dataset.split(",")}


def check_alike(chosen: Sequence[Chosen]) -> None:
    """Raise UserError, naming the first difference, unless one generator can learn from these collections."""
    if len(chosen) < FEWEST:
        names = ", ".join(one.name for one in chosen) or "none"
        raise UserError(f"a generator is trained on at least {FEWEST} collections; selected: {names}")
    first, *others = chosen
    expected = _facts_of(first)
    for other in others:
        for (what, one), (_, found) in zip(expected.items(), _facts_of(other).items(), strict=True):
            if found != one:
                raise UserError(
                    f"{first.name} and {other.name} differ in {what}: {_shown(one, found)} and {_shown(found, one)}; a "
                    "generator is trained on collections that are alike in it: select them (make index lists all)"
                )


def _facts_of(one: Chosen) -> dict[str, Any]:
    """What has to be the same in all collections of a generator, by the name that a message has for it."""
    manifest = one.manifest
    if manifest.recipe is None or manifest.data is None:
        raise UserError(
            f"{one.name}: its manifest has no recipe (it was made from a stock run), so it is unknown how it reads "
            "text; omit it with WITHOUT"
        )
    config = checkpoints.adapter_config(one.folder, manifest)
    base = manifest.base_model
    return {
        "the base model": (manifest.base_name, base.sha256 if base else None),
        "the rank": manifest.rank,
        "the layers": {key: tuple(about["shape"]) for key, about in _header_of(one).items()},
        "the dtype": sorted({about["dtype"] for about in _header_of(one).values()}),
        "the start of the factors": {key: config.get(key) for key in START},
        "the seed of the initial factors": _seed_of_start(one),
        "how text is read": manifest_recipe.text_settings(manifest.recipe),
    }


def _shown(value: Any, other: Any) -> str:
    """A fact as a message shows it; of a mapping, the first item that differs from the other one's."""
    if isinstance(value, dict):
        key = min(key for key in value.keys() | other.keys() if value.get(key) != other.get(key))
        return f"{key}={value.get(key)}"
    return " ".join(str(part)[:40] for part in value if part) if isinstance(value, tuple | list) else str(value)


def _header_of(one: Chosen) -> dict[str, Any]:
    """What the header of a collection's first checkpoint states of each tensor."""
    path = one.folder / one.manifest.checkpoints[0].file_name
    try:
        return safetensors_header.read_tensors(path)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{paths.relative(path)}: cannot be read ({error}); run: make verify") from None


def _seed_of_start(one: Chosen) -> int | None:
    """The seed of the training that drew the initial factors: of the pretrain, where its run is still there."""
    pretrain = one.manifest.pretrain
    before = read_manifest(one.folder.parent / pretrain.run) if pretrain else None
    return one.manifest.seed if before is None else before.seed


def layout_of(one: Chosen) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a collection's checkpoints by PEFT's key, in natural order."""
    header = _header_of(one)
    checkpoints.layers_of(header)  # raises UserError for other tensors than factors of linear layers
    return {key: tuple(header[key]["shape"]) for key in checkpoints.in_natural_order(tuple(header))}


def records_of(chosen: Sequence[Chosen], steps: str) -> list[dict[str, Any]]:
    """What a generator's manifest says of the pairs that it was trained on: an object per collection.

    Args:
        chosen: the collections.
        steps: as STEPS selects checkpoints.
    """
    named = families.families_of({name for one in chosen for name in datasets_of(one)}, paths.DATA)
    return [
        {
            "collection": one.name,
            "manifest": one.manifest.sha256,
            "dataset": one.manifest.dataset,
            "family": "+".join(sorted({named[name] for name in datasets_of(one)})),
            "descriptions": files.sha256_of_value(task_descriptions.of_collection(one.manifest, paths.DATA)),
            "steps": [entry.step for entry in peft.selected(one.manifest.checkpoints, steps)],
        }
        for one in chosen
    ]


def folders_in(top: Path) -> Iterator[Path]:
    """The generators below a folder, sorted."""
    for path in sorted(top.iterdir()) if top.is_dir() else []:
        if not path.name.startswith(".") and (path / paths.MANIFEST).is_file():
            yield path
