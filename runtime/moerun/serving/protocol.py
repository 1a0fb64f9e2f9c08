"""OpenAI's requests, as far as one model on one device can honour them.

After the API reference, https://platform.openai.com/docs/api-reference (chat and completions).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Literal

from moerun.errors import RunError
from moerun.live.sampling import Sampling
from moerun.live.turn import Turn
from moerun.serving.api_error import ApiError
from moerun.serving.chat import Message
from moerun.serving.fields import (
    json_object,
    max_tokens_of,
    messages_of,
    prompt_of,
    refuse_unsupported,
    stop_of,
    take,
)

Kind = Literal["chat", "text"]
"""Of /v1/chat/completions, or of /v1/completions."""

UNLIMITED = 1 << 30
COMPLETION_TOKENS = 16  # what /v1/completions generates unless told, by the reference


@dataclass(frozen=True)
class Defaults:
    """Defaults for requests that do not set a field; ``most_tokens`` bounds the answer."""

    temperature: float = 1.0
    top_p: float = 1.0
    most_tokens: int | None = None


@dataclass(frozen=True)
class CompletionRequest:
    """A request understood: what to continue, and how. ``max_tokens`` None: it does not say."""

    kind: Kind
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


def parse(kind: Kind, body: bytes, model: str, defaults: Defaults) -> CompletionRequest:
    """The request in ``body``. Raises ApiError naming the field that is wrong."""
    fields = json_object(body)
    refuse_unsupported(fields, "prompt" if kind == "chat" else "messages")
    if fields.get("model", model) != model:
        raise ApiError(
            404,
            f"there is no model {fields['model']!r} here; there is '{model}'",
            param="model",
            code="model_not_found",
        )
    stream = take(fields, "stream", bool, False)
    options = take(fields, "stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options needs stream = true", param="stream_options")
    chat = kind == "chat"
    return CompletionRequest(
        kind=kind,
        messages=messages_of(fields.get("messages")) if chat else (),
        prompt="" if chat else prompt_of(fields.get("prompt")),
        max_tokens=max_tokens_of(fields),
        temperature=take(fields, "temperature", float, defaults.temperature),
        top_p=take(fields, "top_p", float, defaults.top_p),
        seed=take(fields, "seed", int, secrets.randbits(32)),
        stop=stop_of(fields.get("stop")),
        stream=stream,
        include_usage=take(options, "include_usage", bool, False),
    )
