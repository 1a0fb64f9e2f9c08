"""The HTTP side: requests become jobs for the worker, its events become answers."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from moepolicy.versions import installed
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from moerun.live.recording import LiveRecording
from moerun.live.runner import Runner
from moerun.live.work import Generated
from moerun.serving.answering import ChoiceEvent, PendingAnswers
from moerun.serving.answers import Answer
from moerun.serving.api_error import ApiError
from moerun.serving.limits import read_body
from moerun.serving.metrics import CONTENT_TYPE, Metrics
from moerun.serving.middleware import Counted, Guarded
from moerun.serving.openapi import describe
from moerun.serving.prompts import Prompts
from moerun.serving.protocol import Defaults, check_model, parse, read
from moerun.serving.requests import (
    ChatRequest,
    DetokenizeRequest,
    Kind,
    TextRequest,
    TokenizeRequest,
)
from moerun.serving.worker import GenerationWorker, Piece

LOG = logging.getLogger("moerun")
Asked = TypeVar("Asked", TokenizeRequest, DetokenizeRequest)


class Service:
    """One runner behind HTTP. ``app`` is the ASGI application; ``worker`` is to be started."""

    def __init__(
        self,
        runner: Runner,
        *,
        queue: int,
        defaults: Defaults,
        api_key: str | None,
        names: Sequence[str] = (),
        origins: Sequence[str] = (),
        recording: LiveRecording | None = None,
    ) -> None:
        """``names`` the model goes by, in the place of its own; ``origins`` of pages whose scripts
        may use the server; ``recording`` of the runner, which whoever gives it finishes."""
        self.models = tuple(names) or (runner.store.index.model,)
        self.model = self.models[0]
        self.metrics = Metrics(self.model, runner.settings.policy.label)
        self.worker = GenerationWorker(runner, queue, self.metrics.generated, recording=recording)
        self._defaults = defaults
        self._prompts = Prompts(runner)
        self._began_s = int(time.time())
        version = installed(("moe-offload-lab",)).get("moe-offload-lab", "0")
        self._description = describe(version, keyed=api_key is not None)
        routes: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/completions": ("POST", self._complete),
            "/v1/models": ("GET", self._models),
            "/v1/models/{name:path}": ("GET", self._one_model),
            "/tokenize": ("POST", self._tokenize),
            "/detokenize": ("POST", self._detokenize),
            "/openapi.json": ("GET", self._openapi),
            "/metrics": ("GET", self._metrics),
            "/health": ("GET", self._health),
        }
        self.app = Starlette(
            routes=[
                Route(path, answer, methods=[method]) for path, (method, answer) in routes.items()
            ],
            middleware=[
                Middleware(Counted, metrics=self.metrics, paths=frozenset(routes)),
                *_cors(origins),
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

    async def _answer(self, kind: Kind, request: Request) -> Response:
        asked = parse(kind, await read_body(request), self.models)
        wanted = await self._prompts.wanted(asked, self._defaults)
        headers = {"x-moerun-seed": str(asked.seed)}
        pending = PendingAnswers(self.worker, wanted, lead=asked.chat)
        prompts = [each.prompt_ids[0].tolist() for each in wanted[:: asked.choices]]
        texts = self._prompts.echoed(asked, prompts)
        n_tokens = sum(map(len, prompts))
        answer = Answer(asked, self.model, int(time.time()), self._prompts.names, n_tokens)
        handed_on = False
        try:
            first = await pending.first(request)
            if not asked.stream:
                said, generated = await pending.whole(first)
                whole = answer.whole(prompts, texts, said, generated)
                return JSONResponse(whole, headers=headers)
            handed_on = True
            events = _sse(pending, first, answer, asked, texts)
            return EventStream(pending, events, headers)
        finally:
            if not handed_on:
                pending.leave()

    async def _tokenize(self, request: Request) -> Response:
        asked = await self._read(TokenizeRequest, request)
        ids = await self._prompts.tokens(asked)
        found: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": self._prompts.limit,
            "tokens": ids,
        }
        if asked.return_token_strs:
            found["token_strs"] = [self._prompts.names(token) for token in ids]
        return JSONResponse(found)

    async def _detokenize(self, request: Request) -> Response:
        asked = await self._read(DetokenizeRequest, request)
        return JSONResponse({"prompt": await self._prompts.text(asked.tokens)})

    async def _read(self, kind: type[Asked], request: Request) -> Asked:
        asked = read(kind, await read_body(request))
        check_model(asked.model, self.models)
        return asked

    async def _models(self, _request: Request) -> Response:
        cards = [self._card(name) for name in self.models]
        return JSONResponse({"object": "list", "data": cards})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        check_model(name, self.models)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._began_s,
            "owned_by": "moerun",
            "max_model_len": self._prompts.limit,
        }

    async def _openapi(self, _request: Request) -> Response:
        return JSONResponse(self._description)

    async def _metrics(self, _request: Request) -> Response:
        return Response(self.metrics.render(self.worker), headers={"content-type": CONTENT_TYPE})

    async def _health(self, _request: Request) -> Response:
        if self.worker.accepting:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, status_code=503)


def _cors(origins: Sequence[str]) -> list[Middleware]:
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-moerun-seed", "retry-after"],
        )
    ]


class EventStream(StreamingResponse):
    """An answer on its way; when the client leaves, its generations are cancelled."""

    def __init__(
        self, pending: PendingAnswers, events: AsyncIterator[str], headers: dict[str, str]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; the generations are cancelled when the client has gone."""
        self._pending.unwatch()  # the response itself listens for that
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pending.leave()


async def _sse(
    pending: PendingAnswers,
    first: ChoiceEvent,
    answer: Answer,
    asked: ChatRequest | TextRequest,
    texts: Sequence[str],
) -> AsyncIterator[str]:
    """The answers as server-sent events; an error in the middle is one of them. ``texts`` are the
    prompts to echo."""
    begun: set[int] = set()
    ended: dict[int, Generated] = {}
    silent = asked.length == 0
    try:
        async for index, what in pending.events(first):
            if index not in begun:
                begun.add(index)
                echo = pending.echoed(index, texts[index // asked.choices]) if texts else None
                if (opening := answer.first(index, echo)) is not None:
                    yield _data(opening)
            part = pending.part(index, what)
            if silent:
                part = part._replace(text="", token_ids=(), logprobs=())
            if isinstance(what, Piece):
                if not silent:
                    yield _data(answer.piece(index, part))
            else:
                ended[index] = what.generated
                for chunk in answer.last(index, what.generated, part):
                    yield _data(chunk)
        if (total := answer.total([ended[i] for i in sorted(ended)])) is not None:
            yield _data(total)
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
    LOG.error("error: %s", error, exc_info=error)
    told = ApiError(500, "the server failed at this request; its log says why", type="server_error")
    return await _api_error(request, told)
