"""What the responses of a test split are, how a generated text is read, and how sure a score is.

Imported by evaluate.py. Rows are those of `prompts.of_collection`. Three kinds of responses are told apart: one of
several options (`[B]`, `[True]`), a mathematical result (`\\boxed{12}`, `#### 12`, `12`), and any other text.
"""

import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MATH_SHARE = 0.95  # of the responses that must state a result: some rows of a mathematical set say "none" in words
SHORT = 120  # characters of a response that is nothing but an expression
CONFIDENCE = 0.95
TRUTH = ("[True]", "[False]")

OPTION = re.compile(r"\[(?:[A-Z]|\d{1,2}|True|False)\]")
BRACKET = re.compile(r"\[([^\[\]]*)\]")
# A line that opens with its option: "A: text", "B) text", "(C) text", "2. text"; not "1.5 litres".
LISTED = re.compile(r"^[ \t]*[(\[]?([A-Z]|\d{1,2})[:.)\]](?:\s|$)", re.MULTILINE)
BOXED = re.compile(r"\\boxed\s*\{.*\}", re.DOTALL)
# GSM8K's last line. Nothing else may stand there: "#### Step 2" is a heading.
HASHED = re.compile(r"^[ \t]*####[ \t]*\$?[ \t]*(-?\$?[\d,]*\.?\d+(?:/\d+)?)[ \t]*%?\.?[ \t]*$", re.MULTILINE)
# No two letters side by side, but for those of a LaTeX command or of its \text{...}.
EXPRESSION = re.compile(
    r"(?:\\(?:text|mathrm|textbf)\{[^{}\n]*\}|\\(?:[a-zA-Z]+|[^a-zA-Z\n])|[a-zA-Z](?![a-zA-Z])"
    r"|[\d \t.,+\-*/^_(){}\[\]=<>|!'%°:$∞π√])++"
)


def metric_of(rows: list[dict[str, Any]]) -> str:
    """What the responses can be scored by: a key of `evaluation.METRICS`.

    Returns "choice" where each response is one option in brackets and nothing else, of two or more; "math" where nearly
    all state a result (`MATH_SHARE`): boxed, behind GSM8K's ####, or as the whole response; else, and where rows have
    no response, "loss".
    """
    said = [row["response"].strip() for row in rows]
    if not said or not all(said):
        return "loss"
    if all(OPTION.fullmatch(response) for response in said):
        everywhere = responses_of(rows)
        return "choice" if all(len(options_of(row, everywhere)) > 1 for row in rows) else "loss"
    return "math" if sum(map(_states_result, said)) >= MATH_SHARE * len(said) else "loss"


def responses_of(rows: list[dict[str, Any]]) -> list[str]:
    """The distinct responses of a split, without the blanks around them, in the order of options ([2] before [10])."""
    return sorted({row["response"].strip() for row in rows}, key=lambda response: (len(response), response))


def options_of(row: dict[str, Any], everywhere: list[str]) -> list[str]:
    """The options of one row, as its response would be written, in order; its response is one of them.

    Args:
        row: of a split scored by choices; it may lack a response.
        everywhere: the distinct responses of the split (`responses_of`), for prompts that list no options.

    Of a conversation the last question counts. Lines such as "A: ..", "B) .." or "1. .." are options where they follow
    each other from A or 1 on; of several such lists the last that has the response.
    """
    response = row["response"].strip()
    if response in TRUTH:
        return list(TRUTH)
    for labels in reversed(_lists_in(_question_of(row))):
        options = [f"[{label}]" for label in labels]
        if response in options or not response:
            return options
    return everywhere if response in everywhere or not response else [*everywhere, response]


def chosen(text: str, options: list[str]) -> str | None:
    """The option that a generated text chooses: what stands in its first brackets, whatever its case and blanks.

    None where there are no brackets, or something else than an option stands in the first.
    """
    found = BRACKET.search(text)
    return _by_key(tuple(options)).get(_key(found[0])) if found else None


def result_of(text: str) -> list[Any]:
    """The result that a text states, as math-verify reads it: sympy expressions and strings; empty where there is none.

    The first that is there counts: the last box (boxes joined by "and" or a comma are one result), a line
    "#### 18", the text itself where it is one expression, else what math-verify finds in running text: what follows
    "the answer is", or the last number or formula.

    math-verify stops after 5 seconds by SIGALRM: call it in the main thread only (a ValueError elsewhere). A text that
    takes longer counts as one without a result.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    if not BOXED.search(text):
        if hashed := HASHED.search(text):  # the first: a base model may go on with questions of its own
            text = re.sub("[,$]", "", hashed[1])
        elif _is_expression(text.strip()):  # without a box, bare LaTeX is read as the first number in it
            text = rf"\boxed{{{text.strip().rstrip('.').strip('$')}}}"
    return parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()])


def same_result(gold: str, text: str) -> bool | None:
    """Whether a generated text comes to the result of a response; None where no result could be read in the text.

    Results are compared by value (1/2 and 0.5, x+1 and 1+x are the same); a comparison of more than 5 seconds is
    False. In the main thread only, see `result_of`.

    Raises ValueError when the response (`gold`) itself has no result that can be read.
    """
    from math_verify import verify

    expected = _expected(gold)
    if not expected:
        raise ValueError(f"no mathematical result can be read in the response {_end_of(gold)!r}")
    result = result_of(text)
    return verify(expected, result) if result else None


def wilson(right: int, rows: int) -> list[float]:
    """The 95 % confidence interval of a share, [low, high], by Wilson's score; `rows` is at least 1."""
    from scipy.stats import binomtest

    low, high = binomtest(right, rows).proportion_ci(CONFIDENCE, method="wilson")
    return [float(low), float(high)]


def loss_interval(sums: "np.ndarray", counts: "np.ndarray") -> list[float]:
    """The 95 % confidence interval, [low, high], of a mean loss per token.

    Args:
        sums: the loss of each row, summed over its tokens (nats).
        counts: the tokens of each row, in the same order; at least one in all.

    The mean is a ratio of two sums over rows (all losses over all tokens), and rows, not tokens, are what was drawn at
    random: tokens of one response have much in common. So its variance is taken over rows, by the delta method. A
    single row tells nothing about others: its interval is its mean.
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
    return bool(BOXED.search(response) or HASHED.search(response) or _is_expression(response))


def _is_expression(text: str) -> bool:
    """Whether a text is one short expression and nothing else: `12`, `$\\frac{1}{2}$`, `x = 3`."""
    if len(text) > SHORT or text.strip("$").count("$") or not EXPRESSION.fullmatch(text):
        return False
    return bool(re.search(r"\d|\\[a-zA-Z]", text))


@cache  # each response is compared with the text of every checkpoint
def _expected(gold: str) -> list[Any]:
    return result_of(gold)


def _question_of(row: dict[str, Any]) -> str:
    asked = [message["content"] for message in row.get("messages", []) if message["role"] == "user"]
    return asked[-1] if asked else row["prompt"]


def _lists_in(prompt: str) -> list[list[str]]:
    """The lists of two or more options in a prompt: labels A, B, .. or 1, 2, .., in the order in which they begin.

    A line that opens with another label than the next one ("E. coli grows..") belongs to no list.
    """
    lists: list[list[str]] = []
    for label in LISTED.findall(prompt):
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
    return {_key(option): option for option in options}


def _key(bracketed: str) -> str:
    return "".join(bracketed.split()).casefold()


def _end_of(text: str) -> str:
    return text if len(text) <= SHORT else f"..{text[-SHORT:]}"
