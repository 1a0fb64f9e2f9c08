"""A job of the worker's as the event loop sees it: events to await, a client that may leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import torch
from moepolicy import PolicyError
from starlette.requests import ClientDisconnect, Request

from moerun.errors import RunError
from moerun.live.generate import Generated
from moerun.live.sampling import Sampling
from moerun.serving.api_error import ApiError
from moerun.serving.chat import Lead
from moerun.serving.worker import (
    AnswerEvent,
    Completed,
    Failed,
    GenerationJob,
    GenerationWorker,
    Piece,
    QueueFull,
)


class PendingAnswer:
    """One request being answered. Whoever made it calls ``leave``, whatever happens."""

    def __init__(
        self, worker: GenerationWorker, prompt_ids: torch.Tensor, sampling: Sampling, *, lead: bool
    ) -> None:
        """``lead``: the text begins with its first letter. Raises ApiError when it must wait."""
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[AnswerEvent | None] = asyncio.Queue()  # None: the client left
        self._lead = Lead(lambda text: self._put(Piece(text))) if lead else None
        self._job = GenerationJob(prompt_ids, sampling, self._tell)
        self._watch: asyncio.Task[None] | None = None
        try:
            worker.submit(self._job)
        except QueueFull as error:
            raise _full(worker) from error

    async def first(self, request: Request) -> Piece | Completed:
        """The first event. Raises ApiError where there will be no answer, ClientDisconnect."""
        self._watch = asyncio.create_task(self._watch_client(request))
        return await self._next()

    def unwatch(self) -> None:
        """Stop to watch the client: the caller does so from now on."""
        if self._watch:
            self._watch.cancel()

    async def pieces(self, event: Piece | Completed) -> AsyncIterator[Piece | Completed]:
        """``event``, then all that follow; the last is Completed. Raises as ``first`` does."""
        yield event
        while isinstance(event, Piece):
            event = await self._next()
            yield event

    async def whole(self, event: Piece | Completed) -> tuple[str, Generated]:
        """The answer's text, without its reasoning, and how it came about."""
        text: list[str] = []
        async for part in self.pieces(event):
            if isinstance(part, Completed):
                return "".join(text), part.generated
            if not part.reasoning:
                text.append(part.text)
        raise AssertionError("an answer without an end")

    def leave(self) -> None:
        """Stop to listen; a generation that still goes on is cancelled."""
        self.unwatch()
        self._worker.cancel(self._job)

    def _tell(self, event: AnswerEvent) -> None:
        """Called from the worker's thread."""
        if self._lead and isinstance(event, Piece) and not event.reasoning:
            self._lead(event.text)
        else:
            self._put(event)

    def _put(self, event: AnswerEvent) -> None:
        with suppress(RuntimeError):  # the loop has ended, and all that listened with it
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _next(self) -> Piece | Completed:
        event = await self._events.get()
        if event is None:
            raise ClientDisconnect
        if isinstance(event, Failed):
            raise _failed(event.error)
        if isinstance(event, Piece):
            return event
        if isinstance(event, Completed) and event.generated.ending != "cancelled":
            return event
        raise ApiError(
            503, "the server is shutting down", type="server_error", code="shutting_down"
        )

    async def _watch_client(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)


def _failed(error: BaseException) -> ApiError:
    """What went wrong in the middle: it names the expert, the file or the policy."""
    message = str(error)
    if not isinstance(error, (RunError, PolicyError, OSError)):  # where, the server's log says
        message = f"{type(error).__name__}: {message}"
    return ApiError(500, message, type="server_error", code="generation_failed")


def _full(worker: GenerationWorker) -> ApiError:
    work = worker.work
    mean_s = (work.prompt_s + work.decode_s) / work.answers if work.answers else 1.0
    wait_s = max(1, round(mean_s * (worker.waiting_limit + 1)))
    return ApiError(
        429,
        f"one answer is in progress and the queue of {worker.waiting_limit} is full: try again in "
        f"about {wait_s} s",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(wait_s)},
    )
