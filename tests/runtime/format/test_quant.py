"""Quantisation: hqq's numbers, kept in a packing that the CPU's int4 kernel computes from."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hqq.core.quantize import Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from moerun.errors import RunError
from moerun.format.bitplanes import dequantise, expand_codes, pack_codes, unpack_codes
from moerun.format.expert import ExpertParam, ExpertShape
from moerun.format.precision import ROWS, SCHEMES, Scheme
from moerun.format.quantise import quantise
from moerun.kernels.linears import kernel_reads_nibbles
from moerun.kernels.slots import SlotForm
from support.shapes import gated_expert

ERRORS = {"4bit": 0.087, "3bit": 0.185, "2bit": 0.302}  # of random normal weights, relative
# bfloat16 has 8 bits of mantissa: the kernel's scales and its sums of products round to them.
KERNEL_TOLERANCE = 0.01

schemes = st.sampled_from(list(SCHEMES.values()))


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.02


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_error_is_that_of_hqq(name: str) -> None:
    weight, scheme = normal(256, 512), SCHEMES[name]
    restored = dequantise(quantise(weight, scheme), scheme, 256, 512)
    assert relative(restored, weight) == pytest.approx(ERRORS[name], rel=0.02)
    codes, meta = Quantizer.quantize(
        weight, nbits=scheme.bits, group_size=scheme.group, axis=1, bitpack=False, device="cpu"
    )
    plain = ((codes - meta["zero"]) * meta["scale"]).view(256, 512)
    # Scales and zeros at 8 bits move a weight by much less than a quantisation step.
    assert relative(restored, plain) < 0.02


@settings(max_examples=30, deadline=None)
@given(scheme=schemes, blocks=st.integers(1, 3), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_codes_survive_packing(scheme: Scheme, blocks: int, groups: int, seed: int) -> None:
    rows, columns = blocks * ROWS, groups * max(scheme.group, 32)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        0, 2**scheme.bits, (rows, columns), dtype=torch.uint8, generator=generator
    )
    planes = pack_codes(codes, scheme)
    assert sum(p.numel() for p in planes.values()) * 8 == rows * columns * scheme.bits
    nibbles = torch.empty(rows * columns // 2, dtype=torch.uint8)
    expand_codes(planes, scheme, nibbles)
    assert torch.equal(unpack_codes(nibbles, columns), codes + scheme.lift)


def test_expansion_in_blocks_equals_expansion_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in SCHEMES.values():
        codes = torch.randint(0, 2**scheme.bits, (ROWS, 640), dtype=torch.uint8)
        planes = pack_codes(codes, scheme)
        found = []
        for block_bytes in (1 << 17, 64):
            monkeypatch.setattr("moerun.format.bitplanes._BLOCK_BYTES", block_bytes)
            nibbles = torch.empty(codes.numel() // 2, dtype=torch.uint8)
            expand_codes(planes, scheme, nibbles)
            found.append(nibbles)
        assert torch.equal(*found)


def slot_of(
    shape: ExpertShape, name: str, weights: dict[str, torch.Tensor], device: str
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A slot into which an expert of these weights has arrived, and the weights as dequantised."""
    scheme, form = SCHEMES[name], SlotForm(shape, name, torch.device(device))
    parts, plain = {}, {}
    for param in shape.params:
        weight = weights[param.name]
        if not param.is_matrix:
            parts[param.name] = plain[param.name] = weight
            continue
        matrix = weight.T.contiguous() if param.transposed else weight
        packed = quantise(matrix, scheme)
        parts |= {f"{param.name}.{part}": tensor for part, tensor in packed.items()}
        plain[param.name] = dequantise(packed, scheme, *param.rows_columns)
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    form.layout.write(parts, record)
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
    if slot.landing is not None:
        slot.landing.copy_(record)
        record = slot.landing
    slot.arrive(record)
    return slot, plain


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_kernel_computes_what_plain_dequantisation_does(name: str, tokens: int) -> None:
    shape = gated_expert(hidden=128, inner=192)
    weights = {"gate_up_proj": normal(384, 128), "down_proj": normal(128, 192, seed=1)}
    slot, plain = slot_of(shape, name, weights, "cpu")
    x = torch.randn(tokens, 128)
    up = slot.up(x)
    assert up.shape == (tokens, 384)
    assert relative(up, x @ plain["gate_up_proj"].T) < KERNEL_TOLERANCE
    h = torch.randn(tokens, 192, dtype=torch.bfloat16)
    assert relative(slot.down(h), h.float() @ plain["down_proj"].T) < KERNEL_TOLERANCE


@pytest.mark.parametrize("name", list(SCHEMES))
def test_odd_rows_biases_and_transposed_matrices(name: str) -> None:
    shape = ExpertShape(
        (
            ExpertParam("gate_up_proj", (64, 80), torch.float32, transposed=True),
            ExpertParam("gate_up_proj_bias", (80,), torch.float32),
            ExpertParam("down_proj", (128, 72), torch.float32, transposed=True),
            ExpertParam("down_proj_bias", (72,), torch.float32),
        )
    )
    weights = {
        "gate_up_proj": normal(64, 80),
        "gate_up_proj_bias": torch.randn(80),
        "down_proj": normal(128, 72),
        "down_proj_bias": torch.randn(72),
    }
    slot, plain = slot_of(shape, name, weights, "cpu")
    x = torch.randn(3, 64)
    wanted = x @ plain["gate_up_proj"].T + weights["gate_up_proj_bias"]
    assert relative(slot.up(x), wanted) < KERNEL_TOLERANCE


def test_a_slot_computes_the_expert_that_arrived_last() -> None:
    shape = gated_expert(hidden=64, inner=64)
    form = SlotForm(shape, "2bit", torch.device("cpu"))
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
    record, x, outputs = torch.empty(form.record_bytes, dtype=torch.uint8), torch.randn(1, 64), []
    for seed in (0, 1, 0):
        parts: dict[str, torch.Tensor] = {}
        for param in shape.params:
            rows, columns = param.shape
            packed = quantise(normal(rows, columns, seed), SCHEMES["2bit"])
            parts |= {f"{param.name}.{part}": tensor for part, tensor in packed.items()}
        form.layout.write(parts, record)
        slot.arrive(record)
        outputs.append(slot.up(x))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])


def test_a_group_of_one_value_does_not_spoil_its_neighbours() -> None:
    weight = normal(128, 256)
    weight[3, 64:128] = 0
    weight[5] = 0
    scheme = SCHEMES["4bit"]
    restored = dequantise(quantise(weight, scheme), scheme, 128, 256)
    assert restored[3, 64:128].abs().max() < 1e-3
    assert relative(restored, weight) == pytest.approx(ERRORS["4bit"], rel=0.05)


@pytest.mark.parametrize("name", list(SCHEMES))
@pytest.mark.parametrize("value", [0.0, 0.02, -0.5])
def test_a_matrix_of_one_value_comes_back(name: str, value: float) -> None:
    """No group has a scale that the others could take."""
    scheme = SCHEMES[name]
    packed = quantise(torch.full((100, 128), value), scheme)
    wanted = torch.full((100, 128), value)
    torch.testing.assert_close(dequantise(packed, scheme, 100, 128), wanted, rtol=1e-3, atol=1e-6)


def test_rows_are_quantised_alike_whatever_runs_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moerun.format.quantise._BLOCK_WEIGHTS", {"cpu": 16 * 128})
    weight, scheme = normal(64, 128), SCHEMES["3bit"]

    def backwards(function: Any, blocks: Any) -> Any:
        return reversed([function(block) for block in reversed(list(blocks))])

    one, other = quantise(weight, scheme), quantise(weight, scheme, run=backwards)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = normal(64, 64)
    weight[5, 7] = value
    with pytest.raises(RunError, match="not finite"):
        quantise(weight, SCHEMES["4bit"])


PROBE = """
import sys, torch
sys.path[:0] = sys.argv[1:]
import test_quant
from moerun.kernels.linears import kernel_reads_nibbles
print(torch.backends.cpu.get_cpu_capability(), kernel_reads_nibbles())
for name in test_quant.SCHEMES:
    test_quant.test_the_kernel_computes_what_plain_dequantisation_does(name, 5)
    test_quant.test_odd_rows_biases_and_transposed_matrices(name)
"""


@pytest.mark.slow
@pytest.mark.skipif(not kernel_reads_nibbles(), reason="this CPU's kernel has another order itself")
def test_a_cpu_whose_kernel_has_another_order_computes_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(Path(__file__).parent), str(Path(__file__).parents[2])],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["AVX2", "False"]
