"""What scoring checkpoints together saves, against PEFT and against LLaMA-Factory's own prediction, in one run.

    python bench/evaluate.py --data ARC-c_test.json --train ARC-c_train.json     100 checkpoints, for a GPU
    python bench/evaluate.py cpu                              8 checkpoints together beside one by one, on this CPU

Ends in a table; --out takes the raw numbers as JSON as they come. --tiny rehearses it in two minutes on any machine.
TOKENIZER names a folder with the random model's tokenizer (default: the embedded model's). All else is written to a
temporary folder and removed.

Model FLOP utilisation (MFU) is what the base model and all checkpoints need for their rows (shapes.forward_flops: each
row's prompt and responses once, without padding) per second, by the device's peak. As PaLM's authors define it, it does
not depend on what an implementation does twice or spares itself, so PEFT's is counted alike. `computed` counts what all
prompts begin with once per checkpoint, as it is computed: the share of the peak that the device really reached.

The seconds are those from the loaded model to the last written evaluation.json, with tokenisation, the comparison with
PEFT and the reading of checkpoints. Told beside it: without the first two; and of the forward passes alone, from the
first launch of a group to its end by the device's clock. On a GPU evaluate.py runs twice and the second run counts: the
first one on a machine compiles Triton's kernels. Its seconds are told, too.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "utils"))

from shapes import ROOT, SHAPES

from paragen.common import cli

DATA = ROOT / "data" / "common-sense-reasoning"


def main() -> int | None:
    args = parse(["cpu" if word == "--cpu" else word for word in sys.argv[1:]])
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false")):
        os.environ.setdefault(name, value)
    args.out = args.out and args.out.absolute()
    with tempfile.TemporaryDirectory(prefix="evaluate bench ") as folder:
        if args.part == "cpu":
            import evaluate_cpu as part
        else:
            os.environ["PARAGEN_TOP"] = str(Path(folder, "top"))  # read when utils/paths.py is imported
            import evaluate_whole as part
        return part.run(args, Path(folder, "top"))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; --tiny replaces what was not given by sizes for a rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", nargs="?", choices=("whole", "cpu"), default="whole")
    add("--data", type=Path, default=DATA / "ARC-c_test.json", help="rows to score on (default: data/..; or made up)")
    add("--train", type=Path, default=DATA / "ARC-c_train.json", help="rows to train on (default: data/..; or made up)")
    add("--model-shape", choices=SHAPES, default="qwen2.5-0.5b")
    add("--checkpoints", type=int, help="default: 100; cpu: 8")
    add("--rank", type=int, default=8)
    add("--steps", type=int, default=60, help="pretrain steps (default: %(default)s)")
    add("--learning-rate", default="3e-3", help="high: a random model soon answers with options")
    add("--sizes", help="batch sizes that PEFT is tried with (default: 8 16 32 64 128 256 512; cpu: 4 16)")
    add("--baseline-checkpoints", type=int, default=3, help="that PEFT scores (default: %(default)s)")
    add("--predict-sizes", default="16 128", help="batch sizes that LLaMA-Factory's prediction is tried with")
    add("--predict-rows", type=int, default=0, help="rows of its measurement at the best size (default: all)")
    add("--predict-tried", type=int, default=256, help="rows of the others (default: %(default)s)")
    add("--metrics", type=Path, help="a folder with jieba and rouge-chinese (pip install --target FOLDER --no-deps "
        "jieba rouge-chinese), which LLaMA-Factory's prediction imports")  # fmt: skip
    add("--rounds", type=int, default=1, help="of cpu (default: %(default)s)")
    add("--profile", action="store_true", help="of cpu: where the time of a pass goes")
    add("--out", type=Path, help="JSON file for the raw numbers")
    add("--tiny", action="store_true", help="a rehearsal: a tiny model, few rows and steps")
    args = parser.parse_args(words)
    if args.tiny:
        vars(args).update(model_shape="tiny", checkpoints=6, steps=8, sizes="4 8", predict_sizes="4 8", predict_rows=16,
                          predict_tried=8, data=DATA / "Demo_test.json", train=DATA / "Demo_train.json")  # fmt: skip
    args.checkpoints = args.checkpoints or (8 if args.part == "cpu" else 100)
    args.sizes = args.sizes or ("4 16" if args.part == "cpu" else "8 16 32 64 128 256 512")
    return args


if __name__ == "__main__":
    cli.run(main)
