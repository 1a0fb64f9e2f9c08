"""The kernels that compute quantised experts, at Mixtral's true size on a GPU."""

from __future__ import annotations

import pytest
import torch
from moerun.bench.random_weights import RandomRecords
from moerun.format.bitplanes import dequantise
from moerun.format.precision import SCHEMES
from moerun.kernels.slots import FusedSlot, SlotForm
from support.shapes import gated_expert

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
SHAPE = gated_expert(hidden=4096, inner=14336)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.device_count() - 1)


@pytest.fixture(scope="module", params=list(SCHEMES))
def arrived(device: torch.device, request: pytest.FixtureRequest) -> tuple[str, FusedSlot]:
    """An expert of random weights in a slot; the last GPU need not be torch's current one."""
    form = SlotForm(SHAPE, request.param, device)
    records = RandomRecords(SHAPE, request.param, seed=1)
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    records.write(3, record)
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8, device=device))
    slot.arrive(record.to(device))
    assert isinstance(slot, FusedSlot)
    return request.param, slot


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("tokens", [1, 2, 16, 70])
def test_a_product_is_that_of_the_dequantised_matrix(
    arrived: tuple[str, FusedSlot], device: torch.device, tokens: int, dtype: torch.dtype
) -> None:
    name, slot = arrived
    assert slot.landing is not None
    views = SHAPE.record(name).views(slot.landing)
    generator = torch.Generator(device).manual_seed(tokens)
    for param, multiply in zip(SHAPE.params, (slot.up, slot.down), strict=True):
        rows, columns = param.rows_columns
        x = torch.randn(tokens, columns, device=device, generator=generator).to(dtype)
        parts = {part: views[f"{param.name}.{part}"] for part, *_ in SCHEMES[name].parts(64, 128)}
        wanted = x.double() @ dequantise(parts, SCHEMES[name], rows, columns).double().T
        found = multiply(x)
        assert found.dtype == dtype
        assert (found.double() - wanted).abs().max() < TOLERANCE[dtype] * wanted.abs().max()
        assert torch.equal(multiply(x), found)
