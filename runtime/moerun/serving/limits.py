"""Bounds on what a client may send and how slowly, so that none keeps the server from others."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import h11
from starlette.requests import Request
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from moerun.serving.api_error import ApiError

BODY_BYTES = 16 << 20  # no prompt that a model can take is longer
HEAD_BYTES = 64 << 10
HEAD_S = 20.0
"""Within which the head of a request must have come, from its first byte or the connection on."""
BODY_PAUSE_S = 30.0  # between two parts of a body
BODY_S = 180.0
SEND_PAUSE_S = 60.0  # that a client may take nothing of its answer
CONNECTIONS = 1024
LINGER_S = 2.0
"""For which a connection is still read, and what comes dropped, after an answer that ends it."""


class _Dropped(asyncio.Protocol):
    """What a client still sends after the answer to it: dropped, up to its end or for a while."""

    def __init__(self, served: asyncio.Protocol, transport: asyncio.Transport) -> None:
        self._served = served
        self._over = asyncio.get_running_loop().call_later(LINGER_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has closed, or its time is over."""
        self._over.cancel()
        self._served.connection_lost(exc)


class _Lingering:
    """A transport that closes so that the last answer arrives.

    A socket that is closed with bytes unread resets the connection, and a client whose connection
    is reset may lose the answer that it has not read yet (RFC 9112, 9.6).
    """

    def __init__(self, transport: asyncio.Transport, served: BoundedProtocol) -> None:
        self._transport = transport
        self._served = served
        self._ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._ended or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if self._served.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            self._transport.close()
            return
        self._ended = True
        self._transport.set_protocol(_Dropped(self._served, self._transport))
        self._transport.write_eof()
        self._transport.resume_reading()


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP, which closes a connection whose request does not come in time, and one whose
    client takes nothing of its answer."""

    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected: its request is to follow."""
        super().connection_made(cast(asyncio.Transport, _Lingering(transport, self)))
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """A part of a request has come."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_timer()
        self._sent()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """More of an answer waits for the client than is to be kept."""
        super().pause_writing()
        # Not close(), which waits for the client.
        self._send_timer = self.loop.call_later(SEND_PAUSE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken what waited."""
        self._sent()
        super().resume_writing()

    def _sent(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()


def check_head(scope: Scope) -> None:
    """Raise ApiError where the head of a request is too long, however fast it came."""
    given = sum(len(name) + len(value) + 4 for name, value in scope["headers"])  # ": ", "\r\n"
    if given + len(scope["raw_path"]) + len(scope["query_string"]) > HEAD_BYTES:
        raise ApiError(
            431,
            f"the head of the request is longer than {HEAD_BYTES} bytes",
            headers={"Connection": "close"},
        )


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises ApiError where it is too long, or comes too slowly."""
    body = bytearray()
    stream = request.stream()
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                async with asyncio.timeout(BODY_PAUSE_S):
                    chunk = await anext(stream, None)
                if chunk is None:
                    return bytes(body)
                body += chunk
                if len(body) > BODY_BYTES:
                    raise ApiError(413, f"the request is longer than {BODY_BYTES} bytes")
    except TimeoutError as error:
        raise ApiError(
            408, "the request did not come in time", headers={"Connection": "close"}
        ) from error
