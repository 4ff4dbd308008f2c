"""A data/ folder with rows for ARC-c and, with drawn pictures, for MathV360K.

python tests/helpers/tiny_pictures.py DATA
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "white")
PICTURES = "multimodal/colours"  # below data/


def draw(path: Path, colour: str, size: tuple[int, int] = (64, 48)) -> None:
    """A PNG with a disc of a colour."""
    picture = Image.new("RGB", size, "black")
    ImageDraw.Draw(picture).ellipse((8, 8, size[0] - 8, size[1] - 8), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def rows(count: int = 16) -> list[dict]:
    """ShareGPT rows, a picture each, and every fourth with two."""
    found = []
    for number in range(count):
        images = [f"{PICTURES}/{number}.png", f"{PICTURES}/0.png"][: 2 if number % 4 == 3 else 1]
        question = {"from": "human", "value": "<image>" * len(images) + "which colour?"}
        found.append({"conversations": [question, {"from": "gpt", "value": COLOURS[number % 4]}], "images": images})
    return found


def make(data: Path) -> None:
    """Write both files, the pictures and dataset_info.json below `data`."""
    for number in range(16):
        draw(data / PICTURES / f"{number}.png", COLOURS[number % 4])
    questions = [{"prompt": f"is {n} even?", "response": f"[{'AB'[n % 2]}]", "system": "answer"} for n in range(16)]
    (data / "common-sense-reasoning").mkdir()
    (data / "multimodal" / "MathV360K.json").write_text(json.dumps(rows()))
    (data / "common-sense-reasoning" / "ARC-c_train.json").write_text(json.dumps(questions))
    text = {"prompt": "prompt", "response": "response", "system": "system"}
    pictures = {"messages": "conversations", "images": "images"}
    info = {
        "ARC-c": {"file_name": "common-sense-reasoning/ARC-c_train.json", "columns": text},
        "MathV360K": {"file_name": "multimodal/MathV360K.json", "formatting": "sharegpt", "columns": pictures},
    }
    (data / "dataset_info.json").write_text(json.dumps(info))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
