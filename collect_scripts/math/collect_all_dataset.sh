#!/usr/bin/env bash
# Collect every recipe pair of this category, or of the named datasets (also by short names such as arcc).
#   bash collect_all_dataset.sh                                             from any folder
#   MODEL="qwen2.5-0.5b gpt2" RANK="4 8" bash collect_all_dataset.sh ARC-c BoolQ
# Complete collections are skipped, a failed one does not stop the others, and the next call continues a stopped one.
# PRUNE_PRETRAIN=1 removes each pretrain folder once its collection is verified; FORCE=1 repeats complete collections.
# PY=python3 names the Python to use, and nothing is set up. Without PY it is .venv's, which is made where it is missing.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MAKEFLAGS= make --no-print-directory -C "$here/../.." setup
exec ${PY:-"$here/../../.venv/bin/python"} "$here/../../utils/collect_all.py" "$(basename "$here")" "$@"
