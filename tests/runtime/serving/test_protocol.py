"""OpenAI's request fields: what is understood, and how the rest is refused."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from moerun.serving.api_error import ApiError
from moerun.serving.protocol import CompletionRequest, Defaults, parse

Kind = Literal["chat", "text"]
DEFAULTS = Defaults(temperature=0.7, top_p=0.9)
USER = {"role": "user", "content": "hi"}


def parsed(kind: Kind = "chat", **fields: Any) -> CompletionRequest:
    basis = {"messages": [USER]} if kind == "chat" else {"prompt": "hi"}
    return parse(kind, json.dumps({**basis, **fields}).encode(), "tiny", DEFAULTS)


def test_what_is_not_said_is_the_default() -> None:
    ask = parsed()
    assert (ask.temperature, ask.top_p, ask.stop, ask.stream) == (0.7, 0.9, (), False)
    assert ask.messages == (USER,)
    assert 0 <= ask.seed < 2**32
    assert ask.seed != parsed().seed
    assert parsed(temperature=None, stop=None, n=None).temperature == 0.7


def test_fields_that_ask_for_what_happens_anyway_are_taken() -> None:
    parsed(n=1, logprobs=False, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, tools=[])
    parsed(response_format={"type": "text"}, user="me", metadata={"a": "b"}, store=False)
    parsed("text", best_of=1, echo=False, suffix="")


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("chat", {"n": 2}, "n"),
        ("chat", {"logprobs": True}, "logprobs"),
        ("text", {"logprobs": 0}, "logprobs"),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"presence_penalty": 0.5}, "presence_penalty"),
        ("chat", {"tools": [{"type": "function"}]}, "tools"),
        ("chat", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat", {"prompt": "hi"}, "prompt"),
        ("text", {"messages": [USER]}, "messages"),
        ("text", {"echo": True}, "echo"),
        ("chat", {"nonsense": 0}, "nonsense"),
        ("chat", {"temperature": "hot"}, "temperature"),
        ("chat", {"temperature": True}, "temperature"),
        ("chat", {"temperature": 10**400}, "temperature"),
        ("chat", {"seed": 1.5}, "seed"),
        ("chat", {"stream": 1}, "stream"),
        ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"max_completion_tokens": "8"}, "max_completion_tokens"),
        ("chat", {"stop": ["a", ""]}, "stop"),
        ("chat", {"stop": 3}, "stop"),
        ("chat", {"messages": None}, "messages"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ("chat", {"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ("chat", {"messages": [{**USER, "name": "Ann"}]}, "messages[0].name"),
        (
            "chat",
            {"messages": [{**USER, "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ("text", {"prompt": None}, "prompt"),
        ("text", {"prompt": ["one", "two"]}, "prompt"),
        ("text", {"prompt": []}, "prompt"),
        ("text", {"prompt": [1, "a"]}, "prompt"),
    ],
)
def test_refusals_name_the_field(kind: Kind, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        parsed(kind, **fields)
    error = refused.value.body["error"]
    assert (refused.value.status, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert param in str(error["message"])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"text"', b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}']
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse("text", body, "tiny", DEFAULTS)
    assert refused.value.status == 400


def test_parts_of_text_are_one_text_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask = parsed(messages=[{"role": "developer", "content": parts}, USER])
    assert ask.messages[0] == {"role": "system", "content": "ab"}


def test_prompts_may_be_text_or_token_ids() -> None:
    assert parsed("text", prompt=["one"]).prompt == "one"
    assert parsed("text", prompt=[3, 4]).prompt == [3, 4]
    assert parsed("text", prompt=[[3, 4]]).prompt == [3, 4]


@pytest.mark.parametrize(
    ("kind", "asked", "prompt", "most", "expected"),
    [
        ("chat", None, 100, None, 412),  # all the room there is
        ("text", None, 100, None, 16),
        ("text", None, 500, None, 12),
        ("chat", 50, 100, None, 50),
        ("chat", 50, 100, 20, 20),
        ("chat", None, 500, 20, 12),
    ],
)
def test_lengths(
    kind: Kind, asked: int | None, prompt: int, most: int | None, expected: int
) -> None:
    ask = parsed(kind, max_tokens=asked)
    assert ask.sampling(prompt, 512, most, ()).max_new_tokens == expected


def test_what_does_not_fit_says_both_lengths() -> None:
    for asked, prompt in ((None, 512), (13, 500)):
        with pytest.raises(ApiError, match=rf"has {prompt} tokens.* context is 512"):
            parsed(max_tokens=asked).sampling(prompt, 512, None, ())
    assert parsed(max_completion_tokens=12).sampling(500, 512, None, ()).max_new_tokens == 12


def test_another_model_is_not_found() -> None:
    assert parsed(model="tiny").kind == "chat"
    with pytest.raises(ApiError) as refused:
        parsed(model="gpt-4o")
    assert (refused.value.status, refused.value.body["error"]["code"]) == (404, "model_not_found")
