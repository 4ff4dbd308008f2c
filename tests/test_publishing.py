"""`make publish` and `make pull`: real huggingface_hub calls to a server on loopback that speaks the hub's protocol."""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import scored
from helpers.copies import edit
from helpers.forked_python import PYTHON
from helpers.upload_server import READS, USER, WRITES, UploadHandler, UploadHub

import publish
import pull
from paragen.archives import archive
from paragen.collection import copies, index
from paragen.collection.manifest import BaseModel, sealed
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.dataset import dataset_info, registration
from paragen.model import base_models
from paragen.publishing import card, licenses, published_tree

ROOT = Path(__file__).resolve().parent.parent
CATEGORY = "common-sense-reasoning"
RUN = "Tiny-Llama_lora-rank_4_finetune"
NAME = f"{CATEGORY}/Toy/{RUN}"
REPO = f"{USER}/toy"
LAYOUTS = ["raw", "archive"]
SETTINGS = ("CATEGORY", "MODELS", "RANKS", "REPO", "PRIVATE", "DRY_RUN", "RAW", "REVISION", "ALLOW_UNKNOWN_LICENSE")


@pytest.fixture
def licensed(collected) -> Path:
    """A project with one collection, whose data and base model say their licences; the dataset has a test split."""
    info = json.loads((collected.top / "data" / "dataset_info.json").read_bytes())
    rows = json.loads(collected.data.read_bytes())
    (collected.data.parent / "Toy_test.json").write_text(json.dumps([{**row, "prompt": "so?"} for row in rows[:8]]))
    info["Toy"] |= {"license": "cc-by-4.0", "source": "our|own", "language": "en"}
    info["Toy_test"] = {**info["Toy"], "file_name": f"{CATEGORY}/Toy_test.json"}
    info["Unused"] = {**info["Toy"]}
    (collected.top / "data" / "dataset_info.json").write_text(json.dumps(info))
    base = manifest_of(collected.top)["base_model"]
    source = {"hub_id": None, "revision": None, "license": "mit", "sha256": base["sha256"]}
    (collected.top / "models" / "Tiny-Llama" / "source.json").write_text(json.dumps(source))
    return collected.top


@pytest.fixture
def empty(tmp_path) -> Path:
    """A project with nothing in it."""
    top = tmp_path / "another project"
    for name in ("data", "saves", "models"):
        (top / name).mkdir(parents=True)
    return top


@pytest.fixture
def hub(monkeypatch):
    """A hub for this process, logged in."""
    from huggingface_hub import constants

    with UploadHub() as hub:
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", re.sub(r"^https?://[^/]+", hub.url, template))
        monkeypatch.setenv("HF_TOKEN", WRITES)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        yield hub


@pytest.fixture
def run(monkeypatch, capsys):
    """run(script, top, **settings): a script's `main` in this process, on a project's folders; what it printed."""

    def call(script, top: Path, **settings: str) -> str:
        for name in ("SAVES", "DATA", "MODELS"):
            monkeypatch.setattr(paths, name, top / name.lower())
        for name in SETTINGS + ("DATASET", "MODEL", "RANK", "SEED", "FORCE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"REPO": REPO, **settings}.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return call


def start(script: str, top: Path, hub: UploadHub, **settings: str) -> subprocess.Popen:
    """A script as a process of its own, on the project at `top`."""
    shutil.copy(ROOT / "models" / "models.yaml", top / "models")
    clean = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|.*proxy", name, re.I)}
    clean |= {"HF_HOME": str(top / "home"), "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITES, "HF_HUB_DISABLE_XET": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [PYTHON, ROOT / "utils" / script]
    return subprocess.Popen(command, env={**clean, "PARAGEN_TOP": str(top), "REPO": REPO, **settings}, cwd="/", **pipes)


def without_peft_check(top: Path) -> None:
    """Take the base model's config away, so that a process need not import PEFT."""
    (top / "models" / "Tiny-Llama" / "config.json").unlink()


def layout(kind: str) -> dict[str, str]:
    return {"RAW": "1"} if kind == "raw" else {}


def manifest_of(top: Path) -> dict:
    return json.loads((top / "saves" / NAME / "manifest.json").read_bytes())


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of all files below a folder, by path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): files.sha256_of(path) for path in found}


def tree_of(top: Path) -> Path:
    return top / "saves" / "publish" / REPO.replace("/", "--")


def flip(path: Path, place: int = -1) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.unlink()
    path.write_bytes(data)


def remanifest(top: Path, **changes) -> None:
    """Change a manifest as a program that seals it would."""
    changed = sealed({**manifest_of(top), **changes})
    files.write_json(top / "saves" / NAME / "manifest.json", changed)


def with_twin(top: Path) -> Path:
    """A second collection, the same with another seed."""
    twin = top / "saves" / CATEGORY / "Toy" / RUN.replace("rank_4", "rank_4_seed-7")
    shutil.copytree(top / "saves" / NAME, twin)
    files.write_json(twin / "manifest.json", sealed({**manifest_of(top), "seed": 7, "run": twin.name}))
    return twin


# ------------------------------------------------------------------------------------------------------------ the tree


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_dry_run_writes_just_the_tree_that_would_be_uploaded(licensed, run, kind):
    """A user's own file in a collection's folder is not published."""
    (licensed / "saves" / NAME / "notes.txt").write_text("mine")
    run(publish, licensed, DRY_RUN="1", **layout(kind))
    tree = tree_of(licensed)
    steps = [entry["step"] for entry in manifest_of(licensed)["checkpoints"]]
    names = [f"{NAME}/{name}" for name in (*(f"checkpoint-{step}.safetensors" for step in steps), "manifest.json")]
    names += [f"{NAME}/{name}" for name in ("adapter_config.json", "trainer_log.jsonl", "training_loss.png")]
    names = names if kind == "raw" else [f"{NAME}.archive"]
    data = [f"data/{CATEGORY}/Toy.json", f"data/{CATEGORY}/Toy_test.json", "data/dataset_info.json"]
    assert published_tree.files_of(tree) == sorted(
        ["README.md", "index.parquet", *data, *(f"collections/{n}" for n in names)]
    )
    if kind == "archive":
        assert "notes.txt" not in archive.read_files(tree / "collections" / f"{NAME}.archive")
    info = json.loads((tree / "data" / "dataset_info.json").read_bytes())
    assert sorted(info) == ["Toy", "Toy_test"]
    before = {
        path: path.stat().st_mtime_ns for path in tree.rglob("*") if path.is_file() and ".cache" not in path.parts
    }
    run(publish, licensed, DRY_RUN="1", **layout(kind))
    after = {path: path.stat().st_mtime_ns for path in tree.rglob("*") if path.is_file() and ".cache" not in path.parts}
    assert after == before, "a second call makes nothing again"


def test_an_archive_in_the_tree_that_was_damaged_since_is_made_again(licensed, run):
    run(publish, licensed, DRY_RUN="1")
    path = tree_of(licensed) / "collections" / f"{NAME}.archive"
    whole = path.read_bytes()
    for keeps_time in (False, True):
        before = path.stat()
        flip(path, len(whole) // 2)
        if keeps_time:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_size == len(whole)
        told = run(publish, licensed, DRY_RUN="1")
        assert "archiving" in told and ("was damaged since it was made" in told) is keeps_time
        assert path.read_bytes() == whole


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_rots_before_it_is_sent_is_named_and_replaced_by_the_next_call(licensed, run, hub, monkeypatch, kind):
    from huggingface_hub import HfApi

    name = f"{NAME}/checkpoint-9.safetensors" if kind == "raw" else f"{NAME}.archive"
    path = tree_of(licensed) / "collections" / name
    send = HfApi.upload_folder

    def rot_first(*given, **named):
        before = path.stat()
        flip(path, path.stat().st_size // 2)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return send(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", rot_first)
        with pytest.raises(UserError, match=f"{re.escape(path.name)}: was damaged since it was made.*run it again"):
            run(publish, licensed, **layout(kind))
    run(publish, licensed, **layout(kind))
    assert hub.repositories[REPO].files[f"collections/{name}"] == path.read_bytes()
    expected = next(entry["sha256"] for entry in manifest_of(licensed)["checkpoints"] if entry["step"] == 9)
    if kind == "raw":
        assert files.sha256_of(path) == expected
    else:
        archive.verify(path)


def test_changing_from_folders_to_archives_leaves_nothing_of_the_folders(licensed, run):
    run(publish, licensed, DRY_RUN="1", RAW="1")
    run(publish, licensed, DRY_RUN="1")
    assert [name for name in published_tree.files_of(tree_of(licensed)) if "collections" in name] == [
        f"collections/{NAME}.archive"
    ]
    run(publish, licensed, DRY_RUN="1", RAW="1")
    assert f"collections/{NAME}/manifest.json" in published_tree.files_of(tree_of(licensed))


def test_load_dataset_shows_the_index_and_the_card_has_sound_metadata(licensed, run, tmp_path):
    import datasets
    from huggingface_hub import DatasetCard

    run(publish, licensed, DRY_RUN="1", RAW="1")
    tree = tree_of(licensed)
    rows = datasets.load_dataset(str(tree), split="train", cache_dir=str(tmp_path / "cache"))
    recorded = manifest_of(licensed)["checkpoints"]
    assert rows["sha256"] == [entry["sha256"] for entry in recorded] and rows["dataset"] == ["Toy"] * len(recorded)
    card = DatasetCard.load(tree / "README.md")
    assert (card.data.license, card.data.language, card.data.size_categories) == ("other", ["en"], ["n<1K"])
    assert card.data.to_dict()["license_name"] == "cc-by-4.0-and-mit"
    assert {"lora", "peft", "parameter-generation", "weight-space"} <= set(card.data.tags)
    for told in (
        "| Toy | tiny-llama | 4 |",
        "our\\|own | cc-by-4.0",
        "make pull REPO=user/toy",
        "llamafactory 0.9.5",
        "| Toy | tiny-llama | 4 | 0.0",
    ):
        assert told in card.text, told


def test_the_card_has_a_table_of_scores_where_something_was_evaluated(licensed, run):
    run(publish, licensed, DRY_RUN="1")
    card = tree_of(licensed) / "README.md"
    before = card.read_text()
    scored.write(
        licensed / "saves" / NAME,
        scored.evaluated({"base": 0.4, 7: 0.5, 9: 0.75, 12: 0.625}),
        scored.evaluated({9: 1.5, 12: 1.25}, metric="loss", split="Other|test", paired=False, rows=8),
        scored.evaluated({"base": 0.3}, limit=10),
    )
    run(publish, licensed, DRY_RUN="1")
    start, end = "## How good\n", "## On what\n"
    text = card.read_text()
    section = text[text.index(start) : text.index(end)]
    assert text.replace(section, "") == before, "nothing else is said otherwise"
    assert "- `choice`: share of right choices, as generated\n- `loss`: mean loss per token of the" in section
    head, line, *rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows == [
        "| Toy | tiny-llama | 4 | 42 | 100 rows of Toy_test | choice | 0.4000 (0.3000 to 0.5000) | "
        "step 9: 0.7500 (0.6500 to 0.8500) | step 12: 0.6250 (0.5250 to 0.7250) |",
        "| Toy | tiny-llama | 4 | 42 | 8 rows of Other\\|test, of another dataset | loss | – | "
        "step 12: 1.2500 (1.1500 to 1.3500) | step 12: 1.2500 (1.1500 to 1.3500) |",
    ]
    assert {row.replace("\\|", "").count("|") for row in (head, line, *rows)} == {10}


def test_one_licence_for_all_stands_alone_in_the_metadata(licensed, run):
    from huggingface_hub import DatasetCard

    path = licensed / "data" / "dataset_info.json"
    path.write_text(path.read_text().replace("cc-by-4.0", "MIT"))
    run(publish, licensed, DRY_RUN="1", RAW="1")
    assert DatasetCard.load(tree_of(licensed) / "README.md").data.license == "mit"


def test_a_model_card_with_several_licences_is_published_with_each_of_them(licensed, run):
    """Also from a folder whose record has them as a list, as `make model` once wrote it."""
    from huggingface_hub import DatasetCard

    source = licensed / "models" / "Tiny-Llama" / "source.json"
    record = json.loads(source.read_bytes())
    for several in (["MIT", "llama3"], "MIT-and-llama3"):
        source.write_text(json.dumps({**record, "license": several}))
        run(publish, licensed, DRY_RUN="1", RAW="1")
        card = DatasetCard.load(tree_of(licensed) / "README.md")
        assert (card.data.license, card.data.license_name) == ("other", "cc-by-4.0-and-llama3-and-mit")
        assert "has a licence of its own (MIT-and-llama3)" in card.text
    source.write_text(json.dumps({**record, "license": {"name": "mit"}}))
    with pytest.raises(UserError, match="the base model's licence is not known"):
        run(publish, licensed, DRY_RUN="1", RAW="1")


def index_with(checkpoints: int, per_collection: int, datasets: int, size: int = 17_600_000) -> pa.Table:
    """The index of so many checkpoints, of which no file exists."""
    numbers = range(checkpoints)
    names = [f"math/D{n // per_collection % datasets}/M{n // per_collection}_lora-rank_8_finetune" for n in numbers]
    columns = {
        "collection": names,
        "step": list(numbers),
        "bytes": [size] * checkpoints,
        "metric": [None] * checkpoints,
    }
    return pa.table(columns)


@pytest.mark.parametrize(
    ("table", "raw", "told"),
    [
        ((100_000, 100, 10), False, None),
        ((100_000, 100, 10), True, "104005 files; the hub takes 100000 in a repository; omit RAW"),
        ((90_000, 100, 10), True, None),
        ((24_000, 12_000, 1), True, "12004 entries; the hub takes 10000 in a folder; omit RAW"),
        ((12_000, 1, 1), False, "12000 entries; the hub takes 10000 in a folder; publish several repositories"),
        ((1_000, 1_000, 1, 600_000_000), False, None),
        ((1_000, 1_000, 1, 60_000_000_000), False, "12000 entries; the hub takes 10000 in a folder; publish several"),
        ((10, 10, 1, 60_000_000_000), True, "a file of 60 GB; the hub takes 20 GB"),
    ],
)
def test_the_hubs_limits_are_known_before_anything_is_written(table, raw, told):
    if told is None:
        published_tree.check_limits(index_with(*table), 3, raw)
    else:
        with pytest.raises(UserError, match=re.escape(told)):
            published_tree.check_limits(index_with(*table), 3, raw)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_prepared_data_are_known_by_their_content_and_a_licence_in_the_entry_counts_first(tmp_path):
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "X.json").write_bytes(b"[{}]")
    entry = {"dataset": "X", "category": "math", "kind": "train", "path": "X.json", "license": "MIT", "source": "there"}
    entry["blob"] = hashlib.sha1(b"blob 4\0[{}]").hexdigest()
    (tmp_path / "sources.yaml").write_text(json.dumps({"repository": "r", "commit": "c", "files": {"X.json": entry}}))
    assert licenses.of_file("X", "math/X.json", tmp_path)["license"] == "MIT"
    (tmp_path / "math" / "X.json").write_bytes(b"[{},{}]")
    assert licenses.of_file("X", "math/X.json", tmp_path)["license"] is None
    info = {"X": {"file_name": "math/X.json", "license": "cc0-1.0"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    assert licenses.of_file("X", "math/X.json", tmp_path)["license"] == "cc0-1.0"


def test_a_hub_model_is_known_by_its_hub_id_and_not_by_its_folders_name(tmp_path):
    base = BaseModel("gemma-3-4b-it", hub_id="google/gemma-3-4b-it", revision="1" * 40, sha256="2" * 64)
    known = licenses.of_base(base, tmp_path)
    assert known["license"] == "gemma" and known["gated"] and card.is_custom(known["license"])
    assert licenses.of_base(replace(base, hub_id=None), tmp_path)["license"] is None


def without_license(top: Path, name: str = "Toy") -> None:
    """Take the licence out of a dataset's entry."""
    path = top / "data" / "dataset_info.json"
    info = json.loads(path.read_bytes())
    del info[name]["license"]
    path.write_text(json.dumps(info))


REFUSED = {
    "a flipped bit": (lambda top: flip(top / "saves" / NAME / "checkpoint-8.safetensors"), "recorded sha256", False),
    "an edited manifest": (lambda top: flip(top / "saves" / NAME / "manifest.json", 20), "manifest.json", False),
    "a stranger's checkpoint": (
        lambda top: (top / "saves" / NAME / "checkpoint-99.safetensors").write_text("1"),
        "checkpoint-99.safetensors does not belong",
        False,
    ),
    "changed prompts": (lambda top: flip_row(top), "are not those that Toy was trained on", False),
    "own data": (
        without_license,
        "Toy.json: its licence is not known; write it as \"license\" into the entry 'Toy'",
        True,
    ),
    "a test split": (lambda top: without_license(top, "Toy_test"), "Toy_test.json: its licence is not known", True),
    "a model put there by hand": (lambda top: (top / "models/Tiny-Llama/source.json").unlink(), "base model", True),
    "a stock run": (lambda top: remanifest(top, data=None, recipe=None), "made from a stock run", True),
}


def flip_row(top: Path) -> None:
    path = top / "data" / CATEGORY / "Toy.json"
    path.write_text(path.read_text().replace("is 3 even", "is 5 even", 1))


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_verify_or_has_no_known_licence_is_not_published(licensed, run, hub, case):
    spoil, told, may_be_allowed = REFUSED[case]
    spoil(licensed)
    with pytest.raises(UserError, match=re.escape(told)):
        run(publish, licensed, RAW="1")
    assert not hub.repositories and not tree_of(licensed).exists()
    if may_be_allowed:
        run(publish, licensed, RAW="1", ALLOW_UNKNOWN_LICENSE="1")
        assert b"unknown" in hub.repositories[REPO].files["README.md"]
    else:
        with pytest.raises(UserError, match=re.escape(told)):
            run(publish, licensed, RAW="1", ALLOW_UNKNOWN_LICENSE="1")


def test_a_licence_that_is_not_known_is_named_once_however_many_collections_need_it(licensed, run, hub, capsys):
    with_twin(licensed)
    without_license(licensed)
    with pytest.raises(UserError) as error:
        run(publish, licensed)
    told = capsys.readouterr()
    assert "FAULTY" not in told.err + str(error.value) and "verifying" not in told.out
    assert str(error.value).count("Toy.json: its licence is not known") == 1 and "licence" not in told.err
    assert str(error.value).endswith("; or ALLOW_UNKNOWN_LICENSE=1 publishes it as unknown; nothing was published")
    without_license(licensed, "Toy_test")
    with pytest.raises(UserError, match="2 licences are not known; ALLOW_UNKNOWN_LICENSE=1 publishes them as unknown"):
        run(publish, licensed)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].rsplit("/")[-1] for line in lines] == ["Toy.json", "Toy_test.json"]


def test_several_faults_are_named_once_each_and_counted(licensed, run, hub, capsys):
    for folder in (licensed / "saves" / NAME, with_twin(licensed)):
        (folder / "checkpoint-99.safetensors").write_text("1")
    with pytest.raises(UserError, match="2 faults in 2 of 2 collections; nothing was published"):
        run(publish, licensed)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("FAULTY ")]
    assert len(lines) == len(set(lines)) == 2 and all("99.safetensors does not belong" in line for line in lines)


def test_the_card_says_how_many_rows_a_file_has_and_how_many_were_trained_on(licensed, run):
    run(publish, licensed, DRY_RUN="1")
    text = (tree_of(licensed) / "README.md").read_text()
    assert f"| Toy | `data/{CATEGORY}/Toy.json` | 64 | the first 48 |" in text
    assert f"| Toy_test | `data/{CATEGORY}/Toy_test.json` | 8 | none: held out |" in text
    assert card.trained_text({1119, 40}, 1119) == "the first 40 or all"


def test_the_card_says_what_is_odd_about_the_data(licensed, run):
    run(publish, licensed, DRY_RUN="1")
    text = (tree_of(licensed) / "README.md").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("- Toy")]
    assert line.startswith("- Toy_test: repeated prompts: 1, ") and "in 8 of 8 rows (100 %)" in line
    remanifest(
        licensed, data_warnings=["Toy: cutoff_len 64 is reached by 2 of 48 rows (4.2 %): what is longer is cut off"]
    )
    run(publish, licensed, DRY_RUN="1")
    text = (tree_of(licensed) / "README.md").read_text()
    assert [line[:20] for line in text.splitlines() if line.startswith("- Toy")] == [
        "- Toy: cutoff_len 64",
        "- Toy_test: repeated",
    ]


def test_descriptions_of_a_task_stand_on_the_card_and_come_back(licensed, empty, run, hub):
    registration.describe("Toy", ["Answer *toy* questions.", "Reply to toys."], "own", licensed / "data")
    run(publish, licensed)
    assert "\n- Toy: Answer *toy* questions. (2)\n" in (tree_of(licensed) / "README.md").read_text()
    run(pull, empty)
    assert dataset_info.entry_of("Toy", empty / "data")["descriptions"] == {
        "own": ["Answer *toy* questions.", "Reply to toys."]
    }


@pytest.mark.parametrize("name", ["", "toy", "a/b/c", "user/to y", "../x", "user/--x", "user/x.git", "user/x-"])
def test_a_repository_is_named_as_the_hub_names_it(licensed, run, name):
    with pytest.raises(UserError, match="make publish REPO=user/name"):
        run(publish, licensed, REPO=name, DRY_RUN="1")


# -------------------------------------------------------------------------------------------------------- the upload


def test_a_dry_run_ends_with_the_command_that_uploads_just_that(licensed, empty, run, hub):
    with_twin(licensed)
    asked = {"DATASET": "toy", "RANKS": "4", "SEED": "42  7", "RAW": "yes", "PRIVATE": "0"}
    last = run(publish, licensed, DRY_RUN="1", **asked).splitlines()[-1]
    command = last.partition(": make publish ")[2]
    assert command == "DATASET=toy RANK=4 SEED='42 7' REPO=user/toy RAW=1"
    built = hashes(tree_of(licensed))
    run(publish, licensed, **dict(word.split("=", 1) for word in shlex.split(command)))
    sent = hub.repositories[REPO].files
    assert {name for name in built if not name.startswith(".cache")} == sent.keys() - {".gitattributes"}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_was_published_comes_back_with_the_same_hashes(licensed, empty, run, hub, kind):
    run(publish, licensed, **layout(kind))
    assert not hub.repositories[REPO].private
    assert set(hub.repositories[REPO].files) == {".gitattributes", *published_tree.files_of(tree_of(licensed))}
    sent = len(hub.arrived)
    run(publish, licensed, **layout(kind))
    assert len(hub.arrived) == sent and hub.commits == 1, "a second call sends nothing"

    out = run(pull, empty)
    assert hashes(empty / "saves" / NAME) == hashes(licensed / "saves" / NAME)
    for name in ("Toy.json", "Toy_test.json"):
        assert (empty / "data" / CATEGORY / name).read_bytes() == (licensed / "data" / CATEGORY / name).read_bytes()
    info = json.loads((empty / "data" / "dataset_info.json").read_bytes())
    assert sorted(info) == ["Toy", "Toy_test"] and info["Toy"]["license"] == "cc-by-4.0"
    assert index.load(empty / "saves").num_rows == len(manifest_of(licensed)["checkpoints"])
    assert "Toy" in out and not list((empty / "saves" / "publish").iterdir())
    assert "there already" in run(pull, empty)


def test_an_archive_too_large_for_one_file_goes_in_parts(licensed, empty, run, hub, monkeypatch):
    run(publish, licensed, DRY_RUN="1")
    [whole] = (tree_of(licensed) / "collections" / CATEGORY / "Toy").iterdir()
    monkeypatch.setattr(published_tree, "PART_BYTES", whole.stat().st_size * 2 // 3)
    run(publish, licensed)
    parts = sorted(name for name in hub.repositories[REPO].files if "collections/" in name)
    assert len(parts) > 1 and not whole.exists()
    assert max(len(hub.repositories[REPO].files[name]) for name in parts) <= published_tree.PART_BYTES
    run(pull, empty)
    assert hashes(empty / "saves" / NAME) == hashes(licensed / "saves" / NAME)


def test_private_is_private_and_a_public_repository_is_not_taken_for_one(licensed, empty, run, hub, monkeypatch):
    run(publish, licensed, RAW="1", PRIVATE="1")
    assert hub.repositories[REPO].private
    run(publish, licensed, RAW="1", PRIVATE="1")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(empty / "none"))
    with pytest.raises(UserError, match="no such repository .* or a private one"):
        run(pull, empty)
    monkeypatch.setenv("HF_TOKEN", WRITES)
    hub.repositories[REPO].private = False
    with pytest.raises(UserError, match="is public already"):
        run(publish, licensed, RAW="1", PRIVATE="1")


def test_files_of_other_things_in_the_repository_are_removed_only_with_force(licensed, run, hub):
    run(publish, licensed, RAW="1")
    hub.repositories[REPO].files["collections/math/Old/x.archive"] = b"old"
    with pytest.raises(UserError, match="math/Old/x.archive.*FORCE=1"):
        run(publish, licensed, RAW="1")
    run(publish, licensed, RAW="1", FORCE="1")
    assert "collections/math/Old/x.archive" not in hub.repositories[REPO].files


def test_a_tree_whose_first_call_wrote_nothing_but_its_cache_is_built_and_one_of_others_is_not(licensed, run, hub):
    mine = tree_of(licensed) / "mine.txt"
    (mine.parent / published_tree.RECORD).parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="is there already, and no tree of ours; move it away"):
        run(publish, licensed, RAW="1")
    mine.unlink()
    run(publish, licensed, RAW="1")
    assert published_tree.read_record(mine.parent) is not None and hub.repositories[REPO].files


def test_a_stopped_upload_ends_at_once_and_goes_on_without_sending_a_file_twice(licensed, run, hub):
    without_peft_check(licensed)
    hub.hold_puts = 3
    process = start("publish.py", licensed, hub, RAW="1")
    assert hub.held.wait(60), process.communicate()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "run it again to go on" in output and "Traceback" not in output
    first, hub.hold_puts = list(hub.arrived), None
    hub.released.set()
    assert len(first) >= 3 and not hub.commits
    run(publish, licensed, RAW="1")
    large = [name for name in hub.repositories[REPO].files if name.endswith((".safetensors", ".png", ".parquet"))]
    assert len(hub.arrived) == len(set(hub.arrived)) == len(large)


@pytest.mark.parametrize(
    ("settings", "answer", "told"),
    [
        ({"token": ""}, None, "publishing needs an account"),
        ({"token": "hf_wrong"}, None, "the token is not valid"),
        ({"token": "\u201c" + WRITES + "\u201d"}, None, "has a character that no token has, such as a curly quote"),
        ({"token": READS}, None, "may not write there"),
        ({"REPO": "somebody/toy"}, None, "give it write access to somebody"),
        ({}, ("/api/datasets/.*/commit/main", 409, "A commit happened"), "somebody else changed it meanwhile"),
        ({}, ("/api/repos/create", 429, "Too many"), "too many requests"),
        ({}, ("/api/repos/create", 500, "Oops"), "HTTP status 500"),
        ({}, ("/api/repos/create", 200, "Oops"), "does not answer as a hub does"),
        ({}, (f"/api/datasets/{REPO}", 200, "Oops"), "does not answer as a hub does"),
        ({}, ("/lfs/.*", 403, "Private storage limit reached"), "has no room for it"),
        ({}, ("/api/validate-yaml", 400, "bad"), "refuses the card"),
    ],
)
def test_an_error_of_the_hub_is_one_line_with_the_way_out(licensed, run, hub, monkeypatch, settings, answer, told):
    settings = {"RAW": "1", **settings}
    monkeypatch.setenv("HF_TOKEN", settings.pop("token", WRITES))
    monkeypatch.setenv("HF_TOKEN_PATH", str(licensed / "none"))
    hub.answers = [answer] if answer else []
    with pytest.raises(UserError, match=re.escape(told)) as error:
        run(publish, licensed, **settings)
    assert "\n" not in str(error.value) and WRITES not in str(error.value)


def test_a_storage_that_cannot_be_reached_is_one_line_with_the_way_out(licensed, hub):
    """With Xet, as by default; the hub grants a token for a storage that does not answer."""
    without_peft_check(licensed)
    hub.grants = {"casUrl": "http://127.0.0.1:9", "exp": 2**32, "accessToken": "xet_secret"}
    quick = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    process = start("publish.py", licensed, hub, RAW="1", HF_HUB_DISABLE_XET="0", **quick)
    output, _ = process.communicate(timeout=60)
    last = output.splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in output, output
    assert last.startswith(f"error: {REPO}: the storage of {hub.url} fails (Network error") and "secret" not in output


# ------------------------------------------------------------------------------------------------------- what is pulled


def marked(data: bytes, change) -> bytes:
    """An index.parquet whose marks were changed."""
    table = pa.parquet.read_table(pa.BufferReader(data))
    marks = json.loads(table.schema.metadata[b"paragen"])
    change(marks)
    return published_tree.index_of(table, marks)


def with_path(marks: dict) -> None:
    mark = marks["collections"][NAME]
    mark["files"] = {f"{NAME}/../../../../evil.py": 1, **mark["files"]}


def renamed(marks: dict) -> None:
    marks["collections"]["../../x"] = marks["collections"].pop(NAME)


def spoiled_index(change):
    return lambda held: held.update({"index.parquet": marked(held["index.parquet"], change)})


def truncated(held: dict) -> None:
    name = f"collections/{NAME}/checkpoint-8.safetensors"
    held[name] = held[name][:-1]


def swapped(held: dict) -> None:
    one, other = (f"collections/{NAME}/checkpoint-{step}.safetensors" for step in (7, 8))
    held[one], held[other] = held[other], held[one]


def with_script(held: dict) -> None:
    info = json.loads(held["data/dataset_info.json"])
    info["Toy"]["script_url"] = "evil.py"
    held["data/dataset_info.json"] = json.dumps(info).encode()


def other_manifest(held: dict) -> None:
    name = f"collections/{NAME}/manifest.json"
    manifest = sealed({**json.loads(held[name]), "seed": 1})
    held[name] = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def with_data_of_others(held: dict) -> None:
    """Other rows, in a file whose hash the index names: only the manifest tells."""
    path = f"{CATEGORY}/Toy.json"
    held[f"data/{path}"] = json.dumps([{"prompt": "x", "response": "y", "system": ""}] * 60).encode()
    sha256 = hashlib.sha256(held[f"data/{path}"]).hexdigest()
    spoiled_index(lambda marks: marks["data"].update({path: sha256}))(held)


def index_bomb(change):
    """An index whose rows a function changes, as a table; its marks stay."""

    def spoil(held: dict) -> None:
        table = pa.parquet.read_table(pa.BufferReader(held["index.parquet"]))
        sink = pa.BufferOutputStream()
        changed = change(table).replace_schema_metadata(table.schema.metadata)
        pa.parquet.write_table(changed, sink)
        held["index.parquet"] = sink.getvalue().to_pybytes()
        assert len(held["index.parquet"]) < 3e6

    return spoil


def flipped_bit(held: dict) -> None:
    """An index of which pyarrow 26 ends the process that asks for the facts of its columns."""
    data = bytearray((Path(__file__).parent / FLIPPED_INDEX).read_bytes())
    data[3283] ^= 8
    held["index.parquet"] = bytes(data)


def column(table: pa.Table, name: str, value) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.repeat(pa.scalar(value, table.schema.field(name).type), len(table)))


def many_rows(table: pa.Table) -> pa.Table:
    """A hundred million rows, which a few kB can stand for."""
    return pa.Table.from_arrays([pa.repeat(pa.scalar("x"), 3_000_000)], ["collection"])


def long_texts(table: pa.Table) -> pa.Table:
    rows = pa.repeat(0, 10_000)
    one = pa.Table.from_arrays([column.combine_chunks().take(rows) for column in table.columns],
                               table.column_names)  # fmt: skip
    return column(one, "file", "x" * 20_000)


FLIPPED_INDEX = "collected_before/saves/publish/user--toy-raw/index.parquet"
SPOILED = {
    "rows of others": (with_data_of_others, "are not those that Toy was trained on"),
    "an index of millions of rows": (index_bomb(many_rows), "it has 3000000 rows"),
    "an index of long texts": (index_bomb(long_texts), "is longer than 1024 bytes"),
    "an index that ends the process that reads it": (flipped_bit, "index.parquet is broken"),
    "an index of negative sizes": (index_bomb(lambda table: column(table, "bytes", -5)), "less than 0 bytes"),
    "a hash that is none": (spoiled_index(lambda marks: marks["collections"][NAME].update(sha256=[])), "sha256 of"),
    "a size that is none": (
        spoiled_index(lambda marks: marks["collections"][NAME]["files"].update({NAME: "1"})),
        "size",
    ),
    "deep marks": (spoiled_index(lambda marks: marks.update(x=json.loads("[" * 200 + "]" * 200))), "too deeply"),
    "truncated": (truncated, "checkpoint-8.safetensors has"),
    "swapped": (swapped, "checkpoint-7.safetensors does not have its recorded sha256"),
    "no file": (lambda held: held.pop(f"collections/{NAME}/adapter_config.json"), "lacks collections/"),
    "another manifest": (other_manifest, "manifest"),
    "other prompts": (lambda held: held.update({f"data/{CATEGORY}/Toy.json": b'[{"prompt": "x"}]'}), "Toy.json is not"),
    "a script": (with_script, "script_url"),
    "a path out of saves": (spoiled_index(with_path), "is no file of"),
    "a name out of saves": (spoiled_index(renamed), "collections that it has rows of"),
    "a path out of data": (spoiled_index(lambda marks: marks["data"].update({"../x.json": ""})), "../x.json"),
    "no index": (lambda held: held.pop("index.parquet"), "has no index.parquet"),
    "a broken index": (lambda held: held.update({"index.parquet": b"PAR1"}), "index.parquet is broken"),
}


def test_whatever_is_wrong_in_a_repository_is_named_and_not_brought(licensed, empty, run, hub):
    run(publish, licensed, RAW="1")
    whole = dict(hub.repositories[REPO].files)
    for case, (spoil, told) in SPOILED.items():
        shutil.rmtree(empty)
        for name in ("data", "saves", "models"):
            (empty / name).mkdir(parents=True)
        hub.repositories[REPO].files = dict(whole)
        spoil(hub.repositories[REPO].files)
        with pytest.raises(UserError, match=re.escape(told)):
            run(pull, empty)
        assert not (empty / "saves" / NAME).exists(), case
        assert not list((empty / "data").rglob("*.json")), case
        assert {path.name for path in empty.parent.iterdir()} == {"another project", "my project"}, case


def test_a_collection_comes_into_a_project_that_calls_its_model_something_else(licensed, empty, run, hub, monkeypatch):
    run(publish, licensed, RAW="1")
    monkeypatch.setattr(base_models, "short_names", lambda: {"Tiny-Llama": "mine"})
    assert re.search(r"Toy +mine ", run(pull, empty))
    assert hashes(empty / "saves" / NAME) == hashes(licensed / "saves" / NAME)
    assert set(index.load(empty / "saves")["model"].to_pylist()) == {"mine"}


@pytest.mark.parametrize(("given", "missing"), [({"RANK": "4 16"}, "RANK=16"), ({"SEED": "5"}, "SEED=5")])
def test_a_rank_or_a_seed_that_a_repository_lacks_is_refused(licensed, empty, run, hub, given, missing):
    run(publish, licensed, RAW="1")
    with pytest.raises(UserError, match=f"^{REPO}: no collection fits {missing}$"):
        run(pull, empty, **given)
    assert not list((empty / "saves").rglob("*.safetensors"))


def test_of_two_collections_the_whole_one_comes_and_the_last_line_names_both(licensed, empty, run, hub, capsys):
    other = with_twin(licensed)
    run(publish, licensed, RAW="1")
    held = hub.repositories[REPO].files
    path = f"collections/{NAME}/checkpoint-8.safetensors"
    held[path] = held[path][:-1] + bytes([held[path][-1] ^ 1])
    with pytest.raises(UserError) as error:
        run(pull, empty)
    brought = other.relative_to(licensed / "saves").as_posix()
    line = str(error.value)
    assert line.startswith(f"{REPO}: downloaded: {brought}; not downloaded: {NAME} (") and "\n" not in line
    assert hashes(empty / "saves" / brought) == hashes(other) and not (empty / "saves" / NAME).exists()
    assert (empty / "data" / CATEGORY / "Toy.json").exists(), "the whole one needs it"


def test_a_pull_whose_last_step_fails_leaves_no_data_behind(licensed, empty, run, hub, monkeypatch):
    run(publish, licensed, RAW="1")
    (empty / "data" / "dataset_info.json").write_text('{"Mine": {"file_name": "math/Mine.json"}}')
    before = hashes(empty / "data")

    def fail(*_):
        raise OSError(28, "No space left on device", "x")

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish_folder", fail)
        with pytest.raises(OSError, match="No space"):
            run(pull, empty)
    assert hashes(empty / "data") == before and not (empty / "saves" / NAME).exists()
    run(pull, empty)
    assert hashes(empty / "saves" / NAME) == hashes(licensed / "saves" / NAME)


def test_what_is_there_is_replaced_only_with_force(licensed, empty, run, hub):
    run(publish, licensed, RAW="1")
    own = {"Toy": {"file_name": f"{CATEGORY}/Own.json", "columns": {"prompt": "q", "response": "a"}}}
    (empty / "data" / CATEGORY).mkdir()
    (empty / "data" / CATEGORY / "Toy.json").write_text('[{"prompt": "mine", "response": "mine"}]')
    with pytest.raises(UserError, match="Toy.json: is there with other rows"):
        run(pull, empty)
    (empty / "data" / CATEGORY / "Toy.json").unlink()
    (empty / "data" / "dataset_info.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match="'Toy' is registered in another way"):
        run(pull, empty)
    (empty / "data" / "dataset_info.json").unlink()
    shutil.copytree(licensed / "saves" / NAME, empty / "saves" / NAME)
    remanifest(empty, seed=7)
    with pytest.raises(UserError, match="is another collection; move it away, or FORCE=1"):
        run(pull, empty)
    assert not list((empty / "data" / CATEGORY).iterdir())
    notes = empty / "saves" / NAME / "notes.txt"
    notes.write_text("mine")
    run(pull, empty, FORCE="1")
    assert notes.read_text() == "mine"
    notes.unlink()
    assert hashes(empty / "saves" / NAME) == hashes(licensed / "saves" / NAME)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_collection_that_is_at_another_place_is_not_downloaded_again(licensed, empty, run, hub, kind):
    figures = {"base": 0.4, 7: 0.5}
    label(licensed, figures)
    run(publish, licensed, **layout(kind))
    moved = empty / "saves" / "common_sense_reasoning" / "Toy" / "renamed"
    shutil.copytree(licensed / "saves" / NAME, moved)
    whole = hashes(moved)
    (moved / "evaluation.json").unlink()
    out = run(pull, empty)
    assert f"there already: {paths.relative(moved)}" in out and "scores imported" in out
    assert hashes(moved) == whole and not (empty / "saves" / CATEGORY).exists()
    assert index.load(empty / "saves").num_rows == len(manifest_of(licensed)["checkpoints"])

    flip(moved / "checkpoint-8.safetensors")
    with pytest.raises(UserError, match=r"renamed: is there, but checkpoint-8\.safetensors does not have"):
        run(pull, empty)
    run(pull, empty, FORCE="1")
    assert hashes(moved) == whole and not (empty / "saves" / CATEGORY).exists()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_collection_whose_folder_was_renamed_is_published_and_comes_back(licensed, empty, run, hub, kind):
    """Its manifest keeps the name under which it was trained."""
    named = licensed / "saves" / NAME
    renamed = named.rename(named.with_name("my_finetune"))
    run(publish, licensed, **layout(kind))
    run(pull, empty)
    assert hashes(empty / "saves" / CATEGORY / "Toy" / "my_finetune") == hashes(renamed)
    assert index.load(empty / "saves").num_rows == len(list(renamed.glob("*.safetensors")))
    assert "there already" in run(pull, empty)


def test_of_a_collection_that_a_repository_has_twice_one_comes(licensed, empty, run, hub, monkeypatch):
    """As repositories may have that were published before the index left second copies out."""
    shutil.copytree(licensed / "saves" / NAME, licensed / "saves" / CATEGORY / "Toy" / "A_finetune")
    with monkeypatch.context() as patch:
        patch.setattr(copies, "mark", lambda *_: None)
        run(publish, licensed, RAW="1")
    run(pull, empty)
    assert [path.name for path in (empty / "saves" / CATEGORY / "Toy").iterdir()] == ["A_finetune"]


FEW, MORE, OTHER = ({"base": 0.4, 7: 0.5}, {"base": 0.4, 7: 0.5, 8: 0.7}, {"base": 0.4, 7: 0.6})


def label(top: Path, figures: dict) -> bytes:
    return scored.write(top / "saves" / NAME, scored.evaluated(figures)).read_bytes()


def label_in(top: Path) -> bytes:
    return (top / "saves" / NAME / "evaluation.json").read_bytes()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_scores_are_published_and_come_back(licensed, empty, run, hub, kind):
    run(publish, licensed, **layout(kind))
    run(pull, empty)
    label(licensed, FEW)
    run(publish, licensed, **layout(kind))
    out = run(pull, empty)
    assert "there already" in out and "scores imported" in out, "the collection is there, its scores are new"
    assert hashes(empty / "saves" / NAME) == hashes(licensed / "saves" / NAME)
    assert index.load(empty / "saves")["score"].to_pylist() == [0.5] + [None] * 5
    assert "fetching" not in run(pull, empty)
    shutil.rmtree(empty / "saves" / CATEGORY)
    run(pull, empty)
    assert hashes(empty / "saves" / NAME) == hashes(licensed / "saves" / NAME)
    (licensed / "saves" / NAME / "evaluation.json").unlink()
    run(publish, licensed, FORCE="1", **layout(kind))
    assert not any("evaluation" in name for name in hub.repositories[REPO].files)
    assert "there already" in run(pull, empty) and label_in(empty), "what nobody else has stays"


def test_a_pull_loses_no_score_without_force(licensed, empty, run, hub):
    label(licensed, FEW)
    run(publish, licensed)
    run(pull, empty)
    more = label(empty, MORE)
    run(pull, empty)
    assert label_in(empty) == more
    other = label(empty, OTHER)
    (empty / "data" / CATEGORY / "Toy.json").unlink()
    with pytest.raises(UserError, match=r"evaluation\.json: holds other scores than .* FORCE=1 replaces it"):
        run(pull, empty)
    assert label_in(empty) == other and not (empty / "data" / CATEGORY / "Toy.json").exists(), "nothing was written"
    run(pull, empty, FORCE="1")
    assert label_in(empty) == label_in(licensed)
    (empty / "saves" / NAME / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"is there, but evaluation\.json: broken"):
        run(pull, empty)


def test_other_scores_than_the_index_names_are_not_brought(licensed, empty, run, hub):
    label(licensed, FEW)
    run(publish, licensed, RAW="1")
    hub.repositories[REPO].files[f"collections/{NAME}/evaluation.json"] = label(licensed, OTHER)
    with pytest.raises(UserError, match="has other scores than index.parquet names; it was not kept"):
        run(pull, empty)
    shutil.copytree(licensed / "saves" / NAME, empty / "saves" / NAME)
    (empty / "saves" / NAME / "evaluation.json").unlink()
    with pytest.raises(UserError, match="has other scores than its index.parquet names; nothing was written"):
        run(pull, empty)


def test_scores_that_change_while_they_are_published_are_not_mixed(licensed, run, monkeypatch):
    label(licensed, FEW)
    place = published_tree.place

    def evaluated_meanwhile(source: Path, target: Path) -> None:
        place(source, target)
        if source.name == "evaluation.json":
            label(licensed, MORE)

    monkeypatch.setattr(published_tree, "place", evaluated_meanwhile)
    with pytest.raises(UserError, match="was evaluated while it was published; run it again"):
        run(publish, licensed, RAW="1", DRY_RUN="1")


@pytest.mark.parametrize("lacking", [{*index.SCORES, *index.LATER}, {*index.LATER}])
def test_what_was_published_before_there_were_scores_or_later_columns_can_be_pulled(licensed, empty, run, hub, lacking):
    edit(licensed / "saves" / NAME, lambda m: m["data"][0]["entry"].update(descriptions=["Answer toy questions."]))
    if "metric" not in lacking:
        label(licensed, FEW)
    run(publish, licensed)
    table = pa.parquet.read_table(pa.BufferReader(hub.repositories[REPO].files["index.parquet"]))
    marks = json.loads(table.schema.metadata[b"paragen"])
    hub.repositories[REPO].files["index.parquet"] = published_tree.index_of(table.drop_columns(list(lacking)), marks)
    run(pull, empty)
    assert hashes(empty / "saves" / NAME) == hashes(licensed / "saves" / NAME)


@pytest.mark.parametrize("answer", [{}, {"error": "try later"}, [], {"id": REPO}])
def test_an_answer_that_is_no_hubs_is_said_to_be_none(empty, run, hub, monkeypatch, answer):
    monkeypatch.setattr(UploadHandler, "answer_about", lambda self, *_: self.send_json(answer))
    with pytest.raises(UserError, match=f"^HF_ENDPOINT={hub.url}: does not answer as a hub does"):
        run(pull, empty)


def test_a_selection_brings_that_alone(licensed, empty, run, hub):
    twin = with_twin(licensed)
    run(publish, licensed, RAW="1")
    run(pull, empty, SEED="7")
    assert [path.name for path in (empty / "saves" / CATEGORY / "Toy").iterdir()] == [twin.name]
    with pytest.raises(UserError, match="collected dataset 'MATH' is not known; known: Toy"):
        run(pull, empty, DATASET="MATH")
    with pytest.raises(UserError, match="has no revision 'v9'"):
        run(pull, empty, REVISION="v9")


def test_a_killed_pull_goes_on_in_the_middle_of_a_file(licensed, empty, run, hub):
    run(publish, licensed)
    name = f"collections/{NAME}.archive"
    padding = os.urandom(24 << 20)
    hub.repositories[REPO].files[name] = hub.repositories[REPO].files[name] + padding  # is refused once it is whole
    hub.hold[name] = 21 << 20
    process = start("pull.py", empty, hub)
    assert hub.held.wait(60), process.communicate()
    process.kill()
    process.communicate()
    hub.hold.clear()
    hub.released.set()
    with pytest.raises(UserError, match="its index says"):
        run(pull, empty)
    assert any(request.range for request in hub.of(name))
    assert not (empty / "saves" / NAME).exists()
