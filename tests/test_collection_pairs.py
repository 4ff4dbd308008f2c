"""`Pairs`: prompts and a checkpoint at a time, the same on every run, never from a file other than was recorded."""

import os
import pickle
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from helpers import scored
from helpers.clone import copy_folder
from helpers.copies import edit, flip_a_bit, twin
from helpers.forked_python import PYTHON
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, get_worker_info

from pairs import Pair, Pairs, collate
from paragen.collection import checkpoints, index, prompts, vectors
from paragen.collection import pairs as pairs_module
from paragen.common import files, paths
from paragen.common.cli import UserError
from paragen.dataset import registration

STEP = "checkpoint-9.safetensors"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def project(collected, monkeypatch):
    """A project with one indexed collection, steps 7 to 12, trained on 48 rows of 64."""
    monkeypatch.setattr(paths, "SAVES", collected.top / "saves")
    monkeypatch.setattr(paths, "DATA", collected.top / "data")
    index.update()
    return collected


@pytest.fixture
def folder(project) -> Path:
    return project.run_folder("finetune")


@pytest.fixture
def mixed(folder) -> Path:
    """The same beside collections of another dataset, rank (with tensors of that shape) and model."""
    twin(folder, dataset="ARC-c")
    twin(folder, model="Other-Model")
    eight = twin(folder, rank=8)

    def double(manifest):
        for entry in manifest["checkpoints"]:
            path = eight / f"checkpoint-{entry['step']}.safetensors"
            tensors = load_file(path)
            save_file({key: torch.cat([value, value], int("lora_B" in key)) for key, value in tensors.items()}, path)
            entry.update(bytes=path.stat().st_size, sha256=files.sha256_of(path))

    edit(eight, double)
    index.update()
    return folder


def texts(pair: Pair) -> list[str]:
    return [row["prompt"] for row in pair.prompts]


def rewrite(folder: Path, change) -> None:
    """Change the tensors of one checkpoint and record its new hash."""
    tensors = load_file(folder / STEP)
    change(tensors)
    save_file(tensors, folder / STEP)
    size, sha256 = (folder / STEP).stat().st_size, files.sha256_of(folder / STEP)
    edit(folder, lambda manifest: manifest["checkpoints"][2].update(bytes=size, sha256=sha256))
    index.update()


def test_a_pair_is_prompts_a_checkpoint_and_its_row(project, folder):
    pairs = Pairs(prompts=4, dataset="toy", rank=4)
    assert len(pairs) == 6
    drawn, checkpoint, row = pairs[2]
    assert drawn[0].keys() == {"system", "prompt", "response", "images"}
    assert len({row["prompt"] for row in drawn}) == 4
    stored = load_file(folder / STEP)
    assert checkpoint.keys() == stored.keys()
    assert all(torch.equal(checkpoint[key], stored[key]) for key in stored)
    assert list(row) == list(index.COLUMNS)
    assert row == index.load().to_pylist()[2]
    assert [pair.row["step"] for pair in pairs] == [7, 8, 9, 10, 11, 12]
    assert pairs[-1].row["step"] == 12
    with pytest.raises(IndexError):
        pairs[6]


def test_writing_into_a_checkpoint_does_not_reach_its_file(project, folder):
    pairs = Pairs(prompts=0)
    checkpoint = pairs[2].checkpoint
    for tensor in checkpoint.values():
        tensor.fill_(7)
    assert files.sha256_of(folder / STEP) == pairs.row(2)["sha256"]
    assert all(torch.equal(tensor, load_file(folder / STEP)[key]) for key, tensor in pairs[2].checkpoint.items())


def test_keys_stand_in_natural_order():
    keys = [f"m.layers.{number}.q_proj.lora_{half}.weight" for number in (10, 9, 2) for half in "BA"]
    assert [key.split(".")[2] + key[-8] for key in checkpoints.in_natural_order(tuple(keys))] == [
        "2A", "2B", "9A", "9B", "10A", "10B"
    ]  # fmt: skip


def test_prompts_depend_on_seed_pair_and_epoch_alone(project):
    pairs = Pairs(prompts=8)
    first = [texts(pair) for pair in pairs]
    assert texts(pairs[3]) == first[3]
    assert [texts(pair) for pair in Pairs(prompts=8)] == first
    assert len({tuple(drawn) for drawn in first}) == 6
    assert [texts(pair) for pair in Pairs(prompts=8, seed=1)] != first
    pairs.set_epoch(1)
    assert all(texts(pair) != before for pair, before in zip(pairs, first, strict=True))
    pairs.set_epoch(0)
    assert [texts(pair) for pair in pairs] == first


def test_prompts_come_from_the_split_that_was_asked_for(project):
    everything = {f"is {number} even?" for number in range(48)}
    assert set(texts(Pairs(prompts=48)[0])) == everything
    assert not everything & set(texts(Pairs(prompts=16, split="test")[0]))
    with pytest.raises(UserError, match="has 16 test prompts; prompts=17 asks for more"):
        Pairs(prompts=17, split="test")[0]
    assert Pairs(prompts=0)[0].prompts == []


def test_a_vector_has_a_layout_and_turns_back_into_the_checkpoint(project, folder):
    vector = Pairs(prompts=1, vector=True)
    _, flat, row = vector[2]
    layout = vector.layout(row["collection"])
    stored = load_file(folder / STEP)
    assert flat.dim() == 1 and flat.numel() == sum(tensor.numel() for tensor in stored.values())
    for slot in layout:
        size = stored[slot.key].numel()
        assert torch.equal(flat[slot.offset : slot.offset + size].view(slot.shape), stored[slot.key])
    back = vectors.to_dict(flat, layout)
    assert list(back) == list(Pairs(prompts=1)[2].checkpoint)
    assert all(torch.equal(back[key], stored[key]) for key in stored)
    flat.zero_()  # the vector is a copy, and the dict a view of it: the file is not touched
    assert not any(tensor.any() for tensor in back.values())
    assert vector[2].checkpoint.any()
    with pytest.raises(UserError, match="does not hold the"):
        vectors.to_dict(flat[:-1], layout)
    with pytest.raises(UserError, match="no such collection among these pairs"):
        vector.layout("math/X/Y")


def test_a_checkpoint_of_mixed_dtypes_comes_back_to_the_bit(project, folder):
    def halve(tensors):
        tensors.update({key: tensors[key].to(torch.bfloat16) for key in list(tensors)[::2]})

    rewrite(folder, halve)
    pairs = Pairs(prompts=0, vector=True, where=pc.field("step") == 9)
    back = vectors.to_dict(pairs[0].checkpoint, pairs.layout(pairs.row(0)["collection"]))
    stored = load_file(folder / STEP)
    assert pairs[0].checkpoint.dtype == torch.float32
    assert all(back[key].dtype == stored[key].dtype and torch.equal(back[key], stored[key]) for key in stored)


def test_a_second_copy_of_a_collection_adds_no_pairs(project, folder):
    shutil.copytree(folder, folder.parents[2] / "elsewhere" / folder.name)
    index.update()
    pairs = Pairs(prompts=0)
    assert len(pairs) == 6
    assert {row["collection"] for _, _, row in pairs} == {folder.relative_to(folder.parents[2]).as_posix()}


def test_filters_on_any_column(mixed):
    def steps(**filters):
        return sorted({(row["dataset"], row["model"], row["rank"]) for _, _, row in Pairs(prompts=0, **filters)})

    assert len(Pairs(prompts=0)) == 24
    assert steps(dataset="arcc") == [("ARC-c", "tiny-llama", 4)]
    assert steps(dataset="Toy", rank=[4]) == [("Toy", "other-model", 4), ("Toy", "tiny-llama", 4)]
    assert steps(dataset=["ARC-c", "toy"], rank=(2, 8)) == [("Toy", "tiny-llama", 8)]
    assert len(Pairs(prompts=0, model="Other_Model", step=range(7, 9))) == 2
    losses = [pair.row["loss"] for pair in Pairs(prompts=0)]
    middle = sorted(losses)[12]
    below = Pairs(prompts=0, where=pc.field("loss") < middle)
    assert [pair.row["loss"] for pair in below] == [loss for loss in losses if loss < middle]
    assert len(Pairs(prompts=0, where=(pc.field("seed") == 42) & (pc.field("rank") == 8), dataset="Toy")) == 6
    assert len(Pairs(prompts=0, file=Pairs(prompts=0).row(0)["file"])) == 1


def test_checkpoints_are_chosen_by_their_scores(mixed):
    def steps(where) -> list[int]:
        return [row["step"] for _, _, row in Pairs(prompts=0, where=where)]

    better = pc.field("score") > pc.field("base_score")
    with pytest.raises(UserError, match="no checkpoint fits where="):
        steps(better)
    scored.write(mixed, scored.evaluated({"base": 0.5, 7: 0.4, 9: 0.7, 12: 0.6}))
    index.update()
    assert steps(better) == [9, 12]
    assert steps(better & (pc.field("score_low") > 0.55)) == [9]
    assert steps(pc.field("split") == "Toy_test") == [7, 9, 12]
    row = Pairs(prompts=0, where=better)[0].row
    assert (row["metric"], row["score"], row["base_score"]) == ("choice", 0.7, 0.5)
    assert list(row) == list(index.COLUMNS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dataset": "BoolQ"}, "collected dataset 'BoolQ' is not known; known: Toy"),
        ({"dataste": "Toy"}, "'dataste' is no column of the index; columns: category, dataset"),
        ({"rank": 3}, "no checkpoint fits rank=3"),
        ({"rank": "three"}, "rank='three' does not fit that column, whose values are int32"),
        ({"rank": 10**12}, "does not fit that column"),
        ({"where": pc.field("los") < 1}, "columns: seed, split, category"),
        ({"where": pc.field("loss") < "x"}, "where="),
        ({"where": "loss < 1"}, "where="),
        ({"split": "dev"}, "split='dev' is not known"),
        ({"prompts": -1}, "prompts=-1 is not a whole number"),
        ({"seed": 1.5}, "seed=1.5 is not a whole number"),
    ],
)
def test_what_cannot_be_meant_is_named(project, arguments, said):
    with pytest.raises(UserError, match=re.escape(said)):
        Pairs(**{"prompts": 1, **arguments})


def read_anyway(*_, **__):
    raise AssertionError("was read although nobody asked for it")


def test_opening_reads_no_checkpoint_no_manifest_and_no_data(mixed, monkeypatch):
    for module, name in ((checkpoints, "opened"), (files, "sha256_of"), (prompts, "rows_in")):
        monkeypatch.setattr(module, name, read_anyway)
    monkeypatch.setattr(pairs_module, "read_manifest", read_anyway)
    assert len(Pairs(prompts=4)) == 24


def damage_of_files():
    return [
        (lambda f: (f / STEP).write_bytes((f / STEP).read_bytes()[:100]), f"{STEP}: has 100 bytes"),
        (lambda f: flip_a_bit(f / STEP), f"{STEP}: does not have its recorded sha256"),
        (
            lambda f: shutil.copy2(f / "checkpoint-8.safetensors", f / STEP),
            f"{STEP}: does not have its recorded sha256",
        ),
        (lambda f: os.replace(f / "checkpoint-8.safetensors", f / STEP), f"{STEP}: does not have its recorded sha256"),
        (lambda f: (f / STEP).unlink(), f"{STEP}: is gone"),
        (lambda f: edit(f, lambda m: m.update(rank=8), seal=False), "edited after it was written|older than"),
        (lambda f: edit(f, lambda m: m.update(rank=8)), "changed since the index was made|older than"),
        (lambda f: (f / "manifest.json").write_text("["), "broken|older than"),
        (lambda f: (f / "manifest.json").unlink(), "is gone since|older than"),
        (lambda f: shutil.rmtree(f), "is gone since|older than"),
    ]


@pytest.mark.parametrize(("damage", "said"), damage_of_files())
def test_a_file_that_is_not_what_was_recorded_is_named_and_not_loaded(folder, damage, said):
    opened_before = Pairs(prompts=1, step=9)
    damage(folder)
    with pytest.raises(UserError, match=said):
        Pairs(prompts=1, step=9)[0]
    with pytest.raises(UserError, match=said):
        opened_before[0]


def test_a_worker_says_what_is_wrong_as_the_process_itself_would(folder):
    flip_a_bit(folder / STEP)
    said = ""
    try:
        for _ in DataLoader(Pairs(prompts=1), batch_size=None, num_workers=1):
            pass
    except UserError as error:
        said = str(error)
    assert f"{STEP}: does not have its recorded sha256" in said


@pytest.mark.parametrize(("damage", "said"), damage_of_files()[:5])
def test_a_file_that_changes_after_it_was_loaded_is_noticed_too(folder, damage, said):
    pairs = Pairs(prompts=1, step=9)
    pairs[0]
    damage(folder)
    with pytest.raises(UserError, match=said):
        pairs[0]


def test_a_data_file_changed_since_the_training_is_refused(project):
    pairs = Pairs(prompts=1)
    pairs[0]
    project.data.write_text(project.data.read_text().replace("is 5 even?", "is 6 even?"))
    for opened in (pairs, Pairs(prompts=1)):
        with pytest.raises(UserError, match="Toy.json: its first 48 rows are not those that Toy was trained on"):
            opened[0]


def test_a_checkpoint_of_another_layout_than_its_collection_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.pop(min(tensors)))
    pairs = Pairs(prompts=0, vector=True)
    pairs[0]
    with pytest.raises(UserError, match=f"{STEP}: has other keys, shapes or types than the rest"):
        pairs[2]


def test_a_file_is_hashed_once_however_often_it_is_loaded(folder, monkeypatch):
    pairs = Pairs(prompts=0)
    hashed, sha256_of = [], files.sha256_of
    monkeypatch.setattr(checkpoints, "_verified", {})
    monkeypatch.setattr(files, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    for _ in range(2):
        list(pairs)
    assert len(hashed) == 6
    copy = pickle.loads(pickle.dumps(pairs))
    monkeypatch.setattr(checkpoints, "_verified", {})  # as a worker of a later epoch starts
    list(copy)
    assert len(hashed) == 6


def sent(method: str, pairs: Pairs, persistent: bool = False) -> DataLoader:
    return DataLoader(
        pairs,
        batch_size=2,
        num_workers=1 if method == "spawn" else 2,  # which imports all anew
        collate_fn=collate,
        multiprocessing_context=method,
        persistent_workers=persistent,
        timeout=60,  # a worker that cannot send ends the test, not hangs it
    )


@pytest.mark.parametrize(("method", "vector"), [("fork", False), ("fork", True), ("spawn", False)])
def test_workers_give_what_the_process_itself_gives(project, method, vector):
    pairs = Pairs(prompts=3, vector=vector)
    loader = sent(method, pairs, persistent=True)
    for epoch in (0, 1):
        pairs.set_epoch(epoch)
        here = [pairs[number] for number in range(6)]
        there = [
            Pair(*one)
            for batch in loader
            for one in zip(batch["prompts"], batch["checkpoint"], batch["row"], strict=True)
        ]
        for one, other in zip(here, there, strict=True):
            assert one.prompts == other.prompts and one.row == other.row
            if vector:
                assert torch.equal(one.checkpoint, other.checkpoint)
            else:
                assert list(one.checkpoint) == list(other.checkpoint)
                assert all(torch.equal(one.checkpoint[key], other.checkpoint[key]) for key in one.checkpoint)


def test_a_mixed_batch_is_padded_vectors_with_their_lengths(mixed):
    pairs = Pairs(prompts=2, vector=True, where=pc.field("step") == 9)
    batch = collate([pairs[number] for number in range(4)])
    longest = max(batch["length"].tolist())
    assert batch["checkpoint"].shape == (4, longest)
    assert min(batch["length"]) < longest
    for number, row in enumerate(batch["row"]):
        flat = batch["checkpoint"][number]
        assert not flat[batch["length"][number] :].any()
        assert torch.equal(flat[: batch["length"][number]], pairs[number].checkpoint)
        back = vectors.to_dict(flat, pairs.layout(row["collection"]))
        assert back.keys() == load_file(paths.SAVES / row["file"]).keys()
    assert [len(drawn) for drawn in batch["prompts"]] == [2] * 4


def test_dicts_of_a_mixed_batch_stay_apart(mixed):
    batch = next(iter(DataLoader(Pairs(prompts=1), batch_size=24, collate_fn=collate)))
    assert [len(checkpoint) for checkpoint in batch["checkpoint"]] == [28] * 24


def test_neither_handles_nor_a_big_index_weigh_on_workers(project):
    pairs = Pairs(prompts=1)
    before = len(pickle.dumps(pairs))
    kept = [pairs[number] for number in range(6)]
    assert len(pickle.dumps(pairs)) == before < 20_000
    assert len(kept) == 6


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts this process's open files")
def test_open_files_do_not_grow_with_the_checkpoints_held(mixed):
    pairs = Pairs(prompts=0)
    held = [pairs[0]]
    before = len(os.listdir("/proc/self/fd"))
    held += [pairs[number] for number in range(24)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_checkpoints_from_workers_fit_into_few_open_files(mixed):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 100, hard))  # 24 checkpoints of 28 tensors; some for the workers
    try:
        held = [batch for batch in sent("fork", Pairs(prompts=0))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(len(batch["row"]) for batch in held) == 24


def test_a_collection_whose_data_is_not_known_still_gives_checkpoints(folder):
    edit(folder, lambda manifest: manifest.update(data=None, recipe=None, seed=None))
    index.update()
    assert len(Pairs(prompts=0)[0].checkpoint) == 28
    with pytest.raises(UserError, match="does not know the data"):
        Pairs(prompts=1)[0]


def test_a_workers_own_number_changes_nothing(project):
    assert get_worker_info() is None
    pairs = Pairs(prompts=5)
    alone = [texts(pair) for pair in pairs]
    for workers in (1, 2):
        loader = DataLoader(pairs, batch_size=None, num_workers=workers)
        assert [texts(pair) for pair in loader] == alone


def test_the_example_of_the_readme_runs(collected):
    """README's example, on this tiny collection instead of the demo's, in a folder with modules of the user's own."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "from pairs import Pairs" in block]
    top = collected.top
    copy_folder("utils", top)
    shutil.copy(ROOT / "models" / "models.yaml", top / "models" / "models.yaml")
    example = example.replace("Demo", "Toy").replace("rank=8", "rank=4")
    for name in ("model", "dataset", "common", "training", "collection", "packed"):
        (top / f"{name}.py").write_text("raise SystemExit('a module of the user was imported')\n")
    environment = {**os.environ, "PYTHONPATH": "utils"}
    for command in (["utils/index.py"], ["-c", example]):
        result = subprocess.run([PYTHON, *command], cwd=top, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_descriptions_of_a_task_are_those_registered_now(project, folder):
    name = folder.relative_to(paths.SAVES).as_posix()
    assert Pairs(prompts=0).descriptions(name) == []
    registration.describe("Toy", ["Answer toy questions."], "own", paths.DATA)
    pairs = pickle.loads(pickle.dumps(Pairs(prompts=0)))
    assert pairs.descriptions(pairs[0].row["collection"]) == ["Answer toy questions."]
    with pytest.raises(UserError, match="no such collection"):
        pairs.descriptions("math/Gone/x")
