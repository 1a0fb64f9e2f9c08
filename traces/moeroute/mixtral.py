"""The published facts about Mixtral-8x7B: dimensions, sizes, and the statistics of its routing with
which the synthetic trace is compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moeroute.hitratio import hit_ratios
from moeroute.models import DenseSizes, dense_sizes, find_model
from moeroute.statistics import (
    Routing,
    gate_weights,
    locality,
    popularity,
    read_routing,
    recall,
)
from moeroute.trace import Trace

SHAPE = find_model("mixtral-8x7b")
N_LAYERS, N_EXPERTS, TOP_K = SHAPE.n_layers, SHAPE.n_experts, SHAPE.top_k

# Measured on Mixtral-8x7B-Instruct (585 decode tokens x 32 layers, code and maths prompts).
LOCALITY = {1: 0.376, 2: 0.323, 4: 0.284, 8: 0.281, 16: 0.289, 32: 0.262}
LOCALITY_OF_LAYER = {0: 0.260, 9: 0.449}  # the least and the most local layer
ANY_REPEATS, TOP1_REPEATS = 0.624, 0.248
HOTTEST_MEAN, HOTTEST_MAX, ENTROPY = 0.169, 0.223, 0.988
TOP1_WEIGHT = 0.707
TOP1_WEIGHT_AT_LEAST = {0.8: 0.28, 0.9: 0.09}
CACHE_SIZES = (2, 3, 4, 5, 6, 7)
LRU = (0.375, 0.502, 0.616, 0.720, 0.819, 0.913)
BELADY = (0.375, 0.608, 0.746, 0.839, 0.907, 0.958)
BELADY_BYPASS = (0.557, 0.690, 0.785, 0.859, 0.917, 0.962)
# AdapMoE's calibration: the next layer's gate on this layer's hidden state, two experts fetched.
RECALL_OF_LAYER = {1: 0.566, 2: 0.721, 3: 0.789, 4: 0.866}  # 0.80 to 0.94 after that
RECALL_MEAN = 0.866
# HOBBIT: how often the heaviest expert is among those predicted one, two, three layers ahead.
TOP1_RECALL = (0.96, 0.90, 0.90)


def hqq_bytes(n_weights: int, bits: int, group: int, meta_group: int) -> int:
    """Bytes of one matrix quantised with HQQ in groups of `group` weights.

    Scale and zero of each group are quantised too: 8 bits, in groups of `meta_group`, with a
    16-bit scale and zero each. Three-bit codes lie ten to an int32.
    """
    groups = n_weights // group
    codes = -(-groups // 10) * group * 4 if bits == 3 else n_weights * bits // 8
    return codes + 2 * groups + 2 * 4 * (groups // meta_group)


def expert_bytes() -> dict[str, int]:
    """Bytes of one expert (three matrices) in the base paper's quantisations and in 16 bit."""
    matrix = SHAPE.expert_params // 3
    return {
        "4bit": 3 * hqq_bytes(matrix, 4, 64, 256),
        "3bit": 3 * hqq_bytes(matrix, 3, 64, 128),
        "2bit": 3 * hqq_bytes(matrix, 2, 16, 128),
        "fp16": 3 * matrix * 2,
    }


def dense_bytes() -> DenseSizes:
    """Bytes of the dense weights as in the base paper: attention in 4 bit, the rest in 16."""
    sizes = {
        name: hqq_bytes(math.prod(shape), 4, 64, 256)
        if "self_attn." in name
        else 2 * math.prod(shape)
        for name, shape in SHAPE.tensors.items()
    }
    return dense_sizes(sizes, SHAPE.layers, SHAPE.vocabulary)


@dataclass(frozen=True)
class Comparison:
    """One statistic of a trace next to the published value for the real model."""

    name: str
    measured: float
    published: float


def compare_with_published(trace: Trace) -> list[Comparison]:
    """Every published statistic of Mixtral's routing, measured on `trace`.

    Raises TraceError if the trace lacks weights or predictions.
    """
    routing = read_routing(trace)
    return [
        *_localities(routing),
        *_popularities(routing),
        *_gate_weights(trace),
        *_hit_ratios(routing),
        *_recalls(trace),
    ]


def _localities(routing: Routing) -> Iterator[Comparison]:
    near = locality(routing, tuple(LOCALITY))
    for lag, measured in zip(near.lags, near.mean, strict=True):
        yield Comparison(f"locality, lag {lag}", float(measured), LOCALITY[lag])
    for layer, published in LOCALITY_OF_LAYER.items():
        measured = near.by_layer[layer, 0]
        yield Comparison(f"locality, layer {layer}", float(measured), published)
    yield Comparison("one of two repeats", float(near.any_by_layer.mean()), ANY_REPEATS)
    yield Comparison("top-1 repeats", float(near.top1_by_layer.mean()), TOP1_REPEATS)


def _popularities(routing: Routing) -> Iterator[Comparison]:
    use = popularity(routing)
    yield Comparison("hottest expert, mean", float(use.hottest.mean()), HOTTEST_MEAN)
    yield Comparison("hottest expert, largest", float(use.hottest.max()), HOTTEST_MAX)
    yield Comparison("entropy of use", float(use.entropy.mean()), ENTROPY)


def _gate_weights(trace: Trace) -> Iterator[Comparison]:
    gate = gate_weights(trace, tuple(TOP1_WEIGHT_AT_LEAST))
    yield Comparison("top-1 weight", gate.mean_top1, TOP1_WEIGHT)
    for limit, share in gate.share_at_least.items():
        yield Comparison(f"top-1 weight >= {limit}", share, TOP1_WEIGHT_AT_LEAST[limit])


def _hit_ratios(routing: Routing) -> Iterator[Comparison]:
    hits = hit_ratios(routing, CACHE_SIZES)
    for name, measured, published in (
        ("LRU", hits.lru, LRU),
        ("Belady", hits.belady, BELADY),
        ("Belady with bypass", hits.belady_bypass, BELADY_BYPASS),
    ):
        for size, value, target in zip(CACHE_SIZES, measured, published, strict=True):
            yield Comparison(f"{name}, {size} experts", float(value), target)


def _recalls(trace: Trace) -> Iterator[Comparison]:
    found = recall(trace, (TOP_K,))
    for layer, published in RECALL_OF_LAYER.items():
        yield Comparison(f"recall, layer {layer}", float(found.by_layer[0, 0, layer]), published)
    yield Comparison("recall, mean", float(found.mean[0, 0]), RECALL_MEAN)
    for j, (value, published) in enumerate(zip(found.top1_mean[:, 0], TOP1_RECALL, strict=False)):
        yield Comparison(f"recall of top-1, {j + 1} ahead", float(value), published)
