"""OpenAI's request fields: what is understood, and how the rest is refused."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from moerun.live.sampling import Sampling
from moerun.serving.api_error import ApiError
from moerun.serving.protocol import Answering, Defaults, choices_of, parse, sampling_of

Kind = Literal["chat", "text"]
DEFAULTS = Defaults(temperature=0.7, top_p=0.9)
USER = {"role": "user", "content": "hi"}


def parsed(kind: Kind = "chat", **fields: Any) -> Any:
    basis = {"messages": [USER]} if kind == "chat" else {"prompt": "hi"}
    return parse(kind, json.dumps({**basis, **fields}).encode(), ("tiny", "other"))


def sampled(
    kind: Kind = "chat", prompt: int = 8, limit: int = 512, most: int | None = None, **fields: Any
) -> Sampling:
    defaults = Defaults(DEFAULTS.temperature, DEFAULTS.top_p, most)
    return sampling_of(parsed(kind, **fields), prompt, defaults, Answering(limit))


def test_what_is_not_said_is_the_default() -> None:
    ask = parsed()
    assert (ask.stop, ask.stream) == ((), None)
    assert ask.messages == (USER,)
    assert 0 <= ask.seed < 2**32
    assert ask.seed != parsed().seed
    assert parsed(seed=-1).seed != parsed(seed=-1).seed
    assert parsed(seed=2**40 + 5).seed == 5
    chosen = sampled(temperature=None, stop=None, n=None)
    assert (chosen.temperature, chosen.top_p) == (0.7, 0.9)


def test_fields_that_ask_for_what_happens_anyway_are_taken() -> None:
    parsed(n=1, logprobs=False, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, tools=[])
    parsed(response_format={"type": "text"}, user="me", metadata={"a": "b"}, store=False)
    parsed("text", best_of=1, echo=False, suffix="")
    # What vllm bench serve, llama-benchy, guidellm and agents send.
    parsed(
        "text", repetition_penalty=1.0, ignore_eos=True, cache_prompt=True, return_token_ids=True
    )
    parsed(reasoning_effort="low", tool_choice="auto", parallel_tool_calls=True, name="bench")
    parsed(messages=[{**USER, "name": "Ann"}], chat_template_kwargs={"enable_thinking": False})


def test_fields_say_how_tokens_are_chosen() -> None:
    neutral = sampled(top_k=-1, min_p=0, repetition_penalty=1, temperature=1)
    assert neutral == sampled(seed=neutral.seed, temperature=1.0)
    assert sampled(top_p=0, temperature=1.3).temperature == 0  # the likeliest token
    asked: dict[str, Any] = {
        **{"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3},
        **{"frequency_penalty": -0.4, "logit_bias": {"7": -100, "8": 2.5}, "stop_token_ids": [9]},
        **{"ignore_eos": True, "min_tokens": 3, "logprobs": 2, "echo": True, "seed": 4},
        **{"max_tokens": 6, "stop": "x", "cache_prompt": False, "temperature": 0.5, "top_p": 0.8},
    }
    chosen = sampled("text", **asked)
    assert chosen == Sampling(
        max_new_tokens=6,
        temperature=0.5,
        top_p=0.8,
        seed=4,
        stop=False,
        stop_strings=("x",),
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=-0.4,
        logit_bias=((7, -100.0), (8, 2.5)),
        min_new_tokens=3,
        end_ids=(9,),
        logprobs=2,
        prompt_logprobs=True,
        reuse=False,
    )
    assert sampled(logprobs=True, top_logprobs=3).logprobs == 3
    assert sampled(logprobs=True).logprobs == 0
    seeds = [each.seed for each in choices_of(sampled(seed=2**32 - 1), 3)]
    assert seeds == [2**32 - 1, 0, 1]


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("chat", {"n": 0}, "n"),
        ("chat", {"n": 129}, "n"),
        ("chat", {"logprobs": 1}, "logprobs"),
        ("text", {"logprobs": True}, "logprobs"),
        ("text", {"logprobs": 21}, "logprobs"),
        ("chat", {"top_logprobs": 3}, "top_logprobs"),
        ("chat", {"presence_penalty": 2.5}, "presence_penalty"),
        ("chat", {"repetition_penalty": 0}, "repetition_penalty"),
        ("chat", {"min_p": 1.1}, "min_p"),
        ("chat", {"top_k": -2}, "top_k"),
        ("chat", {"min_tokens": -1}, "min_tokens"),
        ("chat", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("chat", {"logit_bias": {"1": 101}}, "logit_bias"),
        ("chat", {"best_of": 2}, "best_of"),
        ("chat", {"stop": ["x"] * 65}, "stop"),
        ("chat", {"tools": [{"type": "function"}]}, "tools[0].function"),
        ("chat", {"tools": [{"type": "web_search"}]}, "tools[0]"),
        ("chat", {"tool_choice": "required"}, "tool_choice"),
        ("chat", {"tool_choice": {"type": "function"}}, "tool_choice"),
        ("chat", {"chat_template": "{{ 1 }}"}, "chat_template"),
        ("text", {"prompt_logprobs": 1}, "prompt_logprobs"),
        ("text", {"suffix": "end"}, "suffix"),
        ("text", {"max_tokens": 0}, "max_tokens"),
        ("text", {"prompt": ["a"] * 65, "n": 2}, "prompt"),
        ("chat", {"prompt": "hi"}, "prompt"),
        ("text", {"messages": [USER]}, "messages"),
        ("chat", {"echo": True}, "echo"),
        ("chat", {"nonsense": 0}, "nonsense"),
        ("chat", {"temperature": "hot"}, "temperature"),
        ("chat", {"temperature": True}, "temperature"),
        ("chat", {"temperature": 10**400}, "temperature"),
        ("chat", {"seed": 1.5}, "seed"),
        ("chat", {"stream": 1}, "stream"),
        ("chat", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("chat", {"stream_options": {"x": 1}, "stream": True}, "stream_options.x"),
        ("chat", {"max_tokens": 0}, "max_tokens"),
        ("chat", {"max_completion_tokens": "8"}, "max_completion_tokens"),
        ("chat", {"stop": ["a", ""]}, "stop"),
        ("chat", {"stop": 3}, "stop"),
        ("chat", {"stop": {}}, "stop"),
        ("chat", {"stop": False}, "stop"),
        ("chat", {"messages": None}, "messages"),
        ("chat", {"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role"),
        ("chat", {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ("chat", {"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ("chat", {"messages": [{**USER, "name": 5}]}, "messages[0].name"),
        ("chat", {"messages": [{**USER, "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ("chat", {"messages": [{**USER, "tool_calls": {}}]}, "messages[0].tool_calls"),
        (
            "chat",
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        (
            "chat",
            {"messages": [{**USER, "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ("text", {"prompt": None}, "prompt"),
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
    ("kind", "fields", "param", "says"),
    [
        ("text", {"max_tokens": 5, "min_tokens": 6}, "min_tokens", "more than the 5 tokens"),
        ("text", {"min_tokens": 17}, "min_tokens", "more than the 16 tokens"),
        ("chat", {"max_tokens": 505}, "max_tokens", "context is 512: ask for 504 or fewer"),
        ("chat", {"max_completion_tokens": 505}, "max_completion_tokens", "ask for 504"),
    ],
)
def test_lengths_that_cannot_be_name_their_field(
    kind: Kind, fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(ApiError, match=says) as refused:
        sampled(kind, **fields)
    assert (refused.value.status, refused.value.body["error"]["param"]) == (400, param)
    assert sampled("chat", max_tokens=504, min_tokens=504).min_new_tokens == 504


def test_a_prompt_that_is_too_long_alone_is_the_fields_fault() -> None:
    with pytest.raises(ApiError, match="has 512 tokens; the model's context is 512") as refused:
        sampled("text", prompt=512, max_tokens=5)
    assert refused.value.body["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "temperature": NaN}',
        b'{"seed": 1' + b"0" * 5000 + b"}",
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff",
        b"[" * 100_000,
        b'{"prompt": "\\ud800"}',
    ],
)
def test_bodies_that_are_no_request(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse("text", body, ("tiny",))
    assert refused.value.status == 400


def test_parts_of_text_are_one_text_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask = parsed(messages=[{"role": "developer", "content": parts}, USER])
    assert ask.messages[0] == {"role": "system", "content": "ab"}


def test_prompts_may_be_text_or_token_ids() -> None:
    assert parsed("text", prompt="one").prompts == ["one"]
    assert parsed("text", prompt=["one", [5]]).prompts == ["one", [5]]
    assert parsed("text", prompt=[3, 4]).prompts == [[3, 4]]
    assert parsed("text", prompt=[[3, 4]]).prompts == [[3, 4]]


def test_calls_and_results_of_tools_come_as_templates_take_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    found = parsed(messages=[USER, said, {"role": "tool", "tool_call_id": "c1", "content": "2"}])
    function = {"name": "f", "arguments": {"x": 1}}
    assert found.conversation[1:] == (
        {"role": "assistant", "content": "", "tool_calls": [{**call, "function": function}]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    )


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
    assert sampled(kind, prompt, most=most, max_tokens=asked).max_new_tokens == expected


def test_what_does_not_fit_says_both_lengths() -> None:
    for asked, prompt in ((None, 512), (13, 500)):
        with pytest.raises(ApiError, match=rf"has {prompt} tokens.* context is 512"):
            sampled(prompt=prompt, max_tokens=asked)
    assert sampled(prompt=500, max_completion_tokens=12).max_new_tokens == 12


def test_another_model_is_not_found() -> None:
    assert parsed(model="tiny").chat
    assert parsed("text", model="other").model == "other"
    with pytest.raises(ApiError) as refused:
        parsed(model="gpt-4o")
    assert (refused.value.status, refused.value.body["error"]["code"]) == (404, "model_not_found")
