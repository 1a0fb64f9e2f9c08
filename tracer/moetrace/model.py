"""Loading a stock checkpoint to record from, and what a trace says about it."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moepolicy.versions import installed
from moeroute.models import DenseSizes, dense_sizes
from moerun.checkpoint.accounting import check_tensors
from moerun.checkpoint.context import context_limit
from moerun.checkpoint.families import empty_model, expert_shape, find_experts, shared_experts_of
from moerun.checkpoint.hub import resolve
from moerun.checkpoint.sizes import dense_bytes
from moerun.errors import RunError
from moerun.format.precision import NATIVE, PLAIN, PRECISIONS
from moerun.offload.gate_predictor import find_routers
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

    @property
    def context(self) -> int:
        """Tokens of the longest sequence the model was made for."""
        return context_limit(self.model.config) or 2048

    @property
    def revision(self) -> str | None:
        """The hub's commit, or a digest of the weights of a local checkpoint that is not huge."""
        if self.path.parent.name == "snapshots":
            return self.path.name
        files = sorted(self.path.glob("*.safetensors"))
        if not files or sum(file.stat().st_size for file in files) > _HASHED_BYTES:
            return None
        digest = hashlib.sha256()
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        return f"sha256:{digest.hexdigest()[:16]}"


def load(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto"
) -> Checkpoint:
    """Load a checkpoint by bundled name, folder or hub id.

    `dtype` "auto" runs it as stored; on the CPU, which has no fast 16-bit float arithmetic but
    bfloat16's, float16 runs as float32. Raises RunError when there is no such model, it is no
    mixture of experts, or its files are damaged or incomplete.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # what matters of its warnings is raised below
    logging.disable_progress_bar()
    path = resolve(name, revision=revision)
    place = _device(device)
    config = _loading(path / "config.json", AutoConfig.from_pretrained, path)
    stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    empty = _loading(path, empty_model, config, stored)
    find_routers(empty)
    if not getattr(config, "quantization_config", None):  # what is declared, transformers reads
        check_tensors(path, empty, config)
    run_as = DTYPES[dtype] or stored
    if dtype == "auto" and place.type == "cpu" and stored is torch.float16:
        run_as = torch.float32
    model, info = _loading(
        path,
        AutoModelForCausalLM.from_pretrained,
        path,
        dtype=run_as,
        use_safetensors=True,
        output_loading_info=True,
    )
    if absent := sorted(info["missing_keys"]) or sorted(info["mismatched_keys"]):
        raise RunError(f"{path}: the checkpoint is incomplete: it lacks {absent[0]}")
    tokenizer = _loading(path, AutoTokenizer.from_pretrained, path)
    return Checkpoint(name, path, model.to(place).eval(), tokenizer, stored)


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


def expert_bytes(model: nn.Module, stored: torch.dtype) -> dict[str, int]:
    """Bytes of one expert's record by precision, that of the checkpoint first.

    Precisions that this expert's shape does not divide into are left out; empty where the family
    does not keep its experts as the runtime could serve them.
    """
    found = find_experts(model)
    if not found:
        return {}
    shape = expert_shape(found[0][1], stored)
    own = precision_name(stored)
    sizes: dict[str, int] = {}
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
