"""The jobs of a request as the event loop sees them: events to await, a client that may leave."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from moepolicy import PolicyError
from starlette.requests import ClientDisconnect, Request

from moerun.errors import RunError
from moerun.live.work import Generated
from moerun.serving.answers import Part
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
    Wanted,
)

_FOLDERS = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"():,]+[/\\])+")


class ChoiceEvent(NamedTuple):
    """What became of one of a request's answers."""

    choice: int
    what: Piece | Completed


class PendingAnswers:
    """One request being answered, by a job for each of its choices. Whoever made it calls
    ``leave``, whatever happens."""

    def __init__(self, worker: GenerationWorker, wanted: Sequence[Wanted], *, lead: bool) -> None:
        """``lead``: a text begins with its first letter. Raises ApiError when it must wait."""
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        # None: the client left.
        self._events: asyncio.Queue[tuple[int, AnswerEvent] | None] = asyncio.Queue()
        self._jobs = [self._job(i, each, lead) for i, each in enumerate(wanted)]
        self._told = [0] * len(wanted)  # tokens of which something was handed on
        self._watch: asyncio.Task[None] | None = None
        try:
            worker.submit(self._jobs)
        except QueueFull as error:
            raise _full(worker) from error

    async def first(self, request: Request) -> ChoiceEvent:
        """The first event. Raises ApiError where there will be no answer, ClientDisconnect."""
        self._watch = asyncio.create_task(self._watch_client(request))
        return await self._next()

    def unwatch(self) -> None:
        """Stop to watch the client: the caller does so from now on."""
        if self._watch:
            self._watch.cancel()

    async def events(self, event: ChoiceEvent) -> AsyncIterator[ChoiceEvent]:
        """``event``, then all that follow, up to the end of the last answer. Raises as ``first``
        does."""
        going_on = len(self._jobs)
        while True:
            yield event
            going_on -= isinstance(event.what, Completed)
            if not going_on:
                return
            event = await self._next()

    async def whole(self, event: ChoiceEvent) -> tuple[list[str], list[Generated]]:
        """The answers' texts, without their reasoning, and how they came about."""
        texts: list[list[str]] = [[] for _ in self._jobs]
        found: dict[int, Generated] = {}
        async for index, what in self.events(event):
            if isinstance(what, Completed):
                found[index] = what.generated
            elif not what.reasoning:
                texts[index].append(what.text)
        return ["".join(text) for text in texts], [found[i] for i in range(len(texts))]

    def part(self, index: int, what: Piece | Completed) -> Part:
        """What an event has that is new: its text, and the tokens that came up to it."""
        generation = self._jobs[index].generation
        assert generation is not None
        end = what.tokens if isinstance(what, Piece) else what.generated.new_tokens
        fresh = slice(self._told[index], max(end, self._told[index]))
        self._told[index] = fresh.stop
        return Part(
            what.text if isinstance(what, Piece) else "",
            isinstance(what, Piece) and what.reasoning,
            generation.token_ids[fresh],
            generation.logprobs[fresh],
        )

    def echoed(self, index: int, text: str) -> Part:
        """The prompt of a choice that has begun."""
        job = self._jobs[index]
        assert job.generation is not None
        ids = job.prompt_ids[0].tolist()
        return Part(text, token_ids=ids, logprobs=job.generation.prompt_logprobs, echoed=True)

    def leave(self) -> None:
        """Stop to listen; generations that still go on are cancelled."""
        self.unwatch()
        for job in self._jobs:
            self._worker.cancel(job)

    def _job(self, index: int, wanted: Wanted, lead: bool) -> GenerationJob:
        def put(event: AnswerEvent) -> None:  # called from the worker's thread
            with suppress(RuntimeError):  # the loop has ended, and all that listened with it
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        tokens = 0

        def lead_on(text: str) -> None:
            put(Piece(text, tokens=tokens))

        begin = Lead(lead_on) if lead else None

        def tell(event: AnswerEvent) -> None:
            nonlocal tokens
            if begin and isinstance(event, Piece) and not event.reasoning:
                tokens = event.tokens
                begin(event.text)
            else:
                put(event)

        return GenerationJob(wanted, tell)

    async def _next(self) -> ChoiceEvent:
        found = await self._events.get()
        if found is None:
            raise ClientDisconnect
        index, event = found
        if isinstance(event, Failed):
            raise _failed(event.error)
        if isinstance(event, Piece):
            return ChoiceEvent(index, event)
        if isinstance(event, Completed) and event.generated.ending != "cancelled":
            return ChoiceEvent(index, event)
        raise ApiError(
            503, "the server is shutting down", type="server_error", code="shutting_down"
        )

    async def _watch_client(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)


def without_folders(text: str) -> str:
    """``text`` with files by their names alone: where they lie is nobody's business."""
    return _FOLDERS.sub("", text)


def _failed(error: BaseException) -> ApiError:
    """What went wrong in the middle: it names the expert, the file or the policy."""
    message = without_folders(str(error))
    if not isinstance(error, (RunError, PolicyError, OSError)):  # the server's log says more
        message = "the server failed at this request; its log says why"
    return ApiError(500, message, type="server_error", code="generation_failed")


def _answers(count: int) -> str:
    return f"{count} answers are" if count > 1 else "one answer is"


def _full(worker: GenerationWorker) -> ApiError:
    work = worker.work
    mean_s = (work.prompt_s + work.decode_s) / work.answers if work.answers else 1.0
    wait_s = max(1, round(mean_s * (worker.waiting_limit + 1)))
    return ApiError(
        429,
        f"{_answers(worker.running)} in progress and the queue of {worker.waiting_limit} is full: "
        f"try again in about {wait_s} s",
        type="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(wait_s)},
    )
