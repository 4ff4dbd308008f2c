"""Prints, as JSON, the loss that adapters have on a dataset's held-out rows: for tests that fork it in a project.

Settings: GENERATOR, DATASET, and OTHER: a dataset whose prompts are another task's.
"""

import json
import os


def main() -> None:
    import torch

    from paragen.collection import index, prompts
    from paragen.common import paths
    from paragen.generator import generate, saved
    from paragen.generator.second_stage import BaseLoss

    dataset, other = os.environ["DATASET"], os.environ["OTHER"]
    generator = saved.load(paths.SAVES / "generators" / os.environ["GENERATOR"])
    os.environ.pop("DATASET")
    chosen = {one.manifest.dataset: one for one in index.chosen()[0]}
    base = BaseLoss([*chosen.values()], generator.reader, generator.layout)
    rows = generator.reader.questions(prompts.parts(chosen[dataset].manifest, "test"))

    @torch.no_grad()
    def loss(*adapters: generate.Adapter) -> float:
        vectors = [generator.layout.vector_of(adapter)[None] for adapter in adapters]
        return sum(base.loss(vector, rows).item() for vector in vectors) / len(vectors)

    def generated(name: str) -> list[generate.Adapter]:
        return generate.generate(generator, generate.source_of(name).rows, samples=4)

    own = generate.last_checkpoint(chosen[dataset])
    others = [generate.last_checkpoint(chosen[name]) for name in generator.datasets if name != dataset]
    print("scores: " + json.dumps({
        "base": loss({key: torch.zeros_like(value) for key, value in own.items()}),
        "own": loss(own),
        "others": loss(generate.mean_of(others)),
        "generated": loss(*generated(dataset)),
        "of another": loss(*generated(other)),
    }))  # fmt: skip
