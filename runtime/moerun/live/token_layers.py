"""Decoding a token on the CPU through layers whose attention is packed in llama.cpp's blocks.

A stock layer makes some eighty calls of torch for one token, which take longer than its matrices.
Where a module's code is text that is known here, whichever family it is of, a token goes through
compiled code that rounds to bfloat16 where the stock code does. Sums have another order than
torch's, so a last bit may differ. Prompts, batches, other devices and other types take the stock
code; so do all models whose attention is as published, which are to equal stock to the bit.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from moerun.kernels.blocks import BlockLinear, JoinedLinears
from moerun.kernels.decode import ExpertChoice, HalvesLinear, TokenAttention, TokenNorm
from moerun.live.kvcache import GrowingLayer
from moerun.offload.attention import PackedLinear

Forward = Callable[..., Any]

_TOLD = ("output_attentions", "output_hidden_states", "output_router_logits")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def install_token_layers(model: Any) -> None:
    """Have a single token take compiled code wherever ``model`` has modules that are known.

    One thread at a time may run the model then.
    """
    modules: list[Any] = list(model.modules())
    # Not for attention in other bits: where no weights are in blocks, no plan counts numba.
    packed = (module for module in modules if isinstance(module, PackedLinear))
    if all(linear.blocks is None for linear in packed):
        return
    head: Any = model.get_output_embeddings()
    plain = isinstance(head, nn.Linear) and "bias" not in dict(head.named_parameters())
    if plain and HalvesLinear.fits(head.weight):
        _set_forward(head, TokenHead(head))
    _install(modules)


def _install(modules: Sequence[Any]) -> None:
    for module in modules:
        if (layer := _layer_of(module)) is not None:
            _set_forward(module, layer)
        elif _is_norm(module):
            _set_forward(module, NormForward(module))
        elif (weights := _router_weights(module)) is not None:
            _set_forward(module, RouterForward(module, *weights))
    for module in modules:
        if _code_of(module) == _MODEL and all(_is_token_layer(layer) for layer in module.layers):
            _set_forward(module, TokenPass(module))


def _set_forward(module: nn.Module, forward: Forward) -> None:
    module.forward = forward


class TokenHead:
    """The forward of a head of bfloat16, for a few tokens."""

    def __init__(self, head: nn.Linear) -> None:
        self._stock: Forward = head.forward
        self._weight = head.weight
        self._linear = HalvesLinear(head.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x[..., K] -> logits [..., vocabulary]."""
        out: torch.Tensor = self._linear(x) if HalvesLinear.takes(x) else self._stock(x)
        return out


class NormForward:
    """The forward of an RMS norm, for one token."""

    def __init__(self, norm: Any) -> None:
        self._stock: Forward = norm.forward
        self._width = len(norm.weight)
        self._norm = TokenNorm(norm.weight, norm.variance_epsilon)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., width], normed."""
        if not _is_token(hidden_states, self._width):
            out: torch.Tensor = self._stock(hidden_states)
            return out
        return self._norm(hidden_states)[1]


class RouterForward:
    """The forward of a gate that takes the largest of a softmax, for one token."""

    def __init__(self, router: Any, dtype: torch.dtype, normalised: bool) -> None:
        """The weights are of ``dtype``; ``normalised``: they sum to 1."""
        self._stock: Forward = router.forward
        n, self._width = router.weight.shape
        self._linear = HalvesLinear(router.weight)
        self._choice = ExpertChoice(n, router.top_k, dtype, normalised=normalised)

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits [1, experts], and weights and ids [1, top_k] of the experts chosen."""
        if not _is_token(hidden_states, self._width):
            stock: tuple[torch.Tensor, ...] = self._stock(hidden_states)
            return stock
        logits = self._linear(hidden_states.view(1, -1))
        return logits, *self._choice(logits)


class TokenLayer:
    """The forward of a decoder layer, for one token of one text."""

    def __init__(self, layer: Any) -> None:
        self._stock: Forward = layer.forward
        self._layer_index: int = layer.self_attn.layer_idx
        self._mlp = layer.mlp
        attention = layer.self_attn
        self._projections = JoinedLinears(_blocks(attention, *_PROJECTIONS))
        self._output = JoinedLinears(_blocks(attention, "o_proj"))
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        self._width = len(first.weight)
        self._before = TokenNorm(
            first.weight,
            first.variance_epsilon,
            rounded=self._projections.x,
            scheme=self._projections.scheme,
        )
        self._between = TokenNorm(second.weight, second.variance_epsilon, added=self._output.out)
        norms = None
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm.weight, attention.k_norm.weight
        heads = attention.k_proj.out_features // attention.head_dim
        self._attention = TokenAttention(
            heads=heads,
            group=attention.num_key_value_groups,
            width=attention.head_dim,
            projected=self._projections.out,
            rounded=self._output.x,
            scheme=self._output.scheme,
            scaling=attention.scaling,
            bias=_joined_bias(attention),
            norms=norms,
            eps=attention.q_norm.variance_epsilon if norms else 0.0,
        )

    def __call__(self, hidden_states: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """Hidden states [1, 1, hidden] after the layer; others as the stock layer takes them."""
        held = self._held(hidden_states, named) if not others else None
        if held is None:
            out: torch.Tensor = self._stock(hidden_states, *others, **named)
            return out
        mask, embeddings = named.get("attention_mask"), named["position_embeddings"]
        total, normed = self.attend(hidden_states, held, embeddings, mask)
        total += self._mlp(normed)
        return total

    def attend(
        self,
        x: torch.Tensor,
        held: GrowingLayer,
        embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + attention's output, and that normed: [1, 1, hidden] each."""
        self._before.round(x)
        self._projections.run()
        self._attention(*held.extend(), *embeddings, mask)
        self._output.run()
        return self._between(x)

    def _held(self, x: torch.Tensor, named: dict[str, Any]) -> GrowingLayer | None:
        """What is held of the text before the token x; None where the stock layer is to do it."""
        cache = named.get("past_key_values")
        if cache is None or not _is_token(x, self._width) or x.ndim != 3:
            return None
        held = cache.layers[self._layer_index]
        if type(held) is not GrowingLayer or not held.holds_halves:
            return None
        mask = named.get("attention_mask")
        if mask is not None:
            tokens = held.get_seq_length() + 1
            if mask.dtype is not torch.bool or mask.numel() != tokens or not mask.is_contiguous():
                return None
        return held


class TokenPass:
    """The forward of a model's layers, all of which take a token so, for one token of one text."""

    def __init__(self, model: Any) -> None:
        self._stock: Forward = model.forward
        self._model = model

    def __call__(self, *others: Any, **named: Any) -> Any:
        """As the stock model's, which computes whatever is more than a token of a text."""
        ids: Any = named.get("input_ids")
        cache: Any = named.get("past_key_values")
        if others or not self._takes(ids, cache, named):
            return self._stock(*others, **named)
        model = self._model
        hidden = model.embed_tokens(ids)
        positions = named.get("position_ids")
        if positions is None:
            positions = torch.tensor([[cache.get_seq_length()]])
        embeddings = model.rotary_emb(hidden, position_ids=positions)
        for layer in model.layers:
            hidden = layer(hidden, past_key_values=cache, position_embeddings=embeddings)
        return MoeModelOutputWithPast(last_hidden_state=model.norm(hidden), past_key_values=cache)

    def _takes(self, ids: Any, cache: Any, named: dict[str, Any]) -> bool:
        config = self._model.config
        if ids is None or ids.shape != (1, 1) or not named.get("use_cache") or cache is None:
            return False
        positions = named.get("position_ids")
        if named.get("inputs_embeds") is not None or not (
            positions is None or positions.shape == (1, 1)
        ):
            return False
        if any(named.get(name) or getattr(config, name, False) for name in _TOLD):
            return False
        if not all(type(layer) is GrowingLayer and layer.holds_halves for layer in cache.layers):
            return False
        mask = named.get("attention_mask")
        return mask is None or (mask.ndim == 2 and bool(mask.all()))


def _is_token_layer(layer: Any) -> bool:
    return isinstance(vars(layer).get("forward"), TokenLayer)


def _is_token(x: torch.Tensor, width: int) -> bool:
    return x.numel() == width == x.shape[-1] and x.dtype is torch.bfloat16 and x.is_contiguous()


# What a module's code is, by a digest of its text: families share it, and have it each in a file of
# their own. A newer transformers whose text differs is computed by its own code.

_NORM = "790fa612e4fa57ac"  # MixtralRMSNorm
_ATTENTION = {
    "98e841a5cfbac696": False,  # MixtralAttention
    "dc6807936ef6103d": False,  # Qwen2MoeAttention
    "6c8fb032ff374243": True,  # Qwen3MoeAttention, whose queries and keys are normed
}
_LAYERS = {"681505db8893a5b7", "75d1d62e173e8c57"}  # MixtralDecoderLayer, Qwen3MoeDecoderLayer
_MODEL = "82c795350c8d9e68"  # MixtralModel, Qwen3MoeModel
_ROUTER_OF_WIDE = "d3d52e7870583ffd"  # MixtralTopKRouter, whose weights are float32
_ROUTER = "0cc25d1d534ee953"  # Qwen3MoeTopKRouter
_ROTATION = {"apply_rotary_pos_emb": "ea234325c15de475", "rotate_half": "f714a4b1160c694e"}


@cache
def digest_of(function: Any) -> str:
    """Of a function's text; empty where no sources are here."""
    try:
        text = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _code_of(module: nn.Module) -> str:
    """The digest of a module's forward; empty where somebody has given it another."""
    return "" if "forward" in vars(module) else digest_of(type(module).forward)


def _rotates_alike(module: nn.Module) -> bool:
    """Whether queries and keys are rotated as Mixtral's."""
    theirs = vars(sys.modules[type(module).__module__])
    return all(
        name in theirs and digest_of(theirs[name]) == wanted for name, wanted in _ROTATION.items()
    )


def _is_norm(module: Any) -> bool:
    return _code_of(module) == _NORM and _is_half(module.weight) and len(module.weight) % 32 == 0


def _is_half(weight: torch.Tensor) -> bool:
    on_cpu = weight.device.type == "cpu"
    return weight.dtype is torch.bfloat16 and on_cpu and weight.is_contiguous()


def _router_weights(module: Any) -> tuple[torch.dtype, bool] | None:
    """The type of the weights that a gate gives, and whether their sum is 1; None: unknown."""
    code = _code_of(module)
    if code not in (_ROUTER, _ROUTER_OF_WIDE) or not HalvesLinear.fits(module.weight):
        return None
    if code == _ROUTER_OF_WIDE:
        return torch.float32, True
    return torch.bfloat16, bool(module.norm_topk_prob)


def _layer_of(module: Any) -> TokenLayer | None:
    """The layer for one token; None where ``module`` is none that is known."""
    if _code_of(module) not in _LAYERS or not _attends_alike(getattr(module, "self_attn", None)):
        return None
    norms = module.input_layernorm, module.post_attention_layernorm
    return TokenLayer(module) if all(map(_is_norm, norms)) else None


def _attends_alike(attention: Any) -> bool:
    normed = None if attention is None else _ATTENTION.get(_code_of(attention))
    if normed is None or not _rotates_alike(attention) or attention.head_dim % 32:
        return False
    if normed and not (_is_norm(attention.q_norm) and _is_norm(attention.k_norm)):
        return False
    joined, output = _blocks(attention, *_PROJECTIONS), _blocks(attention, "o_proj")
    biases = {getattr(attention, name).bias is None for name in _PROJECTIONS}
    if not joined or not output or len(biases) > 1 or attention.o_proj.bias is not None:
        return False
    return JoinedLinears.fit(joined) and JoinedLinears.fit(output)


def _blocks(attention: Any, *names: str) -> list[BlockLinear]:
    """The matrices of projections, without their biases; none unless all are in blocks."""
    linears = [getattr(attention, name) for name in names]
    packed = [linear.blocks for linear in linears if isinstance(linear, PackedLinear)]
    found = [blocks for blocks in packed if blocks is not None]
    return found if len(found) == len(names) else []


def _joined_bias(attention: Any) -> torch.Tensor | None:
    biases = [getattr(attention, name).bias for name in _PROJECTIONS]
    return None if biases[0] is None else torch.cat(biases).to(torch.bfloat16)
