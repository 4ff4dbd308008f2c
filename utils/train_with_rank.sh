#!/usr/bin/env bash
# Train a recipe at a LoRA rank. During the training, <recipe>_temp_rank_<rank>.yaml lies beside the recipe.
#   bash utils/train_with_rank.sh RECIPE.yaml RANK [key=value ...]     from any folder; the status is the training's
# key=value overrides keys of the recipe. FORCE=1 redoes a complete or stale run, DEVICES=0,1 names devices.
# PY=python3 names the Python to use, and nothing is set up. Without PY it is .venv's, which is made where it is missing.
set -euo pipefail

utils=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
MAKEFLAGS= make --no-print-directory -C "$utils/.." setup
exec ${PY:-"$utils/../.venv/bin/python"} "$utils/train.py" "$@"
