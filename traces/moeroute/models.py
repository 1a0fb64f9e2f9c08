"""The sizes of a model's weights, computed from its config.json.

Traces, the simulator and `moerun bench` take these sizes of a model from this module: bytes of an
expert by precision, bytes of a layer's dense weights, bytes that a token reads outside those
layers. ``models.toml`` lists well-known models by name; any other model is given by its config.json
or the folder of one.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from moeroute.architecture import CORRECTION_BIAS, Shapes
from moeroute.architectures import architecture_of
from moeroute.jsontext import parse_json
from moeroute.naming import meant
from moeroute.positions import longest_text
from moeroute.schema import TraceError, TraceUsageError

TABLE = Path(__file__).with_name("models.toml")
PLAIN = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes of a weight
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Bits and weights of a group in the records of `moerun pack`, as moerun.format.bitplanes has them.
PACKED = {"4bit": (4, 64), "3bit": (3, 64), "2bit": (2, 16)}
# llama.cpp's: bits of a weight; a float16 scale for 32 of them, rows filled up to blocks of 16.
BLOCKS = {"q4_0": 4, "q8_0": 8}
# Those that checkpoints are published in: values of 4 bits with a scale byte for 32 of them, and of
# 8 bits with a float32 for each block of 128 x 128.
PUBLISHED_AS = ("mxfp4", "fp8")
MXFP4_BLOCK, FP8_BLOCK = 32, 128
NATIVE = "native"
ATTENTION = (NATIVE, *PLAIN, *PACKED, *BLOCKS)

# Its rows are filled up to blocks of 64, scales to ranges of 128; parts and records are aligned.
_ROWS, _META_GROUP, _PART, _RECORD, _LEAST_GROUP = 64, 128, 256, 4096, 32
_BLOCK_ROWS, _BLOCK = 16, 32


def matrix_bytes(shape: tuple[int, ...], precision: str) -> int:
    """Bytes of one matrix at a plain or published precision, with its scales."""
    rows, columns = shape
    if precision in PLAIN:
        return rows * columns * PLAIN[precision]
    if precision == "mxfp4":
        return rows * columns // 2 + rows * -(-columns // MXFP4_BLOCK)
    return rows * columns + 4 * -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK)


def record_bytes(shapes: Iterable[tuple[int, ...]], precision: str, stored: str) -> int | None:
    """Bytes of a record of `moerun pack` with tensors of ``shapes``, matrices [output, input].

    A tensor that is not a matrix keeps the precision ``stored``. None where a matrix cannot be
    divided into groups.
    """
    position = 0
    for shape in shapes:
        sizes = [math.prod(shape) * PLAIN.get(precision, PLAIN[stored])]
        if precision in PACKED and len(shape) == 2:
            bits, group = PACKED[precision]
            rows, columns = shape
            if columns % max(group, _LEAST_GROUP):
                return None
            weights = _up(rows, _ROWS) * columns
            metas = _up(weights // group, _META_GROUP)
            codes = [weights // 4, weights // 8] if bits == 3 else [weights * bits // 8]
            sizes = [*codes, metas, metas, 2 * 4 * metas // _META_GROUP]
        if precision in BLOCKS and len(shape) == 2:
            rows, columns = shape
            if columns % _BLOCK:
                return None
            weights = _up(rows, _BLOCK_ROWS) * columns
            sizes = [weights * BLOCKS[precision] // 8, 2 * weights // _BLOCK]
        for size in sizes:
            position = _up(position, _PART) + size
    return _up(position, _RECORD)


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


class DenseSizes(NamedTuple):
    """Bytes of the weights other than routed experts.

    layer_bytes  of a layer with experts, the mean over layers: attention, norms, gate and shared
                 experts
    token_bytes  that a token reads outside those: one embedding row, layers without experts, the
                 last norm, the head
    """

    layer_bytes: int
    token_bytes: int


def dense_sizes(tensors: Mapping[str, int], layers: Iterable[str], vocabulary: int) -> DenseSizes:
    """What a layer and a token read of ``tensors``: bytes by name, without routed experts.

    ``layers`` names something in each layer with experts ("model.layers.3.mlp.experts"). A model
    without a head of its own reads the embedding in its place.
    """
    prefixes = tuple({layer_prefix(name) for name in layers})
    of_layers = sum(size for name, size in tensors.items() if name.startswith(prefixes))
    embedding = sum(size for name, size in tensors.items() if "embed_tokens" in name)
    rest = sum(tensors.values()) - of_layers - embedding
    head = 0 if any(name.startswith("lm_head") for name in tensors) else embedding
    return DenseSizes(round(of_layers / len(prefixes)), embedding // vocabulary + rest + head)


def layer_prefix(name: str) -> str:
    """model.layers.3.mlp.experts -> model.layers.3. (with the last dot). Raises ValueError for a
    name without a number."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if number is None:
        raise ValueError(f"{name} lies in no numbered layer")
    return f"{'.'.join(parts[: number + 1])}."


@dataclass(frozen=True)
class ModelShape:
    """A model's counts and weights, from its configuration.

    ``stored`` is the precision of the dense weights, ``expert_stored`` that of the experts as
    published; ``assumed`` says that the configuration names none.
    """

    name: str
    n_layers: int  # that have experts
    n_all_layers: int
    n_experts: int
    top_k: int
    n_shared_experts: int
    vocabulary: int
    tensors: Shapes  # of all but routed experts
    expert: Shapes
    layers: tuple[str, ...]  # prefixes of those with experts
    stored: str
    expert_stored: str
    assumed: bool = False
    context_tokens: int | None = None  # of the longest text; None: the configuration does not say

    @property
    def expert_params(self) -> int:
        """Number of weights of one expert."""
        return sum(map(math.prod, self.expert.values()))

    @property
    def n_params(self) -> int:
        """Number of weights of the whole model."""
        dense = sum(math.prod(s) for n, s in self.tensors.items() if CORRECTION_BIAS not in n)
        return dense + self.n_layers * self.n_experts * self.expert_params

    def expert_bytes(self) -> dict[str, int]:
        """Bytes of one expert by precision, that of the checkpoint first.

        The bytes at the checkpoint's precision are those of the checkpoint if it is quantised, and
        else those of the record that `moerun pack` makes. A precision into whose groups the
        expert's matrices cannot be divided is left out.
        """
        own = self.expert_stored
        sizes: dict[str, int] = {}
        if own in PUBLISHED_AS:
            sizes[own] = sum(
                matrix_bytes(shape, own) if len(shape) == 2 else shape[0] * PLAIN[self.stored]
                for shape in self.expert.values()
            )
        plain = own if own in PLAIN else self.stored
        for precision in dict.fromkeys((plain, *PLAIN, *PACKED, *BLOCKS)):
            size = record_bytes(self.expert.values(), precision, self.stored)
            if size is not None:
                sizes[precision] = size
        return sizes

    def dense(self, attention: str = NATIVE) -> DenseSizes:
        """Bytes of the dense weights; matrices of attention may have a precision of their own.

        Raises TraceError for a precision that is unknown or does not fit.
        """
        if attention not in ATTENTION:
            raise TraceUsageError(f"attention in {attention!r}: choose from {', '.join(ATTENTION)}")
        sizes = {name: self._bytes(name, shape, attention) for name, shape in self.tensors.items()}
        return dense_sizes(sizes, self.layers, self.vocabulary)

    def dense_label(self, attention: str = NATIVE) -> str:
        """The precisions that `dense` assumes, for a table's title."""
        label = "fp8" if self.expert_stored == "fp8" else self.stored
        label += " (the config names no dtype)" if self.assumed else ""
        return label if attention in (NATIVE, label) else f"{label}, attention {attention}"

    def first(self, n_layers: int) -> ModelShape:
        """The model cut to its first ``n_layers`` layers.

        Raises TraceError for a number that the model does not have, and where no layer left has
        experts.
        """
        if not 1 <= n_layers <= self.n_all_layers:
            raise TraceUsageError(
                f"{self.name} has {self.n_all_layers} layers: layers must be 1 to that, not "
                f"{n_layers}"
            )
        cut = [f"model.layers.{i}." for i in range(n_layers, self.n_all_layers)]
        layers = tuple(prefix for prefix in self.layers if prefix not in cut)
        if not layers:
            raise TraceError(f"the first {n_layers} layers of {self.name} have no experts")
        kept = {n: s for n, s in self.tensors.items() if not n.startswith(tuple(cut))}
        return replace(
            self, n_layers=len(layers), n_all_layers=n_layers, tensors=kept, layers=layers
        )

    def _bytes(self, name: str, shape: tuple[int, ...], attention: str) -> int:
        if CORRECTION_BIAS in name:
            return 4 * math.prod(shape)
        in_layer = ".layers." in name and len(shape) == 2
        if in_layer and attention != NATIVE and ("self_attn." in name):
            if attention in PLAIN:
                return matrix_bytes(shape, attention)
            packed = record_bytes([shape], attention, self.stored)
            if packed is None:
                raise TraceError(f"{self.name}: {name} does not divide into groups of {attention}")
            return packed
        gate = ".mlp.gate." in name or "shared_expert_gate" in name
        if in_layer and self.expert_stored == "fp8" and not gate:
            return matrix_bytes(shape, "fp8")
        return math.prod(shape) * PLAIN[self.stored]


@cache
def published() -> dict[str, dict[str, Any]]:
    """The table of models: the fields of each config.json by the model's name."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: {
            field: value for field, value in entry.items() if field not in ("repository", "null")
        }
        | dict.fromkeys(entry.get("null", ()))
        for name, entry in table.items()
    }


@cache
def repositories() -> dict[str, str]:
    """The repository of the Hugging Face hub that each model of the table is published in."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: entry["repository"] for name, entry in table.items()}


def find_model(name_or_path: str) -> ModelShape:
    """A model of the table by name, or by its config.json or the folder that holds one.

    Raises TraceUsageError for a name that is no model's, TraceError for a file that is not there
    and for a model whose sizes cannot be computed.
    """
    if name_or_path in published():
        return describe(published()[name_or_path], name_or_path)
    path = Path(name_or_path).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        if path.suffix == ".json" or len(path.parts) != 1:
            raise TraceError(f"{path} is not there: give the path of a model's config.json")
        raise TraceUsageError(
            f"no model {name_or_path!r}: {meant(name_or_path, published())}give one of "
            f"{', '.join(published())}; or the path of a config.json"
        )
    try:
        config = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise TraceError(f"{path} is no config.json: {error}") from None
    if not isinstance(config, dict):
        raise TraceError(f"{path} is no config.json: it holds no JSON object")
    return describe(config, str(path))


def describe(config: Mapping[str, Any], name: str) -> ModelShape:
    """A model's counts and weights from its configuration.

    Raises TraceError for a field that is missing or wrong.
    """
    built = architecture_of(config, name)
    inner = built.config
    dtype = inner.get("dtype") or inner.get("torch_dtype") or config.get("dtype")
    dtype = dtype or config.get("torch_dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise TraceError(f"{name}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    stored = DTYPES[str(dtype).removeprefix("torch.")] if dtype else "bf16"
    layers = built.moe_layers
    top_k = built.top_k
    if not layers or top_k > built.n_experts:
        raise TraceError(f"{name}: no mixture of experts: no layer has {top_k} experts or more")
    return ModelShape(
        name=name,
        n_layers=len(layers),
        n_all_layers=built.n_layers,
        n_experts=built.n_experts,
        top_k=top_k,
        n_shared_experts=built.n_shared_experts,
        vocabulary=built.vocabulary,
        tensors=built.tensors(),
        expert=built.expert(),
        layers=tuple(f"model.layers.{i}." for i in layers),
        stored=stored,
        expert_stored=_published_as(config, name) or stored,
        assumed=dtype is None,
        context_tokens=longest_text(
            inner.get("max_position_embeddings"),
            inner.get("rope_parameters") or inner.get("rope_scaling"),
            name,
        ),
    )


def _published_as(config: Mapping[str, Any], name: str) -> str | None:
    """The precision a quantised checkpoint has its experts in; None where it is not quantised."""
    inner = config.get("text_config") or config
    found = inner.get("quantization_config") or config.get("quantization_config")
    found = found or config.get("quantization")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    if method not in PUBLISHED_AS:
        raise TraceError(
            f"{name}: quantised by {method or 'a method it does not name'}, whose sizes are not "
            "known here: give the config.json of the unquantised model, or the sizes as numbers"
        )
    return str(method)
