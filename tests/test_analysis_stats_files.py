"""Statistics of collections that cannot be made: the collection is named, and the others have theirs."""

import json
import re
import shutil

import pytest

import stats
from paragen.analysis import measures, report
from paragen.collection import derived
from paragen.collection.manifest import sealed
from paragen.common import cli, files, paths


@pytest.fixture
def pair(collected, monkeypatch):
    """The collections Toy and Other, with statistics: the folder of each one's statistics by dataset."""
    for name in ("SAVES", "DATA", "MODELS"):
        monkeypatch.setattr(paths, name, collected.top / name.lower())
    monkeypatch.setattr(paths, "SCRIPTS", collected.top / "collect_scripts")
    toy = collected.run_folder("finetune")
    other = toy.parent.parent / "Other" / toy.name
    shutil.copytree(toy, other)
    manifest = json.loads((other / paths.MANIFEST).read_bytes())
    files.write_json(other / paths.MANIFEST, sealed({**manifest, "dataset": "Other"}))
    assert stats.main() == 0
    return {run.parent.name: paths.SAVES / "stats" / run.relative_to(paths.SAVES) for run in (toy, other)}


def forget(folder):
    """Take a collection's statistics out of the record."""
    record = derived.read_record(paths.SAVES / "stats")
    del record[folder.relative_to(paths.SAVES / "stats").as_posix()]
    files.write_json(paths.SAVES / "stats" / derived.RECORD, record)


def replace_parent(folder):
    shutil.rmtree(folder.parent)
    folder.parent.write_text("")


BLOCKED = {
    "a stray file": (lambda folder: (folder / ".DS_Store").write_text(""), ".DS_Store: was not made there by us"),
    "not recorded": (forget, "is there already, and no export of ours (export.json does not name it)"),
    "a file for a folder": (replace_parent, "Toy: is not a folder"),
}


@pytest.mark.parametrize("block, message", BLOCKED.values(), ids=BLOCKED)
def test_what_is_in_the_place_of_statistics_is_a_fault_of_one_collection(pair, monkeypatch, capsys, block, message):
    block(pair["Toy"])
    (pair["Other"] / "stats.json").unlink()
    page = report.make()[0].read_text()
    assert (pair["Other"] / "stats.json").is_file() and page.count("No pictures of its weights") == 1
    assert message in page and "FAULTY" not in capsys.readouterr().err
    (pair["Other"] / "stats.json").unlink()
    assert stats.main() == 1
    said = capsys.readouterr()
    assert (pair["Other"] / "stats.json").is_file()
    (line,) = said.err.splitlines()
    assert "Toy" in line and message in line and "move it away" in line and "OUT" not in line
    monkeypatch.setattr(measures, "of_collection", lambda *arguments: pytest.fail("measured in vain"))
    monkeypatch.setenv("DATASET", "Toy")
    with pytest.raises(cli.UserError, match=re.escape(message)):
        stats.main()


def test_without_the_record_each_collection_is_named(pair, capsys):
    (paths.SAVES / "stats" / derived.RECORD).unlink()
    assert report.make()[0].read_text().count("No pictures of its weights") == 2
    assert stats.main() == 1
    assert capsys.readouterr().err.count("move it away, then run make stats again") == 2


def test_a_record_of_another_kind_is_to_be_moved_away(pair):
    (paths.SAVES / "stats" / derived.RECORD).write_text("[]")
    with pytest.raises(cli.UserError, match="is no record of an export; move it away, then run make stats"):
        stats.main()


def test_what_comes_into_the_place_while_measuring_is_a_fault_of_one_collection(pair, monkeypatch, capsys):
    measure = measures.of_collection

    def of_collection(one, *arguments):
        if one.manifest.dataset == "Toy":
            (pair["Toy"] / "notes.txt").write_text("")
        return measure(one, *arguments)

    monkeypatch.setattr(measures, "of_collection", of_collection)
    monkeypatch.setenv("FORCE", "1")
    assert stats.main() == 1
    assert "notes.txt: was not made there by us" in capsys.readouterr().err


def test_the_record_is_read_once_for_all_collections(pair, monkeypatch):
    reads = []
    read = derived.read_record
    monkeypatch.setattr(derived, "read_record", lambda *arguments: reads.append(arguments) or read(*arguments))
    assert stats.main() == 0
    assert len(reads) == 1
