"""The GPU's kernels: run by Triton's interpreter here, and compiled for the cards people have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moerun.errors import RunError
from moerun.format.bitplanes import dequantise, pack_codes
from moerun.format.expert import ExpertParam, ExpertShape
from moerun.format.precision import SCHEMES
from moerun.format.quantise import quantise
from moerun.kernels.slots import FusedSlot, SlotForm
from support.shapes import gated_expert

pytestmark = pytest.mark.usefixtures("interpreted")
# Of the largest sum of an output's terms, all taken as positive: the terms may cancel, and what is
# rounded away of them does not. Weights and sums are rounded to the type of the activations.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
COMPILE = """
import sys, warnings
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moerun.kernels import gpu_triton as fusedkernels
from moerun.kernels.gpu import constants_of
from moerun.format.precision import SCHEMES

warnings.simplefilter("ignore")
scheme = SCHEMES[sys.argv[1]]
for kernel, words in ((fusedkernels.multiply_one, "*u32"), (fusedkernels.multiply_many, "*u8")):
    constants = {**constants_of(scheme), "TOKENS": 16}
    types = {"x": sys.argv[2], "ranges": "*fp16", "out": "*fp32", "scale_unit": "fp32"}
    types |= dict.fromkeys(("codes", "high", "scales", "zeros"), words)
    types |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in names},
        constexprs={name: constants[name] for name in names if name in constants},
    )
    for capability in map(int, sys.argv[3:]):
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert built.asm["cubin"], capability
        print(capability, built.metadata.shared)
"""


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_a_product_is_that_of_the_dequantised_matrix(data: st.DataObject) -> None:
    from moerun.kernels.gpu import multiply

    scheme = SCHEMES[data.draw(st.sampled_from(sorted(SCHEMES)), "scheme")]
    rows = data.draw(st.integers(1, 330), "rows")  # odd numbers of blocks of 64 among them
    columns = data.draw(st.sampled_from([64, 128, 192]), "columns")
    columns -= 32 * (scheme.group == 16 and data.draw(st.booleans(), "half a tile"))
    tokens = data.draw(st.sampled_from([1, 1, 2, 16, 17, 70]), "tokens")
    dtype = data.draw(st.sampled_from(list(TOLERANCE)), "dtype")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9), "seed"))
    parts = quantise(torch.randn(rows, columns, generator=generator), scheme)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    found = multiply(x, parts, scheme, rows)
    assert found.dtype == dtype
    assert found.shape == (tokens, rows)
    weights = dequantise(parts, scheme, rows, columns).double()
    wanted = x.double() @ weights.T
    terms = x.double().abs() @ weights.abs().T
    assert (found.double() - wanted).abs().max() / terms.max() < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_columns_shared_out_among_programs_add_up(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moerun.kernels import gpu as fused

    scheme = SCHEMES[name]
    parts = quantise(torch.randn(64, 192), scheme)
    x = torch.randn(tokens, 192)
    alone = fused.multiply(x, parts, scheme, 64)
    monkeypatch.setattr(fused, "_multiprocessors", lambda _: 100)
    shared = fused.multiply(x, parts, scheme, 64)
    assert relative(shared, alone.double()) < 1e-6
    assert torch.equal(shared, fused.multiply(x, parts, scheme, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SCHEMES))
def test_every_code_has_its_place(name: str) -> None:
    """Unit scales and no zeros: the products are sums of codes, exactly."""
    from moerun.kernels.gpu import multiply

    scheme = SCHEMES[name]
    codes = torch.randint(0, 2**scheme.bits, (192, 128), dtype=torch.uint8)
    parts = {**pack_codes(codes, scheme)}
    for part, dtype, shape in scheme.parts(192, 128):
        if part not in parts:
            parts[part] = torch.zeros(shape, dtype=dtype)
    parts["ranges"][1] = 1024.0  # the least scale, times its unit
    x = torch.zeros(128, 128)
    x.fill_diagonal_(1.0)
    assert torch.equal(multiply(x, parts, scheme, 192), codes.T.float())
    assert torch.equal(multiply(x[77:78], parts, scheme, 192), codes[:, 77:78].T.float())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_slot_of_a_gpu_computes_from_the_record_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlotForm, "_takes_nibbles", False)
    shape = ExpertShape(
        (
            ExpertParam("gate_up_proj", (64, 80), torch.float32, transposed=True),
            ExpertParam("gate_up_proj_bias", (80,), torch.float32),
            ExpertParam("down_proj", (128, 72), torch.float32, transposed=True),
            ExpertParam("down_proj_bias", (72,), torch.float32),
        )
    )
    form = SlotForm(shape, name, torch.device("cpu"))
    assert form.slot_bytes == form.record_bytes
    weights = {param.name: torch.randn(param.shape) for param in shape.params}
    packed = {
        param.name: quantise(weights[param.name].T.contiguous(), SCHEMES[name])
        for param in shape.params
        if param.is_matrix
    }
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    tensors = {f"{p}.{part}": t for p, parts in packed.items() for part, t in parts.items()}
    form.layout.write(
        tensors | {name: t for name, t in weights.items() if name.endswith("bias")}, record
    )
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
    assert isinstance(slot, FusedSlot)
    slot.arrive(record)
    x, h = torch.randn(3, 64), torch.randn(1, 128)
    for found, given_, param in ((slot.up(x), x, "gate_up_proj"), (slot.down(h), h, "down_proj")):
        rows, columns = weights[param].T.shape
        plain = dequantise(packed[param], SCHEMES[name], rows, columns)
        wanted = given_ @ plain.T + weights[f"{param}_bias"]
        assert relative(found, wanted.double()) < 2e-6


def test_no_tokens_have_no_products() -> None:
    from moerun.kernels.gpu import multiply

    parts = quantise(torch.randn(70, 64), SCHEMES["4bit"])
    assert multiply(torch.empty(0, 64), parts, SCHEMES["4bit"], 70).shape == (0, 70)


def compiles(name: str, x: str, capabilities: tuple[int, ...]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, name, x, *map(str, capabilities)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 2 * len(capabilities)
    assert max(shared) <= 48 << 10  # what every card gives a program without being asked


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_kernels_compile_without_a_card(name: str) -> None:
    compiles(name, "*bf16", (86,))


@pytest.mark.slow
@pytest.mark.parametrize("x", ["*bf16", "*fp16"])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_kernels_compile_for_every_kind_of_card(name: str, x: str) -> None:
    compiles(name, x, (75, 80, 89, 90, 120))


def test_a_gpu_without_triton_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotForm, "_takes_nibbles", False)
    monkeypatch.setitem(sys.modules, "moerun.kernels.gpu", None)
    form = SlotForm(gated_expert(hidden=64, inner=64), "2bit", torch.device("cpu"))
    with pytest.raises(RunError, match="pip install triton"):
        form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
