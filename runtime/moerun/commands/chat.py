"""`moerun chat`: a conversation with a model."""

from __future__ import annotations

from typing import Annotated

import typer
from moepolicy import console
from moepolicy.options import taking

from moerun.commands import prepare
from moerun.commands.options import CacheOptions, DeviceOptions, ModelOptions, SamplingOptions


def chat(
    *,
    system: Annotated[
        str | None,
        typer.Option(help="What the model is told before the first message.", show_default=False),
    ] = None,
    model: ModelOptions,
    cache: CacheOptions,
    device: DeviceOptions,
    sampling: Annotated[SamplingOptions, taking(max_new_tokens=512)],
) -> None:
    """Talk with a model: one message a line, answers stream to stdout.

    The model's own chat template makes the prompt. A model without a template continues a script
    of "User:" and "Assistant:" lines. The oldest turns are dropped when the context is full.
    Ctrl-C stops an answer; at the prompt, Ctrl-C or Ctrl-D leaves. Commands: /reset, /stats,
    /memory, /quit.
    """
    settings = prepare.settings(cache, device)
    chosen = prepare.sampling(sampling)
    found, settings = prepare.opened(model, settings)
    from moerun.commands.run import say, tell_plan
    from moerun.devices import calm_collector
    from moerun.live.runner import Runner
    from moerun.serving.terminal import TerminalChat

    with Runner(found, settings, report=say) as runner:
        tell_plan(runner)
        calm_collector()
        if TerminalChat(runner, chosen, system).hold():
            raise typer.Exit(console.INTERRUPTED)
