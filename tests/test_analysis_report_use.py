"""How the report is used: what was selected for it, its filters and links, and what a small screen shows."""

import json
import re
import shutil
import sys
import urllib.parse
from pathlib import Path

import pytest
from helpers import copies, report_page, scored
from helpers.chromium import drawn, find, head, opened, shown, size, typed, wait
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from paragen.analysis import report, report_data
from paragen.common import paths
from paragen.common.cli import UserError

LONG = "A-dataset-with-a-name-that-is-very-long-and-has-no-blank-in-it"
SELECTION = ("CATEGORY", "DATASET", "MODEL", "MODELS", "RANK", "RANKS", "SEED")


@pytest.fixture(scope="module")
def project(trained_once, tmp_path_factory):
    """Collections of one pair of recipes at ranks 2, 4, 8 and 16 and at a seed; two of no recipe; a broken one."""
    project = trained_once.copy(tmp_path_factory.mktemp("use") / "my project")
    first, saves = project.run_folder("finetune"), project.top / "saves"
    for rank in (2, 8, 16):
        copies.twin(first, rank=rank)
    copies.twin(first, seed=7)
    for dataset, category, rank in ((LONG, "multimodal", 16), ("GSM8K", "math", 2), ("Half", "math", 2)):
        made = copies.twin(first, dataset=dataset, model="Another-Model-1.5B-Instruct", rank=rank)
        copies.edit(made, lambda manifest, category=category: manifest.update(category=category))
        (saves / category).mkdir(exist_ok=True)
        made.parent.rename(saves / category / dataset)
    (saves / "math" / "Half" / made.name / "manifest.json").unlink()
    scored.write(first, scored.evaluated({"base": 0.4, 7: 0.5, 12: 0.625}))
    partial = scored.evaluated({"base": 0.4, 12: 0.75}, rows=4, limit=4, split="OBQA_test", paired=False)
    scored.write(next((saves / "multimodal" / LONG).iterdir()), partial)
    with report_page.paths_of(project) as patch:
        for name in SELECTION:
            patch.delenv(name, raising=False)
        yield project


@pytest.fixture(scope="module")
def page(project) -> Path:
    return report.make()[0]


@pytest.fixture
def browser(chromium, page):
    with report_page.opened_fresh(chromium, page):
        yield chromium


def link_to(name: str, page: Path) -> str:
    return f"{page.as_uri()}#{urllib.parse.quote(name)}"


def title(browser) -> str:
    return wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#opened h3"))[0].text


# ---- the order and the filters


def test_ranks_and_numbers_in_names_are_sorted_as_numbers(browser):
    assert shown(browser, "Rank") == ["2", "4", "4", "8", "16", "2", "2", "16"]
    assert shown(browser, "Seed")[1:3] == ["7", "42"]
    key = ("category", "dataset", "model", "rank", "seed", "name")
    rows = [dict(zip(key, ("c", dataset, "m", rank, None, "n"), strict=True)) for dataset, rank in (
        ("D10", 2), ("D9", 16), ("D9", None), ("d9", 8),
    )]  # fmt: skip
    ordered = sorted(rows, key=report_data.in_order)
    assert [(row["dataset"], row["rank"]) for row in ordered] == [("D9", None), ("d9", 8), ("D9", 16), ("D10", 2)]


FILTERS = {
    "rank 2": ["2"] * 3,
    "Rank 16": ["16"] * 2,
    "rank 2 16 toy": ["2", "16"],
    "toy rank=8": ["8"],
    "ranks: 4, 8 to": ["4", "4", "8"],
    "rank-16 mult": ["16"],
    "seed 7": ["4"],
    "seed 7 rank 8": [],
    "toy 4": ["4", "4"],
    "rank": ["2", "4", "4", "8", "16", "2", "2", "16"],  # not yet typed whole
    "math broken": ["2"],
}


def test_a_number_in_the_filter_is_a_whole_rank_or_seed(browser):
    for text, ranks in FILTERS.items():
        typed(browser, text)
        assert sorted(shown(browser, "Rank"), key=int) == sorted(ranks, key=int), text


def test_a_filter_that_nothing_fits_says_so_and_is_cleared(browser):
    hint = find(browser, ".hint[data-for=collection-table]")
    assert not hint.is_displayed()
    Select(find(browser, "select[data-for=collection-table]")).select_by_visible_text("broken")
    typed(browser, "rank 3")
    assert shown(browser) == [] and "None of the collections" in hint.text
    hint.find_element(By.TAG_NAME, "button").click()
    assert len(shown(browser)) == 8 and not hint.is_displayed()
    assert find(browser, ".count[data-for=collection-table]").text == "8 of 8"


def test_in_the_table_of_cells_a_rank_is_a_column(browser):
    typed(browser, "toy rank 2 16", "cell-table")
    heads = browser.find_elements(By.CSS_SELECTOR, "#cell-table th[data-rank]")
    assert [one.text for one in heads if one.is_displayed()] == ["Rank 2", "Rank 16"]
    typed(browser, "rank 3", "cell-table")
    assert find(browser, ".hint[data-for=cell-table]").is_displayed()
    typed(browser, "", "cell-table")
    assert len(shown(browser, table="cell-table")) == 2 and all(one.is_displayed() for one in heads)


# ---- links to a collection


def test_a_link_opens_its_collection_and_opening_one_changes_the_address(browser, page):
    name = f"common-sense-reasoning/Toy/{'Tiny-Llama_lora-rank_16_finetune'}"
    browser.get("about:blank")
    browser.get(link_to(name, page))
    assert title(browser) == "Toy, Tiny-Llama, rank 16"
    assert find(browser, f'tr[data-name="{name}"] .open').get_attribute("aria-expanded") == "true"
    find(browser, "#opened [data-close]").click()
    assert browser.current_url == page.as_uri()
    browser.get(link_to(f"saves/{name}/", page))  # as a path is copied
    assert title(browser) == "Toy, Tiny-Llama, rank 16"
    opened(browser, "GSM8K")
    assert browser.current_url == link_to("math/GSM8K/Another-Model-1.5B-Instruct_lora-rank_2_finetune", page)


def test_a_link_opens_a_collection_that_the_filter_hides_and_one_that_was_closed(browser, page):
    link = link_to("common-sense-reasoning/Toy/Tiny-Llama_lora-rank_4_seed-7_finetune", page)
    typed(browser, "math")
    for _ in range(2):
        browser.get(link)
        assert title(browser) == "Toy, Tiny-Llama, rank 4"
        find(browser, "#opened [data-close]").click()
    assert shown(browser) == ["GSM8K", "Half"]


def test_the_same_name_opens_its_collection_again(browser):
    article = opened(browser, "GSM8K")
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    opened(browser, "GSM8K")
    wait(browser, lambda: browser.execute_script("return arguments[0].getBoundingClientRect().top < 100", article))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#opened article")) == 1


def test_a_link_to_what_cannot_be_opened_says_so(browser, page):
    browser.get(link_to("math/None/such%_finetune", page))
    lost = find(browser, "#lost")
    assert lost.is_displayed() and lost.text == "This page has no collection math/None/such%_finetune."
    browser.get(f"{page.as_uri()}#100%")
    assert wait(browser, lambda: lost.text == "This page has no collection 100%.")
    browser.get(f"{page.as_uri()}#map")
    assert wait(browser, lambda: not lost.is_displayed())
    typed(browser, "toy")
    browser.get(link_to("math/Half/Another-Model-1.5B-Instruct_lora-rank_2_finetune", page))
    wait(browser, lambda: "Half" in browser.switch_to.active_element.text)
    assert len(shown(browser)) == 8


# ---- what is to be seen


def is_inside(browser, element) -> bool:
    """Whether all of an element is to be seen in its box, without scrolling sideways."""
    return browser.execute_script(
        "const [e, b] = [arguments[0], arguments[0].closest('.box')].map((one) => one.getBoundingClientRect());"
        "return e.width > 0 && e.left >= b.left - 1 && e.right <= b.right + 1"
        " && arguments[0].scrollWidth <= arguments[0].clientWidth + 1",
        element,
    )


@pytest.mark.parametrize("table", ["collection-table", "cell-table"])
def test_names_and_status_are_not_cut_off(browser, table):
    for name in ("Dataset", "Category", "Model", "Status" if table == "collection-table" else "Rank 2"):
        place = head(browser, name, table).get_property("cellIndex")
        cells = browser.find_elements(By.CSS_SELECTOR, f"#{table} tr > :nth-child({place + 1})")
        assert all(is_inside(browser, cell) for cell in cells), name
    size(browser, 390)
    folded = browser.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]} tbody th`)]"
        ".map((one) => getComputedStyle(one, '::after').content)", table,
    )  # fmt: skip
    assert any(re.search("tiny.*, common-sense-reasoning", text) for text in folded)
    for name in ("Dataset", "Status" if table == "collection-table" else "Rank 2"):
        place = head(browser, name, table).get_property("cellIndex")
        cells = browser.find_elements(By.CSS_SELECTOR, f"#{table} tr > :nth-child({place + 1})")
        assert all(is_inside(browser, cell) for cell in cells), name
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390


def test_at_1280_pixels_nothing_of_the_collections_is_outside(browser):
    box = find(browser, "#collection-table").find_element(By.XPATH, "..")
    assert box.get_property("scrollWidth") <= box.get_property("clientWidth")


def test_a_small_screen_sorts_by_what_it_folds(browser):
    size(browser, 390)
    select = Select(find(browser, "select[data-sort=collection-table]"))
    select.select_by_visible_text("Rank")
    assert shown(browser, "Rank")[0] == "2" and shown(browser, "Rank")[-1] == "16"
    find(browser, "[data-turn=collection-table]").click()
    assert shown(browser, "Rank")[0] == "16"
    assert select.first_selected_option.text == "Rank"


def test_scores_have_their_rows_and_those_that_cannot_be_compared_are_marked(browser):
    columns = (shown(browser, column) for column in ("Dataset", "Last score", "Scored rows"))
    rows = list(zip(*columns, strict=True))
    assert (LONG, "0.7500", "4 LIMIT=4 rows of OBQA_test") in rows and ("Toy", "0.6250", "100") in rows
    row = find(browser, f'tr[data-text^="{LONG}"]')
    assert len(row.find_elements(By.CSS_SELECTOR, ".partial")) == 4
    assert len(browser.find_elements(By.CSS_SELECTOR, "td.partial")) == 4
    article = opened(browser, LONG)
    label = article.find_element(By.CSS_SELECTOR, "[data-kind=scores]").get_attribute("aria-label")
    assert "the first 4 rows of OBQA_test (LIMIT=4), not held out from its own dataset" in label


def test_every_colour_bar_has_a_title(browser):
    opened(browser, "GSM8K")
    assert drawn(browser, "#opened .plot")
    bars = browser.find_elements(By.CSS_SELECTOR, "#opened .colorbar")
    titles = [bar.find_element(By.CSS_SELECTOR, "[class*=title] text").text for bar in bars]
    assert titles == ["step", "relative change"]


def test_collections_and_complete_cells_are_brought_together(browser):
    figures = {one.find_element(By.TAG_NAME, "dt").text: one.find_element(By.TAG_NAME, "dd").text
               for one in browser.find_elements(By.CSS_SELECTOR, ".figures div")}  # fmt: skip
    assert figures["collections"] == "7" and figures["broken"] == "1"
    complete = figures["cells complete"].split(" of ")
    text = find(browser, "#cells + p").text
    assert f"Collections: in cells 5 ({complete[0]} complete, 4 stale); outside of cells 2, since" in text
    remarks = dict(zip(shown(browser), shown(browser, "Remark"), strict=True))
    assert remarks["GSM8K"] == "belongs to no cell: no pair of recipes here makes it"
    assert "has no manifest.json" in remarks["Half"]


def test_a_seed_that_was_collected_has_cells_of_its_own(project):
    pairs = report.gather(paths.SAVES)["pairs"]
    assert [(pair["dataset"], pair["seed"], sorted(pair["cells"])) for pair in pairs] == [
        ("Toy", None, [2, 4, 8, 16, 64]), ("Toy", 7, [4]),
    ]  # fmt: skip
    assert pairs[0]["cells"][4]["state"] == "complete" and pairs[0]["cells"][64]["state"] == "missing"
    stale = pairs[1]["cells"][4]
    assert stale["state"] == "stale" and stale["bytes"] and "seed" in stale["reason"]


# ---- what was selected


def selected(monkeypatch, **settings) -> dict:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return report.gather(paths.SAVES)


@pytest.mark.parametrize(
    ("settings", "places", "cells"),
    [
        ({"DATASET": "toy", "RANK": "2 16"}, [("Toy", 2), ("Toy", 16)], {2, 16}),
        ({"CATEGORY": "math"}, [("GSM8K", 2), ("Half", 2)], set()),
        ({"DATASET": "half"}, [("Half", 2)], set()),
        ({"SEED": "7"}, [("Toy", 4), ("Half", 2)], {2, 4, 8, 16, 64}),
        ({"MODEL": "tiny-llama", "RANK": "8"}, [("Toy", 8)], {8}),
    ],
)
def test_a_page_is_made_of_what_is_selected(project, monkeypatch, capsys, settings, places, cells):
    facts = selected(monkeypatch, **settings)
    assert [(row["dataset"], row["rank"]) for row in facts["collections"]] == places
    assert {rank for pair in facts["pairs"] for rank in pair["cells"]} == cells
    assert facts["selection"]["of"] == 8
    assert f"{len(places)} of 8 collections" in report.render(facts)


def test_the_page_and_the_command_say_what_was_selected(project, monkeypatch, capsys):
    import report as script

    monkeypatch.setattr(script.report, "make", lambda: (paths.SAVES / "report" / "index.html", 0))
    script.main()
    assert capsys.readouterr().out.endswith("report/index.html\n")
    facts = selected(monkeypatch, DATASET="Toy", RANKS="2 16")
    script.main()
    assert capsys.readouterr().out.endswith("index.html (of DATASET=Toy RANK='2 16')\n")
    assert "make report DATASET=Toy RANK=&#39;2 16&#39;" in report.render(facts)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"DATASET": "Tooy"}, "collected dataset 'Tooy' is not known"),
        ({"DATASET": "Half Tooy"}, "'Tooy' is not known"),
        ({"DATASET": "Toy", "RANK": "32"}, "no collection fits DATASET=Toy RANK=32"),
    ],
)
def test_a_selection_of_nothing_is_an_error(project, monkeypatch, settings, fault):
    with pytest.raises(UserError, match=re.escape(fault)):
        selected(monkeypatch, **settings)


def test_a_recipe_that_exists_twice_is_named_where_the_cells_would_be(project, tmp_path, monkeypatch):
    twice = tmp_path / "collect_scripts"
    shutil.copytree(project.top / "collect_scripts", twice)
    shutil.copytree(twice / "common-sense-reasoning", twice / "math")
    monkeypatch.setattr(paths, "SCRIPTS", twice)
    assert "There are no cells: " in (text := report.render(report.gather(paths.SAVES)))
    assert "the same recipe exists as" in text


def test_a_run_folder_that_is_a_link_belongs_to_its_cell(collected, tmp_path, monkeypatch):
    for name in ("SAVES", "DATA", "MODELS"):
        monkeypatch.setattr(paths, name, collected.top / name.lower())
    monkeypatch.setattr(paths, "SCRIPTS", collected.top / "collect_scripts")
    folder = collected.run_folder("finetune")
    folder.rename(tmp_path / folder.name)
    folder.symlink_to(tmp_path / folder.name)
    facts = report.gather(paths.SAVES)
    assert [(row["state"], row["reason"]) for row in facts["collections"]] == [("complete", "")]
    assert facts["pairs"][0]["cells"][4]["id"] == 0


def test_a_second_copy_is_named_in_the_remark_of_the_one_that_counts(collected, monkeypatch, capsys):
    for name in ("SAVES", "DATA", "MODELS"):
        monkeypatch.setattr(paths, name, collected.top / name.lower())
    monkeypatch.setattr(paths, "SCRIPTS", collected.top / "collect_scripts")
    folder = collected.run_folder("finetune")
    shutil.copytree(folder, paths.SAVES / "a folder" / "renamed")
    (paths.SAVES / "a folder" / "linked_finetune").symlink_to(folder)
    facts = report.gather(paths.SAVES)
    assert [(row["dataset"], row["state"], row["reason"]) for row in facts["collections"]] == [
        ("Toy", "complete", "saves/a folder/renamed is a second copy of it")
    ]  # fmt: skip
    assert facts["pairs"][0]["cells"][4]["id"] == 0 and facts["balance"] == "Collections: in cells 1 (1 complete)."
    folder.rename(paths.SAVES / "a folder" / "moved_finetune")  # now none is where the recipes have it
    [row] = report.gather(paths.SAVES)["collections"]
    assert row["name"] == "a folder/moved_finetune" and "a folder/renamed is a second copy of it" in row["reason"]
    assert row["reason"].startswith("belongs to no cell")


def test_the_measurement_of_the_page_renders_one():
    sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))
    import report_page

    text = report.render(report_page.facts_of(12, 8, 14))
    assert len(re.findall(r"<tr data-name=", text)) == 12
    assert json.loads(re.search(r'id="data-11">(.*?)</script>', text)[1])["heat"]["steps"]
