"""What each part of decoding through compiled code saves, on a store of `llama_cpp.py`.

One process, one model. Each part in turn is given back to the stock code for a text, beside texts
with all parts, in turns; ratios are of CPU time, so that other work on the machine counts little.

    python benchmarks/llama_cpp_tries.py SCRATCH/qwen3-30b-a3b/store
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from moepolicy import find_policy
from moerun.live.kvcache import new_cache
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.token_layers import NormForward, RouterForward, TokenHead, TokenLayer, TokenPass
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore

PARTS: dict[str, tuple[type, ...]] = {
    "head of bfloat16": (TokenHead,),
    "attention, norms and sums of a layer": (TokenPass, TokenLayer, NormForward),
    "gates": (RouterForward,),
    "around the layers": (TokenPass,),
    "all of these": (TokenPass, TokenLayer, NormForward, RouterForward, TokenHead),
}
GENERATE = "transformers' generate(), which makes no text"


class Decoder:
    """Decodes a text of a short prompt, and takes the CPU time of a token."""

    def __init__(self, runner: Runner, tokens: int) -> None:
        self._runner, self._tokens = runner, tokens
        self._prompt = torch.arange(3, 35)[None]

    def ours(self) -> float:
        """Seconds of CPU a decoded token, by moerun's own loop."""
        ends: list[float] = []
        sampling = replace(Sampling(), stop=False, max_new_tokens=self._tokens + 1)
        generation = self._runner.generation()
        choose = generation.choose

        def timed(logits: torch.Tensor) -> bool:
            goes_on = choose(logits)
            ends.append(time.process_time())
            return goes_on

        generation.choose = timed  # type: ignore[method-assign]
        generation.run(self._prompt, sampling)
        return (ends[-1] - ends[0]) / self._tokens

    def by_generate(self) -> float:
        """The same by transformers' loop."""
        ends: list[float] = []
        model, prompt = self._runner.model, self._prompt

        class Told:
            def put(self, _token: torch.Tensor) -> None:
                ends.append(time.process_time())

            def end(self) -> None: ...

        config = replace(Sampling(), stop=False).config(model, self._tokens + 1)
        with torch.inference_mode():
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=new_cache(model, prompt.shape[1] + self._tokens + 1),
                generation_config=config,
                streamer=Told(),
            )
        return (ends[-1] - ends[1]) / self._tokens  # the prompt comes first


@contextmanager
def stock(model: Any, kinds: tuple[type, ...]) -> Iterator[None]:
    """The stock code in the place of forwards of these kinds."""
    taken = {m: vars(m).pop("forward") for m in model.modules() if _is(m, kinds)}
    try:
        yield
    finally:
        for module, forward in taken.items():
            module.forward = forward


def _is(module: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(vars(module).get("forward"), kinds)


def main(
    store: Annotated[Path, typer.Argument(help="A store with attention in blocks.")],
    threads: Annotated[int, typer.Option(help="Threads that compute.")] = 1,
    tokens: Annotated[int, typer.Option(help="Decoded at a time.")] = 24,
    rounds: Annotated[int, typer.Option(help="Of which medians are taken.")] = 7,
) -> None:
    """Print a table of ratios: CPU time of a token without a part to that with all parts."""
    torch.set_num_threads(threads)
    opened = ExpertStore.open(store)
    with Runner(opened, Settings(find_policy("lru"), slots=opened.n_experts)) as runner:
        decoder = Decoder(runner, tokens)
        found = measured(runner.model, decoder, rounds)
    typer.echo("| part | CPU ms a token without it | with it | ratio |\n|---|--:|--:|--:|")
    for name, pairs in found.items():
        before, after = (1e3 * median(times) for times in zip(*pairs, strict=True))
        ratio = median(one / other for one, other in pairs)
        typer.echo(f"| {name} | {before:.2f} | {after:.2f} | {ratio:.2f} |")


def measured(model: Any, decoder: Decoder, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds without each part, and with all, of each round."""
    cases: dict[str, tuple[tuple[type, ...], Callable[[], float]]] = {
        **{name: (kinds, decoder.ours) for name, kinds in PARTS.items()},
        GENERATE: ((), decoder.by_generate),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    decoder.ours()
    for _ in range(rounds):
        for name, (kinds, run) in cases.items():
            with stock(model, kinds):
                without_s = run()
            found[name].append((without_s, decoder.ours()))
    return found


if __name__ == "__main__":
    typer.run(main)
