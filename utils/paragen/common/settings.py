"""The settings of the make targets: one table of names, meanings and defaults, and the functions that read them.

A setting is an environment variable such as RANK. What a user types after `make` becomes one, too. `TARGETS` says which
target takes which; a setting means the same in all of them. Standard library only: it is read before .venv exists.
"""

import os
import re
from typing import NamedTuple

from paragen.common import paths
from paragen.common.cli import UserError

DEFAULT_MODEL = "qwen2.5-0.5b"  # where a dataset has several
DEFAULT_RANK = 8  # of one cell
SWEEP_RANKS = (2, 4, 8, 16, 64)  # of a sweep
MADE_MODEL, MADE_ROWS = "smollm2-135m", 2000  # of made tasks: whose recipes are written, and the rows to train on
# Of make benchmark-generator: datasets of a family that VARIANTS holds out, seeds, rows behind an adapter, samples, and
# what is trained or computed to compare with.
BENCHMARK_HOLD, BENCHMARK_REPEATS, BENCHMARK_PROMPTS, BENCHMARK_SAMPLES = 4, 3, 16, 4
BASELINES = ("again", "union", "few", "context")
YES, NO = ("1", "yes", "true", "on"), ("0", "no", "false", "off")
ON_BY_DEFAULT = ("DETERMINISTIC",)  # switches that are on unless they are switched off


class Setting(NamedTuple):
    """What a setting means and which values it may have."""

    help: str
    kind: str = (
        "text"  # text; `values`: one or several texts; `numbers`; `number` and `count`: one; `switch`: yes or no
    )
    choices: tuple[str, ...] = ()


SETTINGS = {
    "CATEGORY": Setting("coding, common-sense-reasoning, math, multimodal or made; all: the first four"),
    "DATASET": Setting("one or several datasets; case and punctuation do not matter", "values"),
    "MODEL": Setting("one or several models; MODELS means the same", "values"),
    "RANK": Setting("one or several LoRA ranks; RANKS means the same", "numbers"),
    "SEED": Setting("one or several seeds", "numbers"),
    "KEEP": Setting("how many of the last steps are kept", "number"),
    "ENGINE": Setting("packed: many adapters together; stock: one by one", choices=("packed", "stock")),
    "DEVICES": Setting("GPUs such as 0,1, or cpu"),
    "DETERMINISTIC": Setting("the same bits each time on the same kind of GPU; 0: the fastest kernels", "switch"),
    "GPUS_PER_CELL": Setting("GPUs that train a cell together", "number"),
    "FORCE": Setting("do again what is complete; replace what is other", "switch"),
    "EVALUATE": Setting("score each collection once it is verified, as make evaluate does", "switch"),
    "PRUNE_PRETRAIN": Setting("remove each pretrain run once its collection is verified", "switch"),
    "STAGE": Setting("send data and models to nodes that share no storage", "switch"),
    "STAGE_DIR": Setting("the folder on such a node"),
    "ALLOW_OPEN_RAY": Setting("join a Ray cluster that asks for no token", "switch"),
    "FILE": Setting("the file or folder to read"),
    "NAME": Setting("the name to register; of a generator: the name of its folder"),
    "MAP": Setting('columns, such as "prompt=question response=answer"'),
    "ACCEPT": Setting("numbers of rows that may lack a text or an answer", "numbers"),
    "HELD_OUT": Setting("how many of the last rows are for scoring", "number"),
    "ROWS": Setting("how many rows each made task has to train on", "number"),
    "PROMPTS_ONLY": Setting("the rows have no responses", "switch"),
    "TEXT": Setting("a description of what a dataset's task is"),
    "SOURCE": Setting("where the descriptions come from"),
    "REPLACE": Setting("register a name for another file", "switch"),
    "FROM": Setting("the pair whose figures are taken: a model, a dataset, or DATASET/MODEL"),
    "TEMPLATE": Setting("the prompt template"),
    "WITHOUT": Setting("the datasets that a generator does not see", "values"),
    "TRAIN_STEPS": Setting("how many steps a generator is trained towards collected factors", "number"),
    "BASE_STEPS": Setting("how many steps it is then trained through the base model's own loss", "count"),
    "TRAIN_SEED": Setting("a generator's own seed", "numbers"),
    "FORM": Setting("the factors that a generator learns: as collected, or canonical", choices=("raw", "canonical")),
    "IMPORTANCE": Setting("weight a generator's errors by the importance that make stats computes", "switch"),
    "MIX": Setting("mix the pairs of two tasks", "switch"),
    "ANSWERS": Setting("read prompts together with their answers", "switch"),
    "WIDTH": Setting("the width of a generator's network", "number"),
    "PLACE": Setting("where checkpoints are kept during a training", choices=("device", "pinned", "disk")),
    "GENERATOR": Setting("a generator: its name in saves/generators, or its folder"),
    "PROMPTS": Setting("how many prompts an adapter is generated from", "number"),
    "SAMPLES": Setting("how many adapters are generated", "number"),
    "SPLIT": Setting("another registered dataset to score on"),
    "STEPS": Setting("all, last or every:10; table and w2t: also best; loragen and text-to-lora: last or best"),
    "LIMIT": Setting("score on the first rows alone", "number"),
    "BY": Setting("what a benchmark's fold holds out", choices=("family", "dataset")),
    "VARIANTS": Setting("hold out HOLD datasets of each family; train on so many of its others", "numbers"),
    "HOLD": Setting("how many datasets of each family VARIANTS holds out", "number"),
    "REPEATS": Setting("how many seeds of a generator, or with VARIANTS random subsets, are measured", "number"),
    "BASELINES": Setting(
        "what a benchmark trains or computes to compare with, or none", "values", choices=(*BASELINES, "none")
    ),
    "LOSS_ONLY": Setting("the metrics of which a benchmark generates no answers", "values", choices=("math", "exact")),
    "PER_DEVICE": Setting("how many processes of a benchmark share a device", "number"),
    "GENERATED": Setting("a folder of adapters to score, <dataset>/<sample>/, in place of collections"),
    "FORMAT": Setting(
        "the format to write",
        choices=("dnd", "peft", "canonical", "loragen", "text-to-lora", "table", "w2t", "archive"),
    ),
    "OUT": Setting("the folder to write"),
    "PARTS": Setting(
        "what else FORMAT=canonical writes: usv, delta, stats", "values", choices=("usv", "delta", "stats")
    ),
    "VAL": Setting("the datasets that an export holds out of training", "values"),
    "SLICE": Setting("cut out the layers that the format reads, where others were trained, too", "switch"),
    "COPY": Setting("put the adapters beside the table that names them", "switch"),
    "DTYPE": Setting("the dtype to write", choices=("float32", "bfloat16", "float16")),
    "REPO": Setting("a dataset repository of the hub: user/name"),
    "REVISION": Setting("a commit, tag or branch of it"),
    "PRIVATE": Setting("make a new repository private", "switch"),
    "RAW": Setting("publish folders in place of archives", "switch"),
    "ALLOW_UNKNOWN_LICENSE": Setting("publish data and models of unknown licence", "switch"),
    "DRY_RUN": Setting("say what would be done, and do nothing", "switch"),
    "ALL": Setting("show the missing cells, too", "switch"),
    "JSON": Setting("print for programs: one JSON object", "switch"),
    "REHASH_MODELS": Setting("read base models anew, and compare them with what was recorded", "switch"),
    "FOR": Setting("the target to explain"),
    "PY": Setting("the Python that runs the target, at a path without blanks; nothing is set up"),
    "PYTHON": Setting("the Python that makes .venv"),
}
PLURALS = {"MODELS": "MODEL", "RANKS": "RANK"}
EVERYWHERE = ("PY", "PYTHON")
# Variables of other programs that may stand on make's command line.
FOREIGN = re.compile(
    "(HF|RAY|OMP|MKL|KMP|GOMP|CUDA|CUBLAS|NCCL|TORCH|PYTORCH|TRITON|TRANSFORMERS|TOKENIZERS|LLAMAFACTORY|PARAGEN|PYTHON|PIP|UV"
    "|MAKE|LC|XDG)[A-Z0-9_]*|SHELL|HOME|PATH|LANG|TMPDIR|CI|([A-Z]+_PROXY|[a-z]+_proxy)"
)
SWEEP = " ".join(map(str, SWEEP_RANKS))


def _takes(names: str, **defaults: object) -> dict[str, str]:
    """The settings that a target takes, in the order of `names`, each with its default as text."""
    defaults |= dict.fromkeys(ON_BY_DEFAULT, 1)
    return {name: str(defaults.get(name, "")) for name in names.split()}


SELECTION = "CATEGORY DATASET MODEL RANK SEED"
_TRAINING = f"{SELECTION} ENGINE DEVICES DETERMINISTIC FORCE"
_CELLS = {"MODEL": f"{DEFAULT_MODEL}, or the dataset's only one", "RANK": DEFAULT_RANK, "SEED": "the recipe's"}
_SWEEP = {"RANK": SWEEP, "SEED": "the recipe's", "KEEP": "the recipe's"}
TARGETS: dict[str, dict[str, str]] = {
    "help": _takes("FOR"),
    "demo": _takes("DEVICES"),
    "model": _takes("MODEL"),
    "data": _takes("CATEGORY DATASET FORCE"),
    "data-all": _takes("FORCE"),
    "register": _takes("FILE NAME CATEGORY MAP ACCEPT HELD_OUT PROMPTS_ONLY REPLACE"),
    "check-data": {},
    "describe": _takes("DATASET TEXT FILE SOURCE", SOURCE="the file's name, or `own`"),
    "made-tasks": _takes("SEED ROWS MODEL TEMPLATE FORCE", SEED=0, ROWS=MADE_ROWS, MODEL=MADE_MODEL),
    "recipe": _takes("CATEGORY DATASET MODEL FROM TEMPLATE"),
    "check-recipes": _takes("FILE"),
    "pretrain": _takes(_TRAINING, **_CELLS),
    "finetune": _takes(f"{_TRAINING} KEEP", **_CELLS, KEEP="the recipe's"),
    "collect": _takes(f"{_TRAINING} KEEP", **_CELLS, KEEP="the recipe's"),
    "collect-all": _takes(
        f"{_TRAINING} KEEP GPUS_PER_CELL EVALUATE PRUNE_PRETRAIN STAGE STAGE_DIR ALLOW_OPEN_RAY",
        **_SWEEP,
        GPUS_PER_CELL=1,
    ),
    "plan": _takes(f"{SELECTION} KEEP ENGINE DEVICES FORCE JSON", **_SWEEP),
    "status": _takes(f"{SELECTION} KEEP ALL JSON", **_SWEEP),
    "verify": _takes(f"{SELECTION} REHASH_MODELS JSON"),
    "clean-checkpoints": _takes(f"{SELECTION} KEEP DRY_RUN", KEEP="all"),
    "disk": _takes("JSON"),
    "clean-up": _takes("DRY_RUN"),
    "index": _takes(SELECTION),
    "export": _takes(
        f"{SELECTION} FORMAT OUT DTYPE STEPS PARTS VAL SLICE COPY DRY_RUN FORCE",
        OUT="saves/exports/<format>", STEPS="all; last for formats with one adapter a dataset",
    ),
    "import": _takes("FILE FORCE"),
    "evaluate": _takes(f"{SELECTION} SPLIT STEPS LIMIT GENERATED DEVICES FORCE ALLOW_OPEN_RAY", STEPS="all"),
    "stats": _takes(f"{SELECTION} DEVICES FORCE"),
    "generator": _takes(
        f"{SELECTION} WITHOUT NAME TRAIN_STEPS BASE_STEPS TRAIN_SEED FORM IMPORTANCE MIX ANSWERS PROMPTS WIDTH STEPS "
        "PLACE DEVICES DETERMINISTIC FORCE",
        NAME="the model, rank, WITHOUT and TRAIN_SEED", TRAIN_STEPS=1000, BASE_STEPS=0, TRAIN_SEED=0, FORM="raw",
        PROMPTS=16, WIDTH=512, STEPS="all", PLACE="the device, where they fit",
    ),
    "generate": _takes(
        "GENERATOR DATASET PROMPTS SAMPLES SEED OUT DEVICES FORCE",
        PROMPTS="as trained", SAMPLES=4, SEED=0, OUT="saves/generated/<generator>",
    ),
    "benchmark-generator": _takes(
        f"{SELECTION} BY VARIANTS HOLD REPEATS PROMPTS SAMPLES LIMIT LOSS_ONLY BASELINES TRAIN_STEPS BASE_STEPS FORM "
        "IMPORTANCE MIX ANSWERS WIDTH STEPS OUT PER_DEVICE DEVICES DETERMINISTIC FORCE",
        BY="family", HOLD=BENCHMARK_HOLD, REPEATS=BENCHMARK_REPEATS, PROMPTS=BENCHMARK_PROMPTS,
        SAMPLES=BENCHMARK_SAMPLES, BASELINES=" ".join(BASELINES), TRAIN_STEPS=1000, BASE_STEPS=0, FORM="raw", WIDTH=512,
        STEPS="all", OUT="saves/benchmarks/<model>_rank-<rank>_<what is held out>", PER_DEVICE=1,
    ),
    "report": _takes(f"{SELECTION} DEVICES"),
    "publish": _takes(f"{SELECTION} REPO PRIVATE RAW DRY_RUN ALLOW_UNKNOWN_LICENSE FORCE"),
    "pull": _takes(f"{SELECTION} REPO REVISION FORCE"),
    "setup": {}, "setup-dev": {}, "test": {}, "test-all": {}, "test-gpu": {}, "lint": {}, "format": {}, "lock": {},
}  # fmt: skip


def text(name: str) -> str:
    """The value of a setting; an empty text where it is unset. Raises UserError for a value that is no choice of it."""
    value = os.environ.get(name, "").strip()
    choices = SETTINGS[name].choices
    if value:
        _check_choice(name, value, choices)
    return value.lower() if choices else value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError where a setting has choices and `value` is none of them."""
    if choices and value.lower() not in choices:
        raise UserError(
            f"{name}={value}: is not known{paths.nearest(value, choices)}; {name} is {' or '.join(choices)}"
        )


def switch(name: str) -> bool:
    """Whether a switch such as FORCE is on. Raises UserError where its value is neither yes nor no."""
    value = os.environ.get(name, "").strip()
    if not value:
        return name in ON_BY_DEFAULT
    if value.lower() in (*YES, *NO):
        return value.lower() in YES
    raise UserError(f"{name}={value}: is neither yes nor no; write {name}=1 or {name}=0")


def number(name: str) -> int | None:
    """The whole number of a setting, None where it is unset. Raises UserError where it is none, or less than it may be:
    0 of the kind `count`, otherwise 1."""
    value, least = text(name), 0 if SETTINGS[name].kind == "count" else 1
    if value and (not re.fullmatch(r"0|[1-9][0-9]{0,17}", value) or int(value) < least):
        raise UserError(f"{name}={value}: is not a whole number from {least} on")
    return int(value) if value else None


def values(name: str) -> list[str]:
    """The blank-separated values of a setting or of its plural, each once.

    Raises UserError where both are set. What stands on make's command line goes before a variable of the environment.
    """
    spelled = [name, *(plural for plural, single in PLURALS.items() if single == name)]
    given = {
        each: os.environ[each].split() for each in spelled if os.environ.get(each, "").strip() and not _alien(each)
    }
    typed = {each: found for each, found in given.items() if each in typed_names()}
    given = typed or given
    if choices := SETTINGS[name].choices:
        for each, found in given.items():
            for value in found:
                _check_choice(each, value, choices)
            given[each] = [value.lower() for value in found]
    if len(given) > 1:
        both = " and ".join(f"{each}={' '.join(found)}" for each, found in given.items())
        raise UserError(f"{both}: they mean the same; give one of them")
    return list(dict.fromkeys(value for found in given.values() for value in found))


def category() -> str:
    """The category that CATEGORY names, an empty text for all of them. Raises UserError for an unknown one."""
    value = text("CATEGORY")
    found = paths.choose(value, (*paths.CATEGORIES, "all"), "category") if value else "all"
    return "" if found == "all" else found


def takes_made() -> bool:
    """Whether made tasks may be among what is selected: they have to be named, by CATEGORY=made or with DATASET.

    Real datasets and made tasks are then never mixed because somebody named nothing.
    """
    return category() == paths.MADE or bool(values("DATASET"))


def typed_names() -> list[str]:
    """The variables that stand on make's command line, which the Makefile passes on."""
    return os.environ.get("MAKE_SETTINGS", "").split()


def _alien(name: str) -> bool:
    """Whether RANK is another program's: torchrun and other launchers export the rank of a process."""
    return name == "RANK" and "WORLD_SIZE" in os.environ and name not in typed_names()


def check(targets: list[str]) -> None:
    """Check what stands on make's command line against the table.

    Raises UserError for a variable that none of the targets takes, and for a value that its setting cannot have.
    """
    taken = {name for target in targets for name in [*TARGETS.get(target, {}), *EVERYWHERE]}
    known = taken | {plural for plural, single in PLURALS.items() if single in taken}
    called = " ".join(["make", *targets])
    for name in typed_names():
        if name in known:
            _check_value(name)
        elif name in SETTINGS or name in PLURALS:
            way = f"it takes {', '.join(sorted(taken - {*EVERYWHERE}))}" if taken - {*EVERYWHERE} else "it takes none"
            raise UserError(f"{called}: does not take the setting {name}; {way}")
        elif not FOREIGN.fullmatch(name):
            near = paths.nearest(name, [*known, *SETTINGS])
            raise UserError(f"{called}: there is no setting {name}{near} (make help FOR={targets[0]} lists them)")


def _check_value(name: str) -> None:
    """Raise UserError where the value of a setting cannot be one."""
    single = PLURALS.get(name, name)
    kind = SETTINGS[single].kind
    readers = {"switch": switch, "number": number, "count": number, "values": values, "numbers": values, "text": text}
    readers[kind](single)


def lines(target: str) -> list[str]:
    """A line per setting of a target: its name, its default, what it means. Raises UserError for an unknown target."""
    if target not in TARGETS:
        raise UserError(f"FOR={target}: there is no such target{paths.nearest(target, list(TARGETS))}; make lists them")
    rows = [(name, default, SETTINGS[name].help) for name, default in TARGETS[target].items()]
    return [f"  {name:<22} {means}{f' (default: {default})' if default else ''}" for name, default, means in rows]


def table() -> list[str]:
    """All settings as a Markdown table, for the README: name, meaning, the targets that take it."""
    head = ["| setting | what it means | targets |", "| --- | --- | --- |"]
    users = {name: [target for target, takes in TARGETS.items() if name in takes] for name in SETTINGS}
    return head + [
        f"| `{name}` | {setting.help} | {', '.join(users[name]) or 'all'} |" for name, setting in SETTINGS.items()
    ]
