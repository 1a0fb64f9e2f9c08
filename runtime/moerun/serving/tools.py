"""Tools that a model may call: what its chat template is given, and how its calls are read.

Calls are read by transformers' response parser. Its description of an answer comes from the
tokenizer, from transformers for the families it knows, or from the chat template, which is asked by
rendering a call.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from moerun.live.turn import TOOL_CALLS, Turn, render_chat

_USER = {"role": "user", "content": "zqaskedqz"}
NAME, KEY, VALUE = "zqnameqz", "zqkeyqz", "zqvalueqz"


class CallForm(NamedTuple):
    """What a chat template writes before and behind a call of a tool, and the JSON between: a call
    of `NAME` with the argument `KEY` = `VALUE`. ``ends`` are the texts of tokens that end an
    answer."""

    opening: str
    close: str
    value: Any
    ends: tuple[str, ...]


def tool_turn(tokenizer: Any, model: Any, turn: Turn) -> Turn | None:
    """``turn`` with a description that has calls of tools; None where nobody gives one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    if turn.response_template and TOOL_CALLS in turn.response_template.get("fields", {}):
        return turn
    if (form := call_form(tokenizer, turn)) is not None:
        return _with_calls(turn, form)
    known = _known_template(tokenizer, model)
    if known and TOOL_CALLS in known.get("fields", {}):
        return replace(turn, response_template=known, prefill=None)
    return None


def _known_template(tokenizer: Any, model: Any) -> dict[str, Any] | None:
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:  # a version of transformers that has it elsewhere, or not
        return None
    found: dict[str, Any] | None = get_response_template(tokenizer, model)
    return found


def call_form(tokenizer: Any, turn: Turn) -> CallForm | None:
    """How a template writes a call as JSON between marks; None where it does not."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    function = {"name": NAME, "arguments": {KEY: VALUE}}
    call = {"type": "function", "id": "call00000", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    text = render_chat(tokenizer, [_USER, called]).rpartition(_USER["content"])[2]
    decoder = json.JSONDecoder()
    for start in (i for i, letter in enumerate(text) if letter in "{["):
        try:
            found, end = decoder.raw_decode(text, start)
        except ValueError:
            continue
        if any(call == {"name": NAME, "arguments": {KEY: VALUE}} for call in calls_in(found)):
            ends = [tokenizer.decode([token]) for token in turn.end_ids]
            behind = text[end:]
            for each in ends:
                behind = behind.partition(each)[0]
            prompt = render_chat(tokenizer, [_USER], generation=True)
            begun = prompt.rpartition(_USER["content"])[2]
            opening = text[:start].removeprefix(begun).strip()
            texts = dict.fromkeys([*ends, tokenizer.eos_token or ""])
            texts.pop("", None)
            return CallForm(opening, behind.strip(), found, tuple(texts)) if opening else None
    return None


def call_field(form: CallForm) -> dict[str, Any]:
    """Calls of this form as a field of a response template. Without a mark behind them, calls go
    on to the token that ends the answer."""
    close = form.close or list(form.ends)
    return {"open": form.opening, "content": "json", "repeats": True, "close": close}


def _with_calls(turn: Turn, form: CallForm) -> Turn:
    described = turn.response_template or {"start_anchor": form.opening, "fields": {"content": {}}}
    fields = {TOOL_CALLS: call_field(form), **described["fields"]}
    prefill = turn.prefill if turn.response_template else ""
    return replace(turn, response_template={**described, "fields": fields}, prefill=prefill)


def calls_in(value: Any) -> list[dict[str, Any]]:
    """The calls in what a model wrote, each with name and arguments; those without are left out."""
    if isinstance(value, list):
        return [call for each in value for call in calls_in(each)]
    if not isinstance(value, dict):
        return []
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return []
    arguments = function.get("arguments", function.get("parameters", {}))
    return [{"name": function["name"], "arguments": arguments}]


def openai_calls(found: Sequence[Any]) -> list[dict[str, Any]]:
    """OpenAI's `tool_calls` of the calls that a response parser found."""
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call["name"], "arguments": _as_json(call["arguments"])},
        }
        for call in calls_in(list(found))
    ]


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
