"""`moerun serve`: the model behind OpenAI's HTTP interface."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy.apps import Force
from moepolicy.console import say
from moepolicy.tables import Format
from rich.console import Console

from moerun.commands import prepare
from moerun.commands.options import (
    CacheOptions,
    DeviceOptions,
    ModelOptions,
    OnPolicyError,
    Reuse,
    SamplingOptions,
)
from moerun.errors import RunError
from moerun.serving.address import address_of, bind

if TYPE_CHECKING:
    from moerun.live.recording import LiveRecording
    from moerun.live.runner import Runner
    from moerun.serving.worker import GenerationWorker


def serve(
    *,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="The most tokens of one answer, whatever a request asks for. Default: what the "
            "context has room for. A request to /v1/completions that asks for no number gets 16, "
            "as with OpenAI.",
            show_default=False,
            min=1,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Default for requests that do not set one.")
    ] = 1.0,
    top_p: Annotated[float, typer.Option(help="Default for requests that do not set one.")] = 1.0,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            help="The port to listen on. 0: any free port; stderr says which.", min=0, max=65535
        ),
    ] = 8000,
    max_batch: Annotated[
        int,
        typer.Option(
            help="How many answers may be decoded together. Memory is planned for as many texts "
            "of the context's length.",
            min=1,
            max=256,
        ),
    ] = 1,
    queue: Annotated[
        int,
        typer.Option(help="How many requests may wait for those in progress.", min=0),
    ] = 8,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="The key that clients must send as 'Authorization: Bearer KEY'. Other users of "
            "the machine can read a command line: prefer the variable.",
            envvar="MOERUN_API_KEY",
            show_default=False,
        ),
    ] = None,
    model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="What requests call the model, in the place of its own name. Repeatable: any of "
            "the names is taken, answers have the first.",
            show_default=False,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A web page's origin (https://host:port) whose scripts may use the server. "
            "Repeatable.",
            show_default=False,
        ),
    ] = None,
    drain: Annotated[
        float,
        typer.Option(help="Seconds that the answer in progress may go on after a signal.", min=0),
    ] = 5.0,
    reuse: Reuse = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Write the trace of all that is served to a Parquet file, when the server ends.",
            show_default=False,
        ),
    ] = None,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Write every transfer and decision to a JSON file, when the server ends; memory "
            "keeps them until then.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    on_policy_error: OnPolicyError = "fallback",
    model: ModelOptions,
    cache: CacheOptions,
    device: DeviceOptions,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it.

    Clients POST to /v1/chat/completions and /v1/completions (streaming or not), /tokenize and
    /detokenize, and GET /v1/models, /metrics (for Prometheus), /health and /openapi.json, which
    describes them. The keys and values of the last text, or of the last --max-batch, are kept: a
    text that begins alike is not read from its beginning. SIGTERM and Ctrl-C end the server, which
    then prints the statistics.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise typer.BadParameter("the API key must be of printable ASCII letters, and not empty")
    _need_packages()
    prepare.check(
        model=model,
        cache=cache,
        device=device,
        sampling=SamplingOptions(max_new_tokens=1, temperature=temperature, top_p=top_p),
        on_policy_error=on_policy_error,
        reuse=reuse,
    )
    prepare.check_recording(record, journal, force=force)
    taken = bind(host, port)
    settings = prepare.settings(
        cache, device, on_policy_error=on_policy_error, recording=record is not None
    )
    settings = replace(settings, texts=max_batch)
    from moerun.serving.protocol import Defaults
    from moerun.serving.server import Server

    found, settings = prepare.opened(model, settings)
    settings = prepare.reusing(settings, found, reuse)
    from moerun.commands.run import exit_code, tell_plan
    from moerun.devices import freeze_loaded_objects
    from moerun.live.recording import LiveRecording
    from moerun.live.runner import Runner
    from moerun.serving.app import Service

    err = Console(stderr=True, highlight=False, soft_wrap=True)
    if api_key is None and not _loopback(taken.getsockname()[0]):
        err.print(
            "anyone who reaches this address can use the server: give --api-key", style="yellow"
        )
    with Runner(found, settings, report=say) as runner:
        tell_plan(runner)
        recorded = record is not None or journal is not None
        recording = LiveRecording(runner, record, journal, None) if recorded else None
        freeze_loaded_objects()
        defaults = Defaults(temperature, top_p, max_new_tokens)
        service = Service(
            runner,
            queue=queue,
            defaults=defaults,
            api_key=api_key,
            names=model_name or (),
            origins=cors_origin or (),
            recording=recording,
        )
        server = Server(
            service.app,
            service.worker,
            drain_s=drain,
            on_ready=lambda: err.print(f"serving {service.model} on {address_of(taken)}"),
        )
        try:
            interrupted = server.serve_on(taken)
        except BaseException:
            if recording is not None:
                recording.discard()
            raise
        if recording is not None:
            _finish(recording, (record, journal))
        _statistics(runner, service.worker, interrupted)
    if code := exit_code(runner, interrupted=interrupted):
        raise typer.Exit(code)


def _need_packages() -> None:
    for package in ("starlette", "uvicorn", "prometheus_client", "pydantic"):
        if find_spec(package) is None:
            raise RunError(
                f"serving needs {package}, which is not installed: "
                "pip install 'moe-offload-lab[run,serve]'"
            )


def _finish(recording: LiveRecording, files: Iterable[Path | None]) -> None:
    """Write what was recorded, and tell where that is not all."""
    if recording.recorder.ended:
        say("the recording ends where an answer ended in an error: the cache was cold after it")
    written = recording.finish()
    for path in files:
        if path is not None and path not in written:
            say(f"{path} is not written: nothing was recorded that could be replayed")


def _loopback(host: str) -> bool:
    return ipaddress.ip_address(host.split("%", maxsplit=1)[0]).is_loopback


def _statistics(runner: Runner, worker: GenerationWorker, interrupted: bool) -> None:
    from moerun.live.report import render, report_of

    report = report_of(runner, worker.work, interrupted=interrupted)
    sys.stderr.write(render(report, Format.table, "", {}))
