"""Weights in the bits of their publication: the compiled kernels against transformers' formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moerun.format.coding import Coding, decode, finer, pack_elements
from moerun.format.expert import ExpertParam, ExpertShape
from moerun.format.precision import Tensors
from moerun.kernels.coded import dequantise, scratch_bytes
from moerun.kernels.slots import SlotForm

CPU = torch.device("cpu")
CODINGS = [
    Coding("e4m3", "float32", (128, 128)),
    Coding("e4m3", "float32", (1, 40)),
    Coding("e4m3", "e8m0", (1, 32)),
    Coding("e2m1", "e8m0", (32, 1)),
    Coding("e2m1", "e8m0", (1, 32)),
    Coding("e2m1", "float32", (3, 5)),
]


def parts_of(coding: Coding, shape: tuple[int, int], seed: int = 0) -> Tensors:
    """Every code and exponent there is, NaN included."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(0, 256, size, dtype=torch.uint8, generator=random)
        if dtype == torch.uint8
        else torch.randn(size, generator=random)
        for name, dtype, size in coding.parts(*shape)
    }


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal, NaN where the other is."""
    return torch.equal(one.isnan(), two.isnan()) and torch.equal(
        one.nan_to_num(0, 0, 0), two.nan_to_num(0, 0, 0)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_the_kernel_of_the_cpu_is_the_plain_formula(coding: Coding, dtype: torch.dtype) -> None:
    parts = parts_of(coding, (300, 200))
    plain = decode(parts, coding, torch.empty(300, 200, dtype=dtype))
    assert same(dequantise(parts, coding, torch.empty_like(plain)), plain)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 70),
    half=st.integers(1, 40),
    block=st.tuples(st.integers(1, 80), st.integers(1, 90)),
    elements=st.sampled_from(["e4m3", "e2m1"]),
    scale=st.sampled_from(["float32", "e8m0"]),
)
def test_blocks_may_be_cut_off(
    rows: int, half: int, block: tuple[int, int], elements: str, scale: str
) -> None:
    coding = Coding(elements, scale, block)
    parts = parts_of(coding, (rows, 2 * half))
    plain = decode(parts, coding, torch.empty(rows, 2 * half, dtype=torch.bfloat16))
    assert same(dequantise(parts, coding, torch.empty_like(plain)), plain)


def test_fp8_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    coding = CODINGS[0]
    parts = parts_of(coding, (256, 384))
    stock = Fp8Dequantize(None).convert(
        {
            "weight": parts["codes"].view(torch.float8_e4m3fn),
            "weight_scale_inv": parts["scales"],
        }
    )["weight"]
    assert same(dequantise(parts, coding, torch.empty(256, 384)), stock)


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (1, 96, 4, 16), dtype=torch.uint8, generator=random)
    scales = torch.randint(4, 250, (1, 96, 4), dtype=torch.uint8, generator=random)
    stock = convert_moe_packed_tensors(blocks, scales)[0]
    coding = Coding("e2m1", "e8m0", (32, 1))
    nibbles = torch.stack([blocks[0] & 15, blocks[0] >> 4], -1).reshape(96, 128)
    parts = {"codes": pack_elements(nibbles.T, coding), "scales": scales[0].T.contiguous()}
    assert torch.equal(dequantise(parts, coding, torch.empty_like(stock)), stock)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_slot_multiplies_as_the_dequantised_matrix_would(threads: int) -> None:
    shape = ExpertShape(
        (
            ExpertParam("up", (1024, 1100), torch.bfloat16, coding=CODINGS[0]),
            ExpertParam("down", (64, 512), torch.bfloat16, transposed=True, coding=CODINGS[3]),
            ExpertParam("down_bias", (512,), torch.bfloat16),
        )
    )
    form = SlotForm(shape, "native", CPU)
    assert form.slot_bytes == form.record_bytes  # the record is computed where it lies
    assert scratch_bytes(shape) == 2 * 1024 * 1100
    parts = {"down_bias": torch.randn(512).bfloat16()}
    for param in shape.params[:2]:
        assert isinstance(param.coding, Coding)
        made = parts_of(param.coding, (param.shape[0], param.shape[1]))
        made["codes"][made["codes"] & 0x7F == 0x7F] = 0  # NaN in E4M3
        if param.coding.scale == "e8m0":
            made["scales"].remainder_(10).add_(120)
        parts |= {f"{param.name}.{name}": tensor for name, tensor in made.items()}
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    form.layout.write(parts, record)
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
    slot.arrive(record)
    x, h = torch.randn(3, 1100).bfloat16(), torch.randn(3, 64).bfloat16()
    weights = []
    for param in shape.params[:2]:
        assert isinstance(param.coding, Coding)
        own = {n: parts[f"{param.name}.{n}"] for n in ("codes", "scales")}
        weights.append(decode(own, param.coding, torch.empty(param.shape, dtype=torch.bfloat16)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(slot.up(x), F.linear(x, weights[0]))
        assert torch.equal(slot.down(h), h @ weights[1] + parts["down_bias"])
    finally:
        torch.set_num_threads(before)


def test_a_coding_survives_its_description() -> None:
    for coding in CODINGS:
        shape = ExpertShape((ExpertParam("w", (64, 40), torch.bfloat16, coding=coding),))
        assert ExpertShape.from_json(shape.to_json()) == shape
    with pytest.raises(ValueError, match="no coding"):
        Coding.from_json({"elements": "e9m9", "scale": "float32", "block": [1, 1]})


def test_joined_matrices_have_blocks_that_divide_them() -> None:
    assert [finer(128, size) for size in (256, 192, 100, 128)] == [128, 64, 4, 128]
