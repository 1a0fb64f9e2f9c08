"""Weights in llama.cpp's blocks: packed without loss, and multiplied as llama.cpp does."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from moerun.errors import RunError
from moerun.format.block_files import from_file
from moerun.format.blocks import dequantise_blocks, quantise_blocks
from moerun.format.expert import ExpertParam, ExpertShape
from moerun.format.precision import BLOCK_SCHEMES, BlockScheme, Tensors
from moerun.kernels import blocks, team
from moerun.kernels.blocks import BlockExpert, BlockLinear, compute_experts
from moerun.kernels.slots import SlotForm, whole_of
from moerun.offload.experts import compute_expert
from support.gguf_files import random_blocks

SCHEMES = tuple(BLOCK_SCHEMES.values())
QUANTISED = tuple(BLOCK_SCHEMES[name] for name in ("q4_0", "q8_0"))  # that weights become


def normals(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def kind_of(scheme: BlockScheme) -> Kind:
    return Kind[scheme.name.upper()]


def linear_of(weight: torch.Tensor, scheme: BlockScheme) -> BlockLinear:
    rows, columns = weight.shape
    return linear_from(quantise_blocks(weight, scheme), rows, columns, scheme)


def linear_from(parts: Tensors, rows: int, columns: int, scheme: BlockScheme) -> BlockLinear:
    param = ExpertParam("weight", (rows, columns), torch.bfloat16)
    return BlockLinear(param, scheme, {f"weight.{name}": part for name, part in parts.items()})


def random_linear(
    rows: int, columns: int, scheme: BlockScheme, seed: int = 0
) -> tuple[BlockLinear, torch.Tensor]:
    """A matrix from a file's random blocks, and its values as gguf has them."""
    raw = random_blocks(kind_of(scheme), rows, columns, seed)
    linear = linear_from(from_file(torch.from_numpy(raw), scheme), rows, columns, scheme)
    return linear, torch.from_numpy(dequantize(raw, kind_of(scheme)))


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x, rounded to 8 bits in blocks of 32, times a matrix: in float64."""
    grouped = x.float().view(len(x), -1, 32)
    most = grouped.abs().amax(-1, keepdim=True)
    # torch computes 127 / most by the reciprocal, which rounds twice.
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0)
    rounded = (grouped * inverse).round() * (most / 127)
    return rounded.double().flatten(1) @ weight.double().T


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_blocks_of_a_file_are_kept_in_its_own_bits(scheme: BlockScheme) -> None:
    raw = random_blocks(kind_of(scheme), 40, 512)
    parts = from_file(torch.from_numpy(raw), scheme)
    laid = [(name, part.dtype, tuple(part.shape)) for name, part in parts.items()]
    assert laid == scheme.parts(40, 512)
    ours = dequantise_blocks(parts, scheme, 40)
    assert np.array_equal(ours.numpy(), dequantize(raw, kind_of(scheme)))
    assert sum(part.nbytes for part in parts.values()) * 40 == raw.nbytes * 48  # rows in sixteens


@pytest.mark.parametrize("scheme", QUANTISED, ids=lambda scheme: scheme.name)
def test_codes_and_scales_are_those_of_llama_cpp(scheme: BlockScheme) -> None:
    weight = normals(40, 96)
    weight[3, 32:64] = 0
    by_gguf = dequantize(quantize(weight.numpy(), kind_of(scheme)), kind_of(scheme))
    ours = dequantise_blocks(quantise_blocks(weight, scheme), scheme, 40)
    assert np.array_equal(ours.numpy(), by_gguf)


@given(seed=st.integers(0, 1000), least=st.integers(0, 15), signed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_values_from_a_file_come_back_as_they_were(seed: int, least: int, signed: bool) -> None:
    """Also blocks without a code 0, which llama.cpp makes with an importance matrix."""
    random = np.random.default_rng(seed)
    codes = random.integers(least, 16, (16, 3, 32))
    scales = random.uniform(1e-4, 2e-2, (16, 3, 1)).astype(np.float16).astype(np.float32)
    sign = -1 if signed else 1
    weight = torch.from_numpy(((codes - 8) * scales * sign).astype(np.float32)).flatten(1)
    scheme = BLOCK_SCHEMES["q4_0"]
    again = dequantise_blocks(quantise_blocks(weight, scheme), scheme, 16)
    assert torch.equal(again, weight)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_products_are_those_of_rounded_activations(scheme: BlockScheme, dtype: torch.dtype) -> None:
    linear, values = random_linear(50, 512, scheme)
    x = normals(19, 512, seed=1).to(dtype)
    x[4, 32:64] = 0
    y = linear(x)
    assert y.shape == (19, 50)
    wanted = reference(x, values)
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    one_by_one = torch.cat([linear(row[None]) for row in x])
    assert torch.equal(y, one_by_one)  # whatever else is in the batch


@pytest.mark.parametrize(
    ("above", "below"),
    [
        ("q4_0", "q4_0"),
        ("q8_0", "q8_0"),
        ("q4_k", "q6_k"),
        ("q6_k", "q5_k"),
        ("q5_0", "q4_k"),
        ("q4_k", "q8_0"),
    ],
)
def test_experts_together_are_each_alone(above: str, below: str) -> None:
    schemes = BLOCK_SCHEMES[above], BLOCK_SCHEMES[below]
    pairs = [
        (random_linear(512, 256, schemes[0], n), random_linear(64, 256, schemes[1], 9 + n))
        for n in range(3)
    ]
    experts = [BlockExpert(up, down) for (up, _), (down, _) in pairs]
    assert all(expert.fits for expert in experts)
    x = 8 * normals(9, 256, seed=5).bfloat16()
    together = compute_experts(experts, x)
    for number, expert in enumerate(experts):
        assert torch.equal(compute_experts([expert], x)[0], together[number])
    gate, up = reference(x, pairs[1][0][1]).float().chunk(2, dim=-1)
    wanted = reference(F.silu(gate) * up, pairs[1][1][1])
    assert (together[1] - wanted).norm() < 2e-2 * wanted.norm()  # a rounding may fall otherwise


def test_a_sum_is_the_same_on_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = BLOCK_SCHEMES["q4_0"]
    expert = BlockExpert(
        linear_of(normals(512, 256), scheme), linear_of(normals(256, 256, seed=1), scheme)
    )
    x = normals(3, 256, seed=2)
    before = torch.get_num_threads()
    alone = _on_threads(1, expert, x)
    shared = _on_threads(3, expert, x)
    monkeypatch.setattr(team, "_team", lambda: team._in_a_pool)
    pooled = _on_threads(3, expert, x)
    torch.set_num_threads(before)
    assert torch.equal(alone, shared)
    assert torch.equal(alone, pooled)
    found: list[torch.Tensor] = []
    other = threading.Thread(target=lambda: found.append(compute_experts([expert], x)))
    other.start()
    other.join()
    assert torch.equal(found[0], alone[:1])


def _on_threads(threads: int, expert: BlockExpert, x: torch.Tensor) -> torch.Tensor:
    torch.set_num_threads(threads)
    return compute_experts([expert, expert], x)


class Silu:
    """What compute_expert asks an experts module for, of the usual kind."""

    def __new__(cls) -> Any:
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

        config = MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=2)
        return MixtralExperts(config)


def test_a_slot_computes_the_expert_whose_record_landed_in_it() -> None:
    params = (
        ExpertParam("gate_up_proj", (192, 64), torch.bfloat16),
        ExpertParam("down_proj", (64, 96), torch.bfloat16),
    )
    form = SlotForm(ExpertShape(params), "q4_0", torch.device("cpu"))
    up, down = normals(192, 64) * 0.1, normals(64, 96, seed=1) * 0.1
    scheme = BLOCK_SCHEMES["q4_0"]
    parts: dict[str, torch.Tensor] = {}
    for name, weight in (("gate_up_proj", up), ("down_proj", down)):
        parts |= {f"{name}.{k}": v for k, v in quantise_blocks(weight, scheme).items()}
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    form.layout.write(parts, record)
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
    assert form.slot_bytes == form.record_bytes
    slot.arrive(record)
    assert whole_of(slot) is not None
    x = normals(1, 64, seed=3)
    module = Silu()
    alone = BlockExpert(linear_of(up, scheme), linear_of(down, scheme))
    assert torch.equal(compute_expert(module, slot, x), compute_experts([alone], x)[0])
    module.act_fn = torch.nn.GELU()  # no SiLU: matrix by matrix
    gate, above = slot.up(x).chunk(2, dim=-1)
    assert torch.equal(compute_expert(module, slot, x), slot.down(F.gelu(gate) * above))


def test_what_does_not_fit_is_said() -> None:
    scheme = BLOCK_SCHEMES["q4_0"]
    with pytest.raises(RunError, match="33 input columns, which q4_0 cannot divide into blocks"):
        quantise_blocks(torch.zeros(2, 33), scheme)
    with pytest.raises(RunError, match="not finite"):
        quantise_blocks(torch.full((2, 32), torch.nan), scheme)
    with pytest.raises(RunError, match="too large"):
        quantise_blocks(torch.full((2, 32), 1e30), scheme)
    with pytest.raises(RunError, match="on the CPU alone"):
        SlotForm(ExpertShape.matrix(64, 64), "q8_0", torch.device("cuda"))


def test_memory_of_a_prompt_is_not_kept() -> None:
    linear = linear_of(normals(16, 32), BLOCK_SCHEMES["q4_0"])
    blocks._kept.plans.clear()
    linear(normals(64, 32))
    assert not blocks._kept.plans
    linear(normals(1, 32))
    assert len(blocks._kept.plans) == 1


@pytest.mark.slow
def test_without_the_instruction_the_sums_are_equal(tmp_path: Path) -> None:
    """Ordinary vector operations, as on a CPU without AVX512_VNNI, in a process of its own."""
    import os
    import subprocess
    import sys

    script = """
import sys
from moerun.kernels import blocks_ir
blocks_ir.VNNI = blocks_ir.VNNI and sys.argv[1] == "with"
import torch
from moerun.format.expert import ExpertParam
from moerun.format.precision import BLOCK_SCHEMES
from moerun.kernels.blocks import BlockLinear
for scheme in BLOCK_SCHEMES.values():
    torch.manual_seed(0)
    views = {}
    for name, dtype, shape in scheme.parts(48, 256):
        size = (*shape[:-1], shape[-1] * dtype.itemsize)
        part = torch.randint(0, 48, size, dtype=torch.uint8).view(dtype)  # no float16 is NaN
        views[f"w.{name}"] = part
    param = ExpertParam("w", (48, 256), torch.bfloat16)
    y = BlockLinear(param, scheme, views)(torch.randn(9, 256))
    assert y.isfinite().all()
    print(y.view(torch.int32).flatten().tolist())
"""
    told = [
        subprocess.run(
            [sys.executable, "-c", script, how],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / how)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for how in ("with", "without")
    ]
    assert told[0]
    assert told[0] == told[1]
