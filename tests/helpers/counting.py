"""Runs a script's `main` and prints how often recipes were rendered, identities taken and manifests parsed.

fork_server.start("helpers.counting", ["train", RECIPE, RANK], ...)
"""

import importlib
import json
import sys
from collections import Counter
from types import ModuleType

from paragen.collection import manifest, run_identity
from paragen.recipes import render

COUNTED = {
    "rendered": (render, "render"),
    "identified": (run_identity, "identity_of"),
    "compared": (run_identity, "quick_identity_of"),
    "parsed": (manifest, "parse_manifest"),
}


def main() -> int:
    counts: dict[str, Counter] = {what: Counter() for what in COUNTED}
    for what, (module, name) in COUNTED.items():
        count_calls(module, name, counts[what])
    script, *sys.argv[1:] = sys.argv[1:]
    status = importlib.import_module(script).main()
    print(json.dumps(counts))
    return status or 0


def count_calls(module: ModuleType, name: str, counts: Counter) -> None:
    """Count a function's calls, by what it is called with: a recipe, a run, or a manifest's name."""
    function = getattr(module, name)

    def counted(*arguments, **options):
        first = arguments[1] if name == "parse_manifest" else getattr(arguments[0], "recipe", arguments[0])
        counts[str(first).rpartition("/")[2] if name != "parse_manifest" else str(first)] += 1
        return function(*arguments, **options)

    setattr(module, name, counted)
