"""The measurements under bench/ take minutes; what is tested here is that they start, and what they count."""

import argparse
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers.forked_python import PYTHON

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import every_target
import generator
import generator_settings
import generator_tables
import numpy as np
import packed_lengths
import packed_whole
import scaling
import score_agreement
import sweep_staged
import timed
from shapes import ROOT, Seen, Work, adapter_parameters, base_parameters, flops, forward_flops, peak_of

from paragen.benchmark import plan
from paragen.common.cli import UserError
from paragen.scoring import questions
from paragen.scoring.option_trees import build_tree
from paragen.sweep import packs


@pytest.mark.parametrize("part", [[], ["whole"], ["grow"], ["cpu"], ["--cpu"], ["lengths"]])
def test_packed_says_what_it_measures(part):
    done = subprocess.run([PYTHON, ROOT / "bench" / "packed.py", *part, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "deterministic",
        "every_target",
        "generator",
        "generator_settings",
        "generator_tables",
        "many_cells",
        "scaling",
        "sweep",
    ],
)
def test_a_script_of_one_part_says_what_it_measures(name):
    script = ROOT / "bench" / f"{name}.py"
    done = subprocess.run([PYTHON, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_every_target_runs_targets_that_there_are():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command[0] for command in every_target.commands(["ARC-c"], ["2", "8"], "100")} <= targets


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """bench/generator_tables.py with three commands, in whose place programs run that append to a file."""

    def make(*programs: str) -> None:
        lines = [[sys.executable, "-c", program] for program in programs]
        monkeypatch.setattr(generator_tables, "commands", lambda args, made: lines)
        monkeypatch.setattr(sys, "argv", ["generator_tables.py", str(tmp_path), "--seconds", "20"])

    monkeypatch.setattr(generator_tables.paths, "SAVES", tmp_path / "saves")
    return make


def test_the_list_behind_the_tables_goes_on_where_it_was_stopped(tmp_path, listed, capsys):
    said = f"open({str(tmp_path / 'said')!r}, 'a').write('{{}}')"
    listed(said.format("a"), "raise SystemExit(3)", said.format("b"))
    with pytest.raises(UserError, match=r"stopped in command 2 of 3 \(status 3\); call this again"):
        generator_tables.main()
    listed(said.format("a"), said.format("-"), said.format("b"))
    generator_tables.main()
    assert (tmp_path / "said").read_text() == "a-b" and "seconds" in capsys.readouterr().out
    generator_tables.main()
    assert (tmp_path / "said").read_text() == "a-b", "all are done"


def test_the_list_behind_the_tables_interrupts_a_command_when_there_is_no_more_time(tmp_path, listed, monkeypatch):
    waits = f"""import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    open({str(tmp_path / "cleaned")!r}, "w")
    raise"""
    listed(waits)
    monkeypatch.setattr(sys, "argv", ["generator_tables.py", str(tmp_path), "--seconds", "2"])
    with pytest.raises(UserError, match="there was no more time"):
        generator_tables.main()
    assert (tmp_path / "cleaned").exists()


def test_the_tables_commands_name_every_task_and_targets_that_there_are(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generator_tables.py", "files", "--rows", "1120", "--made-rows", "1200"])
    seen = []
    monkeypatch.setattr(generator_tables, "run", lambda command, seconds: seen.append(command) or 1)
    with pytest.raises(UserError, match="stopped in command 1"):
        generator_tables.main()
    args = argparse.Namespace(
        folder=Path("files"), rows=1120, made_rows=1200, settings="BASE_STEPS=4", baselines="none", per_device=3,
        tables=["rules", "real"],
    )  # fmt: skip
    found = generator_tables.commands(args, ["made-a"])
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in found if words[0] == "make"} <= targets
    assert "DATASET=ARC-c-1120 ARC-e-1120" in " ".join(found[3]) and "made-a" in " ".join(found[3])
    made = [words for words in found if "benchmark-generator" in words]
    assert all("BASE_STEPS=4" in words for words in made)
    assert ["CATEGORY=made" in words for words in made] == [True, False] and "ARC-c-1120" in " ".join(made[1])


def test_the_bytes_of_a_staged_sweep_are_given_by_node_and_by_cell():
    rows = sweep_staged.rows_of({"sent: base model": 2_000_000, "back: finetune run": 9_000}, cells=3)
    assert rows == [
        ("sent: base model", "2,000,000", "1,000,000", "666,667"), ("back: finetune run", "9,000", "4,500", "3,000"),
    ]  # fmt: skip


def test_twice_the_devices_at_the_same_rate_each_are_fully_efficient():
    one = scaling.Measured(1, 110.0, 10.0, [90.0], 100, 10**9, 1.0)
    two = scaling.Measured(2, 60.0, 10.0, [90.0, 70.0], 100, 10**9, 2.0)
    assert scaling.row_of(one, one)[-2:] == ("100 %", "100 %")
    assert scaling.row_of(two, one) == ("2", "60.0", "10.0", "80", "90 70", "3,000", "16.7", "2.0", "92 %", "100 %")


@pytest.mark.parametrize("shares", [[0.97], [1.0, 0.52]])
def test_the_busy_shares_that_a_sweep_prints_are_read(shares):
    text = f"verified\ndevices: {len(shares)}, had work {packs.busy_text(shares)} of 12 s\n"
    assert scaling.told_shares(text) == pytest.approx([100 * share for share in shares])
    assert scaling.told_shares("nothing was left to do\n") == []


def test_spans_that_overlap_count_once():
    assert packed_whole.covered([(3.0, 5.0), (0.0, 2.0), (1.0, 1.5), (4.0, 6.0)]) == 5.0


def test_padding_is_counted_by_where_it_comes_from():
    """Two groups, one step of 30 and 16 tokens, in a bucket of 48 tokens a group."""
    from paragen.packed.batches import IGNORED, Row, Shape, Step
    from paragen.packed.step_context import AdapterGroups

    def row(length):
        return Row(np.arange(length), np.where(np.arange(length) < length - 3, IGNORED, 1))

    step, groups = Step([[row(10), row(20)], [row(16)]]), AdapterGroups([128, 128])
    counts = packed_lengths.count([step], groups, [Shape(48, 3, 32, 12)])
    assert (counts.tokens, counts.in_groups, counts.in_buckets) == (46, 60, 96)
    assert (counts.learned, counts.learned_in_buckets) == (9, 12)
    assert counts.pairs == 55 + 210 + 136
    assert counts.pairs_of_sequences == counts.pairs + 18 * 19 // 2 + 32 * 33 // 2, "padding of 18 and 32 tokens"
    assert counts.pairs_of_rows == 3 * 32 * 33 // 2
    assert counts.pairs_on_cpu == 3 * 21 * 22 // 2, "a row has room for a token of padding"
    shares = packed_lengths.shares_of("tiny", counts, groups, [128])
    assert shares["on GPUs in float32"] < shares["together"] < min(shares[one] for one in ("groups", "buckets"))
    assert shares["and products of zeros"] == shares["together"], "each group has one adapter"


def test_another_likeliest_option_is_told_with_the_margin_by_the_reference():
    reference = {"losses": [2.0, 3.0], "tokens": [1, 2], "likelihoods": [[-1.0, -2.0], [-3.0, -2.5]]}
    found = {"losses": [2.5, 3.0], "tokens": [1, 2], "likelihoods": [[-1.0, -2.0], [-2.5, -3.0]]}
    assert score_agreement.compare(found, reference) == ("1.83333", "+0.16667", "0.5000", "1 of 2", "0.500")
    assert score_agreement.compare(reference, reference)[1:] == ("+0.00000", "0.0000", "0 of 2", "")


def test_a_task_of_one_file_is_split_by_its_prompts(tmp_path):
    rows = [{"prompt": f"{number // 2}?", "response": str(number)} for number in range(40)]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "GSM8K.json").write_text(json.dumps([*rows, {"prompt": "x" * 1500, "response": ""}]))
    task = next(task for task in generator.TASKS if task.dataset == "GSM8K")
    train, test = generator.split(task, tmp_path, 30)
    assert (len(train), len(test), generator.name_of(task, 30)) == (30, 8, "GSM8K-30-by-prompt")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert (train, test) == generator.split(task, tmp_path, 30) and train[0]["system"] == ""


def test_settings_are_chosen_on_tasks_that_no_table_holds_out():
    known = {f"{rule}-{number}": rule for rule in ("a", "b") for number in range(6)}
    names = generator_settings.tuning_tasks(known, 2)
    assert len(names) == 8
    for count in (1, 4):
        folds = plan.folds_of(plan.Wanted(variants=(count,), hold=2, repeats=3), known)
        assert not {name for fold in folds for name in fold.held} & set(names)


def settings_measured(monkeypatch, *arguments: str) -> list[Path]:
    """The folders of what bench/generator_settings.py measures; it fails with WIDTH=1."""
    known = [
        types.SimpleNamespace(manifest=types.SimpleNamespace(dataset=f"made-{n}{rule}"))
        for rule in "ab"
        for n in range(12)
    ]
    monkeypatch.setattr(generator_settings.index, "chosen", lambda: (known, 0))
    monkeypatch.setattr(generator_settings.families, "families_of", lambda names, _: {name: name[-1] for name in names})
    monkeypatch.setattr(sys, "argv", ["generator_settings.py", *arguments])
    monkeypatch.setenv("DEVICES", "cpu")
    done = []

    def measure(settings: str, names: list[str], args: argparse.Namespace, _: str) -> dict | None:
        done.append(generator_settings.folder_of(settings, names, args))
        figures = {name: 0.5 for name in ("mean", "nearest", "swapped-mean", "generated-mean")}
        shares = {"generated-mean": {"value": 0.5}}
        totals = {"mean_loss": figures, "mean_accuracy": figures, "closed": shares, "closed_accuracy": shares}
        return None if settings == "WIDTH=1" else totals

    monkeypatch.setattr(generator_settings, "measure", measure)
    try:
        generator_settings.main()
    finally:
        done.sort()
    return done


def test_what_was_measured_with_other_settings_model_rank_or_variants_is_not_used_again(monkeypatch):
    first = settings_measured(monkeypatch, "WIDTH=64")
    assert first == settings_measured(monkeypatch, "WIDTH=64")
    others = [settings_measured(monkeypatch, "WIDTH=64", *more) for more in (["--rank", "4"], ["--variants", "2"])]
    monkeypatch.setenv("MODEL", "tiny")
    others.append(settings_measured(monkeypatch, "WIDTH=64"))
    assert len({*first, *(folder for some in others for folder in some)}) == 4


def test_settings_that_fail_are_counted_and_a_word_that_is_none_is_named(monkeypatch, capsys):
    with pytest.raises(UserError, match="^1 of 2 settings could not be measured"):
        settings_measured(monkeypatch, "WIDTH=1", "WIDTH=64")
    assert "failed" in capsys.readouterr().out
    for arguments in (["WIDTH"], ["WIDTH=64", "--also", "width=1"]):
        with pytest.raises(UserError, match="is no setting such as BASE_STEPS=400"):
            settings_measured(monkeypatch, *arguments)


def test_parameters_are_those_of_the_real_model():
    assert base_parameters("qwen2.5-0.5b") == 357_826_560
    assert adapter_parameters("qwen2.5-0.5b", 8) == 4_399_104  # as PEFT counts them for lora_target: all


def test_flops_count_tokens_attention_and_learned_tokens():
    shape, rank = "qwen2.5-0.5b", 8
    per_token = 4 * base_parameters(shape) + 6 * adapter_parameters(shape, rank)
    assert flops(shape, rank, Work(100, 0, 0)) == 100 * per_token
    assert flops(shape, rank, Work(0, 100**2, 0)) == 6 * 24 * 896 * 100**2
    assert flops(shape, rank, Work(0, 0, 5)) == 5 * 4 * 896 * 151936
    both = Work(100, 100**2, 5) + Work(10, 10**2, 1)
    assert both == Work(110, 10100, 6)


@pytest.mark.parametrize("part", [[], ["whole"], ["cpu"], ["--cpu"]])
def test_evaluate_says_what_it_measures(part):
    done = subprocess.run([PYTHON, ROOT / "bench" / "evaluate.py", *part, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_flops_of_scoring_count_tokens_attended_keys_and_logits():
    shape = "qwen2.5-0.5b"
    assert forward_flops(shape, Seen(100, 0, 0)) == 2 * base_parameters(shape) * 100
    assert forward_flops(shape, Seen(0, 5050, 0)) == 4 * 24 * 896 * 5050
    assert forward_flops(shape, Seen(0, 0, 5)) == 2 * 896 * 151936 * 5


def test_what_scoring_needs_counts_the_shared_prefix_once():
    options = [questions.Continuation("a", [7, 9], 1), questions.Continuation("b", [8, 9], 1)]
    asked = [questions.Question([1, 2, 3, 4], options, 0, "a", ""), questions.Question([1, 2, 5], options, 1, "b", "")]
    seen = timed.seen_by(asked, [build_tree(question) for question in asked], prefix=2)
    # the prefix (2 tokens), behind it 2 and 1 tokens of the prompts, and the right option's first token of each
    assert seen.tokens == 2 + (2 + 1) + (1 + 1)
    assert seen.keys == (1 + 2) + (3 + 4 + 5) + (3 + 4)
    assert seen.picks == 2 + 2  # where the prompt ends, and behind the right option


def test_a_peak_is_told_for_known_devices_alone():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("cpu") is None


@pytest.mark.slow
def test_evaluate_measures_a_tiny_model(tmp_path):
    out = tmp_path / "raw numbers.json"
    # not one of the forked ones, which may not start processes of their own
    command = [sys.executable, ROOT / "bench" / "evaluate.py", "--tiny", "--baseline-checkpoints", "1", "--out", out]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["ours parts"]["checkpoints"] == 6 and found["ours parts"]["MFU"] is None
    assert len(found["peft"]["checkpoints"]) == 1
