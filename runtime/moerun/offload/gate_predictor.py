"""Guesses which experts later layers will want, from what is known when a layer's gate has run.

The recorder and the live runtime both use it, so a policy sees the same predictions in both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from moerun.checkpoint.families import family_of_model
from moerun.errors import RunError
from moerun.offload.gate import logits_reader

OWN_NORM = "own-norm"
GATE_INPUT = "gate-input"
METHODS = {
    OWN_NORM: "residual stream before this layer's experts, under the later layer's own norm",
    GATE_INPUT: "input of this layer's gate as it is",
}
# What families call the norm between the residual stream and their experts, surest name first.
_NORM_NAMES = ("pre_feedforward_layernorm", "post_attention_layernorm")
_TABLE, _TOKENS = "tid2eid", "input_ids"  # of a gate that chooses by a table of tokens
_PROBE_TOLERANCE = 0.02  # of the largest value: bfloat16 rounding passes, another formula does not


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The gates of a transformers model in layer order: what the model records router logits of,
    and what its family's entry names besides.

    A forward hook on one sees its output, of which `moerun.offload.gate` makes logits [T, E],
    weights [T, K] and expert ids [T, K]. Raises RunError when the model is no mixture of experts.
    """
    kinds: set[Any] = set()
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, list | tuple) else (recorders,):
            kinds.add(getattr(recorder, "target_class", recorder))
    family = family_of_model(model)
    more = family.more_gates if family else ()
    routers = [m for m in model.modules() if type(m) in kinds or type(m).__name__ in more]
    if not routers:
        raise RunError(f"{type(model).__name__} is no mixture of experts: it has no gate")
    return routers


class GatePredictor:
    """Applies the gates of the next `horizon` layers to this layer's hidden state.

    A context manager; after `close` the model has none of its hooks. `method` is one of METHODS;
    None takes `own-norm`, which recalls more, where the family has a norm in front of its gates (a
    gate that normalises for itself needs none, and gets `gate-input`). To be built when gates and
    norms have their weights. Raises RunError for a model or a method that cannot be used.
    """

    def __init__(self, model: nn.Module, horizon: int, method: str | None = None) -> None:
        if horizon < 1:
            raise RunError(f"horizon {horizon}: predictions reach at least 1 layer ahead")
        if method not in (None, *METHODS):
            raise RunError(f"unknown prediction {method!r}; there are: {', '.join(METHODS)}")
        self.horizon = horizon
        self.routers = find_routers(model)
        self._tables = _TokenTables(self.routers)
        self._gates = [_gate_logits(model, router) for router in self.routers]
        with torch.no_grad():
            self.n_experts = self._gates[0](_probe(self.routers[0])).shape[-1]
        norms = norms_before(model, self.routers)
        if method == OWN_NORM and norms is None:
            raise RunError(f"{type(model).__name__} has no norm before its gates: use {GATE_INPUT}")
        self.method = method or (GATE_INPUT if norms is None else OWN_NORM)
        self._norms = norms if self.method == OWN_NORM and norms is not None else []
        self._products = self._join_gates()
        self._residual: Tensor | None = None
        self._hooks = [norm.register_forward_pre_hook(self._keep_input) for norm in self._norms]
        self._hooks += self._tables.hooks()

    @torch.no_grad()
    def predict(self, layer: int, gate_input: Tensor) -> Tensor:
        """Logits [horizon, T, E] float16: entry j-1 is from the gate of MoE layer `layer + j`.

        To be called between that layer's gate and its experts. `gate_input` [T, H] is what the
        gate of `layer` was given. Entries beyond the last layer are NaN.
        """
        hidden = gate_input
        if self._norms:
            if self._residual is None:
                raise RuntimeError("predictions belong inside a forward pass of the model")
            hidden = self._residual
        known = self._known(layer, hidden.reshape(-1, hidden.shape[-1]))
        missing = self.horizon - len(known)
        return functional.pad(known.half(), (0, 0, 0, 0, 0, missing), value=float("nan"))

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._residual = [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _keep_input(self, _norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._residual = arguments[0]

    def _targets(self, layer: int) -> range:
        return range(layer + 1, min(layer + 1 + self.horizon, len(self.routers)))

    def _known(self, layer: int, hidden: Tensor) -> Tensor:
        """Logits [j, T, E] of the gates there are within the horizon of `layer`."""
        if not self._targets(layer):
            return hidden.new_empty(0, hidden.shape[0], self.n_experts)
        if self._products is not None:
            found = self._products[layer].apply(hidden, len(self._targets(layer)))
        else:
            found = torch.stack([self._gate(t, hidden) for t in self._targets(layer)])
        return self._tables.raised(found, self._targets(layer))

    def _gate(self, target: int, hidden: Tensor) -> Tensor:
        return self._gates[target](self._norms[target].forward(hidden) if self._norms else hidden)

    def _join_gates(self) -> list[_Product] | None:
        """One product a layer for all its later gates, or None if a gate or norm is not plain.

        A gate's forward also ranks the experts and a norm writes a whole hidden state: not needed
        for a guess, and paid at every layer of every token.
        """
        pairs = zip(self.routers, self._gates, strict=True)
        gates = [_linear_gate(router, logits) for router, logits in pairs]
        scales = [_norm_scale(norm) for norm in self._norms]
        if any(gate is None for gate in gates) or any(scale is None for scale in scales):
            return None
        joined = []
        for layer in range(len(self.routers)):
            weights, biases = [], []
            for target in self._targets(layer):
                weight, bias = gates[target]  # type: ignore[misc]
                scale = scales[target] if scales else None
                weights.append(weight if scale is None else (weight * scale).to(weight.dtype))
                biases.append(weight.new_zeros(len(weight)) if bias is None else bias)
            epsilon = _epsilon(self._norms[layer]) if self._norms else None
            joined.append(_Product(weights, biases, epsilon))
        return joined


class _TokenTables:
    """Gates that choose experts by a table of tokens (DeepSeek-V4's first layers). What such a gate
    will choose is known as soon as the tokens are: its predicted logits have those experts above
    all others."""

    def __init__(self, routers: list[nn.Module]) -> None:
        self._tables = {i: r for i, r in enumerate(routers) if hasattr(r, _TABLE)}
        self._ids: Tensor | None = None  # of the tokens of this pass

    def hooks(self) -> list[Any]:
        """Hooks on the gates that learn the tokens of a pass; none where no gate has a table."""
        return [r.register_forward_pre_hook(self._keep_ids) for r in self._tables.values()]

    def raised(self, logits: Tensor, targets: range) -> Tensor:
        """Logits [j, T, E] of the gates of ``targets`` with the chosen raised above the others."""
        for row, target in enumerate(targets):
            router = self._tables.get(target)
            if router is None or self._ids is None or len(self._ids) != logits.shape[1]:
                continue
            chosen = getattr(router, _TABLE)[self._ids].long()
            of = logits[row]
            above = of.amax(-1, keepdim=True) - of.amin(-1, keepdim=True) + 1
            logits[row] = of.scatter(-1, chosen, of.gather(-1, chosen) + above)
        return logits

    def _keep_ids(self, _router: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._ids = arguments[1].reshape(-1)


class _Product:
    """Several linear gates, each behind its own root-mean-square norm, as one matrix product."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor], epsilon: float | None) -> None:
        self._weight = torch.cat(weights) if weights else torch.empty(0)  # [j * E, H]
        self._bias = torch.cat(biases) if any(bool(bias.any()) for bias in biases) else None
        self._epsilon = epsilon  # None: the gates are applied without a norm

    def apply(self, hidden: Tensor, n_gates: int) -> Tensor:
        """Logits [n_gates, T, E] for hidden states [T, H]."""
        if self._epsilon is not None:
            hidden = functional.rms_norm(hidden, hidden.shape[-1:], None, self._epsilon)
        logits = functional.linear(hidden.to(self._weight.dtype), self._weight, self._bias)
        return logits.view(len(hidden), n_gates, -1).transpose(0, 1)


def _gate_logits(model: nn.Module, router: nn.Module) -> Callable[[Tensor], Tensor]:
    """The logits [T, E] of a gate for hidden states [T, H], as a function.

    By way of `forward`: calling the module would fire the hooks that record its routing. What a
    gate is given in addition to the hidden state (MiniMax: a bias of the ranking) lies in its
    block; tokens (DeepSeek-V4) decide about the choice alone, so that any will do.
    """
    paths = {module: path for path, module in model.named_modules()}
    block = model.get_submodule(paths[router].rpartition(".")[0])
    _, *others = inspect.signature(router.forward).parameters.values()
    named = [parameter.name for parameter in others if parameter.default is parameter.empty]
    needed = {name: getattr(block, name) for name in named if name != _TOKENS}
    read = logits_reader(model)

    def logits(hidden: Tensor) -> Tensor:
        tokens = {_TOKENS: hidden.new_zeros(len(hidden), dtype=torch.long)}
        given = needed | (tokens if _TOKENS in named else {})
        found = read(router.forward(hidden[None], **given))
        return found.reshape(len(hidden), -1)

    return logits


def norms_before(model: nn.Module, routers: list[nn.Module]) -> list[nn.Module] | None:
    """For each gate the norm whose output it is given; None where the gates have none."""
    family = family_of_model(model)
    names = (family.gate_norms if family else ()) or _NORM_NAMES
    modules = dict(model.named_modules())
    paths = {module: path for path, module in modules.items()}
    norms = []
    for router in routers:
        if any(_is_norm(child) for child in router.children()):
            return None  # the gate normalises for itself
        path, norm = paths[router], None
        while path and norm is None:
            path = path.rpartition(".")[0]
            named = (modules.get(f"{path}.{name}") for name in names)
            norm = next((module for module in named if module is not None), None)
        if norm is None:
            return None
        norms.append(norm)
    return norms


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _probe(module: nn.Module) -> Tensor:
    """A few seeded hidden states [4, H] for a gate or norm, on its device and in its type."""
    like = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, like.shape[-1], generator=generator).to(like)


def _agrees(found: Tensor, expected: Tensor) -> bool:
    error = (found.float() - expected.float()).abs().max()
    return bool(error <= _PROBE_TOLERANCE * expected.float().abs().max())


@torch.no_grad()
def _linear_gate(
    router: nn.Module, logits: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor | None] | None:
    """Weight [E, H] and bias [E] when they are all there is to the gate's logits, else None."""
    matrices = [p for p in router.parameters() if p.ndim == 2]
    vectors = [p for p in router.parameters() if p.ndim == 1]
    if len(matrices) != 1 or len(vectors) > 1 or any(len(v) != len(matrices[0]) for v in vectors):
        return None
    weight, bias = matrices[0], vectors[0] if vectors else None
    probe = _probe(router)
    found, linear = logits(probe), functional.linear(probe, weight, bias)
    return (weight, bias) if found.shape == linear.shape and _agrees(found, linear) else None


@torch.no_grad()
def _norm_scale(norm: nn.Module) -> Tensor | None:
    """The scale [H] of a root-mean-square norm, None for a norm of another formula."""
    scale = getattr(norm, "weight", None)
    if not isinstance(scale, Tensor) or _epsilon(norm) is None:
        return None
    probe = _probe(norm)
    plain = functional.rms_norm(probe, probe.shape[-1:], scale, _epsilon(norm))
    return scale if _agrees(norm.forward(probe), plain) else None


def _epsilon(norm: nn.Module) -> float | None:
    names = ("variance_epsilon", "eps", "epsilon")
    return next((float(getattr(norm, name)) for name in names if hasattr(norm, name)), None)
