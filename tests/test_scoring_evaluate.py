"""`make evaluate` as a user calls it: what stands in evaluation.json afterwards, what is printed, what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import test_sweep
from conftest import CATEGORY, ROOT, Project
from helpers import copies, fork_server, handmade
from helpers.forked_python import PYTHON

from paragen.collection import evaluation, index, prompts
from paragen.collection.manifest import read_manifest
from paragen.common import devices, files, paths
from paragen.model import base_models, model_files
from paragen.scoring import answers
from paragen.sweep import shared_scoring

pytestmark = pytest.mark.runs

NAME = f"{CATEGORY}/Toy/Tiny-Llama_lora-rank_4_finetune"
STEPS = [7, 8, 9, 10, 11, 12]
TEXT = {"prompt": "prompt", "response": "response", "system": "system"}


def choices(count: int = 12) -> list[dict]:
    """Rows such as the model was trained on."""
    return [
        {"prompt": f"is {n} even?", "response": f"[{'AB'[n % 2]}]", "system": "answer"} for n in range(90, 90 + count)
    ]


def register(project: Project, name: str, rows: list[dict], **entry) -> Path:
    """Put a dataset beside the others; returns its file."""
    info = project.top / "data" / "dataset_info.json"
    known = {"file_name": f"{CATEGORY}/{name}.json", "columns": TEXT, **entry}
    info.write_text(json.dumps({**json.loads(info.read_text()), name: known}))
    path = info.parent / CATEGORY / f"{name}.json"
    path.write_text(json.dumps(rows))
    return path


def unregister(project: Project, name: str) -> None:
    info = project.top / "data" / "dataset_info.json"
    info.write_text(json.dumps({key: entry for key, entry in json.loads(info.read_text()).items() if key != name}))


@pytest.fixture(scope="module")
def ready_once(trained_once, tmp_path_factory) -> Project:
    """A collection of six checkpoints and, registered, its test split of choices. Read only."""
    project = trained_once.copy(tmp_path_factory.mktemp("ready") / "my project")
    shutil.copy(ROOT / "models" / "models.yaml", project.top / "models")
    register(project, "Toy_test", choices())
    return project


@pytest.mark.slow
def test_the_benchmark_of_agreement_finds_pefts_losses(ready_once):
    command = [PYTHON, ROOT / "bench" / "score_agreement.py", "6"]
    environment = {**os.environ, "PARAGEN_TOP": str(ready_once.top), "DATASET": "Toy"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    rows = [re.split("  +", line) for line in done.stdout.splitlines() if line.startswith(("peft", "here"))]
    assert done.returncode == 0 and len(rows) == 4, done.stdout + done.stderr
    assert {float(row[5]) for row in rows} == {0.0} and {row[7] for row in rows} == {"0 of 6"}


@pytest.fixture
def ready(ready_once, tmp_path) -> Project:
    return ready_once.copy(tmp_path / "my project")


@pytest.fixture(scope="module")
def scored_once(ready_once, tmp_path_factory) -> tuple[Project, fork_server.Result]:
    """The same evaluated with nothing but `make evaluate`, and what that printed. Read only."""
    project = ready_once.copy(tmp_path_factory.mktemp("scored") / "my project")
    return project, evaluate(project)


@pytest.fixture
def scored(scored_once, tmp_path) -> Project:
    return scored_once[0].copy(tmp_path / "my project")


@pytest.fixture(scope="module")
def long_once(pretrained_once, tmp_path_factory) -> Project:
    """A collection of 20 checkpoints, which are scored in three groups. Read only."""
    project = pretrained_once.copy(tmp_path_factory.mktemp("long") / "my project")
    result = project.train(project.finetune, "max_steps=30", "save_total_limit=20")
    assert result.status == 0, result.output
    shutil.copy(ROOT / "models" / "models.yaml", project.top / "models")
    register(project, "Toy_test", choices())
    return project


def start(project: Project, *arguments: str, log: str = "evaluate.txt", **environment: str) -> fork_server.Run:
    return fork_server.start(
        "evaluate", [*arguments], {"PARAGEN_TOP": str(project.top), **environment}, project.top / log
    )


def evaluate(project: Project, *arguments: str, **environment: str) -> fork_server.Result:
    return start(project, *arguments, **environment).wait()


def file_of(project: Project, **which) -> Path:
    return project.run_folder("finetune", **which) / "evaluation.json"


def evaluations(project: Project, **which) -> list[dict]:
    """What evaluation.json says, read as all readers do, that is with its seal."""
    folder = project.run_folder("finetune", **which)
    return evaluation.read(folder, read_manifest(folder))


def evaluated(project: Project, **environment: str) -> dict:
    """Evaluate, which must succeed, and return the evaluation that was written last."""
    result = evaluate(project, **environment)
    assert result.status == 0, result.output
    return evaluations(project)[-1]


def scores_of(one: dict) -> dict[int, dict]:
    """The scores by step, 0 for the base."""
    return {0: one["base"]} | {score["step"]: score for score in one["checkpoints"]}


def assert_alike(one: dict, other: dict) -> None:
    """Two evaluations say the same, but for the rounding of other groups of checkpoints."""
    assert scores_of(one).keys() == scores_of(other).keys()
    for step, score in scores_of(other).items():
        for key, value in score.items():
            assert scores_of(one)[step][key] == (value if value is None else pytest.approx(value, rel=1e-5)), (
                step,
                key,
            )
    assert {**one, "base": 0, "checkpoints": 0} == {**other, "base": 0, "checkpoints": 0}


def one_error(result: fork_server.Result) -> str:
    """The one line of a call that failed."""
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.status == 1 and "Traceback" not in result.output, result.output
    return line


def table(output: str) -> list[list[str]]:
    """The cells of the table at the end, without its head."""
    lines = output.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("collection "))
    return [re.split(r"\s{2,}", line) for line in lines[head + 1 :]]


def left_over(project: Project) -> list[str]:
    """What no call may leave in or beside a collection."""
    return [path.name for path in (project.top / "saves").rglob(".*")]


# What is written and printed


def test_base_and_all_checkpoints_are_scored_on_the_test_split(scored_once):
    project, result = scored_once
    assert result.status == 0, result.output
    (one,) = evaluations(project)
    assert one.keys() == evaluation.KEYS
    manifest = read_manifest(project.run_folder("finetune"))
    asked = prompts.of_collection(manifest, "test", project.top / "data")
    expected = {
        "split": "Toy_test", "paired": True, "limit": None, "metric": "choice", "rows": 12,
        "prompts_sha256": files.sha256_of_value(asked), "settings": {"max_new_tokens": 32}, "engine": "packed",
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    assert {key: one[key] for key in expected} == expected
    assert one["versions"].keys() == {"llamafactory", "transformers", "torch", "math-verify"}
    assert [score["step"] for score in one["checkpoints"]] == STEPS
    for score in scores_of(one).values():
        for share, interval in (("score", "interval"), ("likelihood_score", "likelihood_interval")):
            right = round(12 * score[share])
            assert score[share] == right / 12 and score[interval] == answers.share_interval(right, 12)
        assert 0 <= score["unparsed"] <= 12 * (1 - score["score"])
        assert score["loss_interval"][0] < score["loss"] < score["loss_interval"][1]
    losses = [score["loss"] for score in scores_of(one).values()]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 7, "training on such rows helps"


@pytest.fixture
def stored_in_bfloat16(tmp_path) -> Path:
    """A base model whose file has another dtype than a CPU computes in; as a GPU does with SmolLM2's float32."""
    folder = tmp_path / "models" / "Tiny-Llama"
    subprocess.run([PYTHON, ROOT / "tests" / "helpers" / "tiny.py", folder, "bfloat16"], check=True)
    return folder


DTYPES = """
import sys
from pathlib import Path
import torch
from paragen.scoring import base_model
base = base_model.BaseModel({"template": "qwen", "stage": "sft", "finetuning_type": "lora"}, Path(sys.argv[1]))
with torch.inference_mode():
    parameters = list(base.model.parameters())
assert not any(parameter.is_inference() for parameter in parameters)
print(*{parameter.dtype for parameter in parameters}, base.dtype, base.model.config.dtype)
"""


def test_a_base_has_the_dtype_that_is_computed_in_and_takes_gradients(stored_in_bfloat16):
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "utils")}
    command = [PYTHON, "-c", DTYPES, stored_in_bfloat16]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["torch.float32", "torch.float32", "torch.bfloat16"]


@pytest.mark.slow
def test_a_base_stored_in_another_dtype_is_scored(tmp_path, stored_in_bfloat16):
    project = Project(tmp_path / "my project", stored_in_bfloat16)
    for recipe in (project.pretrain, project.finetune):
        result = project.train(recipe)
        assert result.status == 0, result.output
    register(project, "Toy_test", choices())
    shutil.copy(ROOT / "models" / "models.yaml", project.top / "models")
    assert evaluated(project)["dtype"] == "float32"


def test_a_table_tells_how_good_base_best_and_last_checkpoint_are(scored_once):
    project, result = scored_once
    (one,) = evaluations(project)
    (row,) = table(result.output)
    best, last = evaluation.best_of(one), one["checkpoints"][-1]
    base, best_text, last_text = (evaluation.text_of(one, score) for score in (one["base"], best, last))
    assert row == [NAME, "Toy_test", "12", "choice", base, f"{best_text} at step {best['step']}", last_text]
    assert f"scoring {NAME} on Toy_test: 12 rows, 7 of 7 models" in result.output
    assert left_over(project) == []


def test_a_second_call_does_nothing_and_prints_the_table_again(scored, scored_once):
    before = file_of(scored).read_bytes(), file_of(scored).stat()
    result = evaluate(scored)
    assert result.status == 0 and f"scored already: {NAME} on Toy_test, 6 checkpoints" in result.output
    assert table(result.output) == table(scored_once[1].output)
    assert (file_of(scored).read_bytes(), file_of(scored).stat()) == before
    assert left_over(scored) == []


def test_only_what_is_missing_is_scored_and_comes_out_as_all_at_once(ready, scored_once):
    for steps, done, so_far in (("last", "2 of 2", [12]), ("every:2", "2 of 4", [8, 10, 12]), ("all", "3 of 7", STEPS)):
        before = scores_of(evaluations(ready)[0]) if file_of(ready).exists() else {}
        result = evaluate(ready, STEPS=steps)
        assert result.status == 0 and f"12 rows, {done} models" in result.output, result.output
        (one,) = evaluations(ready)
        assert [score["step"] for score in one["checkpoints"]] == so_far
        assert before.items() <= scores_of(one).items(), "what was there is not scored again"
    assert_alike(one, evaluations(scored_once[0])[0])


def test_show_prints_the_answers_of_base_and_last_checkpoint(ready):
    result = evaluate(ready, "--show", "1", STEPS="last")
    assert result.status == 0, result.output
    shown = result.output.split("is 90 even?")[1].splitlines()
    assert shown[1].split() == ["right:", "[A]"]
    assert shown[2].startswith("  base: ") and shown[3].startswith("  step 12: ") and "is 91 even?" not in result.output


# Stopped in the middle


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_file_of_an_undisturbed_call(long_once, tmp_path):
    undisturbed, project = long_once.copy(tmp_path / "one"), long_once.copy(tmp_path / "my project")
    evaluated(undisturbed)
    path, before = file_of(project), None
    for count in (8, 16):
        run = start(project)
        assert run.kill_when(lambda: path.exists() and path.read_bytes() != before)  # noqa: B023 (called at once)
        before = path.read_bytes()
        (one,) = evaluations(project)
        assert len(scores_of(one)) == count, "each group of checkpoints is on disk as soon as it is scored"
        path.with_name(".evaluation.json.4194303.tmp").write_bytes(before[:99])  # as if killed while it was written
    assert evaluate(project).status == 0
    assert path.read_bytes() == file_of(undisturbed).read_bytes()
    assert left_over(project) == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_it_leaves_what_was_scored_and_no_lock(long_once, tmp_path, kind, status):
    project = long_once.copy(tmp_path / "my project")
    run = start(project)
    assert run.kill_when(file_of(project).exists, kind)
    assert run.wait().status == status and "Traceback" not in run.wait().output, run.wait().output
    assert 8 <= len(scores_of(evaluations(project)[0])) < 21
    assert left_over(project) == []


def test_a_second_call_beside_a_live_one_ends_with_one_line(ready, scored_once):
    lock = files.beside(ready.run_folder("finetune"), "evaluation.lock")
    run = start(ready)
    while not lock.exists() or not lock.read_text():
        assert run.process.is_alive(), run.log.read_text()
    os.kill(run.process.pid, signal.SIGSTOP)
    try:
        line = one_error(start(ready, log="second.txt").wait())
    finally:
        os.kill(run.process.pid, signal.SIGCONT)
    assert line == f"error: {NAME} on Toy_test: another process is scoring it; wait for it"
    assert run.wait().status == 0
    assert evaluations(ready) == evaluations(scored_once[0]) and left_over(ready) == []


@pytest.mark.slow
def test_a_collection_that_is_replaced_meanwhile_does_not_get_the_scores_of_the_old_one(long_once, tmp_path):
    project = long_once.copy(tmp_path / "my project")
    run = start(project)
    while not run.log.exists() or "  8 of 21 scored" not in run.log.read_text():
        assert run.process.is_alive(), run.log.read_text()
    os.kill(run.process.pid, signal.SIGSTOP)
    try:
        trained = project.train(project.finetune, FORCE="1")
    finally:
        os.kill(run.process.pid, signal.SIGCONT)
    assert trained.status == 0, trained.output
    assert one_error(run.wait()).endswith("the collection was replaced while it was scored; score it again")
    assert not file_of(project).exists() and left_over(project) == []
    assert len(evaluated(project)["checkpoints"]) == 6


# Which rows


def test_without_a_test_split_the_rows_that_were_not_trained_on_are_scored(ready):
    unregister(ready, "Toy_test")
    one = evaluated(ready, STEPS="last")
    assert (one["split"], one["paired"], one["rows"]) == ("Toy[48:64]", True, 16)


def test_of_held_out_rows_only_these_are_scored(ready):
    unregister(ready, "Toy_test")
    copies.edit(ready.run_folder("finetune"), lambda manifest: manifest["data"][0]["entry"].update(held_out=5))
    one = evaluated(ready, STEPS="last")
    assert (one["split"], one["paired"], one["rows"]) == ("Toy[59:64]", True, 5)


def test_another_registered_dataset_can_be_the_split(scored):
    register(scored, "My Other-Set", choices(5))
    one = evaluated(scored, SPLIT="myotherset", STEPS="last")
    assert (one["split"], one["paired"], one["rows"]) == ("My Other-Set", False, 5)
    assert [(one["split"], len(one["checkpoints"])) for one in evaluations(scored)] == [
        ("Toy_test", 6), ("My Other-Set", 1)
    ]  # fmt: skip
    before = file_of(scored).read_bytes()
    assert "scored already" in evaluate(scored, SPLIT="toy test").output, "the paired one, by its name"
    assert file_of(scored).read_bytes() == before


def test_a_limit_takes_the_first_rows_and_stands_beside_the_whole(scored):
    whole = evaluations(scored)[0]
    one = evaluated(scored, LIMIT="3", STEPS="last")
    assert (one["split"], one["limit"], one["rows"]) == ("Toy_test", 3, 3)
    assert evaluations(scored) == [whole, one]
    assert "scored already" in evaluate(scored, LIMIT="12").output, "no fewer rows than there are"
    register(scored, "First", choices(3))
    first = evaluated(scored, SPLIT="First", STEPS="last")
    assert first["prompts_sha256"] == one["prompts_sha256"] and scores_of(first) == scores_of(one)


def test_a_limit_leaves_the_options_of_the_whole_split(scored):
    """The prompts name no options, so they are the responses there are; a single row has one response only."""
    register(scored, "A first", choices())
    register(scored, "B first", choices()[1:])
    first = [evaluated(scored, SPLIT=name, LIMIT="1", STEPS="last") for name in ("A first", "B first")]
    shares = [one["base"]["likelihood_score"] for one in first]
    assert sorted(shares) == [0.0, 1.0], "this model finds the same option likelier for both rows"


def test_a_collection_of_two_datasets_is_scored_on_both(ready):
    register(ready, "Other", choices(7))
    register(ready, "Other_test", choices(4))
    element = handmade.register(ready.top / "data", CATEGORY, "Other", choices(7))
    copies.edit(ready.run_folder("finetune"), lambda manifest: manifest["data"].append(element))
    one = evaluated(ready, STEPS="last")
    assert (one["split"], one["rows"], one["paired"]) == ("Toy_test+Other_test", 16, True)


# What changes


def test_other_rows_make_the_scores_stale(scored):
    rows = choices()
    rows[3]["prompt"] = "is 93 odd?"
    register(scored, "Toy_test", rows)
    before = file_of(scored).read_bytes()
    line = one_error(evaluate(scored))
    assert line == (f"error: {NAME} on Toy_test: its scores are stale, changed since: the rows; FORCE=1 scores again")
    assert file_of(scored).read_bytes() == before
    old = evaluations(scored)[0]
    new = evaluated(scored, FORCE="1")
    assert new["prompts_sha256"] != old["prompts_sha256"] and len(evaluations(scored)) == 1
    assert all(new["checkpoints"][n]["loss"] != old["checkpoints"][n]["loss"] for n in range(6))


def test_the_same_rows_read_otherwise_are_other_rows(scored):
    columns = {"prompt": "system", "response": "response", "system": "prompt"}
    register(scored, "Toy_test", choices(), columns=columns)
    assert "changed since: the rows" in one_error(evaluate(scored))


def test_other_responses_may_mean_another_metric(scored):
    register(scored, "Toy_test", [{**row, "response": "it is not known"} for row in choices()[:7]])
    line = one_error(evaluate(scored))
    assert "the rows, metric (choice, now loss), rows (12, now 7), settings" in line


def test_a_column_that_is_not_read_may_change(scored):
    register(scored, "Toy_test", [{**row, "source": "a book"} for row in choices()])
    assert "scored already" in evaluate(scored).output


def test_a_collection_that_is_trained_again_loses_its_scores_and_gets_new_ones(scored):
    """Here with a template of ours, which LLaMA-Factory does not know."""
    old = evaluations(scored)[0]
    result = scored.train(scored.finetune, "template=question_answer", FORCE="1")
    assert result.status == 0, result.output
    assert not file_of(scored).exists()
    new = evaluated(scored)
    assert new["base"]["loss"] != old["base"]["loss"] and len(new["checkpoints"]) == 6


def test_scores_in_another_dtype_are_not_mixed(ready):
    """Begun on a GPU in bfloat16, say, and gone on with on a CPU."""
    one = evaluated(ready, STEPS="last")
    manifest = read_manifest(folder(ready))
    evaluation.write(folder(ready), manifest, [{**one, "dtype": "bfloat16", "device": "a GPU"}])
    before = file_of(ready).read_bytes()
    line = one_error(evaluate(ready))
    assert "in float32, the others" in line and "bfloat16 (a GPU)" in line and "FORCE=1" in line
    assert line.startswith(f"error: {NAME} on Toy_test: ") and file_of(ready).read_bytes() == before
    assert evaluated(ready, STEPS="last", FORCE="1") == one


# What is refused


def cut(path: Path, size: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:size])


def other_model(project: Project) -> None:
    copies.flip_a_bit(project.top / "models" / "Tiny-Llama" / "model.safetensors")


def other_tokenizer(project: Project) -> None:
    path = project.top / "models" / "Tiny-Llama" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_up_tokenization_spaces": True}))


def with_pictures(project: Project) -> None:
    rows = [{**row, "images": ["a.png"]} for row in choices()]
    register(project, "Toy_test", rows, columns={**TEXT, "images": "images"})


def conversations(project: Project, *said: tuple[str, str]) -> None:
    rows = [{"conversations": [{"from": who, "value": text} for who, text in said]}]
    register(project, "Toy_test", rows, formatting="sharegpt", columns={"messages": "conversations"})


def trained_on_whole(project: Project) -> None:
    unregister(project, "Toy_test")
    project.data.write_text(json.dumps(json.loads(project.data.read_text())[:48]))


def changed_behind(project: Project) -> None:
    unregister(project, "Toy_test")
    project.data.write_text(project.data.read_text().replace("is 60 even", "is 60 odd"))


def broken_scores(project: Project, content: str | None = None) -> None:
    """A file that is no evaluation; without content one that somebody edited."""
    folder = project.run_folder("finetune")
    evaluation.write(folder, read_manifest(folder), [])
    path = file_of(project)
    path.write_text(path.read_text().replace("[]", "[{}]") if content is None else content)


def scores_of_others(project: Project) -> None:
    folder = project.run_folder("finetune")
    evaluation.write(folder, replace(read_manifest(folder), sha256="0" * 64), [])


def folder(project: Project) -> Path:
    return project.run_folder("finetune")


@pytest.mark.parametrize(
    ("change", "environment", "said"),
    [
        (lambda p: shutil.rmtree(p.top / "saves"), {}, "saves: no collections yet"),
        (None, {"DEVICES": "7"}, "error: DEVICES=7: th"),  # there is no GPU, or this machine has fewer
        (None, {"DATASET": "Tay"}, "dataset 'Tay' is not known; did you mean Toy?; known: Toy"),
        (None, {"RANK": "64"}, "no collection fits RANK=64"),
        (None, {"SPLIT": "nothing"}, "registered dataset 'nothing' is not known; known: Toy, Toy_test"),
        (None, {"LIMIT": "0"}, "LIMIT=0: is not a whole number from 1 on"),
        (None, {"LIMIT": "abc"}, "LIMIT=abc: is not a whole number from 1 on"),
        (None, {"STEPS": "every:0"}, "STEPS=every:0: is not known; known: all, last, every:<n>"),
        (
            lambda p: register(p, "Toy_test", [{"prompt": "?"}], columns={"prompt": "prompt"}, prompts_only=True),
            {},
            "Toy_test: has prompts without responses, nothing to score against; name another dataset in SPLIT",
        ),
        (
            lambda p: register(p, "Toy_test", [*choices(2), {"prompt": "?", "response": " "}]),
            {},
            "Toy_test: row 3: it has no response to score against; put it right, or name another SPLIT",
        ),
        (lambda p: register(p, "Toy_test", [{"prompt": "?", "response": 1}]), {}, "Toy_test: row 1: "),
        (with_pictures, {}, "Toy_test: row 1: it has pictures, and only text is scored"),
        (lambda p: conversations(p, ("human", "?")), {}, "row 1: the last message is from 'human', which leaves no"),
        (lambda p: conversations(p, ("gpt", "!"), ("human", "?")), {}, "row 1: message 1 is from 'gpt' where 'human'"),
        (lambda p: register(p, "Toy_test", []), {}, "Toy_test.json: is an empty list"),
        (lambda p: register(p, "Toy_test", [1]), {}, "Toy_test.json: row 1: is a number, not an object"),
        (lambda p: register(p, "Toy_test", []).write_text("["), {}, "Toy_test.json: broken JSON"),
        (lambda p: register(p, "Toy_test", []).unlink(), {}, "Toy_test.json: dataset 'Toy_test' has no such file"),
        (trained_on_whole, {}, "Toy: has no Toy_test in dataset_info.json and was trained on all its rows"),
        (changed_behind, {}, "Toy.json: changed since Toy was trained, behind the rows trained on"),
        (lambda p: shutil.rmtree(p.top / "models" / "Tiny-Llama"), {}, "models/Tiny-Llama: no such model folder"),
        (other_model, {}, "models/Tiny-Llama: is not the base model that Tiny-Llama_lora-rank_4_finetune"),
        (other_tokenizer, {}, "models/Tiny-Llama: does not have the tokenizer that Tiny-Llama_lora-rank_4_finetune"),
        (lambda p: cut(folder(p) / "checkpoint-9.safetensors"), {}, "checkpoint-9.safetensors: has 100 bytes"),
        (lambda p: (folder(p) / "checkpoint-9.safetensors").unlink(), {}, "checkpoint-9.safetensors: is missing"),
        (lambda p: copies.flip_a_bit(folder(p) / "checkpoint-9.safetensors"), {}, "does not have its recorded sha256"),
        (lambda p: (folder(p) / "adapter_config.json").write_text("{}"), {}, "adapter_config.json: does not have its"),
        (
            lambda p: copies.edit(folder(p), lambda m: m.update(recipe=None)),
            {},
            "its manifest has no recipe",
        ),
        (lambda p: (folder(p) / "manifest.json").unlink(), {}, "has no manifest.json"),
        (lambda p: broken_scores(p, "["), {}, "evaluation.json: broken"),
        (lambda p: broken_scores(p, "[]"), {}, "evaluation.json: not of format 1"),
        (broken_scores, {}, "evaluation.json: was edited after it was written; remove it and run: make evaluate"),
        (scores_of_others, {}, "evaluation.json: is of other checkpoints than its manifest.json"),
    ],
)
def test_what_cannot_be_scored_is_named_in_one_line_and_nothing_is_written(ready, change, environment, said):
    if change:
        change(ready)
    before = kept(ready)
    assert said in one_error(evaluate(ready, **environment))
    assert kept(ready) == before


def kept(project: Project) -> dict[str, bytes]:
    """All files below saves/ but the index, which is made from the others."""
    return {name: data for name, data in handmade.tree(project.top / "saves").items() if name != "index.parquet"}


def with_code_in_its_folder(project: Project) -> Path:
    """Give the base model code of its own, which leaves a file where it runs; the manifest is made right."""
    model, ran = project.top / "models" / "Tiny-Llama", project.top / "ran"
    (model / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaForCausalLM, LlamaConfig\n"
        "class OwnConfig(LlamaConfig): pass\n"
        "class OwnModel(LlamaForCausalLM): pass\n"
    )
    path = model / "config.json"
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": own}))
    sha256 = base_models.identity_of(model)["sha256"]
    copies.edit(project.run_folder("finetune"), lambda m: m["base_model"].update(sha256=sha256))
    return ran


def test_a_manifest_cannot_let_code_in_a_models_folder_run(ready):
    ran = with_code_in_its_folder(ready)
    copies.edit(ready.run_folder("finetune"), lambda m: m["recipe"].update(trust_remote_code=True))
    result = evaluate(ready, STEPS="last")
    assert result.status == 0, result.output
    assert not ran.exists()


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"template": "no such"}, "models/Tiny-Llama: cannot be loaded (ValueError: Template no such does not exist"),
        ({"tool_format": "no such"}, "models/Tiny-Llama: cannot be loaded ("),
        ({"train_from_scratch": True}, "its recipe sets train_from_scratch: True, with which it cannot be scored here"),
        ({"add_tokens": ["a"]}, "recipe.add_tokens is ['a'], not a text"),
    ],
)
def test_a_manifests_recipe_that_cannot_be_followed_is_one_line(ready, recipe, said):
    copies.edit(ready.run_folder("finetune"), lambda m: m["recipe"].update(recipe))
    assert said in one_error(evaluate(ready))


def test_a_full_disk_is_one_line_and_leaves_the_scores_there_were(ready):
    """A file-size limit stands in for the disk; it hits the scores of all steps, not those of one."""
    evaluated(ready, STEPS="last")
    before = kept(ready)
    assert len(before[f"{NAME}/evaluation.json"]) < 3000
    result = evaluate(ready, FILE_SIZE_LIMIT="3000")
    assert "File too large" in one_error(result)
    assert kept(ready) == before
    assert len(evaluated(ready)["checkpoints"]) == 6


def break_tokenizer(content: bytearray) -> None:
    content[content.index(b'"', len(content) // 2)] ^= 1


def break_header(content: bytearray) -> None:
    content[content.index(b'"F32"') + 1] ^= 1


@pytest.mark.parametrize(
    ("name", "rot"), [("tokenizer.json", break_tokenizer), ("model.safetensors", break_header)]
)  # fmt: skip
def test_a_base_model_that_has_rotted_is_one_line(ready, name, rot):
    """Its size and times are those of when it was hashed, so that it is taken for the model of the training."""
    path = ready.top / "models" / "Tiny-Llama" / name
    model_files.hashes_of(path.parent, sorted(path.parent.glob("*")))
    before = path.stat()
    content = bytearray(path.read_bytes())
    rot(content)
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    known = ready.top / "models" / ".hashes.json"
    known.write_text(known.read_text().replace(str(before.st_ctime_ns), str(path.stat().st_ctime_ns)))
    line = one_error(evaluate(ready))
    assert "models/Tiny-Llama: cannot be loaded" in line and "make verify REHASH_MODELS=1" in line


# Several collections


@pytest.fixture
def several(ready) -> Project:
    """Collections of two ranks and two datasets on one base."""
    copies.twin(folder(ready), rank=8)
    other = copies.twin(folder(ready), "Other")
    element = handmade.register(ready.top / "data", CATEGORY, "Other", choices(7))
    copies.edit(other, lambda manifest: manifest.update(data=[element]))
    register(ready, "Other_test", choices(4))
    return ready


def test_several_collections_share_a_base_that_is_loaded_once(several):
    result = evaluate(several, STEPS="last", LLAMAFACTORY_VERBOSITY="INFO", CORES="1")
    assert result.status == 0, result.output
    assert result.output.count("all params: ") == 1, "what LLaMA-Factory says of a model that it has loaded"
    assert [row[:3] for row in table(result.output)] == [
        [f"{CATEGORY}/Other/Tiny-Llama_lora-rank_4_finetune", "Other_test", "4"],
        [NAME, "Toy_test", "12"],
        [NAME.replace("rank_4", "rank_8"), "Toy_test", "12"],
    ]
    rank_4, rank_8 = evaluations(several)[0], evaluations(several, rank=8)[0]
    assert rank_4 == rank_8, "the same weights under two names"
    assert left_over(several) == []


def test_one_that_cannot_be_scored_does_not_stop_the_others(several):
    copies.twin(folder(several), model="Gone")
    unregister(several, "Other_test")
    result = evaluate(several, STEPS="last", LLAMAFACTORY_VERBOSITY="INFO", CORES="1")
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert result.status == 1 and len(errors) == 2, result.output
    gone, other = (f"error: {NAME}: ".replace(*change) for change in (("Tiny-Llama", "Gone"), ("Toy", "Other")))
    assert errors[0].startswith(f"{gone}models/Gone: no such model folder")
    assert errors[1].startswith(f"{other}Other: has no Other_test")
    assert [row[0] for row in table(result.output)] == [NAME, NAME.replace("rank_4", "rank_8")]


def start_shared(project: Project, **environment: str) -> subprocess.Popen:
    """Evaluate in a new process on all cores: several collections are shared out over them."""
    if devices.cpu_cores() < 2:
        pytest.skip("collections are shared out over cores, of which there is one")
    environment = {**os.environ, "PARAGEN_TOP": str(project.top), "STEPS": "last", **environment}
    command = [sys.executable, ROOT / "utils" / "evaluate.py"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_several_collections_are_shared_out_over_the_slots_and_get_the_same_scores(several, tmp_path):
    """One cannot be scored, which does not stop the others. Its fault shows in a worker alone: the model's weights."""
    alone = several.copy(tmp_path / "alone")
    broken = copies.twin(folder(several), "Other", rank=16)
    copies.edit(broken, lambda manifest: manifest["tokenizer"].update(sha256="0" * 64))
    run = start_shared(several)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 1 and "Traceback" not in output, output
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "does not have the tokenizer that" in error
    assert [row[:3] for row in table(output)] == [
        [f"{CATEGORY}/Other/Tiny-Llama_lora-rank_4_finetune", "Other_test", "4"],
        [NAME, "Toy_test", "12"],
        [NAME.replace("rank_4", "rank_8"), "Toy_test", "12"],
    ]
    assert f"scoring {NAME} on Toy_test: 12 rows, 2 of 2 models" in output
    assert re.search(rf"^  {NAME}: 2 of 2 scored, \d+ s$", output, re.MULTILINE), "its line names it"
    result = evaluate(alone, STEPS="last", CORES="1")
    assert result.status == 0, result.output
    for rank in (4, 8):
        assert evaluations(several, rank=rank) == evaluations(alone, rank=rank)
    assert left_over(several) == []


def test_what_a_sweep_has_just_scored_is_not_scored_again_with_force(scored, monkeypatch, capsys):
    for name in ("saves", "data"):
        monkeypatch.setattr(paths, name.upper(), scored.top / name)
    monkeypatch.setenv("FORCE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as `score_all` sets it
    before = file_of(scored).stat().st_mtime_ns
    assert shared_scoring.score_all([index.chosen_at(folder(scored))], scored={NAME}) == 0
    assert file_of(scored).stat().st_mtime_ns == before and table(capsys.readouterr().out)[-1][:2] == [NAME, "Toy_test"]


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("victims_of", [test_sweep.runs_of, test_sweep.scorers_of])
def test_a_killed_scoring_is_repeated(several, victims_of):
    """The process that scores, or the worker that started it."""
    run = start_shared(several, STEPS="all")
    while not (list(several.saves.glob(".*evaluation.lock")) and (victims := victims_of(run))):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    os.kill(victims[0], signal.SIGKILL)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0 and output.count("will try again: ") == 1, output
    assert all(len(evaluations(several, rank=rank)[0]["checkpoints"]) == len(STEPS) for rank in (4, 8))
    assert left_over(several) == []


def test_a_wrong_setting_is_said_once_and_not_for_each_collection(several):
    for setting in ({"LIMIT": "x"}, {"STEPS": "some"}, {"SPLIT": "nothing"}):
        one_error(evaluate(several, **setting))


# Other kinds of rows


def test_free_text_is_scored_by_its_loss(ready):
    rows = [{"prompt": f"tell of {n}", "response": f"there were {n} of them."} for n in range(5)]
    register(ready, "Tales", rows, columns={"prompt": "prompt", "response": "response"})
    result = evaluate(ready, SPLIT="Tales")
    assert result.status == 0, result.output
    (one,) = evaluations(ready)
    assert (one["metric"], one["settings"]) == ("loss", {})
    for score in scores_of(one).values():
        assert (score["score"], score["interval"], score["unparsed"]) == (None, None, 0)
        assert 0 < score["loss_interval"][0] < score["loss"] < score["loss_interval"][1]
    assert table(result.output)[0][4] == evaluation.text_of(one, one["base"]) and one["base"]["loss"] > 1


def test_mathematics_is_scored_by_generated_results(ready):
    """A random model says nonsense, so nothing of it may count as right."""
    rows = [{"prompt": f"{n} + 31415", "response": f"It is \\boxed{{{n + 31415}}}."} for n in range(3)]
    register(ready, "Sums", rows, columns={"prompt": "prompt", "response": "response"})
    one = evaluated(ready, SPLIT="Sums", STEPS="last")
    assert (one["metric"], one["rows"], one["settings"]) == ("math", 3, {"max_new_tokens": 512})
    for score in scores_of(one).values():
        assert score["score"] == 0 and score["interval"] == answers.share_interval(0, 3)
        assert score["unparsed"] in range(4) and "likelihood_score" not in score


def test_rows_of_an_exact_metric_are_scored_by_generated_answers(ready):
    """The adapter has learned what follows these prompts; the base says something else."""
    rows = choices()
    register(ready, "Exact", rows, metric="exact")
    one = evaluated(ready, SPLIT="Exact", STEPS="last")
    assert (one["metric"], one["rows"], one["settings"]) == ("exact", 12, {"max_new_tokens": 64})
    (known,) = evaluated(ready, SPLIT="Toy_test", STEPS="last")["checkpoints"]
    (last,) = one["checkpoints"]
    assert last["loss"] == pytest.approx(known["loss"])
    assert last["score"] == pytest.approx(known["score"]) and one["base"]["score"] == last["unparsed"] == 0
    assert last["interval"] == answers.share_interval(round(last["score"] * 12), 12)


def test_a_conversation_is_scored_on_its_last_answer(ready, scored_once):
    """One of a single turn says what an alpaca row says; an earlier turn is part of the prompt."""
    said = [("system", "answer"), ("human", "is {} even?"), ("gpt", "{}")]
    for name, before in (("One", []), ("Two", [("human", "hello"), ("gpt", "hi")])):
        rows = [
            {
                "conversations": [
                    {"from": who, "value": text.format(row["prompt"].split()[1] if who == "human" else row["response"])}
                    for who, text in [said[0], *before, *said[1:]]
                ]
            }
            for row in choices()
        ]
        register(ready, name, rows, formatting="sharegpt", columns={"messages": "conversations"})
    one, two = (evaluated(ready, SPLIT=name) for name in ("One", "Two"))
    assert one["metric"] == two["metric"] == "choice"
    expected = evaluations(scored_once[0])[0]
    same = ("split", "paired", "prompts_sha256")
    assert_alike(one, {**expected, **{key: one[key] for key in same}})
    assert two["base"]["loss"] != pytest.approx(one["base"]["loss"], rel=1e-4)


# The Makefile


@pytest.fixture
def clone(repository, ready_once) -> Path:
    """A copy of the repository with the trained collection."""
    for name in ("models", "saves", "data"):
        shutil.copytree(ready_once.top / name, repository / name, dirs_exist_ok=True)
    return repository


def make(repository: Path, *settings: str) -> subprocess.CompletedProcess:
    """From another folder, as a user with one repository of several does."""
    command = ["make", "--no-print-directory", "-C", str(repository), "evaluate", *settings]
    return subprocess.run(command, cwd=repository.parent, capture_output=True, text=True)


@pytest.mark.slow
def test_make_evaluate_takes_its_settings_and_is_quiet(clone):
    info = clone / "data" / "dataset_info.json"
    entry = {"file_name": f"{CATEGORY}/My Rows.json", "columns": TEXT}
    info.write_text(json.dumps({**json.loads(info.read_text()), "My Rows": entry}))
    (info.parent / entry["file_name"]).write_text(json.dumps(choices()))
    which = ("DATASET=toy", "MODEL=tinyllama", "RANK=4")
    done = make(clone, *which, "SPLIT=my rows", "LIMIT=3", "STEPS=last")
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = evaluation.read(clone / "saves" / NAME, read_manifest(clone / "saves" / NAME))
    assert (one["split"], one["limit"], [score["step"] for score in one["checkpoints"]]) == ("My Rows", 3, [12])
    assert [line for line in done.stderr.splitlines() if not line.startswith("hashing ")] == []
    said = done.stdout.splitlines()
    assert said[0] == f"scoring {NAME} on My Rows: 3 rows, 2 of 2 models"
    assert re.fullmatch(r"  2 of 2 scored, \d+ s", said[1]) and len(said) == 4, done.stdout


def test_make_evaluate_hands_its_settings_on_as_they_are_typed(clone):
    for setting in ("LIMIT=none", "SPLIT=; touch injected"):
        done = make(clone, setting)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode and setting.partition("=")[2] in line, done.stderr
    assert not list(clone.rglob("injected"))
