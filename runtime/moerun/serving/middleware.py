"""What every request passes: counting, and the key."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moerun.serving.api_error import ApiError
from moerun.serving.limits import check_head
from moerun.serving.metrics import Metrics

OPEN_PATHS = frozenset({"/health"})  # asked by what has no key: load balancers, containers


class Counted:
    """Counts answers by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the application, and count the answer when it is sent."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what is told where the application raised

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            path = scope["path"]
            # Unknown paths together, or whoever tries many of them fills the memory.
            self._metrics.answered(path if path in self._paths else "other", status)


class Guarded:
    """Rejects requests with too long a head, and those without the API key, where there is one."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by the application, or with 431 or 401 where it is not to be asked."""
        if scope["type"] == "http":
            try:
                check_head(scope)
                self._check_key(scope)
            except ApiError as error:
                refusal = JSONResponse(error.body, status_code=error.status, headers=error.headers)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if self._expected is None or scope["path"] in OPEN_PATHS:
            return
        given = Headers(scope=scope).get("authorization", "").encode("latin-1")
        # In the same time, however much of a wrong key is right.
        if secrets.compare_digest(given, self._expected):
            return
        raise ApiError(
            401,
            "the API key is wrong: send it as 'Authorization: Bearer KEY'"
            if given
            else "this server wants an API key: send it as 'Authorization: Bearer KEY'",
            type="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
