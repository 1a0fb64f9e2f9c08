"""`moerun serve` as OpenAI's own client meets it: real processes on free ports."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
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
    assert chunks[-1].usage.to_dict() | {"prompt_tokens_details": None} == (
        whole.usage.to_dict() | {"prompt_tokens_details": None}
    )
    # The prompt is the one before: all but its last token had been read.
    cached = chunks[-1].usage.prompt_tokens_details.cached_tokens
    assert cached == whole.usage.prompt_tokens - 1
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


def test_several_answers_with_their_logprobs(server: Served) -> None:
    client = server.client()
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 5}
    both = chat(client, n=2, logprobs=True, top_logprobs=2, **options)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage.completion_tokens == 10
    for i, choice in enumerate(both.choices):
        assert chat(client, **{**options, "seed": 3 + i}).choices[0].message == choice.message
        entries = choice.logprobs.content
        assert len(entries) == 5
        assert "".join(entry.token for entry in entries).strip() == choice.message.content.strip()
        assert all(len(entry.top_logprobs) == 2 and entry.logprob < 0 for entry in entries)
    chunks = list(chat(client, n=2, logprobs=True, stream=True, **options))
    for i, choice in enumerate(both.choices):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == i]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        found = [entry for c in mine if c.logprobs for entry in c.logprobs.content]
        assert [entry.token for entry in found] == [e.token for e in choice.logprobs.content]


def test_prompts_are_echoed_and_scored(server: Served) -> None:
    client: Any = server.client()
    prompts = [[5, 6, 7], [8, 9]]
    options = {"model": "tiny", "prompt": prompts, "echo": True, "logprobs": 1, "temperature": 0}
    scored = client.completions.create(max_tokens=1, **options)
    silent = client.completions.create(max_tokens=0, **options)
    assert (scored.usage.completion_tokens, silent.usage.completion_tokens) == (2, 0)
    for choice, quiet, prompt in zip(scored.choices, silent.choices, prompts, strict=True):
        found = choice.logprobs
        assert len(found.tokens) == len(found.token_logprobs) == len(prompt) + 1
        assert found.token_logprobs[0] is None
        assert quiet.logprobs.token_logprobs == found.token_logprobs[:-1]
        assert choice.text == "".join(found.tokens)
        assert quiet.text == "".join(found.tokens[:-1])
        # The likeliest token and, where that is another one, the token itself.
        assert all(1 <= len(top) <= 2 for top in found.top_logprobs[1:])
        assert found.top_logprobs[-1] == {found.tokens[-1]: found.token_logprobs[-1]}
    chunks = list(client.completions.create(max_tokens=1, stream=True, **options))
    for i, choice in enumerate(scored.choices):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == i]
        assert "".join(c.text for c in mine) == choice.text
        logprobs = [x for c in mine if c.logprobs for x in c.logprobs.token_logprobs]
        assert logprobs == choice.logprobs.token_logprobs


def test_a_conversation_reads_only_what_is_new(server: Served) -> None:
    client = server.client()
    asked: list[Any] = [{"role": "user", "content": "Tell me of the sea and of the ships."}]
    first = chat(client, messages=asked, max_tokens=8)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    asked += [said, {"role": "user", "content": "And then?"}]
    second = chat(client, messages=asked, max_tokens=8)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens - 1
    fresh = chat(client, messages=asked, max_tokens=8, extra_body={"cache_prompt": False})
    assert fresh.usage.prompt_tokens_details.cached_tokens == 0
    assert fresh.choices[0].message == second.choices[0].message


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_may_ask(server: Served) -> None:
    def curl(path: str, **fields: Any) -> tuple[str, str]:
        options = ["-sN", "-w", "%{stderr}%{http_code}", "-H", f"Authorization: Bearer {KEY}"]
        data = ["-d", json.dumps(fields)] if fields else []
        done = subprocess.run(
            ["curl", *options, f"{server.url}{path}", *data],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout, done.stderr

    body, status = curl("/v1/completions", prompt="It was", max_tokens=2, stream=True)
    assert (body.count("data: "), body.endswith("data: [DONE]\n\n"), status) == (4, True, "200")
    tokens = json.loads(curl("/tokenize", prompt="It was")[0])
    assert (tokens["count"], tokens["max_model_len"]) == (2, 512)
    assert json.loads(curl("/detokenize", tokens=tokens["tokens"])[0]) == {"prompt": "It was"}
    body, status = curl("/v1/completions", prompt="a", top_k="many")
    assert (json.loads(body)["error"]["param"], status) == ("top_k", "400")
    described = json.loads(curl("/openapi.json")[0])
    assert set(described["paths"]) >= {"/v1/completions", "/tokenize", "/health"}
    assert described["security"] == [{"key": []}]


def test_longer_than_the_context_is_refused_with_both_lengths(server: Served) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match=r"has 6\d\d tokens.* context is 512") as long:
        chat(client, messages=[{"role": "user", "content": "word " * 600}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(
        openai.BadRequestError, match=r"500 more; .* is 512: ask for \d+ or"
    ) as more:
        chat(client, max_tokens=500)
    assert more.value.param == "max_tokens"
    # Without a number the answer gets what room there is.
    messages = [{"role": "user", "content": "word " * 495}]
    full = chat(client, messages=messages, max_tokens=openai.omit)
    assert full.usage.total_tokens <= 512


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"extra_body": {"best_of": 2}}, "best_of = 2 is not supported"),
        ({"extra_body": {"guided_regex": "a+"}}, "the field guided_regex is not supported"),
        ({"tool_choice": "required"}, 'tool_choice = \\"required\\" needs tools'),
        ({"temperature": -1}, "temperature must be greater than or equal to 0"),
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
        return after[name] - before.get(name, 0)

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
    # The same under the names that dashboards read.
    assert more("vllm:generation_tokens_total 0 tiny") == 9
    assert more("vllm:inter_token_latency_seconds_count 0 tiny") == 8
    assert more("vllm:time_to_first_token_seconds_count 0 tiny") == 1
    assert more("vllm:request_success_total 0 length tiny") == 1
    assert after["vllm:num_requests_running 0 tiny"] == 0
    assert after["vllm:num_requests_waiting 0 tiny"] == 0
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
