"""The engines that `offload_cpu.py` compares: one model, one routing, three ways to its experts.

ours        moerun: half of each layer's experts in slots, the others read from the store
accelerate  dispatch_model: the experts of half the layers in memory, of the others on disk, which
            its hooks bring a whole layer at a time
mmap        stock transformers on weights mapped from a file: the page cache is the expert cache
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memory_group import forget
from moepolicy import find_policy
from moerun.bench.decoding import MeasuredTimings, decode_forced
from moerun.bench.forced_gates import ForcedGates
from moerun.bench.generated import GeneratedModel
from moerun.bench.models import find_config
from moerun.bench.ondisk import write_store
from moerun.bench.routing import ForcedRouting, load_routing
from moerun.bench.run import Bench
from moerun.bench.schedule import BenchSchedule
from moerun.bench.shapes import shape_name
from moerun.checkpoint.families import empty_model, find_experts
from moerun.format.tensorfile import memory_of
from moerun.offload.load import rebuild_buffers
from moerun.settings import Settings
from torch import nn

CPU = torch.device("cpu")
OURS = ("lru", "lru-spec")
ENGINES = (*OURS, "accelerate", "mmap")
PRECISION = "bf16"


@dataclass(frozen=True)
class Case:
    """What all engines run. ``folder`` holds the weights, once for each engine that reads them.

    ``hidden`` scales the shape's matrices to that hidden size, None leaves them.
    """

    shape: str
    hidden: int | None
    layers: int | None
    routing: str
    tokens: int
    warm_up: int
    folder: Path

    @property
    def forced_tokens(self) -> int:
        return 1 + self.warm_up + self.tokens

    def model(self) -> GeneratedModel:
        config = find_config(self.shape, self.layers)
        config.dtype = torch.bfloat16
        name = shape_name(self.shape)
        if self.hidden:
            _scale(config, self.hidden)
            name += f", hidden size {self.hidden}"
        return GeneratedModel(config, name=name, precision=PRECISION, seed=0)

    def load_routing(self, model: GeneratedModel) -> ForcedRouting:
        index = model.index
        return load_routing(
            self.routing,
            layers=index.n_layers,
            experts=index.n_experts,
            top_k=index.top_k,
            tokens=self.forced_tokens,
        )

    def fused(self, engine: str) -> Path:
        return self.folder / engine

    @property
    def store(self) -> Path:
        return self.folder / "store"


def _scale(config: Any, hidden: int) -> None:
    """Width by width in proportion, heads of the same size."""
    for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, getattr(config, name) * hidden // config.hidden_size)
    config.hidden_size = hidden


def prepare(case: Case) -> GeneratedModel:
    """Write the weights as each engine reads them, and leave none of them in the page cache."""
    model = case.model()
    write_store(model, case.store).close()
    for engine in ("accelerate", "mmap"):
        _write_fused(model, case.fused(engine))
    for path in case.folder.rglob("*"):
        if path.is_file():
            forget(path)
    return model


def _write_fused(model: GeneratedModel, folder: Path) -> None:
    """Each layer's fused experts as accelerate's offload folder has them: NAME.dat and an index."""
    if (folder / "index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    record = torch.zeros(model.records.record_bytes, dtype=torch.uint8)
    for layer, where in enumerate(model.index.layers):
        files = {p.name: (folder / f"{where.module}.{p.name}.dat") for p in model.shape.params}
        handles = {name: path.open("wb") for name, path in files.items()}
        for expert in range(model.n_experts):
            model.records.write(layer * model.n_experts + expert, record)
            for name, part in model.records.layout.views(record).items():
                handles[name].write(memory_of(part.contiguous()))
        for handle in handles.values():
            handle.close()
        for param in model.shape.params:
            index[f"{where.module}.{param.name}"] = {
                "dtype": "bfloat16",
                "shape": [model.n_experts, *param.shape],
            }
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def stock_model(generated: GeneratedModel, config: Any, experts: str | None = None) -> Any:
    """transformers' own model with the generated weights on the CPU, all but the experts'.

    ``experts`` names the implementation that computes them; None: the library's choice.
    """
    model: Any = empty_model(config, torch.bfloat16, experts=experts)
    for _, module in find_experts(model):
        for name, _ in list(module.named_parameters(recurse=False)):
            setattr(module, name, None)
    model.load_state_dict(dict(generated.dense.draw()), strict=False, assign=True)
    model.requires_grad_(False)
    model.tie_weights()
    rebuild_buffers(model, CPU)
    return model


class Stock:
    """A stock model with its gates forced; what its experts are is the engine's."""

    def __init__(self, case: Case, engine: str) -> None:
        generated = case.model()
        self.case = case
        self.model: Any = stock_model(generated, generated.config, "eager")
        place = _place_accelerate if engine == "accelerate" else _place_mapped
        self.model = place(self.model, generated, case.fused(engine))
        self.gates = ForcedGates(self.model, case.load_routing(generated))

    def run(self) -> tuple[float, list[int]]:
        """tokens/s of the measured tokens, and what was decoded."""
        self.gates.start(None)
        timings = MeasuredTimings(self.case.warm_up)
        decode_forced(self.model, timings, self.case.forced_tokens)
        return self.case.tokens / timings.measured_s, timings.token_ids


def _mapped(generated: GeneratedModel, folder: Path, layer: int) -> Iterator[tuple[str, Any]]:
    """A layer's fused parameters, their pages read when they are used."""
    module = generated.index.layers[layer].module
    for param in generated.shape.params:
        shape = (generated.n_experts, *param.shape)
        size = torch.Size(shape).numel()
        path = str(folder / f"{module}.{param.name}.dat")
        flat = torch.from_file(path, shared=False, size=size, dtype=torch.bfloat16)
        yield param.name, flat.view(shape)


def _place_mapped(model: Any, generated: GeneratedModel, folder: Path) -> Any:
    for layer, (_, module) in enumerate(find_experts(model)):
        for name, tensor in _mapped(generated, folder, layer):
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return model


def _place_accelerate(model: Any, generated: GeneratedModel, folder: Path) -> Any:
    from accelerate import dispatch_model

    found = find_experts(model)
    on_disk = {name for name, _ in found[len(found) // 2 :]}
    for layer, (path, module) in enumerate(found):
        for name, tensor in _mapped(generated, folder, layer):
            placed = tensor.to("meta") if path in on_disk else tensor.clone()
            setattr(module, name, nn.Parameter(placed, requires_grad=False))
    device_map = dict.fromkeys(on_disk, "disk")
    for path, module in model.named_modules():
        if path not in on_disk and any(True for _ in module.parameters(recurse=False)):
            device_map[path] = "cpu"
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


class Ours:
    def __init__(self, case: Case, policy: str) -> None:
        generated = case.model()
        spec = find_policy(policy)
        slots = generated.n_experts // 2
        schedule = BenchSchedule((spec,), case.tokens, case.warm_up, 1, released=False)
        self._policy = spec
        self._case = case
        self._bench = Bench(
            generated,
            case.load_routing(generated),
            Settings(policy=spec, slots=slots),
            schedule,
            folder=case.store,
            sums="eager",
        )

    def run(self) -> tuple[float, list[int]]:
        run = self._bench.run_policy(self._policy)
        return self._case.tokens / run.decode_s, self._bench.last_ids


def make_engine(case: Case, engine: str) -> Stock | Ours:
    return Ours(case, engine) if engine in OURS else Stock(case, engine)
