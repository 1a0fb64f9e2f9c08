"""`moerun serve` when its queue is full, clients leave, answers fail, and signals come."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from support.serving import Served, chat, serving, slow_server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server has its store, and where the file that breaks its policy may lie."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(home: Path, folder: Path) -> Iterator[Served]:
    with slow_server(home, folder) as served:
        yield served


def test_a_queue_that_is_full_says_when_to_come_back(server: Served) -> None:
    answers: list[str] = []

    def ask() -> None:
        answers.append(chat(server.client(), max_tokens=40).choices[0].message.content)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    server.wait_for("moerun_busy", 1)
    threads[1].start()
    server.wait_for("moerun_queue_length", 1)
    with pytest.raises(
        openai.RateLimitError, match="in progress and the queue of 1 is full"
    ) as full:
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
        (broken_policy, r"'.*:Faulty' failed: .*Error: the policy lost count \(.*faulty\.py:\d+\)"),
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


@pytest.mark.slow
def test_a_policy_that_fails_is_replaced_and_the_exit_code_tells(home: Path) -> None:
    failing = Path(__file__).parents[2] / "support" / "failing.py"
    policy = ("--policy", f"{failing}:Failing:hook=victim,at=30", "--slots", "3")
    with serving(home, *policy) as served:
        answers = [chat(served.client(), max_tokens=8).choices[0] for _ in range(2)]
        assert answers[0].message.content == answers[1].message.content
        found = served.metrics()
        assert found["moerun_policy_failed"] == 1
        assert found["moerun_decide_seconds_total"] > 0
        assert found["moerun_changed_gate_weight_total rerouted"] == 0
        code, errors = served.end(signal.SIGTERM)
    assert code == 1
    assert errors.count("my victim failed (victim, step ") == 2  # when it failed, and at the end
    assert "from this step on, LRU keeps the experts" in errors


@pytest.mark.slow
def test_a_signal_lets_the_answer_end_and_prints_the_statistics(home: Path) -> None:
    everywhere = ("--drain", "60", "--host", "0.0.0.0")
    with serving(home, *everywhere, MOERUN_API_KEY="") as served:
        assert "anyone who reaches this address can use the server" in served.said
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
