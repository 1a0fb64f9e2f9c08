"""Answers that are to be JSON, and those that cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.live.runner import Runner
from moerun.serving import guided
from moerun.settings import Settings
from moerun.store.pack import pack
from support.serving import asking, chunks_of

USER = {"role": "user", "content": "Give me a person."}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
needs_llguidance = pytest.mark.skipif(
    find_spec("llguidance") is None, reason="llguidance (extra [guided]) is not installed"
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    store = pack(resolve("tiny"), tmp_path_factory.mktemp("guided") / "store", name="tiny")
    with store, Runner(store, Settings(find_policy("lru"), slots=8)) as made:
        yield made


@needs_llguidance
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_its_schema(runner: Runner, temperature: float) -> None:
    fields: dict[str, Any] = {
        **{"messages": [USER], "response_format": PERSON, "max_tokens": 120, "seed": 5},
        "temperature": temperature,
    }
    with asking(runner) as ask:
        choice = ask("/v1/chat/completions", **fields).json()["choices"][0]
        chunks = chunks_of(ask("/v1/chat/completions", **fields, stream=True))
    assert choice["finish_reason"] == "stop"
    said = json.loads(choice["message"]["content"])
    assert set(said) == {"name", "age"}
    assert isinstance(said["age"], int)
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert json.loads("".join(deltas)) == said


@needs_llguidance
def test_any_object_will_do_where_no_schema_is_given(runner: Runner) -> None:
    fields = {"prompt": ["A person:", "A place:"], "max_tokens": 30, "n": 2, "temperature": 1.2}
    with asking(runner) as ask:
        answer = ask("/v1/completions", **fields, response_format={"type": "json_object"}).json()
    for choice in answer["choices"]:
        assert choice["text"].lstrip().startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)


@needs_llguidance
def test_a_schema_that_cannot_be_kept_to_is_refused(runner: Runner) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "nonsense"}}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    with asking(runner) as ask:
        refused = ask("/v1/chat/completions", messages=[USER], response_format=form)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


@needs_llguidance
def test_a_grammar_says_when_to_end(runner: Runner) -> None:
    fields: dict[str, Any] = {"messages": [USER], "response_format": PERSON, "max_tokens": 120}
    with asking(runner) as ask:
        refused = ask("/v1/chat/completions", **fields, ignore_eos=True)
        taken = ask("/v1/chat/completions", **fields, min_tokens=119, seed=5, temperature=1)
    assert refused.json()["error"]["param"] == "ignore_eos"
    assert taken.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "xml"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": []}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_forms_that_are_none(runner: Runner, form: dict[str, Any], param: str) -> None:
    with asking(runner) as ask:
        refused = ask("/v1/chat/completions", messages=[USER], response_format=form)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_without_the_package_the_error_names_the_extra(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guided, "find_spec", lambda _: None)
    with asking(runner) as ask:
        refused = ask("/v1/chat/completions", messages=[USER], response_format=PERSON)
        plain = {"type": "text"}
        taken = ask("/v1/chat/completions", messages=[USER], response_format=plain, max_tokens=1)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == "response_format"
    assert "moe-offload-lab[guided]" in error["message"]
    assert taken.status_code == 200
