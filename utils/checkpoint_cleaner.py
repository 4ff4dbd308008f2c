"""Turn a finished stock LLaMA-Factory finetune run into a collection: the adapters of its saved steps, and a manifest.

    python utils/checkpoint_cleaner.py RUN_FOLDER [--keep 100] [--dry-run]          --keep: of the newest steps alone

Replaces checkpoint-*/, with their optimizer states and tokenizer files, by checkpoint-<step>.safetensors and the other
files of a collection. Files that LLaMA-Factory does not write stay where they are; --dry-run lists every file. The
collection is built and read back beside the folder before anything is removed, so the script can be run again, also
after a crash. Facts that a stock run does not record are null in the manifest.
"""

from pathlib import Path

from paragen.collection import stock_runs
from paragen.common import cli, paths
from paragen.common.cli import say


def main() -> None:
    parser = cli.ArgumentParser(description="Make a stock LLaMA-Factory finetune run a collection.")
    parser.add_argument("run_folder", type=Path)
    stock_runs.add_options(parser)
    args = parser.parse_args()
    outcome = stock_runs.clean(args.run_folder, args.keep, args.dry_run)
    freed = (
        f", {outcome.freed / 1e6:.1f} MB {'to free' if args.dry_run else 'freed'}" if outcome.state != "clean" else ""
    )
    if args.dry_run:
        for line in outcome.lines:
            say(line)
    say(f"{outcome.state}: {paths.relative(args.run_folder)}, {outcome.checkpoints} checkpoints{freed}")


if __name__ == "__main__":
    cli.run(main)
