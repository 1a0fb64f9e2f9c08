"""Loading a stock checkpoint to record from, and what a trace says about it."""

from __future__ import annotations

import hashlib
import platform
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moepolicy.versions import installed
from moeroute.models import DenseSizes, dense_sizes
from moeroute.naming import sha256_of
from moerun.checkpoint.accounting import check_tensors
from moerun.checkpoint.context import context_limit
from moerun.checkpoint.families import empty_model, expert_shape, find_experts, shared_experts_of
from moerun.checkpoint.gguf.header import is_gguf
from moerun.checkpoint.hub import resolve
from moerun.checkpoint.sizes import dense_bytes
from moerun.checkpoint.source import ModelSource
from moerun.errors import RunError
from moerun.format.expert import ExpertShape
from moerun.format.precision import NATIVE, PLAIN, PRECISIONS
from moerun.offload.gate_predictor import find_routers
from moerun.offload.load import load_tokenizer
from moerun.offload.whole import whole_model
from torch import nn

DTYPES = {"auto": None, **PLAIN}
_HASHED_BYTES = 1 << 30  # weights beyond this go by their folder, not by their content
_PACKAGES = ("moe-offload-lab", "torch", "transformers", "tokenizers", "numpy", "polars")


@dataclass(frozen=True)
class Checkpoint:
    """A stock model ready to run, its tokenizer, and where they are from."""

    name: str
    path: Path
    model: Any
    tokenizer: Any
    stored: torch.dtype  # of the checkpoint; the model may run in a wider one
    published: ExpertShape | None = None  # an expert, where the checkpoint is quantised

    @property
    def context(self) -> int:
        """Tokens of the longest sequence the model was made for."""
        return context_limit(self.model.config) or 2048

    @property
    def revision(self) -> str | None:
        """The hub's commit, or a digest of the weights of a local checkpoint that is not huge."""
        if self.path.parent.name == "snapshots":
            return self.path.name
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files or sum(file.stat().st_size for file in files) > _HASHED_BYTES:
            return None
        digest = hashlib.sha256()
        for file in files:
            digest.update(sha256_of(file))
        return f"sha256:{digest.hexdigest()[:16]}"


def load(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto"
) -> Checkpoint:
    """Load a checkpoint by bundled name, folder or hub id.

    GGUF, and what is quantised, is read as `moerun pack` reads it, and runs dequantised. `dtype`
    "auto" runs it as stored; on the CPU, which has no fast 16-bit float arithmetic but
    bfloat16's, float16 runs as float32. Raises RunError when there is no such model, it is no
    mixture of experts, or its files are damaged or incomplete.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # what matters of its warnings is raised below
    logging.disable_progress_bar()
    path = resolve(name, revision=revision)
    place = _device(device)
    if is_gguf(path):
        return _read(name, path, dtype, place)
    config = _loading(path / "config.json", AutoConfig.from_pretrained, path)
    refused: RunError | None = None
    if getattr(config, "quantization_config", None):
        try:
            return _read(name, path, dtype, place)
        except RunError as error:
            refused = error  # transformers may know the format
    stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    empty = _loading(path, empty_model, config, stored)
    find_routers(empty)
    if not getattr(config, "quantization_config", None):  # what is declared, transformers reads
        check_tensors(path, empty, config)
    run_as = _dtype(dtype, stored, place)
    try:
        model, info = _loading(
            path,
            AutoModelForCausalLM.from_pretrained,
            path,
            dtype=run_as,
            use_safetensors=True,
            output_loading_info=True,
        )
    except RunError as error:
        raise refused or error from error
    if absent := sorted(info["missing_keys"]) or sorted(info["mismatched_keys"]):
        raise RunError(f"{path}: the checkpoint is incomplete: it lacks {absent[0]}")
    # Of a quantised checkpoint, transformers casts what it dequantises, and nothing else.
    for parameter in model.parameters():
        if parameter.dtype is stored:
            parameter.data = parameter.data.to(run_as)
    return Checkpoint(name, path, model.to(place).eval(), _tokenizer(path), stored)


def _read(name: str, path: Path, dtype: str, place: torch.device) -> Checkpoint:
    """A checkpoint in GGUF, or in a format of quantised weights, as `moerun pack` reads it."""
    with closing(ModelSource(path)) as source:
        find_routers(source.model)
        stored, published = source.dtype, source.shape
        model = whole_model(source, _dtype(dtype, stored, place), place)
    return Checkpoint(name, path, model, _tokenizer(path), stored, published)


def _tokenizer(path: Path) -> Any:
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise RunError(f"{path} has no tokenizer: put tokenizer.json next to it")
    return tokenizer


def _dtype(asked: str, stored: torch.dtype, place: torch.device) -> torch.dtype:
    """In what a model computes whose checkpoint is ``stored`` so."""
    if asked == "auto" and place.type == "cpu" and stored is torch.float16:
        return torch.float32
    return DTYPES[asked] or stored


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RunError(f"device {name}: this machine has no CUDA device; use --device cpu")
    return torch.device(name)


def _loading(where: Path, load_it: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call one of transformers' loaders, whose failures are as many as its formats."""
    try:
        return load_it(*arguments, **keywords)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise RunError(f"{where} cannot be loaded: {reason}") from error


def expert_bytes(
    model: nn.Module, stored: torch.dtype, published: ExpertShape | None = None
) -> dict[str, int]:
    """Bytes of one expert's record by precision, that of the checkpoint first: ``published`` is an
    expert of one that is quantised, which the runtime may keep in its own bits.

    Precisions that this expert's shape does not divide into are left out; empty where the family
    does not keep its experts as the runtime could serve them.
    """
    found = find_experts(model)
    if not found:
        return {}
    shape = expert_shape(found[0][1], stored)
    own = precision_name(stored)
    sizes: dict[str, int] = {}
    if published and (kept := published.kept_as(NATIVE)):
        sizes[kept] = published.record(NATIVE).record_bytes
    for precision in (own, *PRECISIONS):
        if precision == NATIVE:
            continue
        try:
            sizes[precision] = shape.record(precision).record_bytes
        except RunError:
            continue
    return sizes


def expert_params(model: nn.Module, stored: torch.dtype) -> int | None:
    """Weights of one expert; None where `expert_bytes` is empty."""
    found = find_experts(model)
    return expert_shape(found[0][1], stored).n_weights if found else None


def dense_sizes_of(model: Any, stored: torch.dtype) -> DenseSizes | None:
    """Bytes of the weights other than routed experts, as a checkpoint in `stored` has them.

    None where the family does not keep its experts apart, so that the rest cannot be told from
    them.
    """
    layers = [name for name, _ in find_experts(model)]
    if not layers:
        return None
    vocabulary = int(model.config.get_text_config().vocab_size)
    return dense_sizes(dense_bytes(model, stored, layers), layers, vocabulary)


def precision_name(stored: torch.dtype) -> str:
    """A dtype as traces name it."""
    return next((name for name, dtype in PLAIN.items() if dtype is stored), "fp32")


def shared_experts(model: Any) -> int:
    """Experts that every token passes besides the routed ones."""
    return shared_experts_of(model.config.get_text_config())


def tokenizer_digest(tokenizer: Any) -> str:
    """Class, size and content of a tokenizer in one line."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    digest = hashlib.sha256(repr(vocabulary).encode()).hexdigest()
    return f"{type(tokenizer).__name__}, {len(vocabulary)} entries, sha256:{digest[:16]}"


def package_versions() -> dict[str, str]:
    """What produced a recording."""
    return {"python": platform.python_version()} | installed(_PACKAGES)
