"""Decoding forced tokens with `generate` as it stands, and the time of those that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moerun.bench.forced_gates import ForcedGates
from moerun.bench.routing import ForcedRouting
from moerun.checkpoint.families import find_experts
from moerun.live.gates import SessionExperts
from moerun.live.kvcache import new_cache
from moerun.live.sampling import Sampling
from moerun.live.work import Timings
from moerun.offload.experts import Sums, attach


class MeasuredTimings(Timings):
    """Notes when each token came, and calls back when warm-up ends."""

    def __init__(self, warm_up: int, on_warm: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._warm_up = warm_up
        self._on_warm = on_warm

    def put(self, value: torch.Tensor) -> None:
        """Note the time of a token; the last one of warm-up also starts the measurement."""
        super().put(value)
        if len(self.token_s) == self._warm_up + 1:
            self._on_warm()

    @property
    def measured_s(self) -> float:
        """Seconds of the tokens after warm-up."""
        return self.token_s[-1] - self.token_s[self._warm_up]


class ForcedDecoder:
    """A model whose gates are forced; its experts come from whatever serves them."""

    def __init__(self, model: Any, routing: ForcedRouting, sums: Sums) -> None:
        """``sums`` is as for `attach`. Raises RunError where the gates are not the routing's."""
        self.last_ids: list[int] = []  # what was decoded last
        self._model = model
        self._sums = sums
        self._experts = [module for _, module in find_experts(model)]
        self._gates = ForcedGates(model, routing)

    def decode(
        self,
        provider: Any,
        timings: MeasuredTimings,
        tokens: int,
        told: SessionExperts | None = None,
        *,
        horizon: int = 0,
    ) -> None:
        """Decode the routing's first ``tokens``, as `moerun` decodes any.

        ``provider`` serves the experts; ``told`` is told of the logits, and of ``horizon``
        predictions.
        """
        attach(self._experts, provider, self._sums)
        self._gates.start(told, horizon=horizon)
        decode_forced(self._model, timings, tokens, new_cache(self._model, 1 + tokens))
        self.last_ids = timings.token_ids

    def close(self) -> None:
        """Give the gates back."""
        self._gates.close()


def decode_forced(model: Any, timings: MeasuredTimings, tokens: int, cache: Any = None) -> None:
    """Decode after a prompt of one token, with `generate` as it stands; gates are forced before.

    ``cache`` is of keys and values; None for transformers' own.
    """
    prompt = torch.ones((1, 1), dtype=torch.int64, device=model.device)
    config = replace(Sampling(), stop=False).config(model, tokens)
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            generation_config=config,
            streamer=timings,
        )
