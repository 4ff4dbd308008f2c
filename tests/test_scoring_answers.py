"""A test split tells by its responses how it is scored, generated texts are read as people would, and a score says how
sure it is."""

import json
import subprocess
import sys

import numpy as np
import pytest

from paragen.common import paths
from paragen.dataset import dataset_info, row_texts
from paragen.scoring import answers, questions

LETTERS = ["[A]", "[B]", "[C]", "[D]"]


def row(prompt: str, response: str = "", **more) -> dict:
    return {"system": "", "prompt": prompt, "response": response, "images": [], **more}


def listed(*labels: str, response: str = "", mark: str = ":", after: str = "") -> dict:
    lines = [f"{label}{mark} what {label} says" for label in labels]
    return row("\n".join(["Which is it?", *lines]) + after, response)


def test_the_demo_rows_are_choices_of_two_letters():
    info = dataset_info.entry_of("Demo_test", paths.DATA)
    file = dataset_info.data_file("Demo_test", paths.DATA)
    rows = [row_texts.texts_of(entry, info) for entry in json.loads(file.read_text())]
    everywhere = answers.distinct_responses(rows)
    assert answers.metric_of(rows) == "choice"
    for demo in rows:
        options = answers.options_of(demo, everywhere)
        assert options == LETTERS[:2]
        assert answers.chosen_option(demo["response"], options) == demo["response"]


@pytest.mark.parametrize(
    "rows",
    [
        [listed(*"ABCD", response="[C]"), listed(*"1234", response=" [3]\n"), listed(*"ABC", response="[A]")],
        [row("is water wet?", "[True]"), row("is ice warm?", "[False]")],
        [row("is water wet?", "[True]")],
        [listed(*"AB", response="[A]")],
    ],
)
def test_bracketed_options_are_choices(rows):
    assert answers.metric_of(rows) == "choice"


@pytest.mark.parametrize(
    "responses",
    [
        [r"Half of six is $6/2=\boxed{3}$.", r"\[x = \boxed{\frac{1}{2}}.\]"],
        ["She pays 3 * 4 = <<3*4=12>>12.\n#### 12", "It is\n#### 1,250"],
        ["12", "-3.5", "1,250", r"$\frac{1}{2}$", r"2\sqrt{3}", "x = 3", "(3, 4)", "50%"],
        [*["12"] * 19, "there is none"],
    ],
)
def test_stated_results_are_mathematics(responses):
    assert answers.metric_of([row("How many?", response) for response in responses]) == "math"


@pytest.mark.parametrize(
    "responses",
    [
        ["print('hello')", "x += 1", "24"],
        ["[A] because it is cold", "[B]"],
        ["[A]", "[A]"],  # no options in sight, and only one response: nothing to choose from
        ["[A]", ""],
        ["#### Step 1\nAdd them.", "#### Step 2\nSubtract."],
        [*["12"] * 18, "there is none", "neither"],
        ["The derivative is $2x$ and the maximum $3$."],
        [],
    ],
)
def test_everything_else_is_scored_by_its_loss(responses):
    assert answers.metric_of([row("Say it.", response) for response in responses]) == "loss"


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        (listed(*"ABC", response="[B]"), LETTERS[:3]),
        (listed(*"ABCDE", response="[B]"), [*LETTERS, "[E]"]),
        (listed(*"123", response="[3]"), ["[1]", "[2]", "[3]"]),
        (listed(*"AB", response="[B]", mark=")"), LETTERS[:2]),
        (listed(*"12", response="[2]", mark="."), ["[1]", "[2]"]),
        (listed(*"AB", response="[A]", after="\nPlease choose from [A]/[B]/[C]/[D]."), LETTERS[:2]),
        (listed(*"AB"), LETTERS[:2]),
        (row("is water wet?", "[False]"), ["[True]", "[False]"]),
    ],
)
def test_the_options_are_those_that_the_prompt_lists(asked, options):
    assert answers.options_of(asked, ["[A]", "[Z]"]) == options


@pytest.mark.parametrize(
    ("prompt", "response", "options"),
    [
        ("A: Shall we?\nB: Yes.\nWhat does B say?\nA: yes\nB: no\nC: nothing", "[C]", LETTERS[:3]),
        ("Three things are said:\n1. it is\n2. it was\nWhich is true?\nA: 1\nB: 2\nC: both", "[B]", LETTERS[:3]),
        ("Which?\nA: a thing of which\nI. Newton wrote\nB: another", "[A]", LETTERS[:2]),
        ("It holds\n1.5 litres\n2.5 at most. How many?", "[B]", LETTERS),
        ("C: a line that no list begins with\nD: another", "[C]", LETTERS),
        ("Which?\nA: one\nB: two", "[D]", LETTERS),  # the list has not its response: it is another list
        ("What comes next?", "[A]", LETTERS),
    ],
)
def test_lines_that_look_like_options_are_none(prompt, response, options):
    assert answers.options_of(row(prompt, response), LETTERS) == options


def test_in_a_conversation_the_last_question_counts():
    said = [
        {"role": "user", "content": "Which?\nA: one\nB: two\nC: three"},
        {"role": "assistant", "content": "[A]"},
        {"role": "user", "content": "And now?\nA: one\nB: two"},
        {"role": "assistant", "content": "[B]"},
    ]
    assert answers.options_of(row(said[0]["content"], "[B]", messages=said), LETTERS) == LETTERS[:2]


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("[B]", "[B]"),
        (" the answer is [ b ], not [A]", "[B]"),
        ("[B][A]", "[B]"),
        ("B", None),
        ("[]", None),
        ("[E] or [A]", None),
        ("[B", None),
        ("", None),
    ],
)
def test_the_first_brackets_are_the_choice(text, option):
    assert answers.chosen_option(text, LETTERS) == option


def test_true_and_false_are_read_in_any_case():
    assert answers.chosen_option("[ true ]", ["[True]", "[False]"]) == "[True]"


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        (r"So it is $\boxed{\frac{1}{2}}$.", "0.5"),
        (r"\boxed{x+1}", r"We get \[\boxed{1 + x}\]"),
        (r"\boxed{2\sqrt{3}}", r"2\sqrt{3}"),
        (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$."),
        (r"\boxed{(3, 4)}", "(3, 4)"),
        (r"the answers are $\boxed{-2}$ and $\boxed{1}$.", r"\boxed{1, -2}"),
        (r"first $\boxed{7}$, but then $7+1=\boxed{8}$", "8"),
        ("They earn 10 * 125 =\n#### 1,250", "1250"),
        ("#### 1,250", "#### 1250"),
        ("#### 1250", "Adding up:\n#### $1,250.00"),
        ("#### 1,250", r"\boxed{1{,}250}"),
        ("#### 1250", "So he has 3 left and earns $1,250"),
        ("#### -5", "It falls to -5."),
        ("#### 18", "12 + 6 = 18"),
        ("#### 18", "#### Step 1\nAdd 12 and 6 and get 18"),
        ("#### 18", "#### 18\n\nQuestion: and then?\n#### 20"),
    ],
)
def test_the_same_result_may_be_written_in_many_ways(gold, text):
    assert answers.same_result(gold, text) is True


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("#### 18", "#### 19"),
        ("#### 1,250", "1"),
        (r"\boxed{2\sqrt{3}}", "2"),
        (r"the answers are $\boxed{-2}$ and $\boxed{1}$.", r"\boxed{1}"),
        (r"\boxed{3}", r"3 at first, but $\boxed{4}$ in the end"),
        (r"\boxed{x+1}", r"\boxed{x-1}"),
    ],
)
def test_other_results_are_wrong(gold, text):
    assert answers.same_result(gold, text) is False


@pytest.mark.parametrize("text", ["", "I do not know", r"it is \boxed{", r"\boxed{}"])
def test_a_text_without_a_result_is_neither_right_nor_wrong(text):
    assert answers.parse_result(text) == []
    assert answers.same_result("#### 18", text) is None


def test_a_response_without_a_result_is_said():
    with pytest.raises(ValueError, match="no mathematical result can be read in the response 'there is none'"):
        answers.same_result("there is none", "18")


def test_endless_commands_are_told_from_an_expression_at_once():
    assert answers.metric_of([row("Say it.", r"\pi" * 39 + "##")]) == "loss"


def test_a_share_of_few_rows_is_less_sure():
    # Wilson's formula by hand: 8 of 10 at 95 %
    z, n, p = 1.959964, 10, 0.8
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert answers.share_interval(8, 10) == pytest.approx(
        [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    )
    few, many = answers.share_interval(8, 10), answers.share_interval(800, 1000)
    assert few[0] < many[0] < 0.8 < many[1] < few[1]


def test_a_share_stays_between_none_and_all():
    assert answers.share_interval(0, 5)[0] == 0 and 0 < answers.share_interval(0, 5)[1] < 1
    assert answers.share_interval(5, 5)[1] == 1 and 0 < answers.share_interval(5, 5)[0] < 1


def test_the_interval_of_a_loss_is_what_drawing_the_rows_again_gives():
    random = np.random.default_rng(0)
    counts = random.integers(1, 200, 400)
    sums = counts * random.gamma(2, 0.5, 400)
    drawn = random.integers(0, 400, (4000, 400))
    again = sums[drawn].sum(1) / counts[drawn].sum(1)
    assert answers.loss_interval(sums, counts) == pytest.approx(np.percentile(again, [2.5, 97.5]), rel=0.02)


def test_a_single_row_has_its_mean_for_an_interval():
    assert answers.loss_interval(np.array([3.0]), np.array([4])) == [0.75, 0.75]


def test_rows_of_equal_loss_leave_no_doubt():
    assert answers.loss_interval(np.array([2.0, 4.0, 8.0]), np.array([1, 2, 4])) == pytest.approx([2, 2])


def test_what_is_returned_can_be_written_as_json():
    intervals = [answers.share_interval(1, 3), answers.loss_interval(np.array([1, 3]), np.array([2, 2]))]
    assert json.loads(json.dumps(intervals)) == intervals


def test_importing_it_is_quick():
    heavy = "{'numpy', 'scipy', 'sympy', 'math_verify', 'torch'}"
    code = "import sys; from paragen.scoring import answers; "
    code += f"sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT / "utils", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_row_that_lacks_a_column_is_read_as_the_datasets_library_reads_it():
    from llamafactory.hparams import DataArguments

    entry = {"columns": {"prompt": "prompt", "response": "response", "system": "system"}}
    row = questions.convert_row({"prompt": "a", "response": "b"}, entry, DataArguments(template="qwen"))
    assert row["_prompt"] == [{"role": "user", "content": "a"}] and not row["_system"]


def test_only_a_split_whose_entries_all_say_so_is_exact():
    """Short free texts alone are not: what existing datasets are scored by stays."""
    columns = {"prompt": "prompt", "response": "response"}
    rows = [{"prompt": "Say it.", "response": "red"}, {"prompt": "Say it.", "response": "12"}]
    plain, exact = {"columns": columns}, {"columns": columns, "metric": "exact"}

    def metric_of(*parts) -> str:
        return questions.Split("X", True, list(parts)).metric

    assert metric_of((exact, rows)) == metric_of((exact, rows[:1]), (exact, rows[1:])) == "exact"
    assert metric_of((plain, rows)) == metric_of((exact, rows), (plain, rows)) == "loss"
    assert metric_of((plain, rows[1:])) == "math" and metric_of((exact, rows[1:])) == "exact"
