"""Calls of tools that a request demands (`tool_choice`): the grammar of the calls that the model's
chat template writes, which its answer is kept to.

Such an answer is calls alone: it has no reasoning, and no text around them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moerun.live.turn import TOOL_CALLS, Turn
from moerun.serving.fields import shown, unsupported
from moerun.serving.tools import KEY, NAME, VALUE, CallForm, call_field

FIELD = "tool_choice"
_BLANKS = "/[ \\n]{0,2}/"
_ANY_ARGUMENTS = {"type": "object"}


def forced_tools(
    tools: Sequence[dict[str, Any]], choice: Any, *, written: bool
) -> list[dict[str, Any]]:
    """The tools of which one has to be called; none: no call is demanded. Raises ApiError.

    ``written``: the answer is to follow a `response_format`.
    """
    if choice in (None, "none", "auto"):
        return []
    name = _named(choice)
    if choice != "required" and name is None:
        raise unsupported(
            FIELD,
            f'= {shown(choice)} is not "none", "auto", "required" or '
            '{"type": "function", "function": {"name": ...}}',
        )
    if not tools:
        raise unsupported(FIELD, f"= {shown(choice)} needs tools")
    if written:
        raise unsupported(FIELD, f"= {shown(choice)} excludes a response_format")
    found = [tool for tool in tools if name in (None, tool["function"]["name"])]
    if not found:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        raise unsupported(FIELD, f"names {shown(name)}, which is none of the tools: {names}")
    return found


def _named(choice: Any) -> str | None:
    """The function that a choice names."""
    if not isinstance(choice, dict) or choice.get("type") != "function":
        return None
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def forced_turn(turn: Turn, form: CallForm) -> Turn:
    """A turn that is calls of this form from its first token on."""
    fields = {TOOL_CALLS: call_field(form), "content": {}}
    template = {"start_anchor": form.opening, "fields": fields}
    return replace(turn, response_template=template, prefill="")


def grammar_of(
    tools: Sequence[dict[str, Any]], form: CallForm, tokenizer: Any, *, several: bool
) -> str:
    """llguidance's grammar of a call of one of ``tools``; ``several``: or of more than one.

    Calls that nothing closes go to the answer's end: there is one, or one list of calls.
    """
    shared: dict[str, Any] = {}
    listed = isinstance(form.value, list)
    one = form.value[0] if listed else form.value
    schemas = [_schema(one, tool["function"], shared) for tool in tools]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if listed:
        schema = {"type": "array", "items": schema, "minItems": 1}
        schema |= {} if several else {"maxItems": 1}
    more = {"x-guidance": {"whitespace_pattern": r"[ \n]{0,2}"}, **shared}
    close = f"{_BLANKS} {_literal(form.close, tokenizer)}" if form.close else ""
    again = f" ({_BLANKS} call)*" if several and form.close and not listed else ""
    lines = [
        f"start: call{again}",
        f"call: {_literal(form.opening, tokenizer)} {_BLANKS} json {close}",
        f"json: %json {json.dumps(schema | more)}",
    ]
    return "\n".join(lines)


def _schema(value: Any, function: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call of ``function`` that is written as the JSON ``value``. What the
    function's own schema refers to from its root goes to ``shared``, for the root."""
    if value == NAME:
        return {"const": function["name"]}
    if value == {KEY: VALUE}:
        arguments = dict(function.get("parameters") or _ANY_ARGUMENTS)
        for name in ("$defs", "definitions"):
            for key, defined in (arguments.pop(name, None) or {}).items():
                if shared.setdefault(name, {}).setdefault(key, defined) != defined:
                    raise unsupported("tools", f"define {shown(key)} in two ways")
        return arguments
    if isinstance(value, dict):
        return {
            "type": "object",
            "properties": {key: _schema(each, function, shared) for key, each in value.items()},
            "required": list(value),
            "additionalProperties": False,
        }
    return {"const": value}


def _literal(text: str, tokenizer: Any) -> str:
    """A mark in a grammar: tokens that were added to the tokenizer by their ids, which is how
    llguidance takes them, and the text between them as it is."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    parts: list[str] = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        if token in added:
            before, _, text = text.partition(str(added[token]))
            parts += [json.dumps(before)] * bool(before) + [f"<[{token}]>"]
    return " ".join(parts + [json.dumps(text)] * bool(text))
