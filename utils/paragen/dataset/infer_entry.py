"""Which entry of dataset_info.json the rows of a file want: its formatting, its columns, its tags."""

from collections.abc import Iterable
from typing import Any

from paragen.common.cli import UserError
from paragen.dataset.dataset_info import (
    CANDIDATES,
    DEFAULT_TAGS,
    PROMPTS_ONLY,
    columns_in,
    is_blank,
    is_unicode,
)


def infer_entry(rows: list[dict[str, Any]], named: dict[str, str], prompts_only: bool) -> dict[str, Any]:
    """The entry for some rows, without its file_name.

    Args:
        rows: all rows of a file.
        named: the columns that the user names, e.g. {"prompt": "question"}; an empty name: there is no such column.
        prompts_only: whether the rows have no responses.

    Raises UserError, with the columns to name, where the names of the columns leave more than one reading.
    """
    present = columns_in(rows)
    formatting = infer_formatting(present, named)
    columns = infer_columns(present, named, formatting)
    mark = {PROMPTS_ONLY: True} if prompts_only else {}
    if formatting == "sharegpt":
        tags = infer_tags(rows, columns["messages"])
        return {"formatting": formatting, "columns": columns} | ({} if tags == DEFAULT_TAGS else {"tags": tags}) | mark
    names = ", ".join(map(repr, present))
    if "prompt" not in columns:
        raise UserError(f'no column is plainly the prompt; there are {names}; say MAP="prompt=<column>"')
    response = columns.get("response")
    has_responses = response is not None and not all(is_blank(row.get(response)) for row in rows)
    if has_responses and prompts_only:
        raise UserError(f"the column {response!r} holds responses; register the file without PROMPTS_ONLY")
    if not has_responses and not prompts_only:
        way_out = 'say MAP="response=<column>", or PROMPTS_ONLY=1 when there are prompts only'
        raise UserError(f"the rows have no response; there are {names}; {way_out}")
    if prompts_only:
        columns.pop("response", None)
    return {"columns": columns} | mark


def infer_columns(present: dict[str, int], named: dict[str, str], formatting: str) -> dict[str, str]:
    """Which of the columns `present` holds what: as `named`, otherwise by their usual names. Raises UserError.

    `present` has the number of the first row of each column.
    """
    names, known = ", ".join(map(repr, present)), CANDIDATES[formatting]
    for column, number in present.items():
        if not is_unicode(column):
            raise UserError(f"row {number}: the name of the column {column!r} is not Unicode text")
    for kind, column in named.items():
        if kind not in known:
            raise UserError(f"MAP {kind}=: {formatting} rows have no {kind!r} to map; known: {', '.join(known)}")
        if column and column not in present:
            raise UserError(f"MAP {kind}={column}: no row has the column {column!r}; there are {names}")
    columns = {}
    for kind, candidates in known.items():
        free = [column for column in candidates if column in present and column not in named.values()]
        found = [named[kind]] if kind in named else free
        if len(found) > 1:
            raise UserError(f'the {kind} can be {" or ".join(map(repr, found))}; say MAP="{kind}=<one of them>"')
        if found and found[0]:
            columns[kind] = found[0]
    return columns


def infer_formatting(present: Iterable[str], named: dict[str, str]) -> str:
    """`sharegpt` for rows with messages, else `alpaca`. Raises UserError when the columns suit both."""
    messages = [column for column in CANDIDATES["sharegpt"]["messages"] if column in present]
    prompts = [column for column in CANDIDATES["alpaca"]["prompt"] if column in present]
    if "messages" in named or named.get("prompt"):
        return "sharegpt" if named.get("messages") else "alpaca"
    if messages and prompts:
        choice = f'MAP="messages={messages[0]}" or MAP="prompt={prompts[0]}"'
        raise UserError(f"there are both messages ({messages[0]!r}) and a prompt ({prompts[0]!r}); say {choice}")
    return "sharegpt" if messages else "alpaca"


def infer_tags(rows: list[dict[str, Any]], column: str) -> dict[str, str]:
    """The tags of the messages in `column`: keys from/value or role/content, roles human/gpt or user/assistant."""
    lists = [row[column] for row in rows if isinstance(row.get(column), list)]
    messages = [message for messages in lists for message in messages if isinstance(message, dict)]
    keys = {key for message in messages for key in message}
    tags = dict(DEFAULT_TAGS)
    if "role" in keys and "from" not in keys:
        tags |= {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    roles = {role for message in messages if isinstance(role := message.get(tags["role_tag"]), str)}
    for tag, spellings in (("user_tag", ("human", "user")), ("assistant_tag", ("gpt", "assistant"))):
        tags[tag] = next((spelling for spelling in spellings if spelling in roles), tags[tag])
    return tags
