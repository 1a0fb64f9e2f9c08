"""A server under load: clients that ask, and clients that stall, vanish, send nonsense or too much.

Whoever asks rightly is answered, if need be after the pause that a full queue names; whoever does
not is refused or loses the connection. No answer has a path or a stack. Memory does not grow once
the server is warm.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import re
import signal
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from moerun.serving.limits import BODY_BYTES
from support.serving import KEY, serving

PATIENCE_S = 300.0
PRIVATE = re.compile(rb"Traceback|File \"|\.py\b|site-packages|/(?:work|home|root|usr|tmp)/")
WARM_S = 20.0
SAMPLE_S = 1.0
GROWTH_BYTES = 16 << 20
WORDS = ("It", "was", "the", "best", "of", "times", ",", "it", "was", "the", "worst")


@dataclass
class Seen:
    """What the clients saw, by kind, and what was wrong."""

    answered: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory_bytes: list[tuple[float, int]] = field(default_factory=list)


def head(path: str, length: int | None, *more: str, method: str = "POST", key: str = KEY) -> bytes:
    """The head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *more]
    lines += [f"Content-Length: {length}"] if length is not None else []
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def asking(rng: random.Random) -> bytes:
    """A request that is to be answered."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randrange(1, 60)))
    tokens = rng.choice((1, 2, 4, 8))
    if rng.random() < 0.2:
        path = rng.choice(("/v1/models", "/metrics", "/health", "/openapi.json"))
        return head(path, None, "Connection: close", method="GET")
    sent: dict[str, object] = {"max_tokens": tokens, "stream": rng.random() < 0.5, "seed": 1}
    path = rng.choice(("/v1/chat/completions", "/v1/completions", "/tokenize"))
    if path == "/tokenize":
        sent = {"prompt": prompt}
    elif path == "/v1/completions":
        sent["prompt"] = prompt
    else:
        sent["messages"] = [{"role": "user", "content": prompt}]
    body = json.dumps(sent).encode()
    return head(path, len(body), "Connection: close") + body


WRONG: dict[str, Callable[[], bytes]] = {
    "random bytes": lambda: os.urandom(1000) + b"\r\n\r\n",
    "tls": lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
    "http2": lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "long head": lambda: head("/v1/models", None, "A: " + "a" * 200_000, method="GET"),
    "many heads": lambda: head("/v1/models", None, *["A: b"] * 20_000, method="GET"),
    "huge body": lambda: head("/v1/completions", BODY_BYTES + 9) + b" " * (BODY_BYTES + 9),
    "petabyte": lambda: head("/v1/completions", 1 << 50) + b"{" * 100_000,
    "negative length": lambda: head("/v1/completions", -5) + b"{}",
    "bad chunks": lambda: head("/v1/completions", None, "Transfer-Encoding: chunked")
    + b"zz\r\nhello\r\n",
    "latin-1": lambda: _sent('{"prompt": "\xe9\xff"}'.encode("latin-1")),
    "utf-16": lambda: _sent('{"prompt": "a", "max_tokens": 1}'.encode("utf-16")),
    "gzip": lambda: _sent(gzip.compress(b'{"prompt": "a"}'), "Content-Encoding: gzip"),
    "deep": lambda: _sent(b"[" * 100_000),
    "nan": lambda: _sent(b'{"prompt": "a", "temperature": NaN, "max_tokens": 1e999}'),
    "nul": lambda: _sent(b"\x00" * 100),
    "wrong key": lambda: head("/v1/models", None, "Connection: close", method="GET", key="x"),
    "no such path": lambda: head("/v1/../../etc/passwd%00", None, "Connection: close",
                                     method="GET"),
    "no such method": lambda: head("/v1/models", None, "Connection: close", method="BREW"),
}  # fmt: skip


def _sent(body: bytes, *more: str) -> bytes:
    return head("/v1/completions", len(body), "Connection: close", *more) + body


class Load:
    """Clients of a server that listens on ``port``."""

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self.rng = random.Random(seed)
        self.seen = Seen()

    async def ask(self) -> None:
        """Ask until there is an answer."""
        request = asking(self.rng)
        for _ in range(200):
            answer = await self._exchange(request)
            status = answer[9:12]
            if status == b"200":
                whole = b'"stream": true' not in request or b"data: [DONE]" in answer
                if whole:
                    self.seen.answered["ask"] += 1
                else:
                    self.seen.faults.append(f"a stream without an end: {answer[-300:]!r}")
                return
            if status not in (b"429", b"503"):
                break
            await asyncio.sleep(self.rng.uniform(0.2, 1.0))
        self.seen.faults.append(f"lost: {request[:200]!r} got {answer[:300]!r}")

    async def err(self) -> None:
        """Send what no server can answer rightly."""
        kind = self.rng.choice(sorted(WRONG))
        answer = await self._exchange(WRONG[kind]())
        self.seen.refused[kind] += 1
        right = kind == "utf-16" and answer.startswith(b"HTTP/1.1 200")  # JSON all the same
        if answer and not right and not answer.startswith(b"HTTP/1.1 4"):
            self.seen.faults.append(f"{kind}: {answer[:300]!r}")

    async def vanish(self) -> None:
        """Leave in the middle of the request, or of the answer."""
        request = asking(self.rng)
        with suppress(OSError), self._patience(request):
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                cut = self.rng.random() < 0.6
                writer.write(request[: self.rng.randrange(len(request))] if cut else request)
                await writer.drain()
                if not cut:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(200), self.rng.uniform(0.0, 1.0))
                writer.transport.abort()
        self.seen.refused["vanish"] += 1

    async def stall(self, kind: str) -> None:
        """Send nothing, half a head, a head in drops, or half a body, and wait to be left."""
        begun = {
            "nothing": b"",
            "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n",
            "drops": b"POST /v1/completions HTTP/1.1\r\n",
            "half a body": head("/v1/completions", 100) + b'{"prompt"',
        }[kind]
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(begun)
            until = time.monotonic() + PATIENCE_S
            while time.monotonic() < until:
                with suppress(TimeoutError):
                    part = await asyncio.wait_for(reader.read(4096), 5.0)
                    self._look(part)
                    if not part:
                        break
                if kind == "drops":
                    writer.write(b"A: b\r\n")
            else:
                self.seen.faults.append(f"a client that stalls ({kind}) is never left")
            writer.close()
        except OSError:
            pass
        self.seen.refused[f"stall, {kind}"] += 1

    async def _exchange(self, request: bytes) -> bytes:
        answer = bytearray()
        with suppress(OSError), self._patience(request, answer):
            async with asyncio.timeout(PATIENCE_S):
                await self._fetch(request, answer)
        self._look(bytes(answer))
        return bytes(answer)

    async def _fetch(self, request: bytes, answer: bytearray) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            with suppress(OSError):  # it may have answered and gone before it read all
                await writer.drain()
            if writer.can_write_eof() and b"Connection: close" not in request:
                writer.write_eof()
            while part := await reader.read(1 << 16):
                answer += part
        finally:
            writer.close()

    @contextmanager
    def _patience(self, request: bytes, answer: bytearray | None = None) -> Iterator[None]:
        """A server that keeps a client waiting, in whatever it does, is a fault."""
        try:
            yield
        except TimeoutError:
            got = bytes(answer or b"")[:100]
            self.seen.faults.append(f"hangs: {request[:200]!r}, {len(request)} bytes; got {got!r}")

    def _look(self, answer: bytes) -> None:
        if b"openapi" not in answer and (found := PRIVATE.search(answer)):
            around = answer[max(found.start() - 100, 0) : found.end() + 100]
            self.seen.faults.append(f"tells too much: {around!r}")

    async def mixed(self, seconds: float, pid: int, *, clients: int = 12) -> None:
        """Ask, err, vanish and stall for a while, ``clients`` at a time."""
        until = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < until:
                kind = self.rng.random()
                if kind < 0.6:
                    await self.ask()
                else:
                    await (self.err() if kind < 0.85 else self.vanish())

        async def watch() -> None:
            while time.monotonic() < until:
                self.seen.memory_bytes.append((time.monotonic(), resident_bytes(pid)))
                await asyncio.sleep(SAMPLE_S)

        await _all([*(client() for _ in range(clients)), watch()])

    async def crowd(self, count: int) -> None:
        """``count`` clients that stall at once, and a few that ask meanwhile."""
        kinds = ("nothing", "half a head", "drops", "half a body")
        stalled = [self.stall(kinds[i % len(kinds)]) for i in range(count)]
        await _all([*stalled, *(self.ask() for _ in range(8))])


async def _all(what: Sequence[Awaitable[None]]) -> None:
    await asyncio.gather(*what)


def resident_bytes(pid: int) -> int:
    """What a process has in memory now."""
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def listens_on(pid: int) -> set[str]:
    """The addresses that a process listens on, as /proc has them."""
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets.add(str(fd.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def growth_bytes(memory: list[tuple[float, int]]) -> int:
    """How much more memory the last third of a load had than the second, by their medians."""
    warm = [n_bytes for at, n_bytes in memory if at - memory[0][0] >= WARM_S]
    if len(warm) < 6:
        return 0  # too short a load to tell
    third = len(warm) // 3
    return round(statistics.median(warm[-third:]) - statistics.median(warm[-2 * third : -third]))


def run(folder: Path, seed: int, *, minutes: float, crowd: int) -> tuple[Seen, dict[str, object]]:
    """Load a server for a while; what was seen, and its figures."""
    options = ("--model", "tiny", "--slots", "4", "--max-batch", "2", "--queue", "8")
    began = time.monotonic()
    with serving(folder / "home", *options) as served:
        pid = served.process.pid
        load = Load(int(served.url.rpartition(":")[2]), seed)
        if listens_on(pid) != {"0100007F"}:
            load.seen.faults.append(f"listens on {listens_on(pid)}")
        asyncio.run(load.mixed(60 * minutes, pid))
        asyncio.run(load.crowd(crowd))
        asyncio.run(load.mixed(5, pid))
        grown = growth_bytes(load.seen.memory_bytes)
        code, said = served.end(signal.SIGTERM)
    if code or "Traceback" in said:
        load.seen.faults.append(f"exit code {code}: {said[-1000:]}")
    if grown > GROWTH_BYTES:
        load.seen.faults.append(f"{grown >> 20} MiB more memory in the last third")
    seen = load.seen
    figures: dict[str, object] = {
        "seconds": round(time.monotonic() - began),
        "answered": sum(seen.answered.values()),
        "refused": sum(seen.refused.values()),
        "growth MiB": round(grown / 2**20, 1),
        "most MiB": round(max(n for _, n in seen.memory_bytes) / 2**20),
        "faults": len(seen.faults),
    }
    with (folder / f"{seed}-server.json").open("w") as file:
        document = {**figures, "by kind": seen.refused, "told": seen.faults}
        json.dump(document | {"memory": seen.memory_bytes}, file)
    return seen, figures
