"""The HTTP side: requests become jobs for the worker, its events become answers."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moerun.errors import RunError
from moerun.live.prompt import encode
from moerun.live.runner import Runner
from moerun.live.turn import turn_of
from moerun.serving.answering import PendingAnswer
from moerun.serving.answers import Answer
from moerun.serving.api_error import ApiError
from moerun.serving.chat import encode_chat, stops_of
from moerun.serving.metrics import CONTENT_TYPE, Metrics
from moerun.serving.middleware import Counted, Guarded
from moerun.serving.protocol import CompletionRequest, Defaults, parse
from moerun.serving.worker import Completed, GenerationWorker, Piece

BODY_BYTES = 16 << 20  # no prompt that a model can take is longer


class Service:
    """One runner behind HTTP. ``app`` is the ASGI application; ``worker`` is to be started."""

    def __init__(
        self, runner: Runner, *, queue: int, defaults: Defaults, api_key: str | None
    ) -> None:
        index = runner.store.index
        self.model = index.model
        self.metrics = Metrics(index.model, runner.settings.policy.label)
        self.worker = GenerationWorker(runner, queue, self.metrics.generated)
        self._runner = runner
        self._defaults = defaults
        self._limit = runner.limit_tokens
        # Fast tokenizers do not bear two threads: the worker decodes with the runner's.
        self._tokenizer = copy.deepcopy(runner.tokenizer)
        self._encoding = asyncio.Lock()
        self._stops = stops_of(runner.tokenizer)
        self._turn = turn_of(runner.tokenizer)
        self._began_s = int(time.time())
        routes: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._complete),
            "/v1/models": ("GET", self._models),
            "/v1/models/{name:path}": ("GET", self._one_model),
            "/metrics": ("GET", self._metrics),
            "/health": ("GET", self._health),
        }
        self.app = Starlette(
            routes=[
                Route(path, answer, methods=[method]) for path, (method, answer) in routes.items()
            ],
            middleware=[
                Middleware(Counted, metrics=self.metrics, paths=frozenset(routes)),
                Middleware(Guarded, api_key=api_key),
            ],
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                ClientDisconnect: _client_left,
                Exception: _defect,
            },
        )

    async def _chat(self, request: Request) -> Response:
        return await self._answer("chat", request)

    async def _complete(self, request: Request) -> Response:
        return await self._answer("text", request)

    async def _answer(self, kind: Literal["chat", "text"], request: Request) -> Response:
        asked = parse(kind, await _body(request), self.model, self._defaults)
        chat = kind == "chat"
        # A long prompt takes a while to encode, and others are being answered meanwhile.
        async with self._encoding:
            ids = await asyncio.to_thread(self._encode, asked)
        sampling = asked.sampling(
            ids.shape[1],
            self._limit,
            self._defaults.most_tokens,
            self._stops if chat else (),
            self._turn if chat else None,
        )
        answer = Answer(asked, self.model, int(time.time()))
        headers = {"x-moerun-seed": str(asked.seed)}
        pending = PendingAnswer(self.worker, ids, sampling, lead=chat)
        handed_on = False
        try:
            first = await pending.first(request)
            if not asked.stream:
                text, generated = await pending.whole(first)
                return JSONResponse(answer.whole(text, generated), headers=headers)
            handed_on = True
            return EventStream(pending, first, answer, headers)
        finally:
            if not handed_on:
                pending.leave()

    def _encode(self, asked: CompletionRequest) -> torch.Tensor:
        tokenizer, device = self._tokenizer, self._runner.settings.device
        try:
            if asked.kind == "chat":
                return encode_chat(tokenizer, asked.messages, device)
            if isinstance(asked.prompt, str):
                return encode(tokenizer, asked.prompt, device)
        except RunError as error:
            raise ApiError(400, str(error)) from error
        n_tokens = self._runner.model.get_input_embeddings().num_embeddings
        if wrong := [token for token in asked.prompt if not 0 <= token < n_tokens]:
            raise ApiError(
                400,
                f"there is no token {wrong[0]}: the model has 0 to {n_tokens - 1}",
                param="prompt",
            )
        return torch.tensor([asked.prompt], device=device)

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.model:
            raise ApiError(
                404,
                f"there is no model '{name}' here; there is '{self.model}'",
                param="model",
                code="model_not_found",
            )
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self._began_s,
            "owned_by": "moerun",
        }

    async def _metrics(self, _request: Request) -> Response:
        return Response(self.metrics.render(self.worker), headers={"content-type": CONTENT_TYPE})

    async def _health(self, _request: Request) -> Response:
        if self.worker.accepting:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, status_code=503)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise ApiError(413, f"the request is longer than {BODY_BYTES} bytes")
    return bytes(body)


class EventStream(StreamingResponse):
    """An answer on its way; when the client leaves, its generation is cancelled."""

    def __init__(
        self,
        pending: PendingAnswer,
        first: Piece | Completed,
        answer: Answer,
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            _sse(pending, first, answer), media_type="text/event-stream", headers=headers
        )
        self._pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; the generation is cancelled when the client has gone."""
        self._pending.unwatch()  # the response itself listens for that
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pending.leave()


async def _sse(
    pending: PendingAnswer, first: Piece | Completed, answer: Answer
) -> AsyncIterator[str]:
    """The answer as server-sent events; an error in the middle is one of them."""
    try:
        if (opening := answer.first()) is not None:
            yield _data(opening)
        async for event in pending.pieces(first):
            if isinstance(event, Piece):
                yield _data(answer.piece(event.text, reasoning=event.reasoning))
            else:
                for part in answer.last(event.generated):
                    yield _data(part)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _data(error.body)


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = ApiError(
        error.status_code,
        f"{request.method} {request.url.path}: {error.detail}",
        headers=error.headers,
    )
    return await _api_error(request, told)


async def _client_left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; as nginx logs it


async def _defect(request: Request, error: Exception) -> Response:
    told = ApiError(500, f"{type(error).__name__}: {error}", type="server_error")
    return await _api_error(request, told)
