"""Clients that are slow, or send too much: they lose their connection, and others are served."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx2 as httpx
import pytest
import uvicorn
from moerun.serving import limits
from moerun.serving.address import bind
from moerun.serving.answering import without_folders
from moerun.serving.api_error import ApiError
from moerun.serving.limits import BoundedProtocol, read_body
from moerun.serving.middleware import Guarded
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PATIENCE_S = 60
GONE = threading.Event()


async def echo(request: Request) -> Response:
    try:
        return JSONResponse({"length": len(await read_body(request))})
    except ApiError as error:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def endless(_request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        try:
            while True:
                await asyncio.sleep(0)
                yield b"x" * 65536
        finally:
            GONE.set()

    return StreamingResponse(parts())


async def slow(_request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(4):
            await asyncio.sleep(0.3)
            yield b"."

    return StreamingResponse(parts())


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    for name in ("HEAD_S", "BODY_PAUSE_S", "SEND_PAUSE_S"):
        monkeypatch.setattr(limits, name, 1.5)
    routes = [
        Route("/echo", echo, methods=["POST"]),
        Route("/endless", endless),
        Route("/slow", slow),
    ]
    config = uvicorn.Config(
        Starlette(routes=routes, middleware=[Middleware(Guarded, api_key=None)]),
        http=BoundedProtocol,
        ws="none",
        log_level="critical",
        lifespan="off",
        h11_max_incomplete_event_size=limits.HEAD_BYTES,
    )
    server = uvicorn.Server(config)
    taken = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield taken.getsockname()[:2]
    server.should_exit = True
    thread.join(PATIENCE_S)


def served(address: tuple[str, int]) -> bool:
    url = f"http://{address[0]}:{address[1]}/echo"
    return bool(httpx.post(url, content=b"abc").json() == {"length": 3})


def until_closed(client: socket.socket) -> bytes:
    client.settimeout(PATIENCE_S)
    found = b""
    while part := client.recv(65536):
        found += part
    return found


def loses_its_connection(client: socket.socket, part: bytes) -> bool:
    """Whether a client that goes on sending is cut off."""
    for _ in range(PATIENCE_S * 10):
        try:
            client.sendall(part)
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("begun", [b"", b"POST /echo HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_costs_the_connection(
    address: tuple[str, int], begun: bytes
) -> None:
    with socket.create_connection(address) as client:
        client.sendall(begun)
        assert until_closed(client) == b""
    assert served(address)


def test_a_head_in_drops_costs_the_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\n")
        assert loses_its_connection(client, b"A: b\r\n")
    assert served(address)


def test_a_body_that_does_not_come_is_answered(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as client:
        client.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        answer = until_closed(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not come in time" in answer
    assert served(address)


def test_what_is_too_long_is_refused(address: tuple[str, int]) -> None:
    url = f"http://{address[0]}:{address[1]}/echo"
    with socket.create_connection(address) as client:
        # Far more than is read before it is refused: the answer arrives all the same.
        client.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nA: " + b"a" * (limits.HEAD_BYTES * 64))
        client.shutdown(socket.SHUT_WR)
        assert until_closed(client).startswith(b"HTTP/1.1 400 ")
    # As fast as it comes: a whole head in one piece, too.
    many = dict.fromkeys([f"a{i}" for i in range(8000)], "b")
    assert httpx.post(url, content=b"abc", headers=many).status_code == 431
    assert httpx.post(url, content=b" " * (limits.BODY_BYTES + 1)).status_code == 413
    assert served(address)


def test_a_client_that_sends_on_after_its_answer_is_read_for_a_while(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LINGER_S", 0.5)
    long = b"POST /echo HTTP/1.1\r\nHost: x\r\nA: " + b"a" * (limits.HEAD_BYTES * 2)
    with socket.create_connection(address) as client:
        client.sendall(long)
        client.settimeout(PATIENCE_S)
        assert client.recv(65536).startswith(b"HTTP/1.1 400 ")
        assert loses_its_connection(client, b"a")
    assert served(address)


def test_an_answer_that_nobody_takes_is_given_up(address: tuple[str, int]) -> None:
    GONE.clear()
    with socket.create_connection(address) as client:
        client.sendall(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
        assert GONE.wait(PATIENCE_S)
    assert served(address)


def test_a_client_that_takes_its_time_within_bounds_keeps_its_connection(
    address: tuple[str, int],
) -> None:
    with httpx.Client(base_url=f"http://{address[0]}:{address[1]}") as client:
        for _ in range(2):  # an answer may take longer than a request
            assert client.get("/slow").text == "...."


def test_files_are_named_without_their_folders() -> None:
    for text, wanted in (
        ("expert 3 is cut off in /tmp/a b/c/experts-1.safetensors", None),
        ("policy '/home/me/faulty.py:Faulty' failed: x (/home/me/faulty.py:8)", None),
        ("[Errno 2] No such file: '/var/x/y.json'", "[Errno 2] No such file: 'y.json'"),
        ("3/4 of 1e5 tokens/s, see https://host/path/page", None),
        ("C:\\Users\\me\\file.bin is gone", "file.bin is gone"),
    ):
        found = without_folders(text)
        assert "/home" not in found
        assert "/tmp" not in found
        assert wanted is None or found == wanted
    assert (
        without_folders("3/4 of tokens/s; https://host/a/b") == "3/4 of tokens/s; https://host/a/b"
    )


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = secrets.compare_digest

    def compare(given: bytes, expected: bytes) -> bool:
        compared.append((given, expected))
        return real(given, expected)

    monkeypatch.setattr(secrets, "compare_digest", compare)

    async def ask(key: str) -> int:
        app = Starlette(
            routes=[Route("/echo", echo, methods=["POST"])],
            middleware=[Middleware(Guarded, api_key="right")],
        )
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            headers = {"Authorization": f"Bearer {key}"}
            return (await client.post("/echo", content=b"abc", headers=headers)).status_code

    assert [asyncio.run(ask(key)) for key in ("right", "righ", "")] == [200, 401, 401]
    assert [expected for _, expected in compared] == [b"Bearer right"] * 3
