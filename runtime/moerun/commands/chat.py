"""`moerun chat`: a conversation with a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from moepolicy import console

from moerun.commands import options as opt


def chat(
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
    system: Annotated[
        str | None,
        typer.Option(help="What the model is told before the first message.", show_default=False),
    ] = None,
    max_new_tokens: opt.MaxNewTokens = 512,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    stop: opt.Stop = None,
    seed: opt.Seed = 0,
) -> None:
    """Talk with a model: one message a line, answers stream to stdout.

    The model's own chat template makes the prompt; a model without one continues a script of
    "User:" and "Assistant:" lines. Oldest turns are dropped when the context is full. Ctrl-C stops
    an answer, at the prompt it leaves, as Ctrl-D does. Commands: /reset, /stats, /memory,
    /quit.
    """
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
    sampling = opt.sampling(max_new_tokens, temperature, top_p, seed, stop)
    found = opt.store(model, precision, store, attention)
    settings = replace(settings, low=opt.low_store(model, low, found))
    from moerun.commands.run import say, tell_plan
    from moerun.devices import calm_collector
    from moerun.live.runner import Runner
    from moerun.serving.terminal import TerminalChat

    with Runner(found, settings, report=say) as runner:
        tell_plan(runner)
        calm_collector()
        if TerminalChat(runner, sampling, system).hold():
            raise typer.Exit(console.INTERRUPTED)
