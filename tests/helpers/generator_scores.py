"""Prints, as JSON, the loss that adapters have on a dataset's held-out rows: for tests that fork it in a project.

Settings: GENERATOR, DATASET, and OTHER: a dataset whose prompts are another task's.
"""

import json
import os


def main() -> None:
    from paragen.collection import adapter_config, checkpoints, index, prompts
    from paragen.common import paths
    from paragen.generator import generate, saved
    from paragen.scoring import base_model, collection_scorer
    from paragen.scoring.questions import Split

    dataset, other = os.environ["DATASET"], os.environ["OTHER"]
    generator = saved.load(paths.SAVES / "generators" / os.environ["GENERATOR"])
    os.environ.pop("DATASET")
    chosen = {one.manifest.dataset: one for one in index.chosen()[0]}
    about = chosen[dataset]
    config = adapter_config.parse(checkpoints.adapter_config_bytes(about.folder, about.manifest), dataset)
    split = Split(dataset, True, list(prompts.parts(about.manifest, "test")))
    own = generate.last_checkpoint(about)
    others = [generate.last_checkpoint(chosen[name]) for name in generator.datasets if name != dataset]

    def generated(name: str) -> list[generate.Adapter]:
        return generate.generate(generator, generate.source_of(name).rows, samples=4)

    adapters = [None, own, generate.mean_of(others), *generated(dataset), *generated(other)]
    base = base_model.base_for(about.manifest, None)
    found = collection_scorer.score_adapters(adapters, config, base, split, "loss", dataset)
    base_loss, own_loss, others_loss, *losses = [sum(one.losses) / sum(one.token_counts) for one in found]
    print("scores: " + json.dumps({
        "base": base_loss, "own": own_loss, "others": others_loss, "generated": sum(losses[:4]) / 4,
        "of another": sum(losses[4:]) / 4,
    }))  # fmt: skip
