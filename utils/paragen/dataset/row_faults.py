"""What is wrong with the rows of a dataset: rows without a fault here are all trained on by LLaMA-Factory.

The rules are those of its data/converter.py and mm_plugin.py. A gap is a missing text or answer in a row of the right
shape: LLaMA-Factory loads such a row, but learns an empty answer from it, or drops it.
"""

from collections.abc import Iterable
from typing import Any

from paragen.dataset.dataset_info import (
    ACCEPTED_ROWS,
    HELD_OUT,
    PROMPTS_ONLY,
    columns_in,
    columns_of,
    is_blank,
    is_outside,
    is_unicode,
    kind_of,
    pictures_of,
    tags_of,
)


def row_faults(rows: list[dict[str, Any]], entry: dict[str, Any]) -> list[str]:
    """What is wrong with the rows of a sound `entry`: `row 17: ...`, one line for each faulty row."""
    columns, tags, present = columns_of(entry), tags_of(entry), columns_in(rows)
    names = ", ".join(map(repr, present))
    unmapped = [(kind, column) for kind, column in columns.items() if column not in present]
    if unmapped:
        return [f"{kind} is mapped to {column!r}, which no row has; there are {names}" for kind, column in unmapped]
    kinds: dict[str, tuple[str, int]] = {}
    accepted, faults = set(entry.get(ACCEPTED_ROWS, ())), mark_faults_in(rows, entry)
    for number, row in enumerate(rows, 1):
        cause: str | None
        missing = [column for column in present if column not in row] if len(row) < len(present) else []
        if missing:
            cause = f"lacks the column {missing[0]!r}, which others have (row {present[missing[0]]})"
        elif "messages" in columns:
            cause = messages_fault(row[columns["messages"]], tags)
        else:
            cause = alpaca_fault(row, columns)
        if not cause:
            gap = gap_in(row, columns, tags, bool(entry.get(PROMPTS_ONLY)))
            unfounded = f"stands among the {ACCEPTED_ROWS}, but nothing is wrong with it"
            cause = gap if number not in accepted else None if gap else unfounded
        cause = cause or text_fault(row, columns, ("system",)) or picture_fault(row, columns)
        if cause := cause or kind_fault(row, number, kinds):
            faults.append(f"row {number}: {cause}")
    return faults


def mark_faults_in(rows: list[dict[str, Any]], entry: dict[str, Any]) -> list[str]:
    """What of an entry's held_out and accepted_rows does not fit its rows."""
    count, held_out = len(rows), entry.get(HELD_OUT, 0)
    faults = [f"{HELD_OUT} is {held_out}, which leaves none of {count} rows to train on"] if held_out >= count else []
    return faults + [f"{ACCEPTED_ROWS}: no row {number}" for number in entry.get(ACCEPTED_ROWS, ()) if number > count]


def find_gaps(rows: list[dict[str, Any]], entry: dict[str, Any]) -> dict[int, str]:
    """The rows that only lack a text or an answer, by number, each with what is missing."""
    columns, tags, found = columns_of(entry), tags_of(entry), {}
    for number, row in enumerate(rows, 1):
        if "messages" in columns:
            fault = messages_fault(row.get(columns["messages"]), tags)
        else:
            fault = alpaca_fault(row, columns)
        gap = None if fault else gap_in(row, columns, tags, bool(entry.get(PROMPTS_ONLY)))
        if gap:
            found[number] = gap
    return found


def gap_in(row: dict[str, Any], columns: dict[str, str], tags: dict[str, str], prompts_only: bool) -> str | None:
    """What a row of the right shape lacks: a prompt, a response, the right order of turns."""
    if "messages" in columns:
        return messages_gap(row[columns["messages"]], tags, prompts_only)
    if all(is_blank(row.get(columns[kind])) for kind in ("prompt", "query") if kind in columns):
        return f"empty prompt (column {columns.get('prompt') or columns['query']!r})"
    if "response" in columns and is_blank(row.get(columns["response"])):
        return f"empty response (column {columns['response']!r})"
    return None


def alpaca_fault(row: dict[str, Any], columns: dict[str, str]) -> str | None:
    """What is wrong with the shape of the prompt, query, response and history of a row."""
    fault = text_fault(row, columns, ("prompt", "query", "response"))
    if fault:
        return fault
    history = (row.get(columns["history"]) if "history" in columns else None) or []
    whole = isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)
    if not whole or not all(isinstance(text, str) and is_unicode(text) for turn in history for text in turn):
        return f"the history (column {columns['history']!r}) is not a list of [prompt, response] texts"
    return None


def messages_fault(messages: Any, tags: dict[str, str]) -> str | None:
    """What is wrong with the shape of the messages of a row: a list of objects with a role and a text."""
    if not isinstance(messages, list):
        return f"the messages are {kind_of(messages)}, not a list"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} is {kind_of(message)}, not an object"
        role, content = message.get(tags["role_tag"]), message.get(tags["content_tag"])
        if not isinstance(role, str):
            return f"message {number} has no role (key {tags['role_tag']!r})"
        if not isinstance(content, str) or not is_unicode(content):
            return f"message {number} holds {kind_of(content)}, not Unicode text (key {tags['content_tag']!r})"
    return None


def messages_gap(messages: list[dict], tags: dict[str, str], prompts_only: bool) -> str | None:
    """What messages of the right shape lack: user and assistant in turns, and a last response unless `prompts_only`."""
    turn = 0
    for number, message in enumerate(messages, 1):
        role, content = message[tags["role_tag"]], message[tags["content_tag"]]
        leads = number == 1 and role == tags.get("system_tag")
        due = [tags.get(tag) for tag in (("user_tag", "observation_tag"), ("assistant_tag", "function_tag"))[turn % 2]]
        if not leads and role not in due:
            return f"message {number} is from {role!r} where {due[0]!r} is due"
        turn += not leads
        if is_blank(content) and not leads:
            return f"message {number} is an empty {'response' if role == tags['assistant_tag'] else 'prompt'}"
    if turn == 0:
        return "there are no messages"
    if (turn % 2 == 1) != prompts_only:
        leaves = "a response" if prompts_only else "no response (PROMPTS_ONLY=1 is for such files)"
        return f"the last message is from {messages[-1][tags['role_tag']]!r}, which leaves {leaves}"
    return None


def text_fault(row: dict[str, Any], columns: dict[str, str], kinds: Iterable[str]) -> str | None:
    """What keeps the columns mapped as `kinds` from being text. Null is an empty text."""
    for column in (columns[kind] for kind in kinds if kind in columns):
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            return f"the column {column!r} holds {kind_of(value)}, not text"
        if value and not is_unicode(value):
            return f"the column {column!r} holds half of a surrogate pair, which is not Unicode text"
    return None


def picture_fault(row: dict[str, Any], columns: dict[str, str]) -> str | None:
    """What is wrong with the pictures of a row: paths below data/, one for each <image> mark in the texts."""
    if "images" not in columns:
        return None
    pictures = pictures_of(row, columns["images"])
    for picture in pictures:
        if not isinstance(picture, str) or is_blank(picture) or not is_unicode(picture):
            return f"the picture {picture!r:.80} is not a path"
        if is_outside(picture):
            return f"the picture {picture!r:.80} lies outside data/"
    texts = [row.get(column) for kind, column in columns.items() if kind not in ("images", "system")]
    marks = str(texts).count("<image>")
    return None if marks == len(pictures) else f"{len(pictures)} pictures, but {marks} <image> marks in the texts"


def kind_fault(row: dict[str, Any], number: int, kinds: dict[str, tuple[str, int]]) -> str | None:
    """What has another kind in this row than in the first one: such a file cannot be loaded.

    `kinds` has the kind of each column and the number of the row that it was first seen in, and is filled here.
    """
    for column, value in row.items():
        if value is None:
            continue
        kind, first = kinds.setdefault(column, (kind_of(value), number))
        if kind_of(value) != kind:
            return f"the column {column!r} holds {kind_of(value)}, but {kind} in row {first}"
    return None
