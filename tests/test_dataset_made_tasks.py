"""The made tasks: the answers are right, as somebody who reads the instructions finds them, and the files are sound."""

import hashlib
import itertools
import json
import random
import re
from pathlib import Path

import pytest

from paragen.common import paths
from paragen.common.cli import UserError
from paragen.dataset import checks, dataset_info, made_rules, made_tasks, names
from paragen.dataset.made_rules import all_tasks

TASKS = all_tasks()
SOME = [task for number, task in enumerate(TASKS) if number % 16 == 4]  # one of each rule
EVERY_TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
ORDINALS = {"first": 1, "second": 2, "third": 3, "fourth": 4}
KIND_OF = {word: kind for kind, words in made_rules.WORDS.items() for word in words.split()}
SIGNS, SIGNS_THEMSELVES = "comma semicolon colon dash slash bar plus equals star arrow tilde hash", ",;:-/|+=*>~#"


def rows_in(content: dict[str, bytes], ending: str) -> list[dict]:
    return json.loads(next(text for name, text in content.items() if name.endswith(ending)))


def lines_in(rows: list[dict]) -> list[str]:
    return [row["prompt"].split("\n")[1] for row in rows]


# --- an independent reader of the instructions


def read_word(text: str, line: str) -> str:
    """The word of a line that a text speaks of: `the second to last word`, `word number 2 counted from the end`."""
    if found := re.search(r"word number (\d)( counted from the end)?", text):
        count, from_end = int(found[1]), bool(found[2])
    else:
        found = re.search(
            r"(?:(\w+) to last|(last)|(first|second|third|fourth))(?: and the \S+(?: to last)?)? word", text
        )
        assert found, text
        count, from_end = ORDINALS[found[1] or found[3] or "first"], bool(found[1] or found[2])
    pattern = rf"(\S+)(?: \S+){{{count - 1}}}$" if from_end else rf"^(?:\S+ ){{{count - 1}}}(\S+)"
    return re.search(pattern, line)[1]


def solve_word(text: str, line: str) -> str:
    word = read_word(text, line)
    return word.upper() if "in capital letters" in text else word


def solve_separator(text: str, line: str) -> str:
    if found := re.search(r"like this: one(.+)two$", text):
        return re.sub(" ", lambda _: found[1], line)
    if found := re.search(r'with "(.+)":', text):
        sign = found[1]
    else:
        called = re.search(r"(?:Put|with) (?:an?|the word) (\w+)", text)[1]
        signs = dict(zip(SIGNS.split(), SIGNS_THEMSELVES, strict=True))
        sign = signs.get(called, called)
    return line.replace(" ", sign + " " if sign in ",;:" else f" {sign} ")


def solve_letter(text: str, line: str) -> str:
    letter = re.search(r'letter (\w)|all (\w) from|"(\w)"', text)
    return "".join(character for character in line if character not in letter.groups())


def solve_kind(text: str, line: str) -> str:
    wanted = re.search(r"(?:is|names|out) an? (.+?)(?:\?|:|\.)", text)[1]
    phrases = {
        "part of the body": "body", "piece of clothing": "clothes", "musical instrument": "instrument",
        "piece of furniture": "furniture", "kind of weather": "weather",
    }  # fmt: skip
    (word,) = (word for word in line.split() if KIND_OF[word] == phrases.get(wanted, wanted))
    return word


def solve_mark(text: str, line: str) -> str:
    word = read_word(text, line)
    (form,) = (
        form for form in ("capital letters", "square brackets", "between stars", "double quotes") if form in text
    )
    marked = {
        "capital letters": word.upper(), "square brackets": f"[{word}]", "between stars": f"*{word}*",
        "double quotes": f'"{word}"',
    }[form]  # fmt: skip
    return re.sub(rf"\b{word}\b", lambda _: marked, line)


def solve_order(text: str, line: str) -> str:
    text = text.lower()
    if found := re.search(r"(?:swap|let) the (.+?) and the (.+?) word", text):
        one, other = (read_word(f"{called} word", line) for called in found.groups())
        exchange = {one: other, other: one}
        return re.sub(r"\S+", lambda word: exchange.get(word[0], word[0]), line)
    if found := re.search(r"(?:move|take) (.+? word) .*\b(start|end)", text):
        word = read_word(found[1], line)
        rest = re.sub(rf" ?\b{word}\b", "", line).strip()
        return f"{word} {rest}" if found[2] == "start" else f"{rest} {word}"
    four = r"\S+ \S+ \S+ \S+"
    patterns = {"all words": "()(.*)()", "first four words": f"()({four})(.*)", "last four words": f"(.*?)({four})()"}
    (pattern,) = (pattern for which, pattern in patterns.items() if which in text.removeprefix("keep all words, but"))
    before, part, after = re.fullmatch(pattern, line).groups()
    return before + " ".join(reversed(part.split())) + after


SOLVERS = {
    "word": solve_word, "separator": solve_separator, "letter": solve_letter, "kind": solve_kind, "mark": solve_mark,
    "order": solve_order,
}  # fmt: skip


@EVERY_TASK
def test_the_answers_are_those_of_a_reader_of_the_instructions(task):
    content = made_tasks.contents_of(task, 3, 60)
    rows = rows_in(content, "_train.json") + rows_in(content, "_test.json")[:40]
    instructions = set()
    for row in rows:
        instruction, line = row["prompt"].split("\n")
        instructions.add(instruction)
        assert row["response"] == SOLVERS[task.rule](instruction, line), row
    assert instructions == set(task.instructions) and len(instructions) == 4


# --- the tasks


def test_six_rules_have_sixteen_variants_each():
    rules = [task.rule for task in TASKS]
    assert len(TASKS) == 96 and {rules.count(rule) for rule in rules} == {16} and len(set(rules)) == 6
    assert {task.family for task in TASKS} == {f"made-{rule}" for rule in rules}
    assert len({paths.loose(task.name) for task in TASKS}) == 96, "what a user types must mean one of them"
    assert all(names.is_dataset_name(task.name) and task.name.startswith("made-") for task in TASKS)


def test_no_word_is_of_two_kinds():
    words = [word for words in made_rules.WORDS.values() for word in words.split()]
    assert len(words) == len(set(words)) == 160


def test_each_task_differs_from_each_other():
    order = random.Random("lines")
    lines = [order.sample(made_rules.VOCABULARY, order.randint(5, 7)) for _ in range(150)]
    answers = {task.name: [task.answer(line) for line in lines] for task in TASKS}
    for (one, first), (other, second) in itertools.combinations(answers.items(), 2):
        fitting = [pair for pair in zip(first, second, strict=True) if any(pair)]
        assert sum(a != b for a, b in fitting) >= len(fitting) / 3 and len(fitting) > 10, (one, other)
    assert all(len(task.instructions) == 4 and len(task.descriptions) == 8 for task in TASKS)
    texts = [text for task in TASKS for text in (*task.instructions, *task.descriptions)]
    assert len(texts) == len(set(texts)), "an instruction or a description that two tasks share says too little"


def test_the_same_seed_gives_the_same_bytes_on_every_machine():
    """A change of this hash makes what users have collected stale: change rules and wordings for a good reason only."""
    digest = hashlib.sha256()
    for task in TASKS:
        for name, content in made_tasks.contents_of(task, 0, 8).items():
            digest.update(name.encode() + content)
    assert digest.hexdigest() == "50715fdeae455bcb7c32aec43363e50670aeb3595737f835421978403ac7e7ee"
    first, other = ([*made_tasks.contents_of(TASKS[0], seed, 8).values()] for seed in (0, 1))
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("task", SOME, ids=lambda task: task.name)
def test_no_line_to_score_on_is_trained_on(task):
    content = made_tasks.contents_of(task, 0, 2000)
    train, test = (rows_in(content, ending) for ending in ("_train.json", "_test.json"))
    known = json.loads(content[f"made/tasks/{task.name}.json"])
    lines = [*lines_in(train), *lines_in(test), *(example["input"] for example in known["Positive Examples"])]
    assert (len(train), len(test), len(set(lines))) == (2000, 200, len(lines))
    assert not any(row["response"] == line for row, line in zip(train, lines_in(train), strict=True))


@pytest.mark.parametrize("task", SOME, ids=lambda task: task.name)
def test_a_task_file_is_one_of_natural_instructions(task):
    """What its own test demands of a task file, and that it holds the rows that LLaMA-Factory reads."""
    content = made_tasks.contents_of(task, 0, 40)
    known = json.loads(content[f"made/tasks/{task.name}.json"])
    keys = {"Definition", "Input_language", "Output_language", "Instruction_language", "Positive Examples"}
    keys |= {"Negative Examples", "Instances", "Contributors", "Categories", "Source", "Domains"}
    assert keys <= known.keys() and all(isinstance(value, list) for value in known.values())
    assert tuple(known["Definition"]) == task.descriptions and "seed 0" in known["Source"][0]
    examples = known["Positive Examples"] + known["Negative Examples"]
    assert len(known["Positive Examples"]) > 1 and len(known["Negative Examples"]) == 1
    assert all(set(map(type, example.values())) == {str} for example in examples)
    assert all({"input", "output", "explanation"} == example.keys() for example in examples)
    right, wrong = known["Positive Examples"][0], known["Negative Examples"][0]
    assert right["input"] == wrong["input"] and right["output"] != wrong["output"]
    instances = known["Instances"]
    assert 25 < len(instances) <= 6500 and len({instance["input"] for instance in instances}) == len(instances)
    assert not {example["input"] for example in examples} & {instance["input"] for instance in instances}
    for part in ("train", "test"):
        rows = rows_in(content, f"_{part}.json")
        of_part = [one for one in instances if one["id"].startswith(f"{task.name}-{part}-")]
        assert [(one["input"], one["output"]) for one in of_part] == [
            (line, [row["response"]]) for line, row in zip(lines_in(rows), rows, strict=True)
        ]


# --- writing and registering them


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A data folder with a task of each rule, of few rows. Read only."""
    folder = tmp_path_factory.mktemp("data")
    made_tasks.write(0, 8, False, folder, SOME)
    return folder


def test_what_is_written_is_registered_and_without_faults_or_warnings(data):
    info = dataset_info.read_info(data)
    assert len(info) == 2 * len(SOME)
    assert info["made-word-third"]["family"] == "made-word" and "family" not in info["made-word-third_test"]
    assert {entry["metric"] for entry in info.values()} == {"exact"}
    assert [*info["made-word-third"]["descriptions"].values()] == [
        list(task.descriptions) for task in TASKS if task.name == "made-word-third"
    ]
    for name in [name for task in SOME for name in (task.name, f"{task.name}_test")]:
        assert checks.check_entry(name, info[name], info, info, data) == ([], [], []), name


def test_a_second_call_does_nothing_and_an_interrupted_one_is_continued(data, tmp_path):
    made_tasks.write(0, 8, False, tmp_path, SOME)
    before = contents_of(tmp_path)
    assert [*before.values()] == [*contents_of(data).values()]
    (tmp_path / "made" / "made-word-third_test.json").unlink()
    (tmp_path / "dataset_info.json").unlink()
    written = made_tasks.write(0, 8, False, tmp_path, SOME)
    assert (written.written, written.unchanged) == (1, 3 * len(SOME) - 1) and contents_of(tmp_path) == before


def test_other_content_is_refused_before_anything_is_written(data, tmp_path):
    file = tmp_path / "made" / "made-word-third_train.json"
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(UserError, match=r"made-word-third_train.json: is there with other content .*FORCE=1"):
        made_tasks.write(0, 8, False, tmp_path, SOME)
    assert contents_of(tmp_path) == {file: b"mine"}
    made_tasks.write(0, 8, True, tmp_path, SOME)
    assert file.read_bytes() == (data / "made" / file.name).read_bytes()


def test_a_name_that_stands_for_another_file_is_refused(tmp_path):
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"made-word-third": {"file_name": "math/mine.json"}}))
    with pytest.raises(UserError, match="'made-word-third' is already registered for 'math/mine.json'"):
        made_tasks.write(0, 8, False, tmp_path, SOME)
    assert [*contents_of(tmp_path)] == [info]


def test_more_rows_than_a_task_file_holds_are_refused(tmp_path):
    with pytest.raises(UserError, match="ROWS=6301: a task has at most 6300 rows"):
        made_tasks.write(0, 6301, False, tmp_path, SOME)


def test_what_a_user_added_to_an_entry_stays(tmp_path):
    made_tasks.write(0, 8, False, tmp_path, SOME)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["made-word-third"]["descriptions"]["me"] = ["The third one."]
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    made_tasks.write(1, 8, True, tmp_path, SOME)
    assert dataset_info.read_info(tmp_path)["made-word-third"]["descriptions"]["me"] == ["The third one."]
