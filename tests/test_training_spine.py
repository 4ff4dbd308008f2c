"""Each run is rendered, identified and parsed once; the result is passed on."""

import json
import shutil

from helpers import fork_server


def counts(project, script: str, *arguments: str, **environment: str) -> dict[str, dict[str, int]]:
    """What `helpers.counting` prints of a script."""
    log = project.top / "counts.txt"
    result = fork_server.start("helpers.counting", [script, *arguments], environment, log).wait()
    assert result.status == 0, result.output
    return json.loads(result.output.splitlines()[-1])


def test_the_ordinary_path_renders_and_identifies_each_run_once(project):
    first = counts(project, "train", str(project.pretrain), "4")
    once = {project.pretrain.name: 1}
    assert first == {"rendered": once, "identified": once, "compared": {}, "parsed": {}}
    second = counts(project, "train", str(project.finetune), "4")
    assert second["rendered"] == {project.finetune.name: 1} == second["identified"]
    assert set(second["parsed"].values()) <= {1}


def test_a_complete_run_is_rendered_compared_and_parsed_once_and_never_read(collected):
    again = counts(collected, "train", str(collected.finetune), "4")
    assert again["rendered"] == {collected.finetune.name: 1} == again["compared"]
    assert set(again["parsed"].values()) == {1} and again["identified"] == {}


def test_the_packed_engine_renders_each_run_once_and_identifies_it_once_per_phase(project):
    cell = ["--cell", str(project.pretrain), str(project.finetune), "4"]
    first = counts(project, "paragen.packed.packed_train", *cell)
    names = {project.pretrain.name, project.finetune.name}
    assert first["rendered"] == dict.fromkeys(names, 1) == first["identified"]
    assert set(first["parsed"].values()) <= {1}
    shutil.rmtree(project.run_folder("pretrain"))
    again = counts(project, "paragen.packed.packed_train", *cell)  # its collection is complete
    assert again["rendered"] == dict.fromkeys(names, 1)
    assert again["compared"] == {project.finetune.name: 1} == again["identified"], "once in each phase"


def test_the_recipe_that_lies_beside_a_run_is_what_is_trained(project):
    """The file is a lock, too, and held a process number before."""
    import yaml

    from paragen.recipes.run import run_of
    from paragen.training import attempts

    run = run_of(project.pretrain, 4)
    with attempts.rendered(run) as path:
        assert yaml.safe_load(path.read_text()) == run.config


def test_rows_that_are_held_out_are_not_trained_on(project):
    """A recipe written before they were, or by hand."""
    info = project.top / "data" / "dataset_info.json"
    known = json.loads(info.read_text())
    known["Toy"]["held_out"] = 3
    info.write_text(json.dumps(known))
    result = project.train(project.pretrain, "max_samples=100000")
    rows = len(json.loads(project.data.read_text()))
    assert result.status == 1 and "Traceback" not in result.output
    assert "Toy: the last 3 rows are held out for scoring" in result.output
    assert f"set max_samples to {rows - 3} in it" in result.output
    assert project.train(project.pretrain, f"max_samples={rows - 3}").status == 0
