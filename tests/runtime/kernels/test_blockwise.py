"""Many tokens through a quantised matrix on the CPU: dequantised block by block."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from moerun.format.bitplanes import dequantise, expand_codes, expand_scales
from moerun.format.expert import ExpertShape
from moerun.format.layout import align_up
from moerun.format.precision import ROWS, SCHEMES
from moerun.format.quantise import quantise
from moerun.kernels import cpu_prompt as blockwise
from moerun.kernels.cpu_prompt import multiply_blockwise, pays_from_tokens, scratch_bytes
from moerun.kernels.linears import kernel_reads_nibbles
from moerun.kernels.slots import SlotForm
from torch.utils._python_dispatch import TorchDispatchMode

# Scales, weights and activations are rounded to bfloat16, of 8 bits, before products are summed.
TOLERANCE = 0.005
ROWS_COLUMNS = (3 * ROWS + 8, 192)

Matrix = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def matrix(name: str, rows: int, columns: int) -> Matrix:
    """Nibbles and terms as they are stored, and the weights they stand for."""
    scheme, padded = SCHEMES[name], align_up(rows, ROWS)
    generator = torch.Generator().manual_seed(0)
    parts = quantise(torch.randn(rows, columns, generator=generator) * 0.02, scheme)
    nibbles = torch.empty(padded * columns // 2, dtype=torch.uint8)
    expand_codes(parts, scheme, nibbles)
    shape = (scheme.passes, columns // scheme.group // scheme.passes, padded, 2)
    terms = torch.empty(shape, dtype=torch.bfloat16)
    expand_scales(parts, scheme, terms)
    return nibbles, terms, dequantise(parts, scheme, rows, columns)


def activations(tokens: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, columns, generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 7, 100])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_product_is_that_of_plain_dequantisation(name: str, tokens: int) -> None:
    rows, columns = ROWS_COLUMNS
    nibbles, terms, plain = matrix(name, rows, columns)
    x = activations(tokens, columns)
    y = multiply_blockwise(x, nibbles, terms, SCHEMES[name].group)
    assert y.shape == (tokens, align_up(rows, ROWS))
    assert relative(y[:, :rows], x.float() @ plain.T) < TOLERANCE


@pytest.mark.parametrize("name", list(SCHEMES))
def test_how_many_blocks_go_at_once_does_not_show(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = ROWS_COLUMNS
    nibbles, terms, _ = matrix(name, rows, columns)
    x = activations(40, columns)
    found = []
    for blocks in (1, 3, 4, 100):  # of the four that there are
        monkeypatch.setattr(blockwise, "_BLOCK_WEIGHTS", blocks * ROWS * columns)
        found.append(multiply_blockwise(x, nibbles, terms, SCHEMES[name].group))
    assert all(torch.equal(found[0], other) for other in found[1:])


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is untyped
    """Counts the bytes of the tensors made while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            storage = result.untyped_storage()
            if storage.data_ptr() not in self._sizes:
                self._sizes[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage.data_ptr(), None)
            self.peak_bytes = max(self.peak_bytes, sum(self._sizes.values()))
        return result


@pytest.mark.parametrize(("rows", "columns"), [(64 * 80, 256), (512, 4096), (64, 1 << 15)])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_memory_stays_within_what_is_planned(name: str, rows: int, columns: int) -> None:
    scheme = SCHEMES[name]
    nibbles = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8)
    shape = (scheme.passes, columns // scheme.group // scheme.passes, rows, 2)
    terms, x = torch.ones(shape, dtype=torch.bfloat16), activations(2, columns)
    with Held() as held:
        y = multiply_blockwise(x, nibbles, terms, scheme.group)
    most = scratch_bytes(rows, columns, scheme)
    assert 0.5 * most < held.peak_bytes - y.nbytes <= most
    assert most < 12 * max(1 << 20, ROWS * columns)


def slot_of(name: str, rows: int, columns: int) -> tuple[Any, torch.Tensor]:
    form = SlotForm(ExpertShape.matrix(rows, columns), name, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    packed = quantise(torch.randn(rows, columns, generator=generator), SCHEMES[name])
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    form.layout.write({f"weight.{part}": tensor for part, tensor in packed.items()}, record)
    slot = form.bind(torch.empty(form.slot_bytes, dtype=torch.uint8))
    slot.arrive(record)
    return slot, dequantise(packed, SCHEMES[name], rows, columns)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", list(SCHEMES))
def test_a_prompt_says_what_its_tokens_say_but_for_rounding(
    name: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    slot, plain = slot_of(name, 136, 128)
    x = activations(65, 128)
    prompt = slot.up(x)
    assert relative(prompt, x.float() @ plain.T) < TOLERANCE
    assert torch.equal(prompt, slot.up(x))
    tokens = torch.cat([slot.up(token[None]) for token in x])
    assert relative(prompt, tokens) < TOLERANCE


@pytest.mark.skipif(not kernel_reads_nibbles(), reason="the kernel is kept where it is another's")
@pytest.mark.parametrize("name", list(SCHEMES))
def test_the_number_of_tokens_and_the_processor_choose_the_way(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def multiply(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        batches.append(len(x))
        return multiply_blockwise(x, *rest)

    monkeypatch.setattr("moerun.kernels.linears.multiply_blockwise", multiply)
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        least = pays_from_tokens(SCHEMES[name])
        assert (least is not None) == native
        slot, _ = slot_of(name, 64, 64)
        for tokens in (1, (least or 64) - 1, least or 64, 300):
            slot.up(activations(tokens, 64))
    assert batches == [least, 300]
