"""`make verify` says what is doubtful about a whole collection, is silent about chance, and fails nothing for it."""

import json

import numpy
import pytest
from helpers import scored

import verify
from paragen.analysis import report, report_statistics
from paragen.collection import index, quality_warnings, run_files
from paragen.collection.manifest import CheckpointEntry, read_manifest, sealed
from paragen.common.cli import UserError

STEPS = range(5, 25)


def entries_of(losses) -> list[CheckpointEntry]:
    return [CheckpointEntry(step, loss, 1e-4, 100, str(step)) for step, loss in enumerate(losses, 5)]


@pytest.fixture
def doubts_of(place):
    """doubts_of(*evaluations): what is doubtful about an evaluated collection of 20 steps."""
    folder = place.collect(steps=STEPS)
    manifest = read_manifest(folder)

    def told(*evaluations) -> list[str]:
        if evaluations:
            scored.write(folder, *evaluations)
        return quality_warnings.find_warnings(folder, manifest)

    return told


def test_nothing_is_doubtful_about_a_collection_that_was_not_evaluated(doubts_of):
    assert doubts_of() == []


@pytest.mark.parametrize(
    ("base", "last", "metric", "is_doubtful"),
    [(0.8, 0.6, "choice", True), (0.69, 0.6, "choice", False), (0.4, 0.6, "math", False),
     (0.4, 0.6, "loss", True), (0.51, 0.6, "loss", False), (0.8, 0.6, "loss", False)],
)  # fmt: skip
def test_a_last_checkpoint_clearly_below_its_base_is_doubtful(doubts_of, base, last, metric, is_doubtful):
    found = doubts_of(scored.evaluated({"base": base, 5: base, 24: last}, metric))
    below = [line for line in found if line.startswith("checkpoint 24 is worse than the base model on Toy_test: ")]
    assert bool(below) == is_doubtful


def test_the_figures_are_named(doubts_of):
    [line] = doubts_of(scored.evaluated({"base": 0.8, 5: 0.9, 24: 0.6}))
    assert line.endswith("score 0.6 (0.5 to 0.7), the base 0.8")


def test_another_task_and_a_base_that_is_not_known_raise_no_doubt(doubts_of):
    assert doubts_of(scored.evaluated({"base": 0.8, 24: 0.1}, split="Other_test", paired=False)) == []
    assert doubts_of(scored.evaluated({24: 0.1})) == []


@pytest.mark.parametrize(("last", "is_doubtful"), [(0.8, True), (0.69, False), (0.1, False)])
def test_a_test_loss_that_rises_beyond_both_intervals_is_doubtful(doubts_of, last, is_doubtful):
    losses = {5: 0.5, 10: 2.0, 24: last}
    found = doubts_of(scored.evaluated({"base": 0.4, 5: 0.5, 10: 0.5, 24: 0.5}, losses=losses))
    assert [line[:36] for line in found] == ["the test loss on Toy_test rose from "] * is_doubtful


def test_a_training_loss_that_rises_through_the_kept_steps_is_doubtful():
    noise = numpy.random.default_rng(0).lognormal(-1, 0.3, 40)
    told = quality_warnings.rising_loss(entries_of(noise * numpy.linspace(1, 3, 40)))
    assert told.startswith("the training loss rose through the kept steps, from 0.")
    assert quality_warnings.rising_loss(entries_of(noise * numpy.linspace(3, 1, 40))) is None


def test_noise_and_spikes_and_unknown_losses_raise_no_doubt():
    generator = numpy.random.default_rng(0)
    alarms = [quality_warnings.rising_loss(entries_of(generator.lognormal(-1, 0.5, 40))) for _ in range(500)]
    assert sum(map(bool, alarms)) <= 2
    assert quality_warnings.rising_loss(entries_of([0.5] * 30 + [500.0] * 3 + [0.5] * 2)) is None
    assert quality_warnings.rising_loss(entries_of([None] * 40)) is None
    assert quality_warnings.rising_loss(entries_of([0.1] * 6 + [9.0] * 6)) is None, "too few to tell"
    assert quality_warnings.rising_loss(entries_of([0.1, None] * 7 + [9.0, None] * 7)) is not None
    certain = [0.5 + 1e-5 * step for step in range(1000)]
    assert quality_warnings.rising_loss(entries_of(certain)) is None, "certain, but not worth a word"


def test_equal_checkpoints_are_named_by_their_steps():
    hashes = ["a", "b", "b", "b", "c", "a", "d"]
    entries = [CheckpointEntry(step, None, None, 100, sha256) for step, sha256 in enumerate(hashes, 5)]
    [line] = quality_warnings.equal_checkpoints(entries)
    assert line == "the checkpoints of steps 5, 10; of 6-8 are equal to each other"
    many = [CheckpointEntry(step, None, None, 100, str(step // 2)) for step in range(10)]
    assert quality_warnings.equal_checkpoints(many)[0].endswith("of 4-5 are equal to each other, and 2 more groups")


def test_a_doubt_is_a_line_of_its_own_and_no_fault(collected, monkeypatch, capsys):
    """A whole collection that is doubtful in two ways: its verification, as a sweep or a user calls it, succeeds."""
    monkeypatch.setattr(verify.paths, "MODELS", collected.top / "models")
    folder = collected.run_folder("finetune")
    content = read_manifest(folder).content
    first, second = content["checkpoints"][:2]
    second |= {key: first[key] for key in ("bytes", "sha256")}
    names = [folder / run_files.checkpoint_name(entry["step"]) for entry in (first, second)]
    names[1].write_bytes(names[0].read_bytes())
    (folder / "manifest.json").write_text(json.dumps(sealed(content)))
    scored.write(folder, scored.evaluated({"base": 0.9, 12: 0.2}))
    before = sorted(path.name for path in folder.iterdir())
    for arguments in ([str(folder)], ["--recipe", str(collected.finetune), "4"]):
        monkeypatch.setattr("sys.argv", ["verify.py", *arguments])
        assert verify.main() == 0
        whole, *lines = capsys.readouterr().out.splitlines()
        assert whole.startswith("whole ")
        assert lines == [
            f"DOUBTFUL {folder}: checkpoint 12 is worse than the base model on Toy_test: score 0.2 (0.1 to 0.3), "
            "the base 0.9",
            f"DOUBTFUL {folder}: the checkpoints of steps 7-8 are equal to each other",
        ]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_is_odd_about_the_data_comes_from_the_rows_and_else_from_the_manifest(place):
    rows = [{"prompt": f"{n}?", "response": "[A]", "system": ""} for n in range(20)]
    folder = place.collect(rows=rows)
    odd = "A: one answer, '[A]', in 20 of 20 rows (100 %)"
    assert quality_warnings.about_data(read_manifest(folder)) == [odd], "collected before manifests kept it"
    cut = "A: cutoff_len 8 is reached by 3 of 20 rows (15.0 %): what is longer is cut off"
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(sealed({**json.loads(manifest.read_bytes()), "data_warnings": [odd, cut]})))
    assert quality_warnings.about_data(read_manifest(folder)) == [odd, cut]
    one = index.Chosen(folder.relative_to(place.saves).as_posix(), folder, read_manifest(folder))
    row = report.described(place.saves, one, "complete", "", UserError(report_statistics.NOT_MADE), 3)
    assert row["data_warnings"] == [odd, cut]
    file = place.data / "common-sense-reasoning" / "A.json"
    file.write_text(json.dumps([*rows[:19], rows[0] | {"prompt": "0?"}]))
    assert quality_warnings.about_data(read_manifest(folder)) == [odd, cut], "other rows than those trained on"
    file.unlink()
    assert quality_warnings.about_data(read_manifest(folder)) == [odd, cut]
    assert quality_warnings.find_warnings(folder, read_manifest(folder)) == [], "of the data, not of the collection"
