"""The dimensions of models whose weights nobody needs: configurations of the table by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moepolicy.console import nearest
from moeroute.models import published

from moerun.checkpoint.families import SUPPORTED, read_config
from moerun.errors import RunError, UsageError

TINY = "tiny"


def shape_names() -> list[str]:
    """The names there are: the bundled model's, and the table's."""
    return [TINY, *published()]


def shape_name(shape: str) -> str:
    """The name of a shape for reports: of a folder its last part, not its path."""
    if shape in shape_names():
        return shape
    path = Path(shape).expanduser().resolve()
    return path.parent.name if path.name == "config.json" else path.name


def find_config(shape: str, layers: int | None = None) -> Any:
    """The transformers configuration of a shape: a name, a config.json, or a checkpoint's folder.

    ``layers`` keeps only so many of its layers. Raises RunError for what does not exist.
    """
    config = _config(shape)
    if layers is not None:
        text = config.get_text_config()
        if not 1 <= layers <= text.num_hidden_layers:
            raise UsageError(f"layers must be 1 to {text.num_hidden_layers}, not {layers}")
        _cut(text, layers)
    return config


def _config(shape: str) -> Any:
    if shape == TINY:
        from moerun.checkpoint.hub import resolve

        return read_config(resolve(TINY))
    if shape in published():
        return _published(shape)
    path = Path(shape).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if folder.is_dir() and path.exists():
        return read_config(folder)
    raise RunError(
        f"unknown shape '{shape}'; {nearest(shape, shape_names())}; or give the path of a "
        f"config.json ({', '.join(SUPPORTED)})"
    )


def _published(shape: str) -> Any:
    """A configuration of the table, of weights that are not quantised: a bench draws its own."""
    from transformers import AutoConfig

    fields = dict(published()[shape])
    fields.pop("quantization_config", None)
    family = fields.pop("model_type")
    if family not in SUPPORTED:
        raise RunError(
            f"shape '{shape}' is of family {family!r}, which cannot be offloaded yet; supported "
            f"are {', '.join(SUPPORTED)}"
        )
    return AutoConfig.for_model(family, **fields)


def _cut(config: Any, layers: int) -> None:
    config.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:layers])
