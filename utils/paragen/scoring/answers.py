"""How responses and generated texts are read, and the confidence intervals of scores.

Rows are those of `prompts.of_collection`. There are three kinds of responses: one of several options (`[B]`,
`[True]`), a mathematical result (`\\boxed{12}`, `#### 12`, `12`), and any other text.
"""

import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MATH_SHARE = 0.95  # of the responses have to state a result; some rows of a mathematical dataset answer in words
MAX_EXPRESSION = 120  # characters of a text that can be one expression
CONFIDENCE = 0.95
TRUE_OR_FALSE = ("[True]", "[False]")

OPTION = re.compile(r"\[(?:[A-Z]|\d{1,2}|True|False)\]")
BRACKET = re.compile(r"\[([^\[\]]*)\]")
# A line that begins with the label of an option: "A: text", "B) text", "(C) text", "2. text"; not "1.5 litres".
LABEL = re.compile(r"^[ \t]*[(\[]?([A-Z]|\d{1,2})[:.)\]](?:\s|$)", re.MULTILINE)
BOXED = re.compile(r"\\boxed\s*\{.*\}", re.DOTALL)
# GSM8K's last line. The result has to be alone on it: "#### Step 2" is a heading.
GSM8K_RESULT = re.compile(r"^[ \t]*####[ \t]*\$?[ \t]*(-?\$?[\d,]*\.?\d+(?:/\d+)?)[ \t]*%?\.?[ \t]*$", re.MULTILINE)
# No two letters side by side, except in a LaTeX command or in its \text{...}.
EXPRESSION = re.compile(
    r"(?:\\(?:text|mathrm|textbf)\{[^{}\n]*\}|\\(?:[a-zA-Z]+|[^a-zA-Z\n])|[a-zA-Z](?![a-zA-Z])"
    r"|[\d \t.,+\-*/^_(){}\[\]=<>|!'%°:$∞π√])++"
)


def metric_of(rows: list[dict[str, Any]]) -> str:
    """The metric that rows can be scored by, a key of `evaluation.METRICS`.

    Returns "choice" where each response is one of two or more options in brackets and nothing else. Returns "math"
    where nearly all responses (MATH_SHARE) state a result: boxed, after GSM8K's ####, or as the whole response. Returns
    "loss" otherwise, and where a row has no response.
    """
    responses = [row["response"].strip() for row in rows]
    if not responses or not all(responses):
        return "loss"
    if all(OPTION.fullmatch(response) for response in responses):
        distinct = distinct_responses(rows)
        return "choice" if all(len(options_of(row, distinct)) > 1 for row in rows) else "loss"
    return "math" if sum(map(_states_result, responses)) >= MATH_SHARE * len(responses) else "loss"


def distinct_responses(rows: list[dict[str, Any]]) -> list[str]:
    """The distinct responses of a split, without surrounding blanks, in the order of options ([2] before [10])."""
    return sorted({row["response"].strip() for row in rows}, key=lambda response: (len(response), response))


def options_of(row: dict[str, Any], responses: list[str]) -> list[str]:
    """The options of one row in order, written as its response is; its response is one of them.

    Lines such as "A: ..", "B) .." or "1. .." of the (last) question are options where their labels follow each other
    from A or 1 on. Of several such lists, the last one with the response counts.

    Args:
        row: of a split whose metric is "choice"; it may lack a response.
        responses: the split's `distinct_responses`, which are the options where a prompt lists none.
    """
    response = row["response"].strip()
    if response in TRUE_OR_FALSE:
        return list(TRUE_OR_FALSE)
    for labels in reversed(_option_lists(_question_of(row))):
        options = [f"[{label}]" for label in labels]
        if response in options or not response:
            return options
    return responses if response in responses or not response else [*responses, response]


def chosen_option(text: str, options: list[str]) -> str | None:
    """The option in the first brackets of a generated text, compared without case and blanks.

    None where there are no brackets, or where the first contain no option.
    """
    found = BRACKET.search(text)
    return _by_key(tuple(options)).get(_key(found[0])) if found else None


def parse_result(text: str) -> list[Any]:
    """The result that a text states, as math-verify reads it: sympy expressions and strings; empty where there is none.

    The first of these that the text has counts: its last box (boxes joined by "and" or a comma are one result), a line
    "#### 18", the text itself where it is one expression, and what math-verify finds in running text, which is what
    follows "the answer is", or the last number or formula.

    math-verify stops after 5 seconds by SIGALRM, so this works in the main thread alone (ValueError elsewhere). A text
    that takes longer counts as one without a result.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if not BOXED.search(text):
        if gsm8k := GSM8K_RESULT.search(text):  # the first: a base model may continue with questions of its own
            text = re.sub("[,$]", "", gsm8k[1])
        elif _is_expression(text.strip()):  # without a box, bare LaTeX is read as the first number in it
            text = rf"\boxed{{{text.strip().rstrip('.').strip('$')}}}"
    return parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()])


def same_result(gold: str, text: str) -> bool | None:
    """Whether a generated text has the same result as a response; None where no result can be read in the text.

    Results are compared by value (1/2 and 0.5 are the same, and so are x+1 and 1+x). A comparison that takes more than
    5 seconds is False. In the main thread only, see `parse_result`.

    Args:
        gold: the right response.
        text: the generated text.

    Raises ValueError where no result can be read in `gold`.
    """
    from math_verify import verify

    expected = _expected(gold)
    if not expected:
        raise ValueError(f"no mathematical result can be read in the response {_end_of(gold)!r}")
    result = parse_result(text)
    return verify(expected, result) if result else None


def share_interval(right: int, rows: int) -> list[float]:
    """The 95 % confidence interval of the share right / rows, [low, high], by Wilson's score; `rows` is at least 1."""
    from scipy.stats import binomtest

    low, high = binomtest(right, rows).proportion_ci(CONFIDENCE, method="wilson")
    return [float(low), float(high)]


def loss_interval(sums: "np.ndarray", counts: "np.ndarray") -> list[float]:
    """The 95 % confidence interval, [low, high], of a mean loss per token.

    Args:
        sums: [rows], the loss of each row, summed over its tokens, in nats.
        counts: [rows], the number of tokens of each row; their sum is at least 1.

    The mean is a ratio of two sums over rows (all losses over all tokens). Rows are independent samples, the tokens of
    a row are not, so the variance is taken over rows, by the delta method. A single row has no variance: its interval
    is its mean.
    """
    from statistics import NormalDist

    import numpy as np

    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean, rows = sums.sum() / counts.sum(), len(sums)
    if rows == 1:
        return [float(mean)] * 2
    errors = sums - mean * counts
    deviation = np.sqrt(rows / (rows - 1) * (errors**2).sum()) / counts.sum()
    half = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * deviation
    return [float(max(mean - half, 0)), float(mean + half)]


def _states_result(response: str) -> bool:
    return bool(BOXED.search(response) or GSM8K_RESULT.search(response) or _is_expression(response))


def _is_expression(text: str) -> bool:
    """Whether a text is one short expression and nothing else: `12`, `$\\frac{1}{2}$`, `x = 3`."""
    if len(text) > MAX_EXPRESSION or text.strip("$").count("$") or not EXPRESSION.fullmatch(text):
        return False
    return bool(re.search(r"\d|\\[a-zA-Z]", text))


@cache  # each response is compared with the text of every checkpoint
def _expected(gold: str) -> list[Any]:
    return parse_result(gold)


def _question_of(row: dict[str, Any]) -> str:
    """The last question of a conversation, or the prompt."""
    questions = [message["content"] for message in row.get("messages", []) if message["role"] == "user"]
    return questions[-1] if questions else row["prompt"]


def _option_lists(prompt: str) -> list[list[str]]:
    """The lists of two or more options in a prompt, as their labels A, B, .. or 1, 2, .., in the order of their A or 1.

    A line that begins with another label than the expected one ("E. coli grows..") belongs to no list.
    """
    lists: list[list[str]] = []
    for label in LABEL.findall(prompt):
        if label in ("A", "1"):
            lists.append([label])
        open_list = next((labels for labels in reversed(lists) if labels[0].isdigit() == label.isdigit()), None)
        if open_list and label == _next(open_list[-1]):
            open_list.append(label)
    return [labels for labels in lists if len(labels) > 1]


def _next(label: str) -> str:
    return str(int(label) + 1) if label.isdigit() else chr(ord(label) + 1)


@cache
def _by_key(options: tuple[str, ...]) -> dict[str, str]:
    """Options by what `_key` makes of them."""
    return {_key(option): option for option in options}


def _key(bracketed: str) -> str:
    """An option in brackets without blanks and case."""
    return "".join(bracketed.split()).casefold()


def _end_of(text: str) -> str:
    return text if len(text) <= MAX_EXPRESSION else f"..{text[-MAX_EXPRESSION:]}"
