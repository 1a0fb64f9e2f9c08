"""The server's service without a socket: names, origins, errors, and several requests together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.live.runner import Runner
from moerun.serving.app import Service
from moerun.serving.protocol import Defaults
from moerun.settings import Settings
from moerun.store.pack import pack
from support.serving import asking, chunks_of

USER = {"role": "user", "content": "Who goes there?"}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    store = pack(resolve("tiny"), tmp_path_factory.mktemp("service") / "store", name="tiny")
    with store, Runner(store, Settings(find_policy("lru"), slots=6, texts=3)) as made:
        yield made


def test_requests_decoded_together_say_what_they_say_alone(runner: Runner) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "It was the best of", "max_tokens": 9},
        {"prompt": ["import numpy", "The king"], "max_tokens": 6, "n": 2, "temperature": 1.0},
        {"prompt": "Once upon a time", "max_tokens": 12, "echo": True, "logprobs": 2},
        {"prompt": "for i in", "max_tokens": 7, "stream": True},
        {"prompt": "return", "max_tokens": 3, "repetition_penalty": 1.3},
    ]
    bodies = [{**body, "seed": i, "cache_prompt": False} for i, body in enumerate(bodies)]
    options: dict[str, Any] = {"defaults": Defaults(temperature=0.0), "api_key": None}
    service = Service(runner, queue=8, **options)

    async def all_at_once() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            posts = [client.post("/v1/completions", json=body) for body in bodies]
            return list(await asyncio.gather(*posts))

    service.worker.start()
    try:
        together = asyncio.run(all_at_once())
        assert service.worker.rows > service.worker.passes
    finally:
        service.worker.close()
    with asking(runner) as ask:
        for body, answer in zip(bodies, together, strict=True):
            assert answer.status_code == 200
            assert texts(answer) == texts(ask("/v1/completions", **body))


def texts(answer: httpx.Response) -> list[str]:
    """Of an answer's choices, whole or in pieces."""
    if answer.headers["content-type"].startswith("application/json"):
        return [choice["text"] for choice in answer.json()["choices"]]
    return ["".join(chunk["choices"][0]["text"] for chunk in chunks_of(answer))]


def test_a_model_goes_by_the_names_it_is_given(runner: Runner) -> None:
    with asking(runner, names=("gpt-4o", "default")) as ask:
        listed = ask("/v1/models", "GET").json()["data"]
        assert [(each["id"], each["max_model_len"]) for each in listed] == [
            ("gpt-4o", 512),
            ("default", 512),
        ]
        for name in ("gpt-4o", "default"):
            answer = ask("/v1/completions", model=name, prompt="a", max_tokens=1)
            assert answer.json()["model"] == "gpt-4o"
        assert ask("/v1/models/default", "GET").json()["id"] == "default"
        for path in ("/v1/completions", "/tokenize"):
            refused = ask(path, model="tiny", prompt="a")
            assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")


def test_only_named_origins_may_read_answers(runner: Runner) -> None:
    page = "https://pages.example:8443"
    asks = {"Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    with asking(runner, origins=[page], api_key="secret") as ask:
        allowed = ask("/v1/chat/completions", "OPTIONS", {"Origin": page, **asks})
        assert allowed.status_code == 200  # before there is a key
        assert allowed.headers["access-control-allow-origin"] == page
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        other = ask("/v1/chat/completions", "OPTIONS", {"Origin": "https://else.example", **asks})
        assert "access-control-allow-origin" not in other.headers
        key = {"Origin": page, "Authorization": "Bearer secret"}
        answer = ask("/v1/models", "GET", key)
        assert answer.headers["access-control-allow-origin"] == page
    with asking(runner) as ask:
        assert (
            "access-control-allow-origin" not in ask("/v1/models", "GET", {"Origin": page}).headers
        )


def test_an_error_has_no_folder_and_no_stack(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError(f"in {tmp_path}/secret.py")

    with asking(runner) as ask:
        monkeypatch.setattr("moerun.live.generate.Generation._start", fail)
        failed = ask("/v1/completions", prompt="a", max_tokens=1)
        assert failed.status_code == 500
        assert str(tmp_path) not in failed.text
        assert "secret.py" not in failed.text
        assert "log says why" in failed.json()["error"]["message"]
        monkeypatch.undo()
        assert ask("/v1/completions", prompt="a", max_tokens=1).status_code == 200
        monkeypatch.setattr("moerun.serving.prompts.Prompts.wanted", fail)
        with pytest.raises(ZeroDivisionError):  # which a server's protocol logs
            ask("/v1/completions", prompt="a")


def test_usage_may_come_with_every_chunk(runner: Runner) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    with asking(runner) as ask:
        answer = ask(
            "/v1/completions", prompt="It was", max_tokens=4, stream=True, stream_options=options
        )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks_of(answer)]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] == 4


def test_token_ids_may_come_back(runner: Runner) -> None:
    body: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": True}
    with asking(runner) as ask:
        choice = ask("/v1/completions", **body).json()["choices"][0]
        chunks = chunks_of(ask("/v1/completions", **body, stream=True))
    assert choice["prompt_token_ids"] == [5, 6, 7]
    assert len(choice["token_ids"]) == 4
    streamed = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert streamed == choice["token_ids"]
