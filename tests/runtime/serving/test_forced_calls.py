"""Calls of tools that a request demands, and requests that demand what cannot be had."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from moepolicy import find_policy
from moerun.live.runner import Runner
from moerun.settings import Settings
from support.chat_templates import styled_store
from support.serving import asking, chunks_of

USER = {"role": "user", "content": "What is the weather in Paris?"}
CHAT = "/v1/chat/completions"
needs_llguidance = pytest.mark.skipif(
    find_spec("llguidance") is None, reason="llguidance (extra [guided]) is not installed"
)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


CITIES = {"enum": ["Paris", "Lyon"]}
WEATHER = tool("weather", city={"$ref": "#/$defs/city"}, days={"enum": [1, 2, 3]})
WEATHER["function"]["parameters"]["$defs"] = {"city": CITIES}
TIME = tool("time", zone={"enum": ["CET", "UTC"]})
TOOLS = [WEATHER, TIME]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Runner]]:
    made: dict[str, Runner] = {}
    for style in ("qwen3", "mistral", "gemma"):
        folder: Path = tmp_path_factory.mktemp(style)
        store = styled_store(style, folder)
        made[style] = Runner(store, Settings(find_policy("lru"), slots=8))
    told = "{% if tools %}{{ tools | tojson }}{% endif %}"
    for runner in made.values():
        runner.tokenizer.chat_template = told + runner.tokenizer.chat_template
    yield made
    for runner in made.values():
        runner.close()


def checked(call: dict[str, Any]) -> str:
    """The name of a call, whose arguments are as its tool has them."""
    name: str
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    if name == "time":
        assert arguments.keys() == {"zone"}
        assert arguments["zone"] in ("CET", "UTC")
        return name
    assert name == "weather"
    assert arguments.keys() == {"city", "days"}
    assert arguments["city"] in CITIES["enum"]
    assert arguments["days"] in (1, 2, 3)
    return name


@needs_llguidance
@pytest.mark.parametrize("style", ["qwen3", "mistral"])
def test_a_demanded_call_is_made(style: str, runners: dict[str, Runner]) -> None:
    fields: dict[str, Any] = {"messages": [USER], "tools": TOOLS, "max_tokens": 200}
    with asking(runners[style]) as ask:
        for seed in range(3):
            drawn = fields | {"seed": seed, "temperature": 1.5, "parallel_tool_calls": False}
            choice = ask(CHAT, **drawn, tool_choice="required").json()["choices"][0]
            assert choice["finish_reason"] == "tool_calls"
            assert not choice["message"].get("content")
            (call,) = choice["message"]["tool_calls"]
            checked(call)
        for name in ("weather", "time"):
            answer = ask(CHAT, **fields, temperature=0, tool_choice=named(name)).json()
            (call,) = answer["choices"][0]["message"]["tool_calls"]
            assert checked(call) == name
        chunks = chunks_of(
            ask(CHAT, **fields, temperature=0, tool_choice=named("time"), stream=True)
        )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    (streamed,) = [delta["tool_calls"] for delta in deltas if delta.get("tool_calls")]
    assert checked(streamed[0]) == "time"


@needs_llguidance
def test_several_calls_may_be_made_where_one_is_required(runners: dict[str, Runner]) -> None:
    fields: dict[str, Any] = {"messages": [USER], "tools": [TIME], "max_tokens": 200}
    with asking(runners["qwen3"]) as ask:
        found = [
            ask(CHAT, **fields, tool_choice="required", temperature=1.5, seed=seed).json()
            for seed in range(3)
        ]
    for answer in found:
        calls = answer["choices"][0]["message"]["tool_calls"]
        assert [checked(call) for call in calls] == ["time"] * len(calls) != []


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tool_choice": "always"}, "tool_choice", 'is not "none", "auto", "required"'),
        ({"tool_choice": 3}, "tool_choice", "is not"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "is not"),
        ({"tool_choice": named("noise")}, "tool_choice", "none of the tools: weather, time"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "needs tools"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "excludes a response_format",
        ),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "when to end"),
    ],
)
def test_what_cannot_be_demanded_is_refused(
    fields: dict[str, Any], param: str, says: str, runners: dict[str, Runner]
) -> None:
    with asking(runners["qwen3"]) as ask:
        refused = ask(CHAT, **{"messages": [USER], "tools": TOOLS, **fields})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, param)
        assert says in error["message"]


def test_a_template_that_writes_no_calls_cannot_be_made_to(runners: dict[str, Runner]) -> None:
    with asking(runners["gemma"]) as ask:
        refused = ask(CHAT, messages=[USER], tools=TOOLS, tool_choice="required")
    assert refused.status_code == 400
    assert "cannot be enforced with this model" in refused.json()["error"]["message"]
