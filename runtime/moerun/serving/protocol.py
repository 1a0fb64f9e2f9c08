"""A request's bytes understood, and how the tokens of its answers are chosen."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import ValidationError

from moerun.errors import RunError
from moerun.live.sampling import Sampling
from moerun.live.turn import Turn
from moerun.serving.api_error import ApiError
from moerun.serving.fields import json_object, shown, unsupported
from moerun.serving.forced_calls import forced_tools
from moerun.serving.guided import schema_of
from moerun.serving.requests import (
    KINDS,
    MOST_CHOICES,
    Body,
    ChatRequest,
    CompletionBody,
    Kind,
    TextRequest,
)

UNLIMITED = 1 << 30
COMPLETION_TOKENS = 16  # what /v1/completions generates unless told, by the reference
SEEDS = 1 << 32

Asked = TypeVar("Asked", bound=Body)


@dataclass(frozen=True)
class Defaults:
    """Defaults for requests that do not set a field; ``most_tokens`` bounds the answer."""

    temperature: float = 1.0
    top_p: float = 1.0
    most_tokens: int | None = None


def read(kind: type[Asked], body: bytes) -> Asked:
    """The request in ``body``. Raises ApiError naming the field that is wrong."""
    try:
        return kind.model_validate(json_object(body))
    except ValidationError as error:
        raise _refusal(error) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply") from error


def _refusal(error: ValidationError) -> ApiError:
    """The first thing that is wrong, by the name of its field."""
    found = error.errors(include_url=False, include_context=False)[0]
    name = _name(found["loc"])
    if found["type"] == "missing":
        return ApiError(400, f"{name} is missing", param=name, code="missing_required_parameter")
    if found["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"the field {name} is not supported here",
            param=name,
            code="unsupported_parameter",
        )
    given = shown(found["input"])
    if found["type"] == "value_error":  # one of ours
        said = found["msg"].removeprefix("Value error, ")
        return ApiError(400, f"{name} = {given} {said}", param=name, code="unsupported_value")
    said = found["msg"].replace("Input should be", "must be")
    return ApiError(400, f"{name} {said}, not {given}", param=name, code="invalid_type")


def _name(place: tuple[int | str, ...]) -> str:
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(parts).removeprefix(".")


def parse(kind: Kind, body: bytes, models: tuple[str, ...]) -> ChatRequest | TextRequest:
    """A request for an answer by the model that goes by the names ``models``.

    Raises ApiError naming the field that is wrong.
    """
    asked: ChatRequest | TextRequest = read(KINDS[kind], body)
    check_model(asked.model, models)
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream = true", param="stream_options")
    if asked.seed is None or asked.seed == -1:
        asked.seed = secrets.randbits(32)
    asked.seed %= SEEDS
    if isinstance(asked, ChatRequest):
        _check_chat(asked)
    elif asked.max_tokens == 0 and not asked.echo:
        raise _short(asked)
    elif len(asked.prompts) * asked.choices > MOST_CHOICES:
        raise ApiError(
            400,
            f"{len(asked.prompts)} prompts with n = {asked.choices} are more than {MOST_CHOICES} "
            "answers: send several requests",
            param="prompt",
        )
    return asked


def check_model(name: str | None, models: tuple[str, ...]) -> None:
    """ApiError where a request asks for a model that is not this server's."""
    if name is not None and name not in models:
        raise ApiError(
            404,
            f"there is no model {name!r} here; there is '{models[0]}'",
            param="model",
            code="model_not_found",
        )


def _check_chat(asked: ChatRequest) -> None:
    if asked.length == 0:
        raise _short(asked)
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs = true", param="top_logprobs")
    written = schema_of(asked.response_format) is not None
    if forced_tools(asked.tools, asked.tool_choice, written=written) and asked.ignore_eos:
        raise unsupported("ignore_eos", "is not for a tool_choice that says when to end")


def _short(asked: CompletionBody) -> ApiError:
    name = asked.length_field
    return ApiError(400, f"{name} must be 1 or more, not 0", param=name)


@dataclass(frozen=True)
class Answering:
    """What this server's model makes of an answer."""

    limit: int | None  # tokens of its context
    stops: tuple[str, ...] = ()
    turn: Turn | None = None


def sampling_of(
    asked: ChatRequest | TextRequest, prompt_tokens: int, defaults: Defaults, model: Answering
) -> Sampling:
    """How the tokens of the first answer are chosen; the others' differ in their seed alone.

    Raises ApiError where a value is out of range, or the answer longer than the context.
    """
    room = _room(asked, prompt_tokens, model.limit)
    usual = room if asked.chat else COMPLETION_TOKENS
    length = usual if asked.length is None else max(1, asked.length)
    greedy = asked.top_p == 0  # keeps the likeliest token alone
    chosen = Sampling(
        max_new_tokens=min(length, room, defaults.most_tokens or room),
        temperature=0.0 if greedy else _or(asked.temperature, defaults.temperature),
        top_p=1.0 if greedy else _or(asked.top_p, defaults.top_p),
        seed=asked.seed or 0,
        stop=not asked.ignore_eos,
        stop_strings=(*asked.stop, *model.stops),
        turn=model.turn,
        top_k=max(0, asked.top_k or 0),
        min_p=_or(asked.min_p, 0.0),
        repetition_penalty=_or(asked.repetition_penalty, 1.0),
        presence_penalty=_or(asked.presence_penalty, 0.0),
        frequency_penalty=_or(asked.frequency_penalty, 0.0),
        logit_bias=asked.logit_bias,
        min_new_tokens=asked.min_tokens or 0,
        end_ids=tuple(asked.stop_token_ids or ()),
        logprobs=asked.top,
        prompt_logprobs=bool(
            isinstance(asked, TextRequest) and asked.echo and asked.top is not None
        ),
        reuse=asked.cache_prompt is not False,
    )
    if chosen.min_new_tokens > chosen.max_new_tokens:
        raise unsupported(
            "min_tokens",
            f"= {chosen.min_new_tokens} is more than the {chosen.max_new_tokens} tokens that the "
            "answer may have",
        )
    try:
        chosen.check()
    except RunError as error:
        raise ApiError(400, str(error)) from error
    return chosen


def choices_of(sampling: Sampling, n: int) -> list[Sampling]:
    """Of ``n`` answers to one prompt: each with a seed of its own."""
    return [replace(sampling, seed=(sampling.seed + i) % SEEDS) for i in range(n)]


def _or(value: Any, default: float) -> float:
    return default if value is None else float(value)


def _room(asked: ChatRequest | TextRequest, prompt_tokens: int, limit: int | None) -> int:
    """How many tokens may follow the prompt."""
    if limit is None:
        return UNLIMITED
    wanted = asked.length or 0
    if prompt_tokens < limit and prompt_tokens + wanted <= limit:
        return limit - prompt_tokens
    name = "messages" if asked.chat else "prompt"
    more, instead = "", "shorten it"
    if prompt_tokens < limit:  # the prompt alone would do
        name = asked.length_field
        more = f", {name} asks for {wanted} more"
        instead = f"ask for {limit - prompt_tokens} or fewer"
    raise ApiError(
        400,
        f"the prompt has {prompt_tokens} tokens{more}; the model's context is {limit}: {instead}",
        param=name,
        code="context_length_exceeded",
    )
