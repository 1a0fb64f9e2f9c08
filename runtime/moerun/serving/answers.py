"""OpenAI's answers: the JSON of a request's answer, whole or in pieces."""

from __future__ import annotations

import secrets
from typing import Any

from moerun.live.generate import Generated
from moerun.serving.protocol import CompletionRequest


def usage(generated: Generated) -> dict[str, int]:
    """The `usage` object of an answer: tokens of prompt, completion and both."""
    return {
        "prompt_tokens": generated.prompt_tokens,
        "completion_tokens": generated.new_tokens,
        "total_tokens": generated.prompt_tokens + generated.new_tokens,
    }


class Answer:
    """The JSON of one request's answer, whole or in pieces."""

    def __init__(self, request: CompletionRequest, model: str, created_s: int) -> None:
        self._request = request
        self._chat = request.kind == "chat"
        self._common = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": created_s,
            "model": model,
        }

    def whole(self, text: str, generated: Generated) -> dict[str, Any]:
        """The answer as one object, for requests that do not stream."""
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
        """The chunk that opens a streamed chat; None for a completion, which has none."""
        return self._chunk({"role": "assistant", "content": ""}) if self._chat else None

    def piece(self, text: str, *, reasoning: bool = False) -> dict[str, Any]:
        """A chunk of a streamed answer with new text, or new reasoning."""
        name = "reasoning_content" if reasoning else "content"
        return self._chunk({name: text} if self._chat else {"text": text})

    def last(self, generated: Generated) -> list[dict[str, Any]]:
        """The last chunks: how the answer ended, and the usage where the request asks for it."""
        ended = self._chunk({} if self._chat else {"text": ""}, generated.ending)
        if not self._request.include_usage:
            return [ended]
        return [ended, {**ended, "choices": [], "usage": usage(generated)}]

    def _chunk(self, said: dict[str, Any], ending: str | None = None) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._chat else "text_completion"
        said = {"delta": said} if self._chat else said
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": ending}
        return {**self._common, "object": name, "choices": [choice]}
