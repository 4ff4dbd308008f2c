"""The report of a project, and a browser that has it open."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.chromium import colours, size
from paragen.common import paths


@contextmanager
def paths_of(project) -> Iterator[pytest.MonkeyPatch]:
    """Have this process take a project's folders for its own; yields what puts them back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SAVES", "DATA", "MODELS"):
            patch.setattr(paths, name, project.top / name.lower())
        patch.setattr(paths, "SCRIPTS", project.top / "collect_scripts")
        yield patch


@contextmanager
def opened_fresh(chromium, page: Path) -> Iterator:
    """The page, loaded anew, 1280 pixels wide, in light colours; at the end it has no errors and asked no network."""
    chromium.get("about:blank")
    size(chromium, 1280)
    colours(chromium, "light")
    chromium.get_log("performance"), chromium.get_log("browser")
    chromium.get(page.as_uri())
    yield chromium
    assert [line["message"] for line in chromium.get_log("browser")] == []
    messages = [json.loads(line["message"])["message"] for line in chromium.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in asked
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
