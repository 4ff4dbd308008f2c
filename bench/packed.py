"""What the packed engine saves: against stock LLaMA-Factory and our ordinary path, and as the number of adapters grows.

    python bench/packed.py whole --data ARC-c_train.json     stock, ordinary and packed, in one run (for a GPU)
    python bench/packed.py grow [--shape qwen2.5-7b]         ms per step from 1 to 35 adapters (for a GPU)
    python bench/packed.py cpu                               packed beside one cell after the other, on this CPU
    python bench/packed.py lengths --data FOLDER             what padding costs where rows differ in length

Each part ends in a table and writes its raw numbers to --out; --tiny rehearses it in a minute on any machine. TOKENIZER
names a folder with the random model's tokenizer (default: the embedded model's). All else is written to a temporary
folder and removed. FLOPs and model FLOP utilisation (MFU) are counted as shapes.flops says.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from shapes import ROOT, SHAPES

from paragen.common import cli


def main() -> int | None:
    args = parse(["cpu" if word == "--cpu" else word for word in sys.argv[1:]])
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    args.out = args.out and args.out.absolute()
    with tempfile.TemporaryDirectory(prefix="packed bench ") as folder:
        top = Path(folder, "top")
        os.environ["PARAGEN_TOP"] = str(top)  # read when utils/paths.py is imported, so before the parts are
        if args.part == "whole":
            import packed_whole as part
        elif args.part == "grow":
            import packed_grow as part
        elif args.part == "lengths":
            import packed_lengths as part
        else:
            import packed_cpu as part
        return part.run(args, top)


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; --tiny replaces what was not given by sizes for a rehearsal."""
    parser = argparse.ArgumentParser(description="Measure the packed engine.")
    parts = parser.add_subparsers(dest="part", required=True)
    whole = parts.add_parser("whole", help="stock, ordinary path and packed engine, in one run")
    whole.add_argument("--data", type=Path, help="ARC-c's training rows (JSON)")
    whole.add_argument("--model-shape", choices=SHAPES, default="qwen2.5-0.5b")
    whole.add_argument("--ranks", default="2 4 8 16 64")
    whole.add_argument("--steps", type=int, default=700, help="pretrain steps (default: %(default)s)")
    whole.add_argument("--keep", type=int, default=100, help="collected steps (default: %(default)s)")
    whole.add_argument("--stock-steps", default="14 14", help="measured of the two phases (default: %(default)s)")
    whole.add_argument(
        "--ordinary-steps", type=int, default=150, help="measured of the pretrain; the collection is run whole"
    )
    grow = parts.add_parser("grow", help="time per step against the number of adapters")
    grow.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    grow.add_argument("--counts", default="1,5,10,20,35")
    grow.add_argument("--steps", type=int, default=24, help="per count and phase (default: %(default)s)")
    grow.add_argument("--phases", default="pretrain,collect")
    grow.add_argument("--profile", action="store_true", help="where the device's time goes, for the largest count")
    cpu = parts.add_parser("cpu", help="packed beside one cell after the other, on this CPU")
    cpu.add_argument("--cells", type=int, default=5)
    cpu.add_argument("--steps", type=int, default=4, help="of each phase (default: %(default)s)")
    lengths = parts.add_parser("lengths", help="what padding costs ten real datasets in one pack; nothing is trained")
    lengths.add_argument("--data", type=Path, required=True, help="folder of prepared files, at any depth")
    lengths.add_argument("--ranks", default="8", help="of each dataset (default: %(default)s)")
    lengths.add_argument("--batch", type=int, default=8, help="rows of a step (default: %(default)s)")
    lengths.add_argument("--steps", type=int, default=700, help="of each run (default: %(default)s)")
    lengths.add_argument("--epochs", type=int, help="in place of --steps: passes over each dataset's rows")
    for part in (whole, grow, cpu, lengths):
        part.add_argument("--out", type=Path, help="JSON file for the raw numbers")
        part.add_argument(
            "--peak", type=float, default=989.0, help="TFLOPS of the device (default: an H100's, bfloat16)"
        )
        part.add_argument("--tiny", action="store_true", help="a rehearsal: a tiny model, few steps")
    args = parser.parse_args(words)
    if args.tiny:
        tiny = {
            "whole": {"model_shape": "tiny", "steps": 40, "keep": 12, "stock_steps": "8 8", "ordinary_steps": 20,
                      "data": args.__dict__.get("data") or ROOT / "data/common-sense-reasoning/Demo_train.json"},
            "grow": {"shape": "tiny", "counts": "1,5", "steps": 4},
            "cpu": {"steps": 2},
            "lengths": {"steps": 20},
        }  # fmt: skip
        vars(args).update(tiny[args.part])
    if args.part == "whole" and args.data is None:
        parser.error("whole needs --data, the training rows of ARC-c (or --tiny)")
    return args


if __name__ == "__main__":
    cli.run(main)
