"""`moerun serve`: the model behind OpenAI's HTTP interface."""

from __future__ import annotations

import ipaddress
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy import console
from moepolicy.tables import Format
from rich.console import Console

from moerun.commands import prepare
from moerun.commands.options import CacheOptions, DeviceOptions, ModelOptions, SamplingOptions
from moerun.errors import RunError

if TYPE_CHECKING:
    from moerun.live.runner import Runner
    from moerun.serving.worker import GenerationWorker


def serve(
    *,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="The most tokens of one answer. Default: what the context has room for.",
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
    queue: Annotated[
        int,
        typer.Option(help="How many requests may wait for the one in progress.", min=0),
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
    drain: Annotated[
        float,
        typer.Option(help="Seconds that the answer in progress may go on after a signal.", min=0),
    ] = 5.0,
    model: ModelOptions,
    cache: CacheOptions,
    device: DeviceOptions,
) -> None:
    """Serve a model over HTTP, one answer at a time, as OpenAI's clients expect it.

    Clients POST to /v1/chat/completions and /v1/completions (streaming or not), and GET
    /v1/models, /metrics (for Prometheus) and /health. SIGTERM and Ctrl-C end the server, which
    then prints the statistics.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
        raise typer.BadParameter("the API key must be of printable ASCII letters, and not empty")
    _need_packages()
    settings = prepare.settings(cache, device)
    prepare.sampling(SamplingOptions(max_new_tokens=1, temperature=temperature, top_p=top_p))
    from moerun.serving.protocol import Defaults
    from moerun.serving.server import Server, address_of, bind

    taken = bind(host, port)
    found, settings = prepare.opened(model, settings)
    from moerun.commands.run import say, tell_plan
    from moerun.devices import calm_collector
    from moerun.live.runner import Runner
    from moerun.serving.app import Service

    err = Console(stderr=True, highlight=False, soft_wrap=True)
    if api_key is None and not _loopback(taken.getsockname()[0]):
        err.print(
            "anyone who reaches this address can use the server: give --api-key", style="yellow"
        )
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
