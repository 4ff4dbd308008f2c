"""Our own prompt templates: utils/prompt_templates.py records them, `register` makes them known to LLaMA-Factory.

The calls in that file have the form of LLaMA-Factory's `register_template(...)`, but only record their arguments. So
names and hashes are known without importing LLaMA-Factory, which takes up to 25 s.
"""

import ast
import importlib
import sys
import traceback
from dataclasses import dataclass
from functools import cache
from typing import Any

from paragen.common import files
from paragen.common.cli import UserError

FILE = "utils/prompt_templates.py"


@dataclass(frozen=True)
class Deferred:
    """A name of LLaMA-Factory, imported when a template is registered. Calling it records the call."""

    module: str
    name: str

    def __call__(self, *args: Any, **arguments: Any) -> "Call":
        return Call(self, args, arguments)


@dataclass(frozen=True)
class Call:
    """A recorded call of something of LLaMA-Factory."""

    function: Deferred
    args: tuple[Any, ...]
    arguments: dict[str, Any]  # in the order in which they were given


# What a template may be made of, with the names and arguments that LLaMA-Factory gives them.
EmptyFormatter = Deferred("llamafactory.data.formatter", "EmptyFormatter")
FunctionFormatter = Deferred("llamafactory.data.formatter", "FunctionFormatter")
StringFormatter = Deferred("llamafactory.data.formatter", "StringFormatter")
ToolFormatter = Deferred("llamafactory.data.formatter", "ToolFormatter")
get_mm_plugin = Deferred("llamafactory.data.mm_plugin", "get_mm_plugin")
Llama2Template = Deferred("llamafactory.data.template", "Llama2Template")
ReasoningTemplate = Deferred("llamafactory.data.template", "ReasoningTemplate")
_REGISTER = Deferred("llamafactory.data.template", "register_template")

_recorded: dict[str, Call] = {}
_registered: set[str] = set()  # the names that LLaMA-Factory knows from us in this process


def register_template(**arguments: Any) -> None:
    """Record a template; it is registered with LLaMA-Factory before the first training of a process.

    Args:
        arguments: those of llamafactory.data.template.register_template, by name; `name` is needed.

    Raises UserError for a template without a name, and for a second one of the same name.
    """
    name = arguments.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f'{FILE}: a template needs a name: register_template(name="...", ...), not {name!r}')
    if name in _recorded:
        raise UserError(f"{FILE}: template {name!r} is there twice; rename or remove one")
    _recorded[name] = _REGISTER(**arguments)


@cache
def recorded() -> dict[str, Call]:
    """The templates of utils/prompt_templates.py, by name. Raises UserError where that file cannot be run."""
    try:
        importlib.import_module("prompt_templates")
    except Exception as error:
        _recorded.clear()
        if isinstance(error, UserError):
            raise
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(f"{FILE}{_line_of(error)}: {type(error).__name__}: {text}; correct it") from None
    return dict(_recorded)


def register() -> None:
    """Make our templates known to LLaMA-Factory in this process. Each is registered once, however often this is called.

    Raises UserError for a template that LLaMA-Factory refuses.
    """
    for name, call in recorded().items():
        if name in _registered:
            continue
        try:
            resolve(call)
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{FILE}: template {name!r}: LLaMA-Factory refuses it: {error}; correct it") from None
        _registered.add(name)


def resolve(value: Any) -> Any:
    """A recorded value with LLaMA-Factory's own objects in it."""
    if isinstance(value, Call):
        arguments = {name: resolve(one) for name, one in value.arguments.items()}
        return resolve(value.function)(*map(resolve, value.args), **arguments)
    if isinstance(value, Deferred):
        return getattr(importlib.import_module(value.module), value.name)
    if isinstance(value, list | tuple):
        return type(value)(map(resolve, value))
    return value


def hash_of(name: str | None) -> str | None:
    """The hash of one of our templates, which is part of a run's identity; None for LLaMA-Factory's own templates.

    It is the hash of the call's syntax with all values written out, so that line breaks, comments, quotes and the names
    of variables do not change it.
    """
    call = recorded().get(name) if name is not None else None
    if call is None:
        return None
    options = {"show_empty": True} if sys.version_info >= (3, 13) else {}  # older versions always show them
    return files.sha256_of_value(ast.dump(ast.parse(source_of(call), mode="eval").body, **options))


def source_of(value: Any) -> str:
    """A recorded value as Python source."""
    if isinstance(value, Call):
        given = [*map(source_of, value.args), *(f"{name}={source_of(one)}" for name, one in value.arguments.items())]
        return f"{value.function.name}({', '.join(given)})"
    if isinstance(value, Deferred):
        return value.name
    if isinstance(value, list):
        return f"[{', '.join(map(source_of, value))}]"
    if isinstance(value, set) and value:
        return f"{{{', '.join(sorted(map(source_of, value)))}}}"
    return repr(value)


def _line_of(error: Exception) -> str:
    """`:<line>`, where an exception shows the line of prompt_templates.py that caused it."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(FILE)]
    return f":{lines[-1]}" if lines else ""
