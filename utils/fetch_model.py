"""Download a base model into models/, or check one that is there.

    python utils/fetch_model.py MODEL                 make model MODEL=...

MODEL is a short name of models/models.yaml (qwen2.5-0.5b), any repository of the Hugging Face hub (org/name; a commit,
tag or branch of it as org/name@revision), or a folder under models/ (my-model, or models/my-model as the shell
completes it). HF_ENDPOINT names a mirror, HF_TOKEN or `hf auth login` the account. An interrupted download is resumed.
A second call only checks what is there. A sample of text goes through tokenizer and template and back: a difference is
a warning.
"""

from paragen.common import cli, files, locks, paths, settings
from paragen.model import base_models, download, embedded
from paragen.recipes import round_trip


def main() -> None:
    parser = cli.ArgumentParser(description="Download a base model into models/, or check one that is there.")
    what = "short names (" + ", ".join(base_models.table()) + "), or org/name on the hub; default: MODEL"
    parser.add_argument("models", nargs="*", help=what)
    for name in parser.parse_args().models or settings.values("MODEL") or [""]:
        fetch(name)


def fetch(name: str) -> None:
    """Download one model, or check the one that is there, and print what it is."""
    entry = download.requested_entry(name)
    folder = paths.MODELS / entry["folder"]
    waiting = f"another process is downloading {folder.name}; waiting for it ..."
    with locks.lock(files.beside(folder, "lock"), waiting=waiting):
        files.recover_folder(folder)
        if not folder.exists():
            if entry["hub_id"]:
                download.download(folder, entry)
            else:
                embedded.make(folder)
        for line in download.check(folder, entry):
            cli.say(line)
        for line in round_trip.warnings_of(folder):
            cli.say(f"warning: {line}")


if __name__ == "__main__":
    cli.run(main)
