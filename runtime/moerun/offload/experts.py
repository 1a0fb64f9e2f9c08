"""Offloaded experts as an experts implementation of transformers, named "offloaded".

The experts come from a provider in whatever order they become ready; their outputs are summed in
the order of the stock implementations, so that the logits are the stock model's to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moerun.errors import RunError
from moerun.kernels.slots import ExpertWeights
from moerun.offload.cpu_experts import AsideExpert

IMPLEMENTATION = "offloaded"
Sums = Literal["grouped_mm", "eager"]
"""Which stock implementation's rounding to reproduce: grouped_mm, transformers' default, sums a
token's experts at the precision of the gate weights and rounds once; eager rounds after each."""
SUMS: tuple[Sums, ...] = ("grouped_mm", "eager")


Item = tuple[int, ExpertWeights | AsideExpert | None]


class Served(Iterable[Item]):
    """The distinct experts of a batch, each once, in the order they become ready.

    Advancing it means that the compute of the one before has been issued, or begun where another
    thread does it; when there are no more, that has ended, too. The weights may be another
    expert's that stands in. None: the expert is skipped and adds nothing. ``ids`` is what was asked
    for, integer[T, K], on the host, so that nobody has to wait for the device a second time.
    """

    def __init__(self, ids: NDArray[Any], experts: Generator[Item]) -> None:
        self.ids = ids
        self._experts = experts

    def __iter__(self) -> Generator[Item]:
        return self._experts


class ExpertProvider(Protocol):
    """Whatever makes experts available: a session with a cache and a link, or plain memory."""

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        """The experts of top_k_index[T, K], with the weights that the gate gave them."""


class ExpertsModule(Protocol):
    """What transformers' fused experts offer besides their parameters."""

    num_experts: int
    has_gate: bool
    has_post_expert_norm: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    post_expert_norm: Callable[[torch.Tensor], torch.Tensor]
    offload: Offload

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Offload:
    """What ties an experts module to its provider."""

    layer: int
    provider: ExpertProvider
    sums: Sums


def register() -> None:
    """Make "offloaded" known to transformers; harmless when repeated."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offloaded_experts)


def attach(
    modules: Sequence[nn.Module], provider: ExpertProvider, sums: Sums = "grouped_mm"
) -> None:
    """Let these experts modules, in MoE layer order, take their weights from `provider`."""
    if sums not in SUMS:
        raise RunError(f"there are no sums {sums!r}: choose from {', '.join(SUMS)}")
    for layer, module in enumerate(modules):
        module.offload = Offload(layer, provider, sums)  # type: ignore[assignment]


def offloaded_experts(
    module: ExpertsModule,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """hidden_states[T, H] through the experts top_k_index[T, K]; their weighted sum [T, H]."""
    offload = module.offload
    sum_up = _sum_grouped if offload.sums == "grouped_mm" else _sum_eager
    if len(hidden_states) == 1:
        sum_up = _one_token
    served = offload.provider.serve(offload.layer, top_k_index, top_k_weights)
    return sum_up(module, hidden_states, served, top_k_weights)


def compute_expert(module: ExpertsModule, weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    """x[T, H] through one expert of ``module``; the norm that some put behind it is still to do."""
    h = weights.up(x)
    return weights.down(module._apply_gate(h) if module.has_gate else module.act_fn(h))


def _outputs(
    module: ExpertsModule, served: Served, rows: Callable[[int], torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, its output for ``rows(expert)``) for each that is not skipped, as they are ready."""
    aside: list[tuple[int, Callable[[], torch.Tensor]]] = []
    compute = partial(compute_expert, module)
    norm = module.post_expert_norm if module.has_post_expert_norm else None
    for expert, found in served:
        if isinstance(found, AsideExpert):
            aside.append((expert, found.begin(compute, rows(expert))))
        elif found is not None:
            y = compute(found, rows(expert))
            yield expert, norm(y) if norm else y
    for expert, result in aside:
        yield expert, norm(result()) if norm else result()


def _one_token(
    module: ExpertsModule, x: torch.Tensor, served: Served, weights: torch.Tensor
) -> torch.Tensor:
    """Decode: the same sums as below without the indexing."""
    order: list[int] = served.ids[0].tolist()
    ready: dict[int, torch.Tensor] = {}
    for expert, y in _outputs(module, served, lambda _: x):
        ready[expert] = y * weights[:, order.index(expert), None]
    if module.offload.sums == "grouped_mm":
        kept = [ready[expert] for expert in order if expert in ready]
        return torch.stack(kept, 1).sum(dim=1).to(x.dtype) if kept else torch.zeros_like(x)
    total = torch.zeros_like(x)
    for expert in sorted(ready):
        total += ready[expert].to(x.dtype)
    return total


def _sum_grouped(
    module: ExpertsModule, x: torch.Tensor, served: Served, weights: torch.Tensor
) -> torch.Tensor:
    """A token's outputs side by side in router order, summed at the end: as grouped_mm does."""
    tokens, top_k = served.ids.shape
    flat, flat_weights = served.ids.reshape(-1), weights.reshape(-1, 1)
    places = torch.from_numpy(flat.argsort(kind="stable")).to(x.device)
    ends = np.bincount(flat, minlength=module.num_experts).cumsum().tolist()
    dtype = torch.result_type(x, weights)
    outputs = torch.zeros(tokens * top_k, x.shape[1], dtype=dtype, device=x.device)

    def of(expert: int) -> torch.Tensor:
        return places[ends[expert - 1] if expert else 0 : ends[expert]]

    for expert, y in _outputs(module, served, lambda expert: x[of(expert) // top_k]):
        mine = of(expert)
        outputs[mine] = (y * flat_weights[mine]).to(dtype)
    return outputs.view(tokens, top_k, -1).sum(dim=1).to(x.dtype)


def _sum_eager(
    module: ExpertsModule, x: torch.Tensor, served: Served, weights: torch.Tensor
) -> torch.Tensor:
    """Outputs added expert by expert, by ascending number: as the eager implementation does."""
    ready: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def rows(expert: int) -> torch.Tensor:
        # Rows by rank first, as eager takes them: a row's place can show in a product's last bit.
        places = np.stack((served.ids == expert).T.nonzero())
        ranks, tokens = torch.from_numpy(places).to(x.device)
        chosen[expert] = ranks, tokens
        return x[tokens]

    for expert, y in _outputs(module, served, rows):
        ranks, tokens = chosen[expert]
        ready[expert] = tokens, (y * weights[tokens, ranks, None]).to(x.dtype)
    total = torch.zeros_like(x)
    for expert in sorted(ready):
        total.index_add_(0, *ready[expert])
    return total


def served_in_order(top_k_index: torch.Tensor, of: Callable[[int], ExpertWeights | None]) -> Served:
    """What ``of`` gives for the experts of top_k_index[T, K], by their first place in it."""
    ids = top_k_index.cpu().numpy()
    distinct = dict.fromkeys(ids.ravel().tolist())
    return Served(ids, ((expert, of(expert)) for expert in distinct))
