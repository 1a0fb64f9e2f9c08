"""What is known of a model before anything of it is read but its configuration, without torch.

A shape is a name of the table of published models, ``tiny`` (bundled), the path of a config.json or
of a folder with one, a GGUF file, or owner/name on the Hugging Face hub, whose config.json is
fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepolicy.console import nearest
from moeroute import TraceError
from moeroute.jsontext import parse_json
from moeroute.models import ModelShape, describe, published

from moerun.checkpoint.gguf.header import is_gguf
from moerun.checkpoint.hub_config import CONFIG, fetch_config
from moerun.checkpoint.local import BUNDLED, TINY
from moerun.checkpoint.supported import refuse_unsupported
from moerun.errors import RunError, UsageError

_NO_JSON = ("Infinity", "-Infinity", "NaN")


def shape_names() -> list[str]:
    """The names there are: the bundled model's, and the table's."""
    return [TINY, *published()]


def shape_name(shape: str) -> str:
    """The name of a shape for reports: of a folder its last part, not its path."""
    if shape in shape_names() or is_on_hub(shape):
        return shape
    path = Path(shape).expanduser().resolve()
    return path.parent.name if path.name == CONFIG else path.name


def is_on_hub(shape: str) -> bool:
    """Whether a shape is owner/name of the hub: no name of the table, and nothing local."""
    return (
        shape.count("/") == 1
        and not shape.startswith((".", "/", "~"))
        and not shape.endswith(("/", ".json", ".gguf"))
        and not Path(shape).exists()
    )


@dataclass(frozen=True)
class Shape:
    """A model by its configuration: the fields of its config.json, and their place for messages.

    ``sizes`` are None for a family whose sizes are only known once its model is built.
    """

    name: str
    place: str
    fields: dict[str, Any]

    @property
    def is_named_only(self) -> bool:
        """Whether nothing of the model is here but its configuration."""
        return self.name in published() or is_on_hub(self.name)

    @property
    def n_layers(self) -> int | None:
        """Layers of the whole model, with experts or without."""
        found = (self.fields.get("text_config") or self.fields).get("num_hidden_layers")
        return found if isinstance(found, int) else None

    def check_family(self) -> None:
        """RunError where models of this family cannot be offloaded."""
        refuse_unsupported(self.fields, self.place)

    def check_layers(self, layers: int | None) -> None:
        """UsageError where only so many layers cannot be kept."""
        if layers is not None and self.n_layers and not 1 <= layers <= self.n_layers:
            raise UsageError.of("layers", f"must be 1 to {self.n_layers}, not {layers}")

    def check_top_k(self, top_k: int | None) -> None:
        """UsageError where a token cannot use so many experts."""
        sizes = self.sizes() if top_k is not None else None
        if top_k is not None and (top_k < 1 or (sizes and top_k > sizes.n_experts)):
            most = f"1 to {sizes.n_experts}" if sizes else "1 or more"
            raise UsageError.of("top-k", f"must be {most}, not {top_k}")

    def sizes(self, layers: int | None = None) -> ModelShape | None:
        """Counts and sizes of the first ``layers`` layers."""
        text = dict(self.fields.get("text_config") or self.fields)
        text.pop("quantization_config", None)
        if layers is not None:
            text["num_hidden_layers"] = layers
        try:
            return describe(text, self.name)
        except TraceError:  # of a family that it does not know; the model itself will tell
            return None


def find_shape(shape: str) -> Shape:
    """The shape of that name or path. Raises RunError for what does not exist, UsageError for an
    unknown name."""
    name = shape_name(shape)
    if shape in published():
        return Shape(name, f"shape {shape!r}", dict(published()[shape]))
    if is_on_hub(shape):
        return _of_file(name, fetch_config(shape) / CONFIG)
    path = BUNDLED.get(shape, Path(shape).expanduser())
    if is_gguf(path):
        from moerun.checkpoint.gguf.config import gguf_config

        return Shape(name, f"the header of {path}", gguf_config(path))
    file = path / CONFIG if path.is_dir() else path
    if not path.exists():
        if path.suffix in (".json", ".gguf") or shape.startswith((".", "/", "~")):
            raise RunError(f"{path} is not there")
        raise UsageError(
            f"unknown shape '{shape}'; {nearest(shape, shape_names())}; or give the path of a "
            "config.json, a GGUF file, or owner/name on the Hugging Face hub"
        )
    if not file.is_file():
        return _of_gguf_folder(name, path)
    return _of_file(name, file)


def _of_gguf_folder(name: str, folder: Path) -> Shape:
    from moerun.checkpoint.gguf.config import gguf_config
    from moerun.checkpoint.gguf.files import find_gguf

    if (found := find_gguf(folder)) is None:
        raise RunError(f"{folder} has neither a {CONFIG} nor a GGUF file")
    return Shape(name, f"the header of {found}", gguf_config(found))


def _number(found: dict[str, Any]) -> Any:
    """What transformers writes of a number that JSON lacks ({"__float__": "Infinity"}), as that."""
    named = found.get("__float__")
    return float(named) if found.keys() == {"__float__"} and named in _NO_JSON else found


def _of_file(name: str, file: Path) -> Shape:
    try:
        fields = parse_json(file.read_bytes(), object_hook=_number)
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{file} cannot be used: it is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise RunError(f"{file} cannot be used: it is no JSON object")
    return Shape(name, str(file), fields)
