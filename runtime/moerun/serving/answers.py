"""OpenAI's answers: the JSON of a request's answers, whole or in pieces."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from moerun.live.logprobs import TokenLogprob
from moerun.live.work import Generated
from moerun.serving.requests import ChatRequest, TextRequest
from moerun.serving.tools import openai_calls

NO_TEXT = "\ufffd"  # what a decoder shows for a part of a character
LEAST = -9999.0  # as OpenAI writes the logarithm of 0, which JSON has no number for


def usage(answers: Sequence[Generated], choices: int, *, silent: bool = False) -> dict[str, Any]:
    """The `usage` object of answers of which ``choices`` each are to one prompt.

    ``silent``: the answers' own tokens were not asked for.
    """
    prompts = answers[::choices]
    prompt = sum(each.prompt_tokens for each in prompts)
    new = 0 if silent else sum(each.new_tokens for each in answers)
    cached = sum(each.cached_tokens for each in prompts)
    return {**_counts(prompt, new), "prompt_tokens_details": {"cached_tokens": cached}}


def _counts(prompt: int, new: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class TokenNames:
    """The text of single tokens, as log-probabilities are reported by."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """A token's text, or its entry in the vocabulary where it is but a part of a character."""
        if token not in self._known:
            text = self._tokenizer.decode([token]) if self._tokenizer else ""
            if self._tokenizer and (NO_TEXT in text or not text):
                text = str(self._tokenizer.convert_ids_to_tokens(token))
            self._known[token] = text or f"token_id:{token}"
        return self._known[token]

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens together."""
        return str(self._tokenizer.decode(list(tokens))) if self._tokenizer else ""


class Part(NamedTuple):
    """Some of an answer: new text with the tokens that came with it, or before it.

    logprobs is None where nobody asked for it; ``echoed``: it is the prompt.
    """

    text: str = ""
    reasoning: bool = False
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] | None = None
    echoed: bool = False


class Answer:
    """The JSON of one request's answers, whole or in pieces."""

    def __init__(
        self,
        asked: ChatRequest | TextRequest,
        model: str,
        created_s: int,
        names: TokenNames,
        prompt_tokens: int,
    ) -> None:
        """``prompt_tokens`` of all prompts together."""
        self._asked = asked
        self._chat = asked.chat
        self._names = names
        self._silent = asked.length == 0
        self._common = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": created_s,
            "model": model,
        }
        self._prompt_tokens = prompt_tokens
        self._sent_tokens = 0  # of the answers, in the chunks until now
        self._offsets: dict[int, int] = {}  # of the next token of each choice, in characters

    def whole(
        self,
        prompts: Sequence[Sequence[int]],
        echoed: Sequence[str],
        texts: Sequence[str],
        answers: Sequence[Generated],
    ) -> dict[str, Any]:
        """The answers as one object, for requests that do not stream.

        ``prompts`` are token ids; each has as many of ``texts`` and ``answers`` as the request has
        choices. ``echoed`` has their texts, where answers begin with them, or is empty.
        """
        choices = []
        for i, (text, generated) in enumerate(zip(texts, answers, strict=True)):
            prompt = i // self._asked.choices
            begun = echoed[prompt] if echoed else ""
            said = begun + ("" if self._silent else text)
            choices.append(self._choice(i, prompts[prompt], said, generated))
        name = "chat.completion" if self._chat else "text_completion"
        return {**self._common, "object": name, "choices": choices, "usage": self._usage(answers)}

    def _usage(self, answers: Sequence[Generated]) -> dict[str, Any]:
        return usage(answers, self._asked.choices, silent=self._silent)

    def _choice(
        self, index: int, prompt: Sequence[int], text: str, generated: Generated
    ) -> dict[str, Any]:
        calls = openai_calls(generated.tool_calls)
        said: dict[str, Any] = {"text": text}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if generated.reasoning:
                message["reasoning_content"] = generated.reasoning
            if calls:
                message.update(content=text or None, tool_calls=calls)
            said = {"message": message}
        logprobs = [*generated.prompt_logprobs, *([] if self._silent else generated.logprobs)]
        ids = {}
        if self._asked.return_token_ids:
            ids = {"prompt_token_ids": list(prompt), "token_ids": generated.token_ids}
        return {
            "index": index,
            **said,
            "logprobs": None if self._asked.top is None else self._logprobs(index, logprobs),
            "finish_reason": _ending(generated, calls),
            **ids,
        }

    def first(self, index: int, echoed: Part | None = None) -> dict[str, Any] | None:
        """The chunk that opens a choice of a stream: a chat's role, or the prompt where it is to be
        echoed; None for a completion that has neither."""
        if self._chat:
            return self._chunk(index, {"role": "assistant", "content": ""})
        return None if echoed is None else self.piece(index, echoed)

    def piece(self, index: int, part: Part) -> dict[str, Any]:
        """A chunk of a streamed answer with new text, or new reasoning."""
        name = "reasoning_content" if part.reasoning else "content"
        return self._chunk(index, {name: part.text} if self._chat else {"text": part.text}, part)

    def last(self, index: int, generated: Generated, rest: Part) -> list[dict[str, Any]]:
        """The last chunks of a choice: the calls of tools, and how the answer ended. ``rest`` has
        the tokens that came without text."""
        calls = openai_calls(generated.tool_calls)
        chunks = []
        if calls:
            numbered = [{"index": i, **call} for i, call in enumerate(calls)]
            chunks.append(self._chunk(index, {"tool_calls": numbered}))
        ended = {} if self._chat else {"text": ""}
        return [*chunks, self._chunk(index, ended, rest, _ending(generated, calls))]

    def total(self, answers: Sequence[Generated]) -> dict[str, Any] | None:
        """The chunk with the usage, where the request asks for it."""
        if not self._asked.include_usage:
            return None
        name = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._common, "object": name, "choices": [], "usage": self._usage(answers)}

    def _chunk(
        self, index: int, said: dict[str, Any], part: Part | None = None, ending: str | None = None
    ) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._chat else "text_completion"
        said = {"delta": said} if self._chat else said
        logprobs = None
        if part is not None and part.logprobs and self._asked.top is not None:
            logprobs = self._logprobs(index, part.logprobs)
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": ending}
        if self._asked.return_token_ids and part is not None:
            choice["token_ids"] = list(part.token_ids)
        chunk = {**self._common, "object": name, "choices": [choice]}
        if not self._asked.continuous_usage:
            return chunk
        self._sent_tokens += len(part.token_ids) if part is not None and not part.echoed else 0
        return {**chunk, "usage": _counts(self._prompt_tokens, self._sent_tokens)}

    def _logprobs(self, index: int, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._of_chat(each) for each in found], "refusal": None}
        return self._of_text(index, found)

    def _of_chat(self, of: TokenLogprob) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in of.top]
        return {**self._named(of.token, of.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._names(token)
        return {"token": text, "logprob": _number(logprob), "bytes": list(text.encode())}

    def _of_text(self, index: int, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The form of completions: of the likeliest tokens a dictionary, the chosen one added."""
        names = [self._names(each.token) for each in found]
        offsets, at = [], self._offsets.get(index, 0)
        for name in names:
            offsets.append(at)
            at += len(name)
        self._offsets[index] = at
        return {
            "tokens": names,
            "token_logprobs": [_number(each.logprob) for each in found],
            "top_logprobs": [self._top(each) for each in found],
            "text_offset": offsets,
        }

    def _top(self, of: TokenLogprob) -> dict[str, float | None] | None:
        if of.logprob is None:
            return None
        top = {self._names(token): _number(logprob) for token, logprob in of.top}
        return {**top, self._names(of.token): _number(of.logprob)}


def _ending(generated: Generated, calls: Sequence[Any]) -> str:
    return "tool_calls" if calls and generated.ending == "stop" else generated.ending


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)
