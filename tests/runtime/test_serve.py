"""`moerun serve` as OpenAI's own client meets it: real processes on free ports."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2 as httpx
import openai
import pytest
from moerun.checkpoints import resolve
from moerun.cli import main
from moerun.pack import pack
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 120
KEY = "a secret"
HELLO = [{"role": "user", "content": "Who goes there?"}]
# Fails while the file named by FAULTY is there.
FAULTY_POLICY = """
import os
from moepolicy import find_policy

class Faulty(find_policy("lru-spec").policy):
    def on_step(self, step):
        if os.path.exists(os.environ["FAULTY"]):
            raise ZeroDivisionError("the policy lost count")
"""


class Served(NamedTuple):
    """A server's process and where it listens; what it said on stderr before."""

    process: subprocess.Popen[str]
    url: str
    said: str

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S
        )

    def metrics(self) -> dict[str, float]:
        """Samples by name and label values."""
        text = httpx.get(f"{self.url}/metrics", headers=bearer()).text
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def wait_for(self, name: str, value: float) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while self.metrics().get(name) != value:
            assert time.monotonic() < deadline_s, f"{name} never became {value}"
            time.sleep(0.02)

    def end(self, number: int) -> tuple[int, str]:
        """Signal it; its exit code and what it said."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, errors


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


@contextmanager
def serving(home: Path, *arguments: str | Path, **variables: str) -> Iterator[Served]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from moerun.cli import main; main()"),
            *("serve", *map(str, arguments), "--port", "0"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "MOERUN_API_KEY": KEY,
            **variables,
        },
    )
    try:
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"serving .* on (http://\S+)\n", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield Served(process, found[1], said)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server has its store, and where the file that breaks its policy may lie."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(home: Path, folder: Path) -> Iterator[Served]:
    """Slow enough to leave it while it answers."""
    pack(resolve("tiny"), folder / "store", name="tiny").close()
    policy = folder / "faulty.py"
    policy.write_text(FAULTY_POLICY)
    arguments = (
        "--model",
        folder / "store",
        "--policy",
        f"{policy}:Faulty",
        "--slots",
        "2",
        "--queue",
        "1",
    )
    with serving(home, *arguments, "--link-gbps", "0.1", FAULTY=str(folder / "fault")) as served:
        yield served


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "max_tokens": 16, "temperature": 0, **options}
    )


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


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
    client, options = server.client(), {"model": "tiny", "temperature": 0}
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
        return chat(client, temperature=1.5, top_p=0.95, **options).choices[0].message.content

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


def test_a_queue_that_is_full_says_when_to_come_back(server: Served) -> None:
    answers: list[str] = []

    def ask() -> None:
        answers.append(chat(server.client(), max_tokens=40).choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    server.wait_for("moerun_busy", 1)
    threads[1].start()
    server.wait_for("moerun_queue_length", 1)
    with pytest.raises(openai.RateLimitError, match="one answer is in progress and 1 wait") as full:
        chat(server.client())
    assert int(full.value.response.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join()
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_generation(server: Served, stream: bool) -> None:
    cancelled = server.metrics()["moerun_generations_total cancelled"]
    if stream:
        answer = chat(server.client(), max_tokens=480, stream=True)
        next(iter(answer))
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            chat(server.client().with_options(timeout=1.5), max_tokens=480)
    server.wait_for("moerun_generations_total cancelled", cancelled + 1)
    server.wait_for("moerun_busy", 0)
    assert server.metrics()["moerun_generated_tokens_total"] < 480
    assert chat(server.client(), max_tokens=2).usage.completion_tokens == 2


def test_a_client_that_leaves_the_queue_is_never_served(server: Served) -> None:
    first = chat(server.client(), max_tokens=480, stream=True)
    next(iter(first))
    begun = generations(server)
    with pytest.raises(openai.APITimeoutError):
        chat(server.client().with_options(timeout=1))
    server.wait_for("moerun_queue_length", 0)
    first.close()
    server.wait_for("moerun_busy", 0)
    assert generations(server) == begun + 1


def generations(server: Served) -> float:
    found = server.metrics()
    return sum(
        count for name, count in found.items() if name.startswith("moerun_generations_total")
    )


def broken_record(folder: Path) -> Callable[[], None]:
    """Cut a layer's records short; what is handed back makes them whole."""
    victim = folder / "store" / "experts-00003.safetensors"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])

    def cure() -> None:
        victim.write_bytes(content)

    return cure


def broken_policy(folder: Path) -> Callable[[], None]:
    fault = folder / "fault"
    fault.touch()
    return fault.unlink


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (broken_record, r"expert \d of layer 3 is cut off .*experts-00003"),
        (broken_policy, r"policy '.*faulty\.py:Faulty' failed: the policy lost count"),
    ],
)
def test_after_an_error_the_next_request_is_answered(
    server: Served, folder: Path, damage: Callable[[Path], Callable[[], None]], says: str
) -> None:
    client = server.client()
    expected = chat(client).choices[0].message.content
    stream = chat(client, max_tokens=480, stream=True)
    pieces = iter(stream)
    next(pieces)
    cure = damage(folder)
    with pytest.raises(openai.APIError, match=says) as broken:
        list(pieces)  # in the middle of an answer
    assert broken.value.code == "generation_failed"
    with pytest.raises(openai.InternalServerError, match=says):
        chat(client)  # before its first token
    with pytest.raises(openai.InternalServerError, match=says):
        chat(client, stream=True)
    cure()
    assert chat(client).choices[0].message.content == expected
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_signal_lets_the_answer_end_and_prints_the_statistics(home: Path) -> None:
    everywhere = ("--drain", "60", "--host", "0.0.0.0")
    with serving(home, *everywhere, MOERUN_API_KEY="") as served:
        assert "anyone who reaches this address can use it" in served.said
        stream = chat(served.client(key="none"), max_tokens=100, stream=True)
        pieces = iter(stream)
        next(pieces)
        served.process.send_signal(signal.SIGINT)
        chunks = list(pieces)
        assert chunks[-1].choices[0].finish_reason == "length"
        code, errors = served.end(0)
    assert code == 130
    assert "tokens/s decoding" in errors
    assert "(interrupted)" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_no_time_to_drain_cuts_the_answer_and_refuses_those_who_wait(home: Path) -> None:
    with serving(home, "--slots", "1", "--link-gbps", "0.05", "--drain", "0") as served:
        client = served.client()
        pieces = iter(chat(client, max_tokens=400, stream=True))
        next(pieces)
        refused: list[int] = []

        def wait() -> None:
            with pytest.raises(openai.InternalServerError, match="shutting down") as error:
                chat(client)
            refused.append(error.value.status_code)

        waiting = threading.Thread(target=wait)
        waiting.start()
        served.wait_for("moerun_queue_length", 1)
        served.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(pieces)
        waiting.join()
        code, errors = served.end(0)
    assert (code, refused) == (0, [503])
    assert "tokens/s decoding" in errors
    assert "Traceback" not in errors


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
