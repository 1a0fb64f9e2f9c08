"""Several texts decoded together in a memory budget, as `moerun serve --max-batch` does it.

A command as the others are: ``--texts N`` beside their options. Prints the peak of memory as JSON.
"""

from __future__ import annotations

import json
import queue
from dataclasses import replace
from typing import Annotated

import typer
from moepolicy import PolicyError, console
from moepolicy.apps import add_command, make_app
from moerun.commands import prepare
from moerun.commands.options import CacheOptions, DeviceOptions, ModelOptions, SamplingOptions
from moerun.errors import RunError


def batched(
    *,
    prompt: Annotated[str, typer.Option(help="The beginning of every text.")],
    texts: Annotated[int, typer.Option(help="How many are decoded together.")],
    model: ModelOptions,
    cache: CacheOptions,
    device: DeviceOptions,
    sampling: SamplingOptions,
) -> None:
    """Continue a prompt several times at once."""
    prepare.check(model=model, cache=cache, device=device, sampling=sampling)
    settings = replace(prepare.settings(cache, device), texts=texts)
    found, settings = prepare.opened(model, settings)
    from moerun.live.runner import Runner
    from moerun.serving.worker import Failed, GenerationJob, GenerationWorker, Piece, Wanted

    events: queue.SimpleQueue[object] = queue.SimpleQueue()
    with Runner(found, settings) as runner:
        worker = GenerationWorker(runner, texts, lambda _: None)
        worker.start()
        for number in range(texts):
            wanted = Wanted(runner.encode(f"{number} {prompt}"), prepare.sampling(sampling))
            worker.submit([GenerationJob(wanted, events.put)])
        left = texts
        while left:
            event = events.get()
            left -= not isinstance(event, Piece)
            if isinstance(event, Failed):
                worker.close()
                raise event.error
        worker.close()
        print(json.dumps({"memory_peak_bytes": runner.peak_bytes}))


app = make_app("batched", "", version="", packages=(), default="batched")
add_command(app, batched)


def main() -> None:
    """Read the command line."""
    console.run(app, errors=lambda: (RunError, PolicyError))
