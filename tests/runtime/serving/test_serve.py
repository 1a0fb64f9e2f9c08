"""`moerun serve` as OpenAI's own client meets it: real processes on free ports."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from moerun.cli import main
from support.serving import HELLO, KEY, Served, bearer, chat, slow_server, text_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with slow_server(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("served")) as served:
        yield served


def test_it_listens_on_loopback_and_lists_its_model(server: Served) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert "anyone" not in server.said
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "moerun"
    with pytest.raises(openai.NotFoundError, match="there is 'tiny'"):
        client.models.retrieve("owner/name")


def test_a_stream_says_what_the_whole_answer_says(server: Served) -> None:
    client = server.client()
    whole = chat(client)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == choice.message.content.lstrip() != ""
    assert (choice.finish_reason, whole.usage.completion_tokens) == ("length", 16)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 16
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == choice.message.content
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_continue_the_prompt(server: Served) -> None:
    client: Any = server.client()
    options = {"model": "tiny", "temperature": 0}
    whole = client.completions.create(prompt="It was the best of", **options)
    assert whole.usage.completion_tokens == 16  # the reference's default
    stream = client.completions.create(prompt="It was the best of", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    ids = client.completions.create(prompt=[[5, 6, 7]], max_tokens=1, **options)
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, 1)
    with pytest.raises(openai.BadRequestError, match="there is no token 9999"):
        client.completions.create(prompt=[9999], **options)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(server: Served) -> None:
    client = server.client()
    text = chat(client).choices[0].message.content
    stop = text.split()[3]
    cut = chat(client, stop=["@@", stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    chunks = list(chat(client, stop=stop, stream=True))
    assert text_of(chunks) == text[: text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer(server: Served) -> None:
    client = server.client()

    def said(**options: Any) -> str:
        answer = chat(client, temperature=1.5, top_p=0.95, **options)
        return str(answer.choices[0].message.content)

    assert said(seed=7) == said(seed=7) != said(seed=8)
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=16, temperature=1.5, top_p=0.95
    )
    seed = int(raw.headers["x-moerun-seed"])
    assert raw.parse().choices[0].message.content == said(seed=seed)


def test_longer_than_the_context_is_refused_with_both_lengths(server: Served) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match=r"has 6\d\d tokens.* context is 512") as long:
        chat(client, messages=[{"role": "user", "content": "word " * 600}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"500 more are asked for; .* is 512"):
        chat(client, max_tokens=500)
    # Without a number the answer gets what room there is.
    messages = [{"role": "user", "content": "word " * 495}]
    full = chat(client, messages=messages, max_tokens=openai.omit)
    assert full.usage.total_tokens <= 512


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 2}, "n = 2 is not supported"),
        ({"logprobs": True}, "logprobs = true is not supported"),
        ({"extra_body": {"min_p": 0.1}}, "the field min_p is not supported"),
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"messages": []}, "messages must be a list of at least one"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    server: Served, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        chat(server.client(), **options)


def test_unknown_models_paths_and_methods(server: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o' here"):
        chat(server.client(), model="gpt-4o")
    wrong = httpx.get(f"{server.url}/v1/embeddings", headers=bearer())
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (404, "invalid_request_error")
    wrong = httpx.get(f"{server.url}/v1/completions", headers=bearer())
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    wrong = httpx.post(f"{server.url}/v1/completions", headers=bearer(), content=b"{")
    assert (wrong.status_code, "no JSON" in wrong.json()["error"]["message"]) == (400, True)
    long = httpx.post(f"{server.url}/v1/completions", headers=bearer(), content=b" " * (17 << 20))
    assert long.status_code == 413


def test_the_key_is_wanted_everywhere_but_for_health(server: Served) -> None:
    for key in ("wrong", KEY[:-1], f"{KEY}s"):
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            server.client(key=key).models.list()
    refused = httpx.get(f"{server.url}/metrics")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert "wants an API key" in refused.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_metrics_count_what_was_served(server: Served) -> None:
    before = server.metrics()
    usage = chat(server.client(), max_tokens=9).usage
    after = server.metrics()

    def more(name: str) -> float:
        return after[name] - before[name]

    assert more("moerun_requests_total /v1/chat/completions 200") == 1
    assert more("moerun_generations_total length") == 1
    assert more("moerun_prompt_tokens_total") == usage.prompt_tokens
    assert more("moerun_generated_tokens_total") == 9
    outcomes = [more(f"moerun_expert_requests_total {kind}") for kind in ("hit", "late", "miss")]
    assert sum(outcomes) >= 8 * 2 * 8  # 8 decoded tokens, 2 experts in each of 8 layers
    loads = sum(more(f"moerun_expert_loads_total {why}") for why in ("demand", "prefetch"))
    assert more("moerun_loaded_bytes_total") == loads * 196608 > 0
    assert after["moerun_tokens_per_second"] > 0
    assert any(name.startswith("moerun_info tiny ") for name in after)
    assert (after["moerun_busy"], after["moerun_queue_length"]) == (0, 0)


def test_an_address_that_is_taken_is_said_before_a_model_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = [
            "moerun",
            "serve",
            "--model",
            "nowhere/no-model",
            "--threads",
            "1",
            "--port",
            str(port),
        ]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert f"error: cannot listen on 127.0.0.1:{port}: Address already in use" in said
