"""Offloaded experts as an experts implementation of transformers, named "offloaded".

The experts come from a provider in whatever order they become ready; their outputs are summed in
the order of the stock implementations, so that the logits are the stock model's to the last bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe

from moerun.checkpoint.families import family_of_model
from moerun.errors import RunError
from moerun.kernels.blocks import compute_experts
from moerun.kernels.decode import weighted_sum
from moerun.kernels.slots import ExpertWeights, whole_of
from moerun.offload.cpu_experts import CpuExpert

IMPLEMENTATION = "offloaded"
Sums = Literal["grouped_mm", "eager"]
"""Which stock implementation's rounding to reproduce: grouped_mm, transformers' default, sums a
token's experts at the precision of the gate weights and rounds once; eager rounds after each."""
SUMS: tuple[Sums, ...] = ("grouped_mm", "eager")


Item = tuple[int, ExpertWeights | CpuExpert | None]


class Served(Iterable[Item]):
    """The distinct experts of a batch, each once, in the order they become ready.

    Advancing it means that the compute of the one before has been issued, or begun where another
    thread does it; when there are no more, that has ended, too. The weights may be another
    expert's that stands in. None: the expert is skipped and adds nothing. ``ids`` is what was asked
    for, integer[T, K], on the host, so that nobody has to wait for the device a second time.
    ``weights`` [T, K] are those of ``ids`` where a policy chose other experts than the gate, else
    None. The first ``together`` experts may be computed at once: each is whole, and stays until
    it is advanced beyond the last of them.
    """

    def __init__(
        self,
        ids: NDArray[Any],
        experts: Generator[Item],
        weights: torch.Tensor | None = None,
        *,
        together: int = 0,
    ) -> None:
        self.ids = ids
        self.weights = weights
        self.together = together
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
    wide: bool = False  # eager sums have the dtype of the gate's weights until the end

    def serving(self, provider: ExpertProvider) -> Offload:
        """The same with another provider."""
        return replace(self, provider=provider)


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
        family = family_of_model(module)
        wide = family is not None and family.wide_sums
        module.offload = Offload(layer, provider, sums, wide)  # type: ignore[assignment]


def offloaded_experts(
    module: ExpertsModule,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """hidden_states[T, H] through the experts top_k_index[T, K]; their weighted sum [T, H]."""
    offload = module.offload
    served = offload.provider.serve(offload.layer, top_k_index, top_k_weights)
    weights = top_k_weights if served.weights is None else served.weights
    return sum_experts(module, hidden_states, served, weights)


def sum_experts(
    module: ExpertsModule, x: torch.Tensor, served: Served, weights: torch.Tensor
) -> torch.Tensor:
    """The sums [T, H] over each token's experts of ``weights`` [T, K] times their outputs for
    x[T, H]."""
    if len(x) == 1:
        return _one_token(module, x, served, weights)
    sum_up = _sum_grouped if module.offload.sums == "grouped_mm" else _sum_eager
    return sum_up(module, x, served, weights)


def compute_expert(module: ExpertsModule, weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    """x[T, H] through one expert of ``module``; the norm that some put behind it is still to do."""
    if (whole := whole_of(weights)) is not None and _gates_by_silu(module):
        return compute_experts([whole], x)[0]
    h = weights.up(x)
    return weights.down(module._apply_gate(h) if module.has_gate else module.act_fn(h))


def outputs_of(
    module: ExpertsModule, served: Served, rows: Callable[[int], torch.Tensor]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, its output for ``rows(expert)`` [T, H]) for each that is not skipped, as they are
    ready."""
    on_cpu: list[tuple[int, Callable[[], torch.Tensor]]] = []
    compute = partial(compute_expert, module)
    norm = module.post_expert_norm if module.has_post_expert_norm else None
    for expert, found in served:
        if isinstance(found, CpuExpert):
            on_cpu.append((expert, found.begin(compute, rows(expert))))
        elif found is not None:
            y = compute(found, rows(expert))
            yield expert, norm(y) if norm else y
    for expert, result in on_cpu:
        yield expert, norm(result()) if norm else result()


def _gates_by_silu(module: ExpertsModule) -> bool:
    """Whether an expert is down(SiLU(gate) x up), by transformers' own rule for the gate."""
    plain = module.has_gate and type(module)._apply_gate is moe._default_apply_gate
    return plain and isinstance(module.act_fn, SiLUActivation | nn.SiLU)


def _one_token(
    module: ExpertsModule, x: torch.Tensor, served: Served, weights: torch.Tensor
) -> torch.Tensor:
    """Decode: the same sums as below without the indexing."""
    order: list[int] = served.ids[0].tolist()
    first, outputs = _first_together(module, x, served)
    if len(first) == len(order):
        list(served)  # which ends the step
        if first != order:
            outputs = outputs[[first.index(expert) for expert in order]]
        return _sum_of_one(x, outputs.transpose(0, 1), weights)
    ready = dict(zip(first, outputs, strict=True))
    ready.update(outputs_of(module, served, lambda _: x))
    if module.offload.sums != "grouped_mm":
        total = torch.zeros_like(x, dtype=_total_dtype(module, x, weights))
        for expert in sorted(ready):
            y = ready[expert] * weights[:, order.index(expert), None]
            total += y.to(total.dtype)
        return total.to(x.dtype)
    kept = [rank for rank, expert in enumerate(order) if expert in ready]
    if not kept:
        return torch.zeros_like(x)
    if len(kept) < len(order):
        weights = weights[:, kept]
    return _sum_of_one(x, torch.stack([ready[order[rank]] for rank in kept], 1), weights)


def _first_together(
    module: ExpertsModule, x: torch.Tensor, served: Served
) -> tuple[list[int], torch.Tensor]:
    """The experts that are there first and their outputs [experts, 1, H], computed in one call;
    none where that cannot be."""
    whole = module.offload.sums == "grouped_mm" and not module.has_post_expert_norm
    if served.together < 2 or not (whole and _gates_by_silu(module)):
        return [], x.new_empty(0)
    found = dict(itertools.islice(served, served.together))
    wholes = [one for weights in found.values() if (one := whole_of(weights))]
    assert len(wholes) == len(found)  # or the session had not told of them
    return list(found), compute_experts(wholes, x)


def _sum_of_one(x: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum [1, H] of ``weights`` [1, K] times outputs [1, K, H], in router order."""
    if x.is_cpu and (x.dtype, outputs.dtype) == (torch.bfloat16, torch.float32):
        return weighted_sum(outputs[0], weights)  # of matrices in blocks
    return (outputs * weights[..., None]).sum(dim=1).to(x.dtype)


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

    for expert, y in outputs_of(module, served, lambda expert: x[of(expert) // top_k]):
        mine = of(expert)
        outputs[mine] = (y * flat_weights[mine]).to(dtype)
    return outputs.view(tokens, top_k, -1).sum(dim=1).to(x.dtype)


def _sum_eager(
    module: ExpertsModule, x: torch.Tensor, served: Served, weights: torch.Tensor
) -> torch.Tensor:
    """Outputs added expert by expert, by ascending number: as the eager implementation does."""
    ready: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    dtype = _total_dtype(module, x, weights)

    def rows(expert: int) -> torch.Tensor:
        # Rows by rank first, as eager takes them: a row's place can show in a product's last bit.
        places = np.stack((served.ids == expert).T.nonzero())
        ranks, tokens = torch.from_numpy(places).to(x.device)
        chosen[expert] = ranks, tokens
        return x[tokens]

    for expert, y in outputs_of(module, served, rows):
        ranks, tokens = chosen[expert]
        ready[expert] = tokens, (y * weights[tokens, ranks, None]).to(dtype)
    total = torch.zeros_like(x, dtype=dtype)
    for expert in sorted(ready):
        total.index_add_(0, *ready[expert])
    return total.to(x.dtype)


def _total_dtype(module: ExpertsModule, x: torch.Tensor, weights: torch.Tensor) -> torch.dtype:
    return weights.dtype if module.offload.wide else x.dtype


def served_in_order(top_k_index: torch.Tensor, of: Callable[[int], ExpertWeights | None]) -> Served:
    """What ``of`` gives for the experts of top_k_index[T, K], by their first place in it."""
    ids = top_k_index.cpu().numpy()
    distinct = dict.fromkeys(ids.ravel().tolist())
    return Served(ids, ((expert, of(expert)) for expert in distinct))
