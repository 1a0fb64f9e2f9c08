"""The configurations of models whose weights nobody needs, as transformers has them."""

from __future__ import annotations

from typing import Any

from moerun.bench.shapes import Shape, find_shape
from moerun.checkpoint.families import config_of, set_top_k
from moerun.errors import UsageError


def find_config(shape: str | Shape, layers: int | None = None, *, top_k: int | None = None) -> Any:
    """The transformers configuration of a shape: see `moerun.bench.shapes`.

    ``layers`` keeps only so many of its layers; ``top_k`` has a token use so many experts. Weights
    of a quantised checkpoint count as unquantised ones: whoever asks draws their own. Raises
    RunError for what does not exist, or a family that cannot be offloaded.
    """
    found = find_shape(shape) if isinstance(shape, str) else shape
    found.check_layers(layers)
    found.check_top_k(top_k)
    fields = {name: value for name, value in found.fields.items() if name != "quantization_config"}
    config = config_of(fields, found.place)
    if layers is not None:
        text = config.get_text_config()
        if not 1 <= layers <= text.num_hidden_layers:
            raise UsageError.of("layers", f"must be 1 to {text.num_hidden_layers}, not {layers}")
        _cut(text, layers)
    if top_k is not None:
        set_top_k(config, top_k)
    return config


def _cut(config: Any, layers: int) -> None:
    config.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:layers])
