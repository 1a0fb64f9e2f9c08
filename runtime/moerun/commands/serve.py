"""`moerun serve`: the model behind OpenAI's HTTP interface."""

from __future__ import annotations

import ipaddress
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy import console
from moepolicy.tables import Format
from rich.console import Console

from moerun.commands import options as opt
from moerun.errors import RunError

if TYPE_CHECKING:
    from moerun.live.runner import Runner
    from moerun.serving.worker import GenerationWorker


def serve(
    model: opt.Model = "tiny",
    policy: opt.Policy = "lru",
    slots: opt.Slots = None,
    memory: opt.Memory = None,
    memory_file: opt.MemoryFile = None,
    context: opt.ContextTokens = None,
    host_memory: opt.HostMemory = None,
    scope: opt.Scope = "layer",
    precision: opt.Precision = "native",
    attention: opt.Attention = "native",
    store: opt.Store = None,
    low: opt.Low = None,
    device: opt.Device = "auto",
    streams: opt.Streams = 1,
    chunk: opt.Chunk = None,
    link_gbps: opt.LinkGbps = None,
    cold: opt.Cold = False,
    threads: opt.Threads = None,
    horizon: opt.Horizon = None,
    calibration: opt.Calibration = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="The most that one answer may have. Default: what the context has room for.",
            show_default=False,
            min=1,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of requests that do not say.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of requests that do not say.")] = 1.0,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="0: any that is free; stderr says which.", min=0, max=65535)
    ] = 8000,
    queue: Annotated[
        int,
        typer.Option(help="How many requests may wait for the one in progress.", min=0),
    ] = 8,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="What clients must send as 'Authorization: Bearer KEY'. On the command line "
            "other users of the machine can read it: prefer the variable.",
            envvar="MOERUN_API_KEY",
            show_default=False,
        ),
    ] = None,
    drain: Annotated[
        float,
        typer.Option(help="Seconds that the answer in progress has left on a signal.", min=0),
    ] = 5.0,
) -> None:
    """Serve a model over HTTP, one answer at a time, as OpenAI's clients expect it.

    POST /v1/chat/completions and /v1/completions (streaming or not), GET /v1/models, /metrics (for
    Prometheus) and /health. SIGTERM and Ctrl-C end it with the statistics.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise typer.BadParameter("the API key must be of printable ASCII letters, and not empty")
    _need_packages()
    settings = opt.settings(
        policy=policy,
        slots=slots,
        memory=memory,
        memory_file=memory_file,
        context=context,
        host_memory=host_memory,
        chunk=chunk,
        scope=scope,
        device=device,
        streams=streams,
        link_gbps=link_gbps,
        cold=cold,
        threads=threads,
        horizon=horizon,
        calibration=calibration,
    )
    opt.sampling(1, temperature, top_p, 0)
    from moerun.serving.protocol import Defaults
    from moerun.serving.server import Server, address_of, bind

    taken = bind(host, port)
    found = opt.store(model, precision, store, attention)
    settings = replace(settings, low=opt.low_store(model, low, found))
    from moerun.commands.run import say, tell_plan
    from moerun.devices import calm_collector
    from moerun.live.runner import Runner
    from moerun.serving.app import Service

    err = Console(stderr=True, highlight=False, soft_wrap=True)
    if api_key is None and not _loopback(taken.getsockname()[0]):
        err.print("anyone who reaches this address can use it: give --api-key", style="yellow")
    with Runner(found, settings, report=say) as runner:
        tell_plan(runner)
        calm_collector()
        defaults = Defaults(temperature, top_p, max_new_tokens)
        service = Service(runner, queue=queue, defaults=defaults, api_key=api_key)
        server = Server(
            service.app,
            service.worker,
            drain_s=drain,
            on_ready=lambda: err.print(f"serving {service.model} on {address_of(taken)}"),
        )
        interrupted = server.serve_on(taken)
        _statistics(runner, service.worker, interrupted)
    if interrupted:
        raise typer.Exit(console.INTERRUPTED)


def _need_packages() -> None:
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise RunError(
                f"serving needs {package}, which is not installed: "
                "pip install 'moe-offload-lab[run,serve]'"
            )


def _loopback(host: str) -> bool:
    return ipaddress.ip_address(host.split("%", maxsplit=1)[0]).is_loopback


def _statistics(runner: Runner, worker: GenerationWorker, interrupted: bool) -> None:
    from moerun.live.report import render, report_of

    report = report_of(runner, worker.work, interrupted=interrupted)
    sys.stderr.write(render(report, Format.table, "", {}))
