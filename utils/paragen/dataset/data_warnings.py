"""Warnings about a dataset: its rows are sound, but a model learns little from them, or a score on them means little.

A warning is no fault: nothing is refused for it, and no exit status changes. Each is a phrase of one line.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paragen.common import files
from paragen.common.cli import UserError
from paragen.common.paths import relative
from paragen.dataset import comparison, dataset_info, row_texts
from paragen.dataset.names import test_split_name
from paragen.dataset.row_faults import row_faults

Row = dict[str, Any]

FEWEST = 10  # rows: shares of fewer say nothing
NEARLY_ALL = 0.9  # the share of one answer from which a set with few different answers is one of a single answer
MAJORITY = 0.5  # the same for a set of free answers
LABELS = 20  # the most different answers that count as labels
RARE = 0.05  # a label that is less frequent than this share of the most frequent one is not counted as one
UNEVEN = 1.5  # the least ratio of the largest share to an even one
SIGMAS = 4  # and by how many standard deviations it exceeds it, so that chance alone raises no warning
LONG_RATIO, LONG_CHARACTERS = 10, 2000  # a very long answer has more characters than both say; the ratio to the median
SHOWN = 3  # rows that a warning names at most
FAULTY = "some rows have faults, which `make check-data` lists"

_found: dict[tuple, list[str]] = {}  # what `of_trained` found in this process, by what it read


def of_rows(rows: Sequence[Row], entry: dict[str, Any]) -> list[str]:
    """The warnings about some rows alone: their answers and their repeated prompts.

    Args:
        rows: rows without faults (see row_faults.py).
        entry: their entry in dataset_info.json.
    """
    found = [repeated_prompts(rows, entry)]
    if not entry.get(dataset_info.PROMPTS_ONLY):
        answers = [row_texts.texts_of(row, entry)["response"].strip() for row in rows]
        found = [one_answer(answers) or uneven_answers(answers), empty_answers(answers), long_answers(answers), *found]
    return [warning for warning in found if warning]


def of_dataset(
    name: str,
    file: Path,
    rows: Sequence[Row],
    entry: dict[str, Any],
    info: dict[str, Any],
    data_dir: Path,
    trained: int | None = None,
) -> list[str]:
    """All warnings about a dataset: about its rows, and about those that its train and test split have in common.

    Args:
        name: the dataset's.
        file: its file.
        rows: the file's rows, without faults.
        entry: its entry.
        info: the entries of dataset_info.json in which its train or test split is looked for.
        data_dir: the folder of dataset_info.json.
        trained: how many of the first rows are trained on, where that is known; the others are then not looked at,
            except for the held-out ones.
    """
    last = entry.get(dataset_info.HELD_OUT, 0)
    first = Rows(name, rows[: len(rows) - last if trained is None else trained], entry)
    found = of_rows(rows if trained is None else first.rows, entry)
    if last:
        rest = rows[max(len(first.rows), len(rows) - last) :]
        found += shared_prompts(first, Rows(f"its own {len(rest):,} held-out rows", rest, entry))
    for other, path in comparison.registered_files(info, data_dir).items():
        if other != name and comparison.is_other_split(other, path, name, file):
            found += shared_prompts(first, read(other, path, info[other]))
    return found


def of_trained(name: str, file_name: str, entry: dict[str, Any], count: int, data_dir: Path) -> list[str]:
    """The warnings about a dataset's first rows and about its registered test split, `<dataset>: <warning>` each.

    Args:
        name: the dataset's.
        file_name: its file, relative to `data_dir`.
        entry: its entry in dataset_info.json, with or without `file_name`.
        count: how many of its first rows are trained on.
        data_dir: the folder of dataset_info.json.

    A process reads unchanged files once. Raises UserError where the file is gone.
    """
    file, test = Path(data_dir) / file_name, test_split_name(name)
    splits = {known: value for known, value in dataset_info.read_info(data_dir).items() if known == test}
    found = comparison.registered_files(splits, data_dir)
    try:
        stamps = [files.stamp_of(path.stat()) for path in (file, *found.values())]
    except FileNotFoundError as error:
        raise UserError(f"{relative(Path(error.filename))}: there is no such file") from None
    key = (name, str(file), count, repr([entry, splits]), *stamps)
    if key not in _found:
        rows = read(name, file, {"file_name": file_name, **entry}).rows
        own = of_dataset(name, file, rows, entry, splits, data_dir, count) if rows else [FAULTY]
        others = of_rows(read(test, found[test], splits[test]).rows, splits[test]) if test in found else []
        _found[key] = [*(f"{name}: {text}" for text in own), *(f"{test}: {text}" for text in others)]
    return _found[key]


class Rows(NamedTuple):
    """Some rows of a dataset."""

    name: str  # what warnings call them
    rows: Sequence[Row]
    entry: dict[str, Any]

    def prompts(self) -> list[str]:
        """What identifies each row's prompt."""
        return [prompt_of(row, self.entry) for row in self.rows]


def read(name: str, file: Path, entry: Any) -> Rows:
    """The rows of a registered file; none where the entry or a row has a fault, which `make check-data` reports."""
    try:
        rows = [] if dataset_info.entry_faults(entry) else dataset_info.load_rows(file)
    except UserError:
        rows = []
    return Rows(name, [] if rows and row_faults(rows, entry) else rows, entry)


# ------------------------------------------------------------------------------------------------------- each warning


def one_answer(answers: Sequence[str]) -> str | None:
    """Warns when all rows, or nearly all, have the same answer: whatever is asked, a model learns to say that."""
    counts = Counter(answers)
    (answer, count), total = (counts.most_common(1) or [("", 0)])[0], len(answers)
    if total < FEWEST or count < (NEARLY_ALL if len(counts) <= LABELS else MAJORITY) * total:
        return None
    return f"one answer, {shown(answer)}, in {share(count, total)}"


def uneven_answers(answers: Sequence[str]) -> str | None:
    """Warns when the answers are few labels, and one of them is far more frequent than the others."""
    counts, total = Counter(answers), len(answers)
    if total < FEWEST or not 2 <= len(counts) <= min(LABELS, total // FEWEST):
        return None
    answer, count = counts.most_common(1)[0]
    even = 1 / max(2, sum(other >= RARE * count for other in counts.values()))
    if count < max(UNEVEN * even * total, even * total + SIGMAS * (total * even * (1 - even)) ** 0.5):
        return None
    return f"uneven answers: {shown(answer)} in {share(count, total)}, where an even share is {100 * even:.0f} %"


def empty_answers(answers: Sequence[str]) -> str | None:
    """Warns of answers without a visible character: a model learns to say nothing."""
    rows = [number for number, answer in enumerate(answers, 1) if not answer]
    return f"empty answers: {share(len(rows), len(answers))}, {numbered(rows)}" if rows else None


def long_answers(answers: Sequence[str]) -> str | None:
    """Warns of answers that are much longer than the others, such as those that hold another document."""
    if not answers:
        return None
    median = statistics.median(map(len, answers))
    rows = [n for n, text in enumerate(answers, 1) if len(text) > max(LONG_RATIO * median, LONG_CHARACTERS)]
    if not rows:
        return None
    length, row = max((len(answers[number - 1]), -number) for number in rows)
    counted = share(len(rows), len(answers))
    return f"very long answers: {counted}; row {-row} has {length:,} characters, the median is {median:,.0f}"


def repeated_prompts(rows: Sequence[Row], entry: dict[str, Any]) -> str | None:
    """Warns when prompts stand in several rows: they count as often, and answers that differ contradict each other."""
    places: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        places.setdefault(prompt_of(row, entry), []).append(number)
    repeated = [numbers for numbers in places.values() if len(numbers) > 1]
    if not repeated:
        return None
    texts = [row_texts.texts_of(row, entry)["response"] for row in rows]
    differing = sum(len({texts[number - 1] for number in numbers}) > 1 for numbers in repeated)
    counted, first = share(sum(map(len, repeated)), len(rows)), repeated[0]
    with_others = f", {differing:,} of them with different answers" if differing else ""
    most = f"up to {max(map(len, repeated))} times each" if len(repeated) > 1 else f"{len(first)} times"
    return (
        f"repeated prompts: {len(repeated):,}{with_others}, {most}, in {counted}; row {first[1]} repeats row {first[0]}"
    )


def shared_prompts(some: Rows, others: Rows) -> list[str]:
    """Warns, in a list, when prompts of one split stand in the other, too: a score on them tells less."""
    known = {prompt: number for number, prompt in reversed(list(enumerate(others.prompts(), 1)))}
    shared = [(number, known[prompt]) for number, prompt in enumerate(some.prompts(), 1) if prompt in known]
    if not shared:
        return []
    number, other = shared[0]
    counted = share(len(shared), len(some.rows))
    return [f"prompts that also stand in {others.name}: {counted}; row {number} is row {other} there"]


# ------------------------------------------------------------------------------------------------------------- wording


def prompt_of(row: Row, entry: dict[str, Any]) -> str:
    """What identifies the prompt of a row: everything that it has before its answer."""
    texts = row_texts.texts_of(row, entry)
    before = texts.get("messages", [])[:-1] if texts["response"] else texts.get("messages", [])
    turns = [[message["role"], message["content"]] for message in before]
    return comparison.as_text([texts["system"].strip(), texts["prompt"].strip(), turns, texts["images"]])


def share(count: int, total: int) -> str:
    """`12 of 1,119 rows (1.1 %)`; all and none alone are 100 % and 0 %."""
    percent = 100 * count / total
    digits = (
        f"{percent:.0f}" if percent in (0, 100) else f"{min(percent, 99.9):.1f}" if percent >= 0.1 else "less than 0.1"
    )
    return f"{count:,} of {total:,} rows ({digits} %)"


def shown(answer: str) -> str:
    """An answer on one line, shortened."""
    return repr(answer if len(answer) <= 60 else answer[:57] + "...")


def numbered(rows: Sequence[int]) -> str:
    """`row 5`, or `rows 5, 17, 40, ...`."""
    return (
        f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:SHOWN]))}{', ...' if len(rows) > SHOWN else ''}"
    )
