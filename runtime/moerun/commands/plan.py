"""`moerun --plan` of a model that is not packed: by its configuration, without any weights."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from moepolicy.console import say
from moepolicy.tables import Format

from moerun.bench.generated import GeneratedModel, GeneratedStore, Published
from moerun.bench.models import find_config
from moerun.bench.shapes import Shape, find_shape
from moerun.checkpoint.local import find_local
from moerun.checkpoint.published.planned import declared_coding
from moerun.checkpoint.source import ModelSource
from moerun.commands.options import ModelOptions
from moerun.commands.run import print_plan
from moerun.errors import RunError
from moerun.format.names import NATIVE, PRECISIONS
from moerun.live.assembly import check_lower
from moerun.live.prompt import encode
from moerun.live.sampling import Sampling
from moerun.offload.load import load_tokenizer
from moerun.settings import Settings
from moerun.store.find import find_store


def show_shape_plan(
    model: ModelOptions, settings: Settings, sampling: Sampling, prompt: str | None, format: Format
) -> None:
    """Print the memory plan that the model's store would have. Raises RunError where it cannot
    be."""
    shape = find_shape(model.model)
    shape.check_family()
    published = _published(shape, model)
    declared = declared_coding(shape.fields) if model.precision == NATIVE else None
    generated = GeneratedModel(
        find_config(shape),
        name=shape.name,
        precision=model.precision,
        seed=0,
        attention=model.attention,
        published=published,
        declared=declared,
    )
    if published is None:
        _tell_quantised(shape, generated.shape.kept_as(model.precision), model)
    store = GeneratedStore(generated, held=False)
    if model.low is not None:
        lower = (
            GeneratedStore(generated.at(model.low), held=False)
            if model.low in PRECISIONS
            else find_store(model.low)
        )
        check_lower(store, lower)
        settings = replace(settings, low=lower)
    if prompt is not None:
        tokens = _prompt_tokens(shape, model.model, prompt)
        context = settings.context_tokens or tokens + sampling.max_new_tokens
        settings = replace(settings, context_tokens=context, prompt_tokens=tokens)
    print_plan(store, settings, format)


def _published(shape: Shape, model: ModelOptions) -> Published | None:
    """What native records of a checkpoint that is here keep in its own bits; None where only its
    configuration is here, or they keep nothing so."""
    local = None if shape.is_named_only else find_local(model.model)
    if model.precision != NATIVE or local is None or local.name == "config.json":
        return None
    try:
        with closing(ModelSource(local)) as source:
            source.keep_attention()
            kept = Published(source.shape, source.kept_attention)
            return kept if source.shape.codings(NATIVE) else None
    except RunError:  # its weights are not here, or not whole
        return None


def _tell_quantised(shape: Shape, kept: str | None, model: ModelOptions) -> None:
    """Say what the plan makes of a configuration of quantised weights."""
    if NATIVE not in (model.precision, model.attention) or (
        "quantization_config" not in shape.fields
    ):
        return
    if kept:
        say(f"{shape.place} says that experts are published in {kept}: the plan counts them so")
    else:
        say(
            f"{shape.place} is of quantised weights: the plan counts them unquantised; packed as "
            "native, experts may be kept in fewer bits"
        )


def _prompt_tokens(shape: Shape, model: str, prompt: str) -> int:
    """Tokens of a prompt; of a model whose tokenizer is not here, the most that they can be."""
    local = None if shape.is_named_only else find_local(model)
    tokenizer = None if local is None else load_tokenizer(_of_checkpoint(local))
    if tokenizer is None:
        most = len(prompt.encode())
        say(f"the prompt counts as {most} tokens, one a byte: the tokenizer of {model} is not here")
        return most
    return encode(tokenizer, prompt, torch.device("cpu")).shape[1]


def _of_checkpoint(local: Path) -> Path:
    return local.parent if local.name == "config.json" else local
