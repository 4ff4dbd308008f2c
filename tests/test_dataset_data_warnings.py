"""What a user is told about rows that are sound, but that a model learns little from."""

import json
from pathlib import Path

import pytest

from paragen.common.cli import UserError
from paragen.dataset import data_warnings

ENTRY = {"file_name": "math/A.json", "columns": {"prompt": "prompt", "response": "response", "system": "system"}}
UNEVEN = "uneven answers: {}, where an even share is {} %"
TALKS = {"file_name": "math/A.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}}


def answered(*answers: str) -> list[dict]:
    """Rows with these answers to different prompts."""
    return [{"prompt": f"{number}?", "response": answer, "system": ""} for number, answer in enumerate(answers)]


def talk(*turns: str) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]}


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        (["[A]"] * 3084, ["one answer, '[A]', in 3,084 of 3,084 rows (100 %)"]),  # PIQA_test as it is published
        (["[A]"] * 95 + ["[B]"] * 5, ["one answer, '[A]', in 95 of 100 rows (95.0 %)"]),
        (["[A]"] * 9999 + ["[B]"], ["one answer, '[A]', in 9,999 of 10,000 rows (99.9 %)"]),
        (["I cannot."] * 60 + list(map(str, range(40))), ["one answer, 'I cannot.', in 60 of 100 rows (60.0 %)"]),
        (["yes"] * 80 + ["no"] * 20, [UNEVEN.format("'yes' in 80 of 100 rows (80.0 %)", 50)]),
        (["A"] * 120 + list("BCD") * 40, [UNEVEN.format("'A' in 120 of 240 rows (50.0 %)", 25)]),
        (["A"] * 85 + ["B", "C", "D", "E"] * 3 + ["B"] * 3, [UNEVEN.format("'A' in 85 of 100 rows (85.0 %)", 50)]),
        (["[True]"] * 62 + ["[False]"] * 38, []),  # BoolQ's shares
        (list("ABCD") * 140 + ["1", "2", "3"], []),  # labels that nearly nobody has do not make the others uneven
        (["A"] * 9, []),  # too few to say
        (["A"] * 7 + ["B"] * 4, []),  # chance
        (["A"] * 15 + list("BCDEFGHIJ"), []),  # as many answers as rows of each
        (list(map(str, range(50))), []),
        (["", " \n", *map(str, range(48))], ["empty answers: 2 of 50 rows (4.0 %), rows 1, 2"]),
        (["", *map(str, range(48))], ["empty answers: 1 of 49 rows (2.0 %), row 1"]),
        (
            ["x" * 100] * 2 + [f"{n}" * 50 for n in range(10, 58)] + ["z" * 2500],
            ["very long answers: 1 of 51 rows (2.0 %); row 51 has 2,500 characters, the median is 100"],
        ),
        (["x" * 1999 + str(n) for n in range(30)], []),
    ],
)  # fmt: skip
def test_the_answers(answers, told):
    assert data_warnings.of_rows(answered(*answers), ENTRY) == told


def test_prompts_that_repeat():
    rows = answered("a", "b", "c", "d", "e")
    assert data_warnings.of_rows(rows, ENTRY) == []
    rows[3] |= {"prompt": " 0?"}
    [told] = data_warnings.of_rows(rows, ENTRY)
    assert told.startswith(
        "repeated prompts: 1, 1 of them with different answers, 2 times, in 2 of 5 rows (40.0 %); row 4 "
    )
    rows[3] |= {"system": "another task"}
    assert data_warnings.of_rows(rows, ENTRY) == []
    rows = [row for row in answered(*map(str, range(271))) for _ in range(4)]  # Mu-Math as it is published
    assert data_warnings.of_rows(rows, ENTRY) == [
        "repeated prompts: 271, up to 4 times each, in 1,084 of 1,084 rows (100 %); row 2 repeats row 1"
    ]


def test_all_turns_before_the_answer_are_the_prompt_and_pictures_belong_to_it():
    rows = [talk("hi", "hello", "why?", "so"), talk("hi", "well", "why?", "so"), talk("hi", "hello", "why?", "as")]
    [told] = data_warnings.of_rows(rows, TALKS)
    assert told.startswith("repeated prompts: 1, 1 of them with different") and told.endswith("row 3 repeats row 1")
    entry = {**ENTRY, "columns": {**ENTRY["columns"], "images": "image"}}
    rows = [{"prompt": "<image>?", "response": str(n), "system": "", "image": f"{n}.png"} for n in range(3)]
    assert data_warnings.of_rows(rows, entry) == []


def test_prompts_without_responses_have_no_answers_to_warn_of():
    entry = {"file_name": "math/A.json", "columns": {"prompt": "prompt"}, "prompts_only": True}
    assert data_warnings.of_rows([{"prompt": f"{n}?"} for n in range(30)], entry) == []
    assert data_warnings.of_rows([{"prompt": f"{n // 2}?"} for n in range(30)], entry) == [
        "repeated prompts: 15, up to 2 times each, in 30 of 30 rows (100 %); row 2 repeats row 1"
    ]


def test_a_warning_is_one_line_that_a_manifest_may_have():
    rows = answered(*["a\nb\u2028\x1b[31m" + "c" * 80] * 20)
    [told] = data_warnings.of_rows(rows, ENTRY)
    assert told.isprintable() and len(told) < 160


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data folder with A, whose last 4 of 24 rows are held out, and A_test."""
    (tmp_path / "math").mkdir()
    rows = answered(*map(str, range(24)))
    rows[20]["prompt"] = rows[2]["prompt"]
    (tmp_path / "math" / "A.json").write_text(json.dumps(rows))
    (tmp_path / "math" / "A_test.json").write_text(json.dumps([rows[5], *answered(*["[A]"] * 30)[25:]]))
    info = {"A": {**ENTRY, "held_out": 4}, "A_test": {**ENTRY, "file_name": "math/A_test.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def test_what_a_training_sees_and_what_it_is_scored_on(folder):
    entry = {**ENTRY, "held_out": 4}
    assert data_warnings.of_trained("A", "math/A.json", entry, 20, folder) == [
        "A: prompts that also stand in its own 4 held-out rows: 1 of 20 rows (5.0 %); row 3 is row 1 there",
        "A: prompts that also stand in A_test: 1 of 20 rows (5.0 %); row 6 is row 1 there",
    ]
    assert data_warnings.of_trained("A", "math/A.json", entry, 2, folder) == []
    (folder / "math" / "A_test.json").write_text(
        json.dumps(answered(*["[A]"] * 30)[25:] + answered(*["[A]"] * 60)[30:])
    )
    assert data_warnings.of_trained("A", "math/A.json", entry, 20, folder) == [
        "A: prompts that also stand in its own 4 held-out rows: 1 of 20 rows (5.0 %); row 3 is row 1 there",
        "A_test: one answer, '[A]', in 35 of 35 rows (100 %)",
    ], "a file that changed is read again"


def test_faulty_rows_are_left_to_check_data_and_stop_nothing(folder):
    (folder / "math" / "A_test.json").write_text("[{]")
    assert [line for line in data_warnings.of_trained("A", "math/A.json", ENTRY, 20, folder) if "A_test" in line] == []
    (folder / "math" / "A_test.json").unlink()
    assert data_warnings.of_trained("A", "math/A.json", ENTRY, 20, folder) == []
    (folder / "math" / "A.json").write_text(json.dumps([*answered("a"), {"prompt": 1}]))
    assert data_warnings.of_trained("A", "math/A.json", ENTRY, 2, folder) == [
        "A: some rows have faults, which `make check-data` lists"
    ]
    (folder / "math" / "A.json").unlink()
    with pytest.raises(UserError, match="A.json: there is no such file"):
        data_warnings.of_trained("A", "math/A.json", ENTRY, 2, folder)
