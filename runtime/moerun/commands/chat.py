"""`moerun chat`: a conversation with a model."""

from __future__ import annotations

from typing import Annotated

import typer
from moepolicy.console import say
from moepolicy.options import taking

from moerun.commands import prepare
from moerun.commands.options import (
    CacheOptions,
    DeviceOptions,
    ModelOptions,
    OnPolicyError,
    Reuse,
    SamplingOptions,
)


def chat(
    *,
    system: Annotated[
        str | None,
        typer.Option(help="What the model is told before the first message.", show_default=False),
    ] = None,
    reuse: Reuse = None,
    on_policy_error: OnPolicyError = "fallback",
    model: ModelOptions,
    cache: CacheOptions,
    device: DeviceOptions,
    sampling: Annotated[SamplingOptions, taking(max_new_tokens=512)],
) -> None:
    """Talk with a model: one message a line, answers stream to stdout.

    The model's own chat template makes the prompt. A model without a template continues a script
    of "User:" and "Assistant:" lines. The oldest turns are dropped when the context is full.
    Ctrl-C stops an answer; at the prompt, Ctrl-C or Ctrl-D leaves. Commands: /help, /reset,
    /stats, /memory, /quit.
    """
    prepare.check(
        model=model,
        cache=cache,
        device=device,
        sampling=sampling,
        on_policy_error=on_policy_error,
        reuse=reuse,
    )
    settings = prepare.settings(cache, device, on_policy_error=on_policy_error)
    chosen = prepare.sampling(sampling)
    found, settings = prepare.opened(model, settings)
    settings = prepare.reusing(settings, found, reuse)
    from moerun.commands.run import exit_code, tell_plan
    from moerun.devices import freeze_loaded_objects
    from moerun.live.runner import Runner
    from moerun.serving.terminal import TerminalChat

    with Runner(found, settings, report=say) as runner:
        tell_plan(runner)
        freeze_loaded_objects()
        interrupted = TerminalChat(runner, chosen, system).hold()
        if code := exit_code(runner, interrupted=interrupted):
            raise typer.Exit(code)
