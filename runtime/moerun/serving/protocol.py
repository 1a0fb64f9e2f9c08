"""OpenAI's request fields and answers, as far as one model on one device can honour them.

After the API reference, https://platform.openai.com/docs/api-reference (chat and completions).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moerun.errors import RunError
from moerun.live.generate import Generated
from moerun.live.sampling import Sampling
from moerun.live.turn import REASONING, Turn
from moerun.serving.chat import Message

UNLIMITED = 1 << 30
COMPLETION_TOKENS = 16  # what /v1/completions generates unless told, by the reference
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


class ApiError(Exception):
    """A request that cannot be answered, in OpenAI's terms."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = {
            "error": {"message": message, "type": type, "param": param, "code": code},
        }


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say; ``most_tokens`` bounds what it may say."""

    temperature: float = 1.0
    top_p: float = 1.0
    most_tokens: int | None = None


@dataclass(frozen=True)
class Ask:
    """A request understood: what to continue, and how. ``max_tokens`` None: it does not say."""

    kind: Literal["chat", "text"]
    messages: tuple[Message, ...]
    prompt: str | list[int]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool

    def sampling(
        self,
        prompt_tokens: int,
        limit: int | None,
        most_tokens: int | None,
        stops: tuple[str, ...],
        turn: Turn | None = None,
    ) -> Sampling:
        """For a model whose context is ``limit``. Raises ApiError where a value is out of range."""
        room = self._room(prompt_tokens, limit)
        usual = room if self.kind == "chat" else COMPLETION_TOKENS
        chosen = Sampling(
            max_new_tokens=min(self.max_tokens or usual, room, most_tokens or room),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop_strings=self.stop + stops,
            turn=turn,
        )
        try:
            chosen.check()
        except RunError as error:
            raise ApiError(400, str(error)) from error
        return chosen

    def _room(self, prompt_tokens: int, limit: int | None) -> int:
        """How many tokens may follow the prompt."""
        if limit is None:
            return UNLIMITED
        asked = self.max_tokens or 0
        if prompt_tokens < limit and prompt_tokens + asked <= limit:
            return limit - prompt_tokens
        more = f" and {asked} more are asked for" if asked else ""
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens{more}; the model's context is {limit}: "
            "shorten it",
            param="messages" if self.kind == "chat" else "prompt",
            code="context_length_exceeded",
        )


def parse(kind: Literal["chat", "text"], body: bytes, model: str, defaults: Defaults) -> Ask:
    """The request in ``body``. Raises ApiError naming the field that is wrong."""
    fields = _object(body)
    _refuse_unsupported(fields, "prompt" if kind == "chat" else "messages")
    if fields.get("model", model) != model:
        raise ApiError(
            404,
            f"there is no model {fields['model']!r} here; there is '{model}'",
            param="model",
            code="model_not_found",
        )
    stream = _take(fields, "stream", bool, False)
    options = _take(fields, "stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options needs stream = true", param="stream_options")
    chat = kind == "chat"
    return Ask(
        kind=kind,
        messages=_messages(fields.get("messages")) if chat else (),
        prompt="" if chat else _prompt(fields.get("prompt")),
        max_tokens=_max_tokens(fields),
        temperature=_take(fields, "temperature", float, defaults.temperature),
        top_p=_take(fields, "top_p", float, defaults.top_p),
        seed=_take(fields, "seed", int, secrets.randbits(32)),
        stop=_stop(fields.get("stop")),
        stream=stream,
        include_usage=_take(options, "include_usage", bool, False),
    )


def _object(body: bytes) -> dict[str, Any]:
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


def _refuse_unsupported(fields: dict[str, Any], elsewhere: str) -> None:
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


def _take(fields: dict[str, Any], name: str, kind: Callable[[Any], Any], default: Any) -> Any:
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


TYPES: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    dict: "an object",
}


def _wrong(name: str, expected: str, value: Any) -> ApiError:
    return ApiError(
        400, f"{name} must be {expected}, not {_named(value)}", param=name, code="invalid_type"
    )


def _named(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _max_tokens(fields: dict[str, Any]) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields]
    if not names:
        return None
    count: int = _take(fields, names[0], int, None)
    if count < 1:
        raise ApiError(400, f"{names[0]} must be 1 or more, not {count}", param=names[0])
    return count


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _wrong("stop", "a string or a list of strings, none of them empty", value)
    return tuple(stops)


def _prompt(value: Any) -> str | list[int]:
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


def _messages(value: Any) -> tuple[Message, ...]:
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


def usage(generated: Generated) -> dict[str, int]:
    return {
        "prompt_tokens": generated.prompt_tokens,
        "completion_tokens": generated.new_tokens,
        "total_tokens": generated.prompt_tokens + generated.new_tokens,
    }


class Answer:
    """The JSON of one request's answer, whole or in pieces."""

    def __init__(self, ask: Ask, model: str, created_s: int) -> None:
        self._ask = ask
        self._chat = ask.kind == "chat"
        self._common = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": created_s,
            "model": model,
        }

    def whole(self, text: str, generated: Generated) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text}
        if self._chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            if generated.reasoning:
                message["reasoning_content"] = generated.reasoning
            said = {"message": message}
        name = "chat.completion" if self._chat else "text_completion"
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": generated.ending}
        return {**self._common, "object": name, "choices": [choice], "usage": usage(generated)}

    def first(self) -> dict[str, Any] | None:
        """What a stream opens with, if anything."""
        return self._chunk({"role": "assistant", "content": ""}) if self._chat else None

    def piece(self, text: str, *, reasoning: bool = False) -> dict[str, Any]:
        name = "reasoning_content" if reasoning else "content"
        return self._chunk({name: text} if self._chat else {"text": text})

    def last(self, generated: Generated) -> list[dict[str, Any]]:
        """How it ended, and the usage where it was asked for."""
        ended = self._chunk({} if self._chat else {"text": ""}, generated.ending)
        if not self._ask.include_usage:
            return [ended]
        return [ended, {**ended, "choices": [], "usage": usage(generated)}]

    def _chunk(self, said: dict[str, Any], ending: str | None = None) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._chat else "text_completion"
        said = {"delta": said} if self._chat else said
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": ending}
        return {**self._common, "object": name, "choices": [choice]}
