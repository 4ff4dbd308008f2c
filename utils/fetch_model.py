"""Download a base model into models/, or check one that is there.

    python utils/fetch_model.py MODEL                 make model MODEL=...

MODEL is a short name of models/models.yaml (qwen2.5-0.5b), any repository of the Hugging Face hub (org/name; a commit,
tag or branch of it as org/name@revision), or a folder put under models/ by hand. HF_ENDPOINT names a mirror, HF_TOKEN
or `hf auth login` the account. An interrupted download is resumed. A second call only checks what is there.
"""

import argparse

from paragen.common import cli, files, paths
from paragen.model import base_models, download, embedded


def main() -> None:
    parser = argparse.ArgumentParser(description="Download a base model into models/, or check one that is there.")
    parser.add_argument("model", help="a short name (" + ", ".join(base_models.table()) + "), or org/name on the hub")
    entry = download.requested_entry(parser.parse_args().model)
    folder = paths.MODELS / entry["folder"]
    waiting = f"another process is downloading {folder.name}; waiting for it ..."
    with files.lock(files.beside(folder, "lock"), waiting=waiting):
        files.recover_folder(folder)
        if not folder.exists():
            if entry["hub_id"]:
                download.download(folder, entry)
            else:
                embedded.make(folder)
        for line in download.check(folder, entry):
            cli.say(line)


if __name__ == "__main__":
    cli.run(main)
