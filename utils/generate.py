"""Have a generator write adapters for datasets, from prompts (and a description).

    GENERATOR=.. DATASET="OBQA ..." [PROMPTS=16] [SAMPLES=4] [SEED=0] [OUT=..] [DEVICES=..] [FORCE=1] \\
        python utils/generate.py                                                            (make generate)

GENERATOR is a name in saves/generators or a path. DATASET is registered (data/dataset_info.json) and needs no
collection: its training rows are the prompts, never those that are held out to score on. Writes PEFT folders,
OUT/<dataset>/<sample>/, with a generated.json beside them; OUT defaults to saves/generated/<generator>. make evaluate
scores them.
"""

from pathlib import Path

from paragen.common import cli, devices, paths, settings
from paragen.common.cli import UserError, say
from paragen.exports import parts
from paragen.generator import options, sources

SAMPLES = 4


def main() -> None:
    requested, datasets = settings.text("GENERATOR"), settings.values("DATASET")
    if not requested or not datasets:
        raise UserError("name a generator and a dataset: make generate GENERATOR=.. DATASET=..")
    folder = folder_of(requested)
    seed, samples = options.only_seed("SEED", settings.values("SEED")), settings.number("SAMPLES") or SAMPLES
    out = parts.out_folder(settings.text("OUT") or str(paths.SAVES / "generated" / folder.name))
    devices.pin(devices.choose()[:1])
    from paragen.generator import generate, saved  # import torch: after the device is pinned

    generator = saved.load(folder)
    each = settings.number("PROMPTS") or generator.manifest["settings"]["prompts"]
    found = [generate.source_of(dataset) for dataset in datasets]
    for source in found:
        drawn = generate.draw_prompts(len(source.rows), samples, seed, each)
        record = generate.record_of(generator, source, drawn, seed)
        if generate.is_there(record, out):
            say(f"there already: {paths.relative(out / source.dataset)}")
            continue
        adapters = generate.generate(generator, source.rows, samples, seed, each, source.description)
        generate.write(generator, adapters, record, out)


def folder_of(requested: str) -> Path:
    """The folder of the generator that GENERATOR names. Raises UserError, listing those there are, for another name."""
    path = Path(requested).expanduser()
    if (path / paths.MANIFEST).is_file():
        return path.absolute()
    top = paths.SAVES / "generators"
    return top / paths.choose(requested, [each.name for each in sources.folders_in(top)], "generator")


if __name__ == "__main__":
    cli.run(main)
