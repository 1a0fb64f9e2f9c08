"""The parts of a request's JSON that are of more than one type, each checked and named where it is
wrong.

After the API reference, https://platform.openai.com/docs/api-reference (chat and completions).
Every function raises ApiError.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from moerun.live.turn import REASONING
from moerun.serving.api_error import ApiError
from moerun.serving.chat import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""Roles that a message may have, and what chat templates call them."""
MOST_STOPS = 64
Prompt = str | list[int]
"""Text, or its token ids."""


def json_object(body: bytes) -> dict[str, Any]:
    """A JSON object's fields; null is as good as absent."""
    try:
        fields = json.loads(body, parse_constant=_no_number)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(fields)}")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body has half of a surrogate pair, which is no text") from error
    return {name: value for name, value in fields.items() if value is not None}


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def wrong(name: str, expected: str, value: Any) -> ApiError:
    """The error of a field that is not as ``expected``."""
    return ApiError(
        400, f"{name} must be {expected}, not {shown(value)}", param=name, code="invalid_type"
    )


def unsupported(name: str, why: str) -> ApiError:
    """The error of a field that this server cannot do what it asks for; ``why`` says the reason."""
    return ApiError(400, f"{name} {why}", param=name, code="unsupported_value")


def shown(value: Any) -> str:
    """A value as an error shows it: as JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def stop_of(value: Any) -> tuple[str, ...]:
    """The strings that end the answer."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise wrong("stop", "a string or a list of strings, none of them empty", value)
    if len(stops) > MOST_STOPS:
        raise ApiError(400, f"stop has {len(stops)} strings; {MOST_STOPS} may be", param="stop")
    return tuple(stops)


def prompts_of(value: Any) -> list[Prompt]:
    """One prompt or several: each a string or its token ids."""
    if isinstance(value, list) and value and all(isinstance(each, str | list) for each in value):
        return [_prompt(each) for each in value]
    return [_prompt(value)]


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    raise wrong("prompt", "a string, a list of token ids, or a list of such prompts", value)


def biases_of(value: Any) -> tuple[tuple[int, float], ...]:
    """Token ids, which are strings in JSON, and what is added to their logits."""
    if not isinstance(value, dict):
        raise wrong("logit_bias", "an object of token ids and numbers", value)
    found = []
    for token, bias in value.items():
        number = type(bias) in (int, float) and -100 <= bias <= 100
        if not (token.isascii() and token.isdigit() and len(token) < 12 and number):
            raise wrong("logit_bias", "token ids with numbers from -100 to 100", {token: bias})
        found.append((int(token), float(bias)))
    return tuple(found)


def messages_of(value: Any) -> tuple[Message, ...]:
    """The conversation, its roles as chat templates know them."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", "a list of at least one message", value)
    return tuple(_message(f"messages[{i}]", message) for i, message in enumerate(value))


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise wrong(name, "an object with role and content", value)
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{name}.role", f"one of {', '.join(ROLES)}", role)
    # As other servers name it, and as ours gives it: an answer may come back as it was given.
    mused = [name for name in REASONING if role == "assistant" and value.get(name)]
    known = {"role", "content", "name", *mused}
    known |= {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}.get(role, set())
    for field, content in value.items():
        if field not in known and content:
            raise ApiError(
                400,
                f"{name}.{field} is not supported here",
                param=f"{name}.{field}",
                code="unsupported_parameter",
            )
    said: Message = {"role": ROLES[role]}
    calls = value.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise wrong(f"{name}.tool_calls", "a list of calls", calls)
    if value.get("content") is not None or not calls:
        said["content"] = _content(f"{name}.content", value.get("content"))
    else:
        said["content"] = ""
    for field in ("name", "tool_call_id"):
        given = value.get(field)
        if given is not None and not isinstance(given, str):
            raise wrong(f"{name}.{field}", "a string", given)
        if given and field in known:
            said[field] = given
    if calls:
        said["tool_calls"] = _calls(f"{name}.tool_calls", calls)
    if mused:
        said["reasoning_content"] = _content(f"{name}.{mused[0]}", value[mused[0]])
    return said


def _calls(name: str, value: list[Any]) -> list[dict[str, Any]]:
    """Calls of tools as chat templates take them: their arguments are an object."""
    found = []
    for i, call in enumerate(value):
        at = f"{name}[{i}].function"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise wrong(at, "an object with name and arguments", function)
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise wrong(f"{at}.arguments", "a JSON object as a string", function.get("arguments"))
        called = {"name": _text(f"{at}.name", function.get("name")), "arguments": arguments}
        found.append({"type": "function", "id": str(call.get("id") or i), "function": called})
    return found


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The functions that the model may call, each with a name and a schema of its parameters."""
    if not isinstance(value, list):
        raise wrong("tools", "a list of tools", value)
    for i, tool in enumerate(value):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise wrong(f"tools[{i}]", 'an object whose type is "function"', tool)
        function = tool.get("function")
        if not isinstance(function, dict):
            raise wrong(f"tools[{i}].function", "an object with a name", function)
        _text(f"tools[{i}].function.name", function.get("name"))
        if not isinstance(function.get("parameters", {}), dict):
            parameters = function["parameters"]
            raise wrong(f"tools[{i}].function.parameters", "a JSON schema", parameters)
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise wrong(name, "a string, and not empty", value)
    return value


def _content(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(name, "a string or a list of text parts", value)
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text") or not isinstance(
            part.get("text"), str
        ):
            raise wrong(name, "text: this model takes nothing else", part)
    return "".join(part["text"] for part in value)
