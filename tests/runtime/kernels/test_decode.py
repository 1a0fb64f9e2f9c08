"""A decoded token's norms, attention, gates and heads, held against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from moerun.format.block_scheme import BLOCK_SCHEMES
from moerun.kernels.decode import (
    ExpertChoice,
    HalvesLinear,
    TokenAttention,
    TokenNorm,
    weighted_sum,
)

Q4_0 = BLOCK_SCHEMES["q4_0"]
HALF = torch.bfloat16


def normals(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(HALF)


def stock_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As transformers' modules compute it."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    one, two = x.chunk(2, dim=-1)
    return (x * cosines) + (torch.cat([-two, one], dim=-1) * sines)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("width", [16, 64, 208])
def test_rows_of_bfloat16_are_multiplied_in_float32(tokens: int, width: int) -> None:
    weight, x = normals(37, width), normals(tokens, width, seed=1)
    assert HalvesLinear.fits(weight)
    assert HalvesLinear.takes(x)
    found = HalvesLinear(weight)(x)
    wanted = x.double() @ weight.double().T
    assert found.shape == (tokens, 37)
    assert found.dtype is HALF
    assert torch.allclose(found.double(), wanted, rtol=2**-8, atol=1e-5 * width)


def test_matrices_and_tokens_it_is_not_for() -> None:
    assert not HalvesLinear.fits(torch.ones(4, 64))
    assert not HalvesLinear.fits(torch.ones(4, 24, dtype=HALF))
    assert not HalvesLinear.fits(torch.ones(64, 4, dtype=HALF).T)
    assert not HalvesLinear.takes(torch.ones(5, 64, dtype=HALF))
    assert not HalvesLinear.takes(torch.ones(1, 64))


def test_a_norm_rounds_where_the_stock_module_does() -> None:
    x, weight, added = normals(1, 1, 96), normals(96, seed=1), normals(96, seed=2).float()
    total, found = TokenNorm(weight, 1e-6)(x)
    assert total is x
    assert torch.equal(found, stock_norm(x, weight, 1e-6))
    codes = torch.zeros(96 + 8 * 3, dtype=torch.uint8)
    norm = TokenNorm(weight, 1e-6, added=added.data_ptr(), rounded=codes.data_ptr(), scheme=Q4_0)
    total, found = norm(x)
    assert torch.equal(total, x + added.to(HALF))
    assert torch.equal(found, stock_norm(total, weight, 1e-6))
    groups = found.float().view(3, 32)
    scales = groups.abs().amax(-1) / 127
    assert torch.equal(codes[96 : 96 + 12].view(torch.float32), scales)
    kept = codes[:96].view(torch.int8).view(3, 32) * scales[:, None]
    assert (kept - groups).abs().max() <= 0.51 * scales.max()


@pytest.mark.parametrize(("normed", "biased", "masked"), [(1, 0, 0), (0, 1, 1), (0, 0, 0)])
def test_attention_is_that_of_torch(normed: int, biased: int, masked: int) -> None:
    heads, group, width, held = 2, 3, 64, 150
    rows = (group + 2) * heads * width
    projected, bias = normals(rows).float(), normals(rows, seed=1) if biased else None
    norms = (normals(width, seed=2), normals(width, seed=3)) if normed else None
    angles = torch.rand(width // 2, generator=torch.Generator().manual_seed(4)).repeat(2)
    cosines, sines = angles.cos().to(HALF), angles.sin().to(HALF)
    keys, values = (normals(1, heads, held + 60, width, seed=s)[:, :, : held + 1] for s in (5, 6))
    mask = None
    if masked:
        mask = (torch.arange(held + 1) % 3 > 0).view(1, 1, 1, -1).contiguous()
        mask[..., -1] = True
    codes = torch.zeros(heads * group * width * 5 // 4, dtype=torch.uint8)
    attention = TokenAttention(
        heads=heads,
        group=group,
        width=width,
        projected=projected.data_ptr(),
        rounded=codes.data_ptr(),
        scheme=Q4_0,
        scaling=width**-0.5,
        bias=bias,
        norms=norms,
        eps=1e-6,
    )
    attention(keys, values, cosines, sines, mask)

    taken = projected.to(HALF) + bias if bias is not None else projected.to(HALF)
    queries, new_keys, new_values = torch.split(
        taken.view(-1, width), [heads * group, heads, heads]
    )
    if norms:
        queries, new_keys = (
            stock_norm(each, norm, 1e-6)
            for each, norm in zip((queries, new_keys), norms, strict=True)
        )
    assert torch.equal(keys[0, :, -1], rotated(new_keys, cosines, sines))
    assert torch.equal(values[0, :, -1], new_values)
    queries = rotated(queries, cosines, sines).view(1, heads, group, width)
    seen = None if mask is None else mask.expand(1, heads, group, held + 1)
    wanted = F.scaled_dot_product_attention(
        queries.double(), keys.double(), values.double(), attn_mask=seen
    )
    n = wanted.numel()
    scales = codes[n : n + n // 8].view(torch.float32)
    found = codes[:n].view(torch.int8).view(-1, 32) * scales[:, None]
    # The rounding to 8 bits, and before it that to bfloat16.
    assert (found - wanted.view(-1, 32)).abs().max() < 0.6 * scales.max() + 2**-8


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_the_likeliest_experts_are_chosen(dtype: torch.dtype, normalised: bool) -> None:
    logits = 3 * normals(1, 50)
    weights, ids = ExpertChoice(50, 6, dtype, normalised=normalised)(logits)
    wanted, places = logits.float().softmax(-1).topk(6)
    if normalised:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    assert torch.equal(ids, places)
    assert weights.dtype is dtype
    assert torch.allclose(weights.float(), wanted, rtol=2**-8 if dtype is HALF else 1e-5)


def test_experts_that_cannot_be_told_apart_are_different_ones() -> None:
    choice = ExpertChoice(8, 3, torch.float32, normalised=True)
    assert choice(torch.zeros(1, 8, dtype=HALF))[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_outputs_are_summed_with_their_weights(dtype: torch.dtype) -> None:
    rows, weights = normals(3, 40, seed=1).float()[:, :33], normals(1, 3).to(dtype)
    found = weighted_sum(rows, weights)
    wanted = weights[0, 0].float() * rows[0]
    for weight, row in zip(weights[0, 1:].float(), rows[1:], strict=True):
        wanted = wanted + weight * row
    assert found.shape == (1, 33)
    assert torch.equal(found[0], wanted.to(HALF))
    assert torch.equal(weighted_sum(rows.contiguous(), weights), found)
