"""Routing that a script holds in memory: expert ids request by request, as servers return them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeroute.importers.assemble import write_recording
from moeroute.importers.findings import Findings
from moeroute.importers.npz import by_layer
from moeroute.importers.recording import NO_OPTIONS, Columns, Facts, Recording
from moeroute.schema import DECODE, PROMPT, TraceError
from moeroute.sizes import NO_SIZES, GivenSizes
from moeroute.trace import Trace


class RoutedRequest(NamedTuple):
    """One request's routing.

    experts        integer[tokens, layers, top-k] of the tokens that went through the model; ids
                   below 0, and layers whose ids are all alike, are none
    prompt_tokens  how many of the tokens are prompt; None: unknown
    token_ids      the tokens, if they are known; more than went through are cut off
    """

    experts: NDArray[Any]
    prompt_tokens: int | None = None
    token_ids: Sequence[int] | None = None


def vllm_requests(outputs: Iterable[Any]) -> Iterator[RoutedRequest]:
    """What vLLM's `LLM.generate` returned, under `enable_return_routed_experts`, as requests.

    Each completion is one; `prompt_routed_experts` of an output come before its first completion's
    `routed_experts`. Raises TraceError where an output has none.
    """
    for number, output in enumerate(outputs):
        prompt_ids = list(output.prompt_token_ids)
        of_prompt = getattr(output, "prompt_routed_experts", None)
        for i, completion in enumerate(output.outputs):
            own = getattr(completion, "routed_experts", None)
            if own is None:
                raise TraceError(
                    f"output {number}: no routed_experts: make the LLM with "
                    "enable_return_routed_experts=True"
                )
            parts = [of_prompt, own] if of_prompt is not None and i == 0 else [own]
            experts = np.concatenate([np.asarray(part) for part in parts])
            tokens = prompt_ids + list(completion.token_ids)
            alone = of_prompt is not None and i > 0
            if alone:
                tokens = tokens[len(prompt_ids) :]
            known = tokens[: len(experts)] if len(tokens) >= len(experts) else None
            yield RoutedRequest(experts, 0 if alone else len(prompt_ids), known)


def write_requests(
    out: str | Path,
    requests: Iterable[RoutedRequest],
    *,
    model: str,
    n_experts: int | None = None,
    sizes: GivenSizes = NO_SIZES,
) -> Trace:
    """Write requests as a trace, a sequence each, one after the other, and open it.

    `n_experts`: of a layer; without it the largest id tells. Raises TraceError naming the request
    that is wrong.
    """
    facts = Facts(model, n_experts=n_experts)
    facts.phase = "prompt_tokens is None"
    starts: list[int] = []

    def chunks() -> Iterator[Columns]:
        start = 0
        for number, request in enumerate(requests):
            experts = np.asarray(request.experts)
            _check(number, request, experts)
            starts.append(start * experts.shape[1])
            n = len(experts)
            columns: Columns = {
                "sequence": np.full(n, number, np.uint32),
                "position": np.arange(n),
            }
            if request.prompt_tokens is not None:
                columns["phase"] = np.where(np.arange(n) < request.prompt_tokens, PROMPT, DECODE)
            if request.token_ids is not None:
                columns["token_id"] = np.asarray(request.token_ids)[:n]
            yield by_layer(experts, start, **columns)
            start += n

    def place(row: int) -> str:
        return f"request {int(np.searchsorted(starts, row, side='right')) - 1}"

    recording = Recording(Path("routed experts"), facts, chunks(), place, Findings())
    return write_recording(recording, out, NO_OPTIONS, sizes)


def _check(number: int, request: RoutedRequest, experts: NDArray[Any]) -> None:
    if experts.ndim != 3 or experts.dtype.kind not in "iu" or 0 in experts.shape[1:]:
        raise TraceError(
            f"request {number}: experts is {experts.dtype}{list(experts.shape)}, not whole numbers "
            "[tokens, layers, top-k]"
        )
    if request.token_ids is not None and len(request.token_ids) < len(experts):
        raise TraceError(
            f"request {number}: {len(request.token_ids)} token ids for {len(experts)} tokens"
        )
