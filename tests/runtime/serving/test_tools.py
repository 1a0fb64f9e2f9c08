"""Tools in a request: told to the model by its template, and read out of what it writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from moepolicy import find_policy
from moerun.live.runner import Runner
from moerun.live.turn import Turn, turn_of
from moerun.serving.tools import calls_in, tool_turn
from moerun.settings import Settings
from support.chat_templates import STYLES, styled_store, tokenizer_of
from support.serving import asking, posted

USER = {"role": "user", "content": "What is the weather in Paris?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
WRITES = (
    "<think>\nA tool knows.\n</think>\n\nLet me look."
    '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    '<tool_call>{"name": "weather", "arguments": {"city": "Lyon"}}</tool_call><|im_end|>'
)
TOLD = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if enable_thinking is defined %}<|im_start|>system\n"
    "Thinking: {{ enable_thinking }}, {{ reasoning_effort }}<|im_end|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    store = styled_store("qwen3", tmp_path_factory.mktemp("qwen3"))
    with store, Runner(store, Settings(find_policy("lru"), slots=8)) as made:
        made.tokenizer.chat_template = TOLD + made.tokenizer.chat_template
        yield made


def test_calls_are_read_out_of_the_answer(runner: Runner) -> None:
    choice = posted(runner, WRITES, [USER], tools=[TOOL], tool_choice="auto")
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("Let me look.", "A tool knows.")
    functions = [call["function"] for call in message["tool_calls"]]
    assert [function["name"] for function in functions] == ["weather", "weather"]
    cities = [json.loads(function["arguments"])["city"] for function in functions]
    assert cities == ["Paris", "Lyon"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    # The answer and the tool's result may come back as they were given.
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "Rain."}
    after = posted(runner, "It rains.<|im_end|>", [USER, message, result], tools=[TOOL])
    assert (after["message"]["content"], after["finish_reason"]) == ("It rains.", "stop")


def test_a_stream_has_its_calls_before_its_end(runner: Runner) -> None:
    choices = posted(runner, WRITES, [USER], tools=[TOOL], stream=True)
    assert choices[-1]["finish_reason"] == "tool_calls"
    called = choices[-2]["delta"]["tool_calls"]
    assert [(call["index"], call["function"]["name"]) for call in called] == [
        (0, "weather"),
        (1, "weather"),
    ]
    assert "".join(each["delta"].get("content", "") for each in choices) == "Let me look."


def test_without_tools_a_call_is_text(runner: Runner) -> None:
    several: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}]
    for fields in several:
        choice = posted(runner, WRITES, [USER], **fields)
        assert choice["finish_reason"] == "stop"
        assert "tool_calls" not in choice["message"]
        assert '{"name": "weather"' in choice["message"]["content"]


def test_a_call_that_is_no_json_is_shown_as_it_came(runner: Runner) -> None:
    writes = "<tool_call>weather in Paris</tool_call><|im_end|>"
    choice = posted(runner, writes, [USER], tools=[TOOL])
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("stop", False)
    assert "weather in Paris" in choice["message"]["content"]


def test_the_template_is_told(runner: Runner) -> None:
    with asking(runner) as ask:

        def told(**fields: Any) -> str:
            tokens = ask("/tokenize", messages=[USER], **fields).json()["tokens"]
            return str(ask("/detokenize", tokens=tokens).json()["prompt"])

        assert '"name": "weather"' in told(tools=[TOOL])
        assert "Tools" not in told()
        variables = {"enable_thinking": False, "reasoning_effort": "high"}
        assert "Thinking: False, high" in told(chat_template_kwargs=variables)
        assert told().endswith("assistant\n")
        assert told(add_generation_prompt=False).rstrip().endswith("<|im_end|>")
        chat = {"messages": [USER], "max_tokens": 1}
        plain = ask("/v1/chat/completions", **chat).json()["usage"]["prompt_tokens"]
        variables = {"enable_thinking": True}
        more = ask(
            "/v1/chat/completions", **chat, chat_template_kwargs=variables, reasoning_effort="low"
        )
        assert more.json()["usage"]["prompt_tokens"] > plain


def test_what_is_no_variable_of_a_template_is_refused(runner: Runner) -> None:
    with asking(runner) as ask:
        for name in ("tokenize", "chat_template", "messages", "tools", "return_tensors", "a b"):
            variables = {name: 1}
            refused = ask("/v1/chat/completions", messages=[USER], chat_template_kwargs=variables)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("style", STYLES)
def test_only_templates_that_write_calls_are_read(style: str) -> None:
    tokenizer = tokenizer_of(style)
    model = SimpleNamespace(config=SimpleNamespace(model_type="mixtral"))
    found = tool_turn(tokenizer, model, turn_of(tokenizer))
    assert (found is not None) == (style in ("qwen3", "prefilled", "mistral"))
    # A family that transformers knows the calls of needs no template that tells.
    known = SimpleNamespace(config=SimpleNamespace(model_type="qwen3_moe"))
    assert tool_turn(tokenizer, known, Turn()) is not None


def test_calls_are_found_in_whatever_form_they_come() -> None:
    wanted = {"name": "f", "arguments": {"x": 1}}
    assert calls_in({"type": "function", "function": wanted}) == [wanted]
    assert calls_in([wanted, {"name": "f", "parameters": {"x": 1}}]) == [wanted, wanted]
    assert calls_in({"nothing": 1}) == calls_in("text") == calls_in({"function": 3}) == []
