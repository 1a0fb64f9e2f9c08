"""`moerun serve` in a process of its own, and OpenAI's client to talk to it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import httpx2 as httpx
import openai
from moerun.checkpoint.hub import resolve
from moerun.live.runner import Runner
from moerun.serving.app import Service
from moerun.serving.protocol import Defaults
from moerun.store.pack import pack
from prometheus_client.parser import text_string_to_metric_families

from support.chat_templates import scripted, spelled

PATIENCE_S = 120
SERVING = re.compile(r"serving .* on (http://\S+)\n")
KEY = "a secret"
HELLO: list[Any] = [{"role": "user", "content": "Who goes there?"}]
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
    """A server's process, where it listens, and the file of its stderr: a pipe that nobody reads
    would stop it after 64 KiB."""

    process: subprocess.Popen[bytes]
    url: str
    errors: IO[bytes]

    @property
    def said(self) -> str:
        """What it said on stderr so far."""
        return said_in(self.errors)

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
        return self.process.wait(timeout=PATIENCE_S), self.said


def said_in(errors: IO[bytes]) -> str:
    """The text of a file that another process writes."""
    return os.pread(errors.fileno(), os.fstat(errors.fileno()).st_size, 0).decode()


def bearer() -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"}


def begin_serving(
    home: Path, arguments: Sequence[str | Path], errors: int, variables: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """A server's process, whose stderr is the file descriptor ``errors``."""
    return subprocess.Popen(
        [
            *(sys.executable, "-c", "from moerun.cli import main; main()"),
            *("serve", *map(str, arguments), "--port", "0"),
        ],
        stderr=errors,
        env={
            **os.environ,
            "XDG_CACHE_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "MOERUN_API_KEY": KEY,
            **variables,
        },
    )


@contextmanager
def serving(home: Path, *arguments: str | Path, **variables: str) -> Iterator[Served]:
    with tempfile.TemporaryFile() as errors:
        process = begin_serving(home, arguments, errors.fileno(), variables)
        try:
            while not (found := SERVING.search(said_in(errors))):
                assert process.poll() is None, said_in(errors)
                time.sleep(0.02)
            yield Served(process, found[1], errors)
        finally:
            process.kill()
            process.wait()


@contextmanager
def slow_server(home: Path, folder: Path) -> Iterator[Served]:
    """Slow enough to leave it while it answers; in ``folder`` are its store, and the file
    ``fault`` that breaks its policy."""
    pack(resolve("tiny"), folder / "store", name="tiny").close()
    policy = folder / "faulty.py"
    policy.write_text(FAULTY_POLICY)
    arguments = (
        *("--model", folder / "store", "--policy", f"{policy}:Faulty", "--slots", "2"),
        *("--queue", "1", "--link-gbps", "0.1", "--on-policy-error", "stop"),
    )
    with serving(home, *arguments, FAULTY=str(folder / "fault")) as served:
        yield served


@contextmanager
def asking(runner: Runner, **options: Any) -> Iterator[Callable[..., httpx.Response]]:
    """A server without a socket: what it answers to (method, path, headers, the fields sent)."""
    with answering(runner, **options) as service:

        def ask(
            path: str,
            method: str = "POST",
            headers: dict[str, str] | None = None,
            content: bytes | None = None,
            **fields: Any,
        ) -> httpx.Response:
            async def asked() -> httpx.Response:
                transport = httpx.ASGITransport(app=service.app)
                async with httpx.AsyncClient(
                    transport=transport, base_url="http://server"
                ) as client:
                    sent = {"content": content} if content is not None else {"json": fields}
                    sent = sent if method == "POST" else {}
                    return await client.request(method, path, headers=headers, **sent)

            return asyncio.run(asked())

        yield ask


@contextmanager
def answering(runner: Runner, **options: Any) -> Iterator[Service]:
    """A server without a socket."""
    settings = {"queue": 4, "defaults": Defaults(temperature=0.0), "api_key": None, **options}
    service = Service(runner, **settings)
    service.worker.start()
    try:
        yield service
    finally:
        service.worker.close()


def answers_together(
    service: Service, path: str, requests: list[dict[str, Any]]
) -> list[httpx.Response]:
    """What a server answers to requests that come at once, in their order."""

    async def asked() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            sent = [client.post(path, json=fields) for fields in requests]
            return list(await asyncio.gather(*sent))

    return asyncio.run(asked())


def posted(runner: Runner, writes: str, messages: list[dict[str, Any]], **fields: Any) -> Any:
    """The answer of a server whose model writes ``writes``: an object, or a stream's choices."""
    with (
        asking(runner) as ask,
        scripted(runner.model, spelled(runner.tokenizer, writes)),
    ):
        answer = ask("/v1/chat/completions", messages=messages, **fields)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()["choices"][0]
    return [chunk["choices"][0] for chunk in chunks_of(answer)]


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a stream that has come to its end."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HELLO, "max_tokens": 16, "temperature": 0, **options}
    )


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
