"""Experts kept in the bits of their publication, dequantised on a GPU."""

from __future__ import annotations

import pytest
import torch
from moerun.format.coding import Coding
from moerun.format.expert import ExpertParam, ExpertShape
from moerun.kernels.coded import dequantise
from moerun.kernels.slots import SlotForm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CODINGS = [
    Coding("e4m3", "float32", (128, 128)),
    Coding("e4m3", "e8m0", (1, 32)),
    Coding("e2m1", "e8m0", (32, 1)),
]


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_a_gpu_dequantises_to_the_same_bits_as_the_cpu(coding: Coding) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    random = torch.Generator().manual_seed(0)
    parts: dict[str, torch.Tensor] = {}
    for name, dtype, size in coding.parts(4096, 2880):
        values = torch.randint(100, 126, size, generator=random)
        parts[name] = (values / 1e4 if dtype is torch.float32 else values).to(dtype)
    wanted = dequantise(parts, coding, torch.empty(4096, 2880, dtype=torch.bfloat16))
    there = {name: part.to(device) for name, part in parts.items()}
    out = torch.empty(4096, 2880, dtype=torch.bfloat16, device=device)
    assert torch.equal(dequantise(there, coding, out).cpu(), wanted)
    shape = ExpertShape((ExpertParam("w", (4096, 2880), torch.bfloat16, coding=coding),))
    form = SlotForm(shape, "native", device)
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    form.layout.write({f"w.{name}": part for name, part in parts.items()}, record)
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8, device=device))
    slot.arrive(record.to(device))
    x = torch.randn(3, 2880, device=device, dtype=torch.bfloat16)
    assert torch.equal(slot.up(x), x @ wanted.to(device).T)
