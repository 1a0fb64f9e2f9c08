"""Checks that every tensor of a checkpoint is accounted for, before any is read.

A model runs but speaks nonsense if a tensor of its checkpoint is not used, is read as something
else, or is missing. The check reads headers only, so a refusal costs next to nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from moeroute.families import family_of

from moerun.checkpoint.expert_accounts import ExpertAccounts, ShapesAlone
from moerun.checkpoint.folder import INDEX, weight_map
from moerun.checkpoint.mapping import TensorMap
from moerun.checkpoint.opening import open_weights
from moerun.checkpoint.published.declared import declared
from moerun.checkpoint.published.table import UNQUANTISED, find_format
from moerun.checkpoint.published.weights import PublishedCheckpoint
from moerun.checkpoint.weights import Weights
from moerun.errors import RunError
from moerun.format.expert import ExpertParam

PLAIN_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_NEXT_TOKENS = re.compile(r"(?:^|\.)mtp\.")
OTHER_PARTS, NEXT_TOKENS = "other parts", "next tokens"
_REASONS = {
    OTHER_PARTS: "being of parts for images or sound, where text alone is run",
    NEXT_TOKENS: "being of layers that predict further tokens (MTP), which are not run",
    None: "as stock transformers does not either",
}


class Accounts:
    """Compares the tensors of one checkpoint with those of its model."""

    def __init__(self, checkpoint: Weights, mapping: TensorMap) -> None:
        self._checkpoint = checkpoint
        self._mapping = mapping
        self._path = checkpoint.path
        self._shapes = ShapesAlone(checkpoint, mapping)

    def check(
        self, layers: Sequence[str] = (), params: Sequence[ExpertParam] = (), n_experts: int = 0
    ) -> list[str]:
        """The tensors that are left out because stock transformers declares them ignored.

        `layers` are the names of the fused experts that are read one at a time, `params` the
        parameters of each of `n_experts`. Raises RunError that names the first tensor that is left
        over, cannot be read as the model's, or is missing.
        """
        left_out = self._check_taken()
        self._check_missing()
        experts = {f"{layer}.{param.name}": param.shape for layer in layers for param in params}
        accounts = ExpertAccounts(self._checkpoint, self._mapping, n_experts)
        for target in self._mapping.state:
            if target not in self._mapping.targets:
                continue
            self._check_sources(target)
            if target in experts:
                accounts.check(target, experts[target])
            else:
                self._shapes.check(target, self._mapping.targets[target].names)
        return left_out

    def _check_taken(self) -> list[str]:
        mapping = self._mapping
        nobody = [target for target in mapping.targets if target not in mapping.state]
        ignored = set(nobody) - told_by_stock(mapping.model, unexpected=nobody)
        ignored |= {target for target in nobody if why_not_read(target, mapping.config)}
        left_out = [
            n for target in nobody if target in ignored for n in mapping.targets[target].names
        ]
        left_over = [
            n for target in nobody if target not in ignored for n in mapping.targets[target].names
        ]
        taken = [t for t in mapping.targets if t in mapping.state]
        wrong = [n for t in taken for n in mapping.targets[t].names if not self._fits(n, t)]
        if left_over or wrong:
            raise self._refusal(left_over, wrong, set(left_out))
        return left_out

    def _fits(self, name: str, target: str) -> bool:
        """Whether a tensor's values are those of the model's tensor: neither codes nor packed
        bits."""
        if self._checkpoint.unread(name) is not None:
            return False
        dtype = self._checkpoint.entry(name).dtype
        wanted = self._mapping.state[target].dtype
        return (
            dtype in PLAIN_FLOATS
            if wanted.is_floating_point
            else not (dtype.is_floating_point or dtype.is_complex)
        )

    def _refusal(
        self, left_over: list[str], wrong: list[str], left_out: Collection[str]
    ) -> RunError:
        considered = [name for name in self._checkpoint.names if name not in left_out]
        said, found = declared(self._path), find_format(considered)
        offending = {*left_over, *wrong}
        tellers = (found.tensor if found else None, *left_over[:1], *wrong[:1])
        first = next(name for name in tellers if name in offending)
        what = self._checkpoint.described(first)
        if wrong or found:
            looks = found.format.name if found else "a quantised checkpoint"
            stated = f" ({said})" if said else ""
            instead = found.format.instead if found else UNQUANTISED
            return RunError(
                f"{what} cannot be read as a plain weight: it looks like {looks}{stated}, which is "
                f"not supported; {instead}"
            )
        more = f", nor {len(left_over) - 1} more" if len(left_over) > 1 else ""
        return RunError(
            f"{what} is taken by no part of the {self._mapping.config.model_type} model that "
            f"config.json describes{more}, and would be lost: "
            f"{self._why_left_over(first)}"
        )

    def _why_left_over(self, name: str) -> str:
        n_layers = getattr(self._mapping.config.get_text_config(), "num_hidden_layers", None)
        layer = _LAYER.search(name)
        if layer and n_layers is not None and int(layer[1]) >= n_layers:
            return f"config.json says num_hidden_layers {n_layers}; give that of these weights"
        if name.endswith(".bias"):
            return (
                "config.json says that there is no such bias; give the config.json of these weights"
            )
        if "lora_" in name:
            return (
                "it is of a LoRA adapter; merge it into the model first (PEFT's merge_and_unload)"
            )
        return "config.json and weights do not belong together"

    def _check_missing(self) -> None:
        mapping = self._mapping
        ties: dict[str, str] = mapping.model.all_tied_weights_keys
        absent = [name for name in mapping.state if name not in mapping.targets]
        told = told_by_stock(mapping.model, missing=absent) if absent else set()
        for name in absent:
            pair = {ties.get(name), *(t for t, s in ties.items() if s == name)}
            if name in told and not pair & mapping.targets.keys():
                raise RunError(f"{self._path} has no weights for {name}: {self._why_missing(name)}")

    def _why_missing(self, name: str) -> str:
        if file := weight_map(self._path).get(name):
            return f"{INDEX} says that {file} holds it, which does not; download {file} again"
        if name == "lm_head.weight" and not getattr(self._mapping.config, "tie_word_embeddings", 0):
            return (
                "config.json does not say tie_word_embeddings, so the output head cannot be the "
                "embeddings; download it again"
            )
        return "download it again"

    def _check_sources(self, name: str) -> None:
        target = self._mapping.targets[name]
        if target.converter is None:
            if len(target.names) > 1:
                one, two = target.names[:2]
                raise RunError(
                    f"{self._path} has {name} twice, as {one!r} and as {two!r}: keep one"
                )
            return
        foreign = [p for p in target.sources if p not in target.converter.source_patterns]
        if foreign:
            fused = target.sources[foreign[0]][0]
            other = next(n for n in target.names if n != fused)
            raise RunError(
                f"{self._path} has {name} twice, as {fused!r} and as {other!r}: keep one"
            )
        for pattern in target.converter.source_patterns:
            if pattern not in target.sources:
                raise RunError(
                    f"{self._path} has no tensor {pattern!r} for {name}, only {target.names[0]!r}: "
                    "download it again"
                )


def check_tensors(path: Path, model: Any, config: Any) -> None:
    """Raises RunError where stock transformers would drop, misread or invent a tensor of `model`.

    For code that loads a checkpoint that declares no quantisation by transformers, which only
    warns. `model` may be on the meta device.
    """
    checkpoint = open_weights(path)
    try:
        if isinstance(checkpoint, PublishedCheckpoint) and checkpoint.quantised:
            weight = next(iter(checkpoint.quantised.values()))
            raise RunError(
                f"{path}: {weight.name} is quantised ({weight.format.name}) and config.json does "
                "not say so: stock transformers would drop its scales. Add the publisher's "
                "quantization_config to config.json"
            )
        Accounts(checkpoint, TensorMap(checkpoint, model, config)).check()
    finally:
        checkpoint.close()


def told_by_stock(
    model: Any, *, unexpected: Collection[str] = (), missing: Collection[str] = ()
) -> set[str]:
    """Those of ``unexpected`` and ``missing`` names that stock transformers does not declare
    ignored."""
    from transformers.modeling_utils import LoadStateDictInfo

    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return {*info.unexpected_keys, *info.missing_keys}


def why_not_read(name: str, config: Any) -> str | None:
    """OTHER_PARTS or NEXT_TOKENS for a tensor that is no part of the text model as it runs."""
    family = family_of(config.model_type)
    if family is not None and name.startswith(family.others):
        return OTHER_PARTS
    return NEXT_TOKENS if _is_next_token_layer(name, config.get_text_config()) else None


def notes_of_left_out(names: Sequence[str], config: Any) -> list[str]:
    """A line for each kind of tensor that is not read, with how many and an example."""
    kinds: dict[str | None, list[str]] = {}
    for name in names:
        kinds.setdefault(why_not_read(name, config), []).append(name)
    return [
        f"not read, {_REASONS[kind]}: {len(of)} tensors, such as {of[0]}"
        for kind, of in kinds.items()
    ]


def _is_next_token_layer(name: str, config: Any) -> bool:
    """Whether a tensor is of a layer that predicts further tokens (MTP): by its name, or as a layer
    past the last.

    Stock transformers lists such layers of the published models by number; this function takes the
    number of layers from the configuration.
    """
    if _NEXT_TOKENS.search(name):
        return True
    extra = getattr(config, "num_nextn_predict_layers", None)
    layer = _LAYER.search(name)
    if not isinstance(extra, int) or layer is None:
        return False
    return 0 <= int(layer[1]) - int(config.num_hidden_layers) < extra
