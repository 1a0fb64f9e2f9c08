"""The stock transformers model of a store, its experts coming from a provider."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moerun.checkpoint.families import empty_model, find_experts, read_config
from moerun.checkpoint.folder import check_small_files
from moerun.checkpoint.gguf.header import is_gguf
from moerun.checkpoint.gguf.tokenizer import gguf_tokenizer
from moerun.errors import RunError
from moerun.format.tensorfile import bytes_of
from moerun.offload.attention import install_attention
from moerun.offload.experts import IMPLEMENTATION, ExpertProvider, Sums, attach, register
from moerun.offload.scaled_inputs import install_scaled_inputs
from moerun.store.expert_store import ExpertStore

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def load_offloaded(
    store: ExpertStore,
    device: torch.device | str,
    provider: ExpertProvider,
    *,
    sums: Sums = "grouped_mm",
) -> tuple[Any, Any]:
    """The model, ready to generate, and its tokenizer (None where the store has none).

    Only the dense weights are read, straight to `device`. `sums` says whose rounding the experts'
    sums have: that of transformers' default implementation, or of its eager one.
    Raises RunError when the store's dense weights do not fit its configuration.
    """
    model = dense_model(store, device)
    attach([module for _, module in find_experts(model)], provider, sums)
    return model, load_tokenizer(store.path)


def dense_model(store: ExpertStore, device: torch.device | str) -> Any:
    """The model with everything but its experts, which are empty until `attach`."""
    register()
    config = read_config(store.path)
    dtype = _main_dtype(store.dense_tensors().values())
    config.dtype = dtype
    model: Any = empty_model(config, dtype, experts=IMPLEMENTATION)
    _empty_experts(model, store)
    install_scaled_inputs(model)
    install_attention(model, store, torch.device(device))
    _load_dense(model, store, torch.device(device))
    rebuild_buffers(model, torch.device(device))
    model.generation_config = own_tokens(store.path, config)
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a store, checkpoint or GGUF file; None where it has none."""
    if is_gguf(path):
        return gguf_tokenizer(path)
    check_small_files(path)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer("a")  # some of what its files say is looked at only now
        return tokenizer
    except Exception as error:  # tokenizer classes fail in their own ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"the tokenizer of {path} cannot be used: {reason}") from error


def _main_dtype(dense: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> torch.dtype:
    """The dtype of most dense bytes: some small tensors stay float32 in any model."""
    totals: dict[torch.dtype, int] = {}
    for dtype, shape in dense:
        if dtype.is_floating_point:
            totals[dtype] = totals.get(dtype, 0) + bytes_of(dtype, shape)
    return max(totals, key=lambda dtype: totals[dtype], default=torch.float32)


def _empty_experts(model: nn.Module, store: ExpertStore) -> None:
    found = find_experts(model)
    if tuple(name for name, _ in found) != tuple(r.module for r in store.index.layers):
        raise RunError(
            f"{store.path}: config.json and index.json do not belong together: pack the store again"
        )
    for _, module in found:
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, None)


def _load_dense(model: Any, store: ExpertStore, device: torch.device) -> None:
    state = dict(store.read_dense(device))
    try:
        absent, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # tensors of other shapes
        reason = str(error).strip().splitlines()[-1].strip()
        raise RunError(
            f"{store.dense_path} does not fit config.json ({reason}): pack the store again"
        ) from error
    model.requires_grad_(False)
    missing = set(absent)
    # As at a stock load: tied where one of two is absent or both are equal, else each its own.
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing or unexpected:
        wrong = sorted(missing or unexpected)[0]
        raise RunError(
            f"{store.dense_path} does not fit config.json ({wrong}): pack the store again"
        )


def rebuild_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies): computed as at a stock load."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor._is_hf_initialized = True  # so that transformers leaves what was loaded as it is
    for module in model.modules():
        names = [n for n, b in module.named_buffers(recurse=False) if b.is_meta]
        if not names:
            continue
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        with torch.no_grad():
            model._init_weights(module)
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if left:
        raise AssertionError(f"not loaded: {left}")


def own_tokens(path: Path, config: Any) -> Any:
    """The model's special tokens, and nothing else: generate() takes from here whatever it was not
    told, such as a penalty for repetition or a cache of another kind."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    if file.is_file():
        try:
            own = GenerationConfig.from_pretrained(path)
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RunError(f"{file} cannot be used: {reason}") from error
    else:
        file = path / "config.json"
        own = GenerationConfig.from_model_config(config)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: _token_ids(getattr(own, name), name, file) for name in names})


def _token_ids(value: Any, name: str, file: Path) -> Any:
    """A special token's id, or several; stock transformers fails on anything else at the first
    token."""
    several = value if isinstance(value, list) else [value]
    if value is not None and not all(type(one) is int and one >= 0 for one in several):
        raise RunError(f"{file}: {name} is {value!r:.80}, not the id of a token")
    return value
