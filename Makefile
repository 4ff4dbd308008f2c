# ParaGen-Dataset: prompt-checkpoint pairs, one command each. `make` alone lists the targets.

# .venv's Python runs every target; PYTHON makes .venv. With PY=python3, on the command line or in the environment, that
# Python runs every target and nothing is set up: in a container, on a cluster, on a machine without network.
PYTHON ?= $(or $(wildcard .venv/bin/python),python3)
ifdef PY
export PY
SET_UP := :
else
unexport PY
PY := .venv/bin/python
SET_UP := "$(PYTHON)" utils/setup_env.py
endif
CODE := utils tests bench

# The variables on make's command line, which make hands to the scripts: utils/settings.py refuses those that a target
# does not take. Variables of the environment are not checked, as nobody may have typed them.
MAKE_SETTINGS := $(sort $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name))))
export MAKE_SETTINGS
CHECK := "$(PYTHON)" utils/settings.py check $(or $(MAKECMDGOALS),help)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev lock model data data-all register describe made-tasks check-data recipe check-recipes \
	pretrain finetune collect collect-all plan status verify clean-checkpoints disk clean-up index export import evaluate \
	stats generator generate benchmark-generator report publish pull demo test test-all test-gpu test-runs test-others lint format

help:  ## list the targets; FOR=collect explains one and its settings
	@$(CHECK)
	@if [ -n "$$FOR" ]; then exec "$(PYTHON)" utils/settings.py explain "$$FOR"; fi; \
	awk -F ':.*## ' '/^##@/ {print "\n" substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile; \
	printf '\nmake help FOR=collect explains a target and its settings, such as DATASET=ARC-c RANK=8\n'

##@ Start here
demo: setup  ## everything once, for real: model, training, 16 checkpoints, verification, scores (minutes)
	@$(PY) utils/demo.py

test: setup-dev  ## run the quick tests, before a commit (minutes)
	@SPEED="not slow" $(MAKE) --no-print-directory -j 2 test-runs test-others

test-all: setup-dev  ## run all of them, some with the embedded model, before a release
	@$(PY) utils/fetch_model.py smollm2-135m
	@SPEED="not alone" $(MAKE) --no-print-directory -j 2 test-runs test-others
	@$(PY) -m pytest -q -m alone tests

test-runs: setup-dev  # of the files that have such tests, since importing the others takes ten seconds
	@$(PY) -m pytest -q -m "runs and $(SPEED)" $$(grep -l 'mark\.runs' tests/test_*.py)

test-others: setup-dev
	@$(PY) -m pytest -q -m "not runs and not gpu and $(SPEED)" tests

test-gpu: setup-dev  ## run the tests that need an NVIDIA GPU, on it
	@TEST_GPU=1 $(PY) -m pytest -q -m gpu tests/test_gpu*.py

##@ Prepare
setup:  ## make .venv from requirements.txt; every target does this first, unless PY=python3 names a Python
	@$(CHECK)
	@$(SET_UP)

model: setup  ## download a base model: MODEL=qwen2.5-0.5b, or any of the hub: MODEL=org/name
	@$(PY) utils/fetch_model.py

data: setup  ## download prepared datasets and register them: DATASET=ARC-c, or CATEGORY=math
	@$(PY) utils/fetch_data.py

data-all: setup  ## download all prepared datasets of all categories
	@$(PY) utils/fetch_data.py --all

register: setup  ## register your own: FILE=data/math/X.json, or FILE=X.csv CATEGORY=math [NAME=X] [MAP="prompt=question"]
	@$(PY) utils/register_dataset.py

describe: setup  ## add descriptions of a dataset's task: DATASET=X TEXT="..", or FILE=x.txt, one a line
	@$(PY) utils/describe.py

made-tasks: setup  ## write 96 generated text tasks, to experiment with, and recipes that learn them [SEED=..] [ROWS=n] [MODEL=..]
	@$(PY) utils/make_tasks.py

check-data: setup  ## check every dataset in data/dataset_info.json
	@$(PY) utils/register_dataset.py --check

recipe: setup  ## write a new pair of recipes to edit: DATASET=X MODEL=gpt2 [FROM=ARC-c] [TEMPLATE=..] [CATEGORY=..]
	@$(PY) utils/make_recipe.py

check-recipes: setup  ## check every recipe, or FILE and its other half: names, keys, templates, the pair's agreement
	@$(PY) utils/check_recipes.py

##@ Train and collect
pretrain: setup  ## train the adapter to a good region: DATASET=ARC-c [RANK=8]
	@exec $(PY) utils/collect.py pretrain

finetune: setup  ## go on from the pretrain and collect the last checkpoints: DATASET=ARC-c [RANK=8] [KEEP=n]
	@exec $(PY) utils/collect.py finetune

collect: setup  ## pretrain if it is missing, finetune, verify: DATASET=ARC-c [RANK="2 4 8 16 64"]
	@exec $(PY) utils/collect.py

collect-all: setup  ## collect all of a category: CATEGORY=math [DATASET="MATH Mu-Math"] [MODEL=..] [RANK="2 8"]
	@$(PY) utils/collect_all.py

plan: setup  ## what that would take: cells, steps, disk, time [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK="2 8"]
	@$(PY) utils/plan.py

##@ Look after what was collected
status: setup  ## how every cell stands [CATEGORY=..] [DATASET=..] [MODEL=..] [RANK="2 8"]
	@$(PY) utils/status.py

verify: setup  ## re-read every collection, or those selected: hashes, shapes, steps, values, PEFT; REHASH_MODELS=1: base models, too
	@$(PY) utils/verify.py

clean-checkpoints: setup  ## make DATASET's stock LLaMA-Factory runs collections [KEEP=n]
	@$(PY) utils/clean_dataset_dir.py

disk: setup  ## what collections, models and all else take on the disk, and what of it can go
	@$(PY) utils/disk.py

clean-up: setup  ## delete what killed runs left, and the rows that sweeps tokenised: DRY_RUN=1 lists it
	@$(PY) utils/clean_up.py

##@ Use what was collected
index: setup  ## one table over all collections: saves/index.parquet
	@$(PY) utils/index.py

export: setup  ## FORMAT=dnd|peft|canonical|loragen|text-to-lora|table|w2t|archive [DATASET=..] [MODEL=..] [RANK=..] [OUT=..] [STEPS=..] ...
	@$(PY) utils/export.py

evaluate: setup  ## score checkpoints on held-out prompts: DATASET=ARC-c [RANK=8] [SPLIT=..] [STEPS=last] [LIMIT=n]; GENERATED=folder: adapters
	@exec $(PY) utils/evaluate.py

stats: setup  ## norms, changes, effective ranks, importance of layers: [DATASET=..] [MODEL=..] [RANK=..]
	@$(PY) utils/stats.py

generator: setup  ## train a small generator on the pairs of one base and rank: MODEL=.. RANK=8 [WITHOUT="OBQA ARC-c"] ...
	@exec $(PY) utils/train_generator.py

generate: setup  ## have it write adapters from a dataset's prompts: GENERATOR=.. DATASET=OBQA [PROMPTS=16] [SAMPLES=4] [OUT=..]
	@exec $(PY) utils/generate.py

benchmark-generator: setup  ## measure it on datasets that it has not seen: BY=family|dataset, or VARIANTS="1 3 6 12" ...
	@exec $(PY) utils/benchmark_generator.py

report: setup  ## a page to look at all of it, offline: saves/report/index.html
	@$(PY) utils/report.py

import: setup  ## unpack archived collections into saves/: FILE=x.archive, or a folder of them
	@$(PY) utils/import_archive.py

publish: setup  ## put collections on the Hugging Face hub: REPO=user/name [PRIVATE=1] [DRY_RUN=1] [RAW=1] [DATASET=..] ...
	@exec $(PY) utils/publish.py

pull: setup  ## download published collections into saves/ and data/: REPO=user/name [REVISION=..] [DATASET=..] [RANK=..] ...
	@exec $(PY) utils/pull.py

##@ Work on this repository
setup-dev:  ## make .venv from requirements-dev.txt, which adds what tests and linting need
	@$(CHECK)
	@$(SET_UP) --dev

lint: setup-dev  ## check style, format and types
	@$(PY) -m ruff check --quiet $(CODE)
	@$(PY) -m ruff format --quiet --check $(CODE) || { echo "run: make format"; exit 1; }
	@$(PY) -m mypy

format: setup-dev  ## put the code into the shape that lint asks for
	@$(PY) -m ruff check --quiet --select I --fix $(CODE)
	@$(PY) -m ruff format --quiet $(CODE)

lock: COMPILE := $(PY) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--custom-compile-command "make lock"
lock: setup  ## resolve requirements.in and requirements-dev.in into their .txt, with versions and hashes
	@$(COMPILE) requirements.in --output-file requirements.txt
	@$(COMPILE) requirements-dev.in --constraint requirements.txt --output-file requirements-dev.txt
