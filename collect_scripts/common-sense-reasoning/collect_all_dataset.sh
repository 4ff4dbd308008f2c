#!/usr/bin/env bash
# Collect every recipe pair of this category, or of the datasets named (short names such as arcc will do).
#   bash collect_all_dataset.sh                                             from any folder
#   MODELS="qwen2.5-0.5b gpt2" RANKS="4 8" bash collect_all_dataset.sh ARC-c BoolQ
# What is complete is skipped, what failed does not stop the rest, and a stopped call is continued by the next one.
# PRUNE_PRETRAIN=1 removes each pretrain folder once its collection has been verified; FORCE=1 collects anew.
# PY=python3 names the Python to use, and nothing is set up; otherwise it is that of .venv, made where it is missing.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
make --no-print-directory -C "$here/../.." setup
exec ${PY:-"$here/../../.venv/bin/python"} "$here/../../utils/collect_all.py" "$(basename "$here")" "$@"
