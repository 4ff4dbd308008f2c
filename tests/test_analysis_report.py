"""`make report`: what the page shows, in a real browser, of collections that are whole, odd, half or broken."""

import base64
import contextlib
import io
import json
import os
import pwd
import re
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import report_page, scored
from helpers.chromium import colours, drawn, find, head, opened, shown, size, typed, wait
from PIL import Image
from safetensors.torch import load_file, save_file
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from paragen.analysis import report, report_data, report_statistics
from paragen.collection.manifest import read_manifest, sealed
from paragen.common import files, locks, paths

EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'<b>'&amp;"  # may be a folder's name
CLOSING = "</script><script>document.title='owned'</script>"  # may stand where a manifest has free text
RUN = "Tiny-Llama_lora-rank_4_finetune"


def reseal(folder: Path, **changes) -> None:
    """Change a manifest as a tool would that gives it its hash again."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | changes)))


def twin(project, place: str, **changes) -> Path:
    """A copy of the project's collection at another place below saves/, with changes in its manifest."""
    folder = project.top / "saves" / place
    shutil.copytree(project.run_folder("finetune"), folder)
    reseal(folder, run=folder.name, **changes)
    return folder


@pytest.fixture(scope="module")
def project(trained_once, tmp_path_factory):
    """Collections of three datasets and two models, and one of each kind that is not whole."""
    project = trained_once.copy(tmp_path_factory.mktemp("report") / "my project")
    twin(project, "math/GSM8K/Tiny-Llama_lora-rank_16_finetune", dataset="GSM8K", category="math", rank=16)
    other = {"name": 'Other <i>"model"', "hub_id": None, "revision": None, "sha256": "0" * 64}
    twin(project, f"math/Odd 'quoted' & <b>/{RUN}", dataset=EVIL, category="math", base_model=other, device=CLOSING)
    manifest = read_manifest(project.run_folder("finetune"))
    silent = [entry | {"loss": None, "learning_rate": None} for entry in manifest.content["checkpoints"]]
    unknown = dict.fromkeys(("recipe", "data", "pretrain", "seed", "base_model"))
    stock = twin(project, f"math/Stock/{RUN}", dataset="Stock", checkpoints=silent, **unknown)
    (stock / "trainer_log.jsonl").unlink()
    edited = twin(project, f"math/Edited/{RUN}", dataset="Edited") / "manifest.json"
    edited.write_text(edited.read_text().replace('"rank": 4', '"rank": 8'))
    (twin(project, f"math/Half/{RUN}", dataset="Half") / "manifest.json").unlink()
    with report_page.paths_of(project):
        yield project


@pytest.fixture(scope="module")
def page(project) -> Path:
    return report.make()[0]


@pytest.fixture
def browser(chromium, page):
    with report_page.opened_fresh(chromium, page):
        yield chromium


def test_the_table_is_sorted_with_mouse_and_keyboard_and_filtered(browser):
    rank = head(browser, "Rank")
    rank.find_element(By.TAG_NAME, "button").click()
    assert rank.get_attribute("aria-sort") == "ascending"
    assert shown(browser, "Rank")[0] == "4" and shown(browser, "Rank")[-1] == "16"
    rank.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert rank.get_attribute("aria-sort") == "descending"
    assert shown(browser, "Rank")[0] == "16"
    typed(browser, "gsm rank 16")
    assert shown(browser) == ["GSM8K"]
    assert find(browser, ".count[data-for=collection-table]").text == "1 of 6"
    typed(browser, "")
    find(browser, "select[data-for=collection-table] option:last-child").click()
    assert set(shown(browser, "Status")) == {"broken"}
    assert shown(browser) == ["Half", "Edited"] or shown(browser) == ["Edited", "Half"]


def test_unknown_figures_come_last_in_both_directions(browser):
    loss = head(browser, "Mean loss").find_element(By.TAG_NAME, "button")
    for _ in range(2):
        loss.click()
        assert shown(browser, "Mean loss")[-3:] == ["", "", ""]
        assert all(shown(browser, "Mean loss")[:-3])


def test_a_collection_is_opened_with_its_pictures_and_closed(browser, tmp_path):
    article = opened(browser)
    assert drawn(browser, "#opened .plot")
    labels = [plot.get_attribute("aria-label") for plot in article.find_elements(By.CSS_SELECTOR, ".plot[role=img]")]
    assert len(labels) == 3
    assert "at step 5 to" in labels[0] and "steps 7 to 12 kept; resumed at step 4" in labels[0]
    assert "6 checkpoints from step 7 to 12" in labels[1]
    assert "14 layers" in labels[2]
    names = [text.text for text in article.find_elements(By.CSS_SELECTOR, ".legendtext")]
    assert names == ["pretrain", "finetune"]
    code = article.find_element(By.TAG_NAME, "pre").text
    assert f'"saves/common-sense-reasoning/Toy/{RUN}/checkpoint-12.safetensors"' in code
    link = article.find_element(By.CSS_SELECTOR, "header + p a").get_attribute("href")
    assert Path(link.removeprefix("file://").replace("%20", " ")).is_dir()
    browser.execute_script("arguments[0].scrollIntoView()", article)
    browser.save_screenshot(str(tmp_path / "opened.png"))
    assert shades(browser.get_screenshot_as_png(), (0, 114, 178)) > 50  # the finetune's line
    article.find_element(By.CSS_SELECTOR, "[data-close]").click()
    assert not browser.find_elements(By.CSS_SELECTOR, "#opened article")
    assert browser.switch_to.active_element.text == "Toy"


def shades(png: bytes, colour: tuple[int, int, int]) -> int:
    """How many pixels of a screenshot have a colour, nearly."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(axis=2) < 12).sum())


def test_a_cell_of_the_grid_opens_its_collection(browser):
    assert shown(browser, table="cell-table") == ["Toy"]
    ranks = [rank.text for rank in browser.find_elements(By.CSS_SELECTOR, "#cell-table th[data-rank]")]
    assert ranks == ["Rank 2", "Rank 4", "Rank 8", "Rank 16", "Rank 64"]
    assert shown(browser, "Rank 2", "cell-table") == ["missing"]
    assert shown(browser, "Rank 4", "cell-table")[0].startswith("complete")
    find(browser, "#cell-table .open").click()
    assert wait(browser, lambda: find(browser, "#opened h3")).text == "Toy, Tiny-Llama, rank 4"


def test_the_map_is_coloured_by_what_is_chosen(browser):
    assert drawn(browser, "#map ~ .pictures .plot")
    assert len(browser.find_elements(By.CSS_SELECTOR, "#map ~ .pictures .plot")) == 2  # a panel for each base model
    legend = find(browser, "#legend")
    marks = "return [...document.querySelectorAll('#map ~ .pictures .plot .point')].map(p => p.style.fill)"
    by_dataset = browser.execute_script(marks)
    assert len(by_dataset) == 4 * 6 + 2  # the checkpoints, and each base model's cross
    assert "GSM8K" in legend.text
    find(browser, "#colour option[value=rank]").click()
    assert legend.text.split("\n") == ["rank 4", "rank 16"]
    assert len(set(browser.execute_script(marks))) < len(set(by_dataset))
    find(browser, "#colour option[value=model]").click()
    assert "tiny-llama" in legend.text


def test_pictures_follow_the_colour_scheme(browser):
    opened(browser)
    assert drawn(browser, "#opened .plot")
    line = "return getComputedStyle(document.querySelector('#opened .scatterlayer .js-line')).stroke"
    light = browser.execute_script(line)
    ground = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(ground) == "rgb(255, 255, 255)"
    colours(browser, "dark")
    assert browser.execute_script(ground) == "rgb(20, 23, 26)"
    wait(browser, lambda: browser.execute_script(line) != light)


@pytest.fixture(scope="module")
def evaluated_page(trained_once, tmp_path_factory) -> Path:
    """A page with three collections: scored by choices, by the loss at one step, and not evaluated."""
    project = trained_once.copy(tmp_path_factory.mktemp("evaluated") / "my project")
    for dataset in ("Loss", "Unscored"):
        twin(project, f"math/{dataset}/{RUN}", dataset=dataset, category="math")
    figures = {"base": 0.4, 7: 0.5, 9: 0.75, 12: 0.625}
    scored.write(project.run_folder("finetune"), scored.evaluated(figures, split="<i>Toy_test"))
    scored.write(project.top / "saves" / "math" / "Loss" / RUN, scored.evaluated({"base": 2.5, 12: 1.25}, "loss"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SAVES", "DATA", "MODELS"):
            patch.setattr(paths, name, project.top / name.lower())
        patch.setattr(paths, "SCRIPTS", project.top / "collect_scripts")
        return report.make()[0]


def figures_of(article) -> list[str]:
    return [title.text for title in article.find_elements(By.CSS_SELECTOR, "figure h4")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_scores_are_drawn_beside_the_loss_with_base_and_best(chromium, evaluated_page, tmp_path, scheme):
    size(chromium, 1280)
    colours(chromium, scheme)
    chromium.get_log("browser")
    chromium.get(evaluated_page.as_uri())
    article = opened(chromium)
    assert drawn(chromium, "#opened .plot")
    assert figures_of(article)[:2] == ["Loss and learning rate", "Score along the trajectory"]
    loss, score = article.find_elements(By.CSS_SELECTOR, "figure")[:2]
    assert loss.location["y"] == score.location["y"], "side by side"
    assert score.find_element(By.CSS_SELECTOR, ".plot").get_attribute("aria-label") == (
        "Score from 0.500 at step 7 to 0.625 at step 12, best 0.750 at step 9; the base model 0.400; "
        "100 rows of <i>Toy_test, share of right choices, as generated; "
        "3 of 6 checkpoints evaluated, with 95 % confidence intervals"
    )
    assert [text.text for text in score.find_elements(By.CSS_SELECTOR, ".legendtext")] == [
        "base model", "checkpoints", "best, step 9",
    ]  # fmt: skip
    assert score.find_elements(By.CSS_SELECTOR, ".fills path.js-fill"), "the interval is a band"
    chromium.execute_script("arguments[0].scrollIntoView()", score)
    chromium.save_screenshot(str(tmp_path / f"{scheme}.png"))
    png = chromium.get_screenshot_as_png()
    line, base, best = {
        "light": ((0, 114, 178), (213, 94, 0), (230, 159, 0)),
        "dark": ((79, 168, 224), (240, 132, 60), (240, 180, 41)),
    }[scheme]
    assert shades(png, line) > 50 and shades(png, base) > 50 and shades(png, best) > 20
    assert [entry["message"] for entry in chromium.get_log("browser")] == []


def test_the_metric_loss_is_the_test_loss_and_what_was_not_evaluated_looks_as_before(chromium, evaluated_page):
    size(chromium, 1280)
    chromium.get(evaluated_page.as_uri())
    article = opened(chromium, "Loss")
    assert drawn(chromium, "#opened .plot")
    assert figures_of(article)[1] == "Test loss along the trajectory"
    label = article.find_element(By.CSS_SELECTOR, "[data-kind=scores]").get_attribute("aria-label")
    assert label.startswith("Test loss 1.25 at step 12; the base model 2.50; 100 rows of Toy_test, mean loss per token")
    article.find_element(By.CSS_SELECTOR, "[data-close]").click()
    article = opened(chromium, "Unscored")
    assert figures_of(article) == ["Loss and learning rate", "Trajectory of the steps", "Change of each layer per step"]
    assert "wide" in article.find_element(By.CSS_SELECTOR, "figure").get_attribute("class")


def test_scores_stand_in_the_table_where_something_was_evaluated(chromium, evaluated_page, page):
    chromium.get(evaluated_page.as_uri())
    columns = ("Dataset", "Base score", "Last score", "Best score", "Scored rows")
    assert sorted(zip(*(shown(chromium, column) for column in columns), strict=True)) == [
        ("Loss", "2.5000 loss", "1.2500 loss", "1.2500 loss", "100"),
        ("Toy", "0.4000", "0.6250", "0.7500", "100"),
        ("Unscored", "", "", "", ""),
    ]
    assert "Base score" not in page.read_text()


def test_what_is_not_known_of_scores_is_left_out():
    lacking = scored.evaluated({7: 0.5, 8: float("nan"), 9: 0.25}, "loss")
    picture = report_data.scores(lacking, 6)
    assert (picture["step"], picture["value"], picture["base"], picture["best"]) == ([7, 9], [0.5, 0.25], None, 1)
    assert "the base model was not evaluated" in picture["label"] and "2 of 6 checkpoints" in picture["label"]
    nothing = report_data.scores(scored.evaluated({7: float("nan")}, "loss"), 6)
    assert nothing == {
        "title": "Test loss", "axis": "test loss per token", "label": "No figure of Toy_test is known",
    }  # fmt: skip


def test_a_phone_sees_it_without_sideways_scrolling(browser):
    size(browser, 390)
    opened(browser)
    assert drawn(browser, "#opened .plot, #map ~ .pictures .plot")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert browser.execute_script(
        "return [...document.querySelectorAll('.plot')].every(p => p.scrollWidth <= p.clientWidth + 1)"
    )


def test_names_cannot_become_markup_or_script(browser):
    assert EVIL in shown(browser)
    article = opened(browser, EVIL)
    assert drawn(browser, "#opened .plot")
    assert drawn(browser, "#map ~ .pictures .plot")
    assert EVIL in article.find_element(By.TAG_NAME, "h3").text
    assert CLOSING in article.text
    assert EVIL in find(browser, "#legend").text
    assert browser.title == "ParaGen-Dataset: report"
    assert not browser.find_elements(By.CSS_SELECTOR, "img, td b, h4 i, article b")


def test_what_is_not_whole_is_shown_with_its_reason(page):
    rows = {row["name"].split("/")[1]: row for row in report.gather(paths.SAVES)["collections"]}
    assert rows["Edited"]["state"] == "broken" and "was edited" in rows["Edited"]["reason"]
    assert rows["Half"]["state"] == "broken" and "has no manifest.json" in rows["Half"]["reason"]
    assert rows["Stock"]["loss"] is None
    assert rows["Stock"]["pictures"]["curve"]["label"] == "No loss was recorded; steps 7 to 12 kept"
    assert rows["Stock"]["pictures"]["trajectory"]["step"] == [7, 8, 9, 10, 11, 12]
    assert rows["GSM8K"]["pictures"]["curve"]["notes"] == ["the pretrain's log is not there any more"]
    assert rows["Toy"]["pictures"]["curve"]["notes"] == []


def test_a_collection_that_is_being_made_is_no_broken_one(collected, monkeypatch, capsys):
    for name in ("SAVES", "DATA", "MODELS"):
        monkeypatch.setattr(paths, name, collected.top / name.lower())
    monkeypatch.setattr(paths, "SCRIPTS", collected.top / "collect_scripts")
    folder = collected.run_folder("finetune")
    (folder / "manifest.json").unlink()
    with locks.lock(files.beside(folder, "lock")):
        facts = report.gather(paths.SAVES)
    assert [row["state"] for row in facts["collections"]] == ["collecting"]
    assert facts["pairs"][0]["cells"][4]["state"] == "collecting"
    assert facts["faults"] == []


def test_a_page_without_collections_or_recipes_is_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "SCRIPTS", tmp_path / "none")
    (tmp_path / "saves").mkdir()
    text = report.make(tmp_path / "saves")[0].read_text()
    assert "Nothing is collected yet" in text and "There are no cells: collect_scripts/*: no pair of recipes" in text


def test_a_changed_checkpoint_makes_its_collection_broken(collected, monkeypatch, capsys):
    for name in ("SAVES", "DATA", "MODELS"):
        monkeypatch.setattr(paths, name, collected.top / name.lower())
    monkeypatch.setattr(paths, "SCRIPTS", collected.top / "collect_scripts")
    path = collected.run_folder("finetune") / "checkpoint-9.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    text = report.make()[0].read_text()
    assert "checkpoint-9.safetensors: does not have its recorded sha256" in capsys.readouterr().err
    assert "checkpoint-9.safetensors: does not have its recorded sha256" in text


@pytest.fixture
def own(collected, monkeypatch):
    """A copy of the project for one test, with all paths in it."""
    for name in ("SAVES", "DATA", "MODELS"):
        monkeypatch.setattr(paths, name, collected.top / name.lower())
    monkeypatch.setattr(paths, "SCRIPTS", collected.top / "collect_scripts")
    return collected


def test_statistics_for_which_no_time_is_left_are_said_and_made_later(own, monkeypatch, capsys):
    twin(own, f"math/Other/{RUN}", dataset="Other")
    with monkeypatch.context() as patch:
        patch.setattr(report_statistics, "SECONDS", 0)
        text = report.make()[0].read_text()
    assert "2 of 2 collections have none yet; make stats makes them" in capsys.readouterr().out
    assert text.count("No pictures of its weights: its statistics are not made yet; make stats makes them") == 2
    assert not list((own.top / "saves").rglob("stats.parquet"))
    text = report.make()[0].read_text()
    out = capsys.readouterr().out
    assert out.count("statistics: ") == 3 and "none yet" not in out
    assert "No pictures of its weights" not in text and len(list((own.top / "saves").rglob("stats.parquet"))) == 2


CONVOLUTION = {"x.lora_A.weight": torch.ones(4, 3, 1, 1), "x.lora_B.weight": torch.ones(5, 4, 1, 1)}
OTHER_KINDS = {
    "DoRA": ({"x.lora_magnitude_vector": torch.ones(3)}, ": x.lora_magnitude_vector: is no LoRA factor"),
    "convolution": (CONVOLUTION, ": x.lora_A.weight is no matrix"),
    "float8": ({"x.lora_A.weight": torch.ones(4, 3).to(torch.float8_e4m3fn)}, "x.lora_A.weight is F8_E4M3"),
}


@pytest.mark.parametrize("added, message", OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_an_adapter_of_another_kind_is_a_collection_without_pictures_of_its_weights(own, capsys, added, message):
    folder = own.run_folder("finetune")
    entries = []
    for path in sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem.split("-")[1])):
        tensors = load_file(path)
        save_file(tensors | added, path)
        entries.append({"sha256": files.sha256_of(path), "bytes": path.stat().st_size})
    content = read_manifest(folder).content["checkpoints"]
    reseal(folder, checkpoints=[{**old, **new} for old, new in zip(content, entries, strict=True)])
    text = report.make()[0].read_text()
    (why,) = re.findall("No pictures of its weights: (.*)", text)
    assert why.startswith(f"saves/common-sense-reasoning/Toy/{RUN}") and message in why
    assert "FAULTY" not in capsys.readouterr().err


def test_a_terminal_sees_how_far_the_statistics_are(monkeypatch):
    reader, writer = os.openpty()
    with open(writer, "w") as terminal, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stdout", terminal)
        with report_statistics.progress(4_000_000) as advance:
            advance(1_000_000)
            advance(2_000_000)
    seen = b""
    with contextlib.suppress(OSError), open(reader, "rb", buffering=0) as screen:  # the terminal's end is an error
        while part := screen.read(1 << 16):
            seen += part
    assert b"statistics" in seen and b"3.0/4.0 MB" in seen


def test_another_pretrain_is_not_drawn_as_the_one_before(collected):
    folder = collected.run_folder("finetune")
    manifest = read_manifest(folder)
    both = report_data.curve(folder, manifest)
    assert [line["name"] for line in both["lines"]] == ["pretrain", "finetune"]
    assert both["lines"][0]["step"][0] == 5 and both["lines"][1]["step"][-1] == 12
    another = replace(manifest.pretrain, sha256="0" * 64)
    alone = report_data.curve(folder, replace(manifest, pretrain=another))
    assert [line["name"] for line in alone["lines"]] == ["finetune"]
    assert "is another pretrain by now" in alone["notes"][0]


def test_half_a_log_line_is_said_and_left_out(collected):
    folder = collected.run_folder("finetune")
    with open(folder / "trainer_log.jsonl", "a") as file:
        file.write('{"current_steps": 13, "lo')
    curve = report_data.curve(folder, read_manifest(folder))
    assert curve["lines"][1]["step"][-1] == 12
    assert "1 lines of" in curve["notes"][0]


def test_the_page_says_nothing_of_this_machine(page):
    text = page.read_text()
    assert str(paths.ROOT) not in text and str(paths.SAVES.parent) not in text and str(Path.home()) + "/" not in text
    assert f'"{socket.gethostname()}"' not in text


def test_components_are_those_of_the_vectors():
    random = np.random.default_rng(0)
    for count, width in ((12, 40), (40, 12)):
        directions = np.linalg.qr(random.normal(size=(width, 2)))[0]
        along = random.normal(size=(count, 2)) * (5, 1)
        along -= along.mean(0)
        places, shares, zero = report_data.principal(along @ directions.T + 3 * directions[:, 0])
        spread = np.linalg.svd(along, compute_uv=False) ** 2
        assert np.allclose(shares, spread / spread.sum())
        assert np.allclose(np.linalg.norm(places - zero, axis=1), np.linalg.norm(along + (3, 0), axis=1))
    assert report_data.principal(np.ones((5, 3))) is None
    on_a_line = report_data.principal(np.outer([0.0, 1.0, 3.0], [1.0, 2.0, 2.0]))
    assert np.allclose(on_a_line[1], [1, 0]) and np.allclose(on_a_line[0][:, 1], 0)


def test_layers_of_a_kind_stand_together_under_its_shortest_name():
    layers = ["h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_fc", "h.1.mlp.c_proj"]
    order, groups = report_data.grouped(layers)
    assert [layers[place] for place in order][:2] == ["h.0.attn.c_proj", "h.1.attn.c_proj"]
    assert groups == [["attn.c_proj", 2], ["c_fc", 2], ["mlp.c_proj", 2]]


def test_a_heat_map_keeps_two_digits_zeros_and_gaps():
    change = np.array([[np.nan, 1e-4, 0.0], [np.nan, 1e-2, np.nan]])
    heat = report_data.heat(["a", "b"], np.array([7, 8, 9]), change)
    shades = np.frombuffer(base64.b64decode(heat["shades"]), np.uint8).reshape(2, 2)
    assert heat["steps"] == [8, 9] and shades.tolist() == [[2, 1], [255, 0]]
    assert (heat["low"], heat["high"]) == (-4, -2)
    assert "largest 0.01 at step 8 in b" in heat["label"]


def test_a_long_log_is_thinned_outside_of_the_kept_window():
    rows = [(step, 1.0, 0.1) for step in range(1, 20_001)]
    steps = [row[0] for row in report_data.thinned(rows, [19_901, 20_000])]
    assert len(steps) < 600 and steps[0] == 1 and steps[-100:] == list(range(19_901, 20_001))


def test_the_map_is_thinned_evenly_but_shows_every_collection():
    assert report_data.chosen_places(50, 3000) == list(range(50))
    assert report_data.chosen_places(100, 30_000) == [9, 19, 29, 39, 49, 59, 69, 79, 89, 99]
    assert report_data.chosen_places(2, 100_000) == [1]


def test_statistics_that_are_there_already_are_not_told_one_by_one(project, capsys):
    report.make()
    capsys.readouterr()
    report.make()
    assert capsys.readouterr().out == ""


def test_lines_of_a_strangers_log_that_no_training_writes_are_noted(tmp_path):

    good = '{"current_steps": 3, "loss": 0.5, "lr": null}'
    lines = [good, "[" * 100_000, '{"current_steps": 1e999, "loss": 1}', "{}", "[]"]
    (tmp_path / "trainer_log.jsonl").write_text("\n".join(lines))
    notes: list[str] = []
    assert report_data.read_log(tmp_path / "trainer_log.jsonl", notes) == [(3, 0.5, None)]
    assert notes == [f"3 lines of {tmp_path.name}/trainer_log.jsonl cannot be read"]


def test_a_data_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    from paragen.common.cli import UserError
    from paragen.dataset import dataset_info

    (tmp_path / "a.json").write_text("[]")

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match="a.json: cannot be read: Permission denied"):
        dataset_info.load_rows(tmp_path / "a.json")


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_whose_name_is_no_utf8_is_on_the_page(own, whole):
    folder = own.top / "saves" / "math" / os.fsdecode(b"a\xff") / RUN
    shutil.copytree(own.run_folder("finetune"), folder)
    reseal(folder, dataset="Odd")
    if not whole:
        (folder / "manifest.json").unlink()
    text = report.make()[0].read_text()
    assert f'data-name="math/a?/{RUN}"' in text and text.count('class="open"') == 2
    assert ("the name is not UTF-8" if whole else "has no manifest.json") in text


@pytest.mark.parametrize(
    "home, text, expected",
    [
        ("/", "/data/x/y: is gone", "/data/x/y: is gone"),
        ("", "/data/x: is gone", "/data/x: is gone"),
        ("/root", "/rootfs/x and /root/x and /mnt/root/x", "/rootfs/x and ~/x and /mnt/root/x"),
        ("/home/me/", "(/home/me/x)", "(~/x)"),
    ],
)
def test_the_home_folder_alone_is_shortened(tmp_path, monkeypatch, home, text, expected):
    monkeypatch.setenv("HOME", home)
    assert report_data.without_places(text, tmp_path / "saves") == expected


def test_a_user_without_a_home_folder_has_none_shortened(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    assert report_data.without_places("/data/x: is gone", tmp_path / "saves") == "/data/x: is gone"
