"""The fields of a request's JSON, each checked and named where it is wrong.

After the API reference, https://platform.openai.com/docs/api-reference (chat and completions).
Every function raises ApiError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from moerun.live.turn import REASONING
from moerun.serving.api_error import ApiError
from moerun.serving.chat import Message

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"})
"""Fields that say something about a request and ask for nothing."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "store": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are honoured in these values alone, which are what happens anyway."""
SERVED = frozenset(
    {
        *("model", "seed", "stop", "stream", "stream_options", "temperature", "top_p"),
        *("max_tokens", "max_completion_tokens", "messages", "prompt"),
    }
)
TYPES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "an object",
}


def json_object(body: bytes) -> dict[str, Any]:
    """A JSON object's fields; null is as good as absent."""
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body must be a JSON object, not {_named(fields)}")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body has half of a surrogate pair, which is no text") from error
    return {name: value for name, value in fields.items() if value is not None}


def refuse_unsupported(fields: dict[str, Any], elsewhere: str) -> None:
    """Reject unsupported fields by name; ``elsewhere`` has the other endpoint's fields."""
    for name, value in fields.items():
        if name in NEUTRAL:
            if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
                shown = json.dumps(value)[:80]
                raise ApiError(
                    400,
                    f"{name} = {shown} is not supported by this server: leave {name} out",
                    param=name,
                    code="unsupported_value",
                )
        elif name == elsewhere or name not in SERVED | LABELS:
            raise ApiError(
                400,
                f"the field {name} is not supported here",
                param=name,
                code="unsupported_parameter",
            )


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and no 0 for false: "logprobs": 0 asks for something."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def take(fields: dict[str, Any], name: str, kind: Callable[[Any], Any], default: Any) -> Any:
    """A field of one JSON type; an integer will do for a number, true and false will not."""
    value = fields.get(name)
    if value is None:
        return default
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
        raise _wrong(name, TYPES[kind], value)
    try:
        return kind(value)
    except OverflowError as error:
        raise _wrong(name, TYPES[kind], value) from error


def _wrong(name: str, expected: str, value: Any) -> ApiError:
    return ApiError(
        400, f"{name} must be {expected}, not {_named(value)}", param=name, code="invalid_type"
    )


def _named(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def max_tokens_of(fields: dict[str, Any]) -> int | None:
    """The most tokens that the answer may have; None where the request does not say."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    if not names:
        return None
    count: int = take(fields, names[0], int, None)
    if count < 1:
        raise ApiError(400, f"{names[0]} must be 1 or more, not {count}", param=names[0])
    return count


def stop_of(value: Any) -> tuple[str, ...]:
    """The strings that end the answer."""
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong("stop", "a string or a list of strings, none of them empty", value)
    return tuple(stops)


def prompt_of(value: Any) -> str | list[int]:
    """One prompt: a string, its token ids, or a list with one of either."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    if value is None:
        raise ApiError(400, "prompt is missing", param="prompt", code="missing_required_parameter")
    raise _wrong("prompt", "one string or one list of token ids", value)


def messages_of(value: Any) -> tuple[Message, ...]:
    """The conversation, its roles as chat templates know them."""
    if value is None:
        raise ApiError(
            400, "messages is missing", param="messages", code="missing_required_parameter"
        )
    if not isinstance(value, list) or not value:
        raise _wrong("messages", "a list of at least one message", value)
    return tuple(_message(f"messages[{i}]", message) for i, message in enumerate(value))


def _message(name: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise _wrong(name, "an object with role and content", value)
    role = value.get("role")
    if role not in ROLES:
        raise _wrong(f"{name}.role", f"one of {', '.join(ROLES)}", role)
    # As other servers name it, and as ours gives it: an answer may come back as it was given.
    mused = [name for name in REASONING if role == "assistant" and value.get(name)]
    for field, content in value.items():
        if field not in ("role", "content", *mused) and content:
            raise ApiError(
                400,
                f"{name}.{field} is not supported here",
                param=f"{name}.{field}",
                code="unsupported_parameter",
            )
    said = {"role": ROLES[role], "content": _content(f"{name}.content", value.get("content"))}
    if mused:
        said["reasoning_content"] = _content(f"{name}.{mused[0]}", value[mused[0]])
    return said


def _content(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong(name, "a string or a list of text parts", value)
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text") or not isinstance(
            part.get("text"), str
        ):
            raise _wrong(name, "text: this model takes nothing else", part)
    return "".join(part["text"] for part in value)
