"""What exports ask of a collection's scores: the best step, and the command that makes scores which are missing."""

from paragen.collection import evaluation
from paragen.collection.index import Chosen
from paragen.collection.manifest import CheckpointEntry
from paragen.common import paths
from paragen.common.cli import UserError


def best_entry(chosen: Chosen) -> CheckpointEntry:
    """The checkpoint that STEPS=best selects, in every format that takes it.

    It is the best by its score on rows that are not the held-out ones of the collection's dataset: of such evaluations,
    the one of most rows decides. Those held-out rows are what is reported; a step chosen by them would be reported too
    good. Raises UserError where no such score is known.
    """
    others = [found for found in evaluation.read(chosen.folder, chosen.manifest) if not found["paired"]]
    # of an evaluation that has scored no checkpoint yet, nothing can be chosen
    most = max((found for found in others if found["checkpoints"]), key=lambda found: found["rows"], default=None)
    score = evaluation.best_of(most) if most else None
    if score is None:
        raise UserError(
            f"{chosen.name}: is not scored on rows other than the reported ones, by which STEPS=best may not choose; "
            f"{way_to_score(chosen)} SPLIT=.., or take STEPS=last"
        )
    return next(entry for entry in chosen.manifest.checkpoints if entry.step == score["step"])


def way_to_score(chosen: Chosen) -> str:
    """How a message ends that misses scores of a collection: the command that makes them."""
    manifest = chosen.manifest
    seed = "" if manifest.seed is None else f" SEED={manifest.seed}"
    model = "" if manifest.base_name is None else f" MODEL={manifest.base_name}"
    return f"score it: make evaluate DATASET={paths.typed(manifest.dataset)}{model} RANK={manifest.rank}{seed}"
