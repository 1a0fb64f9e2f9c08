"""Small checkpoints in the formats in which quantised models are published.

Each is written beside the same values unquantised, worked out here by the plain formula of the
format, for comparison.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from support.checkpoints import Tensors, change_config, change_weights, is_matrix, make_checkpoint

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Made = tuple[Tensors, torch.Tensor]
"""The stored tensors of a weight, by what follows its module's name, and the weight they make."""


def blocks_of(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The greatest magnitude in each block of a weight: [rows of blocks, columns of blocks]."""
    lines = [torch.split(part, block[1], 1) for part in torch.split(weight.abs(), block[0])]
    return torch.stack([torch.stack([each.amax() for each in line]) for line in lines])


def in_groups(values: torch.Tensor, dim: int, group: int) -> torch.Tensor:
    """A dimension as groups of so many, and their members after it."""
    shape = list(values.shape)
    shape[dim : dim + 1 if dim >= 0 else None] = [shape[dim] // group, group]
    return values.reshape(shape)


def spread(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """A scale for each weight."""
    whole = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[: shape[0], : shape[1]]


def fp8_block(weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> Made:
    """DeepSeek-V3's: E4M3 and a float32 for each block."""
    scales = blocks_of(weight, block) / 448
    whole = spread(scales, block, weight.shape)
    codes = (weight / whole).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * whole


def fp8_tensor(weight: torch.Tensor) -> Made:
    """One scale for the whole weight, and one of its activations: ModelOpt's FP8."""
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.02)}
    return stored, codes.float() * scale


def fp8_row(weight: torch.Tensor) -> Made:
    """compressed-tensors' float-quantized: a bfloat16 for each row."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def int8_row(weight: torch.Tensor) -> Made:
    """compressed-tensors' int-quantized."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def power_of_two(scales: torch.Tensor) -> torch.Tensor:
    """Scales rounded up to E8M0."""
    return torch.exp2(torch.ceil(torch.log2(scales.clamp(min=1e-30)))).to(torch.float8_e8m0fnu)


def fp8_e8m0(weight: torch.Tensor) -> Made:
    """DeepSeek-V4's dense weights: E4M3 and an exponent for each block."""
    scales = power_of_two(blocks_of(weight, (128, 128)) / 448)
    whole = spread(scales.float(), (128, 128), weight.shape)
    codes = (weight / whole).to(torch.float8_e4m3fn)
    return {"weight": codes, "scale": scales}, codes.float() * whole


def fp4_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 codes, uint8."""
    return (values[..., None] - FP4).abs().argmin(-1).to(torch.uint8)


def pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the low half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def fp4_e8m0(weight: torch.Tensor) -> Made:
    """DeepSeek-V4's experts: two E2M1 a signed byte and an exponent for each 32 of a row."""
    scales = power_of_two(blocks_of(weight, (1, 32)) / 6)
    whole = spread(scales.float(), (1, 32), weight.shape)
    codes = fp4_codes(weight / whole)
    return {"weight": pairs(codes).view(torch.int8), "scale": scales}, FP4[codes.int()] * whole


def mxfp4_packed(weight: torch.Tensor) -> Made:
    """compressed-tensors' mxfp4-pack-quantized."""
    stored, plain = fp4_e8m0(weight)
    names = {"weight": "weight_packed", "scale": "weight_scale"}
    return {names[part]: tensor.view(torch.uint8) for part, tensor in stored.items()}, plain


def nvfp4(weight: torch.Tensor) -> Made:
    """ModelOpt's: two E2M1 a byte, an E4M3 for each 16 of a row, one float32."""
    tensor_scale = weight.abs().amax() / (6 * 448)
    scales = (blocks_of(weight, (1, 16)) / 6 / tensor_scale).to(torch.float8_e4m3fn)
    whole = spread(scales.float() * tensor_scale, (1, 16), weight.shape)
    codes = fp4_codes(torch.where(whole > 0, weight / whole, 0.0))
    stored = {"weight": pairs(codes), "weight_scale": scales, "weight_scale_2": tensor_scale}
    return stored | {"input_scale": torch.tensor(0.01)}, FP4[codes.int()] * whole


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers [n, m] packed along the first dimension into int32[n * bits / 32, m], the
    lowest bits first, across words where 32 does not divide."""
    lows = [(codes.long() >> bit & 1) for bit in range(bits)]
    stream = torch.stack(lows, 1).flatten(0, 1)  # a row a bit
    weights = torch.tensor([1 << bit for bit in range(32)])[None, :, None]
    packed: torch.Tensor = (in_groups(stream, 0, 32) * weights).sum(1).to(torch.int32)
    return packed


def groups_of(weight: torch.Tensor, group: int, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [groups, rows] of the groups of inputs of a weight [rows, columns]."""
    grouped = in_groups(weight.T, 0, group)
    low, high = grouped.amin(1), grouped.amax(1)
    scales = ((high - low) / top).half().float()
    return scales, (-low / scales).round().clamp(1, top)


def gptq(weight: torch.Tensor, bits: int = 4, group: int = 64, *, v2: bool = False) -> Made:
    """GPTQ with an activation order: the group of an input is in g_idx."""
    top = (1 << bits) - 1
    scales, zeros = groups_of(weight, group, top)
    g_idx = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(3)) // group
    codes = (weight.T / scales[g_idx] + zeros[g_idx]).round().clamp(0, top)
    plain = ((codes - zeros[g_idx]) * scales[g_idx]).T
    stored = {
        "qweight": words(codes, bits),
        "qzeros": words((zeros - int(not v2)).T, bits).T.contiguous(),
        "scales": scales.half(),
        "g_idx": g_idx.int(),
    }
    return stored, plain


def awq(weight: torch.Tensor, group: int = 64) -> Made:
    """AWQ's GEMM layout: the eight outputs of a word in the order 0 2 4 6 1 3 5 7."""
    scales, zeros = groups_of(weight, group, 15)
    g_idx = torch.arange(weight.shape[1]) // group
    codes = (weight.T / scales[g_idx] + zeros[g_idx]).round().clamp(0, 15)

    def packed(values: torch.Tensor) -> torch.Tensor:
        order = in_groups(values, 1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)
        return words(order.T, 4).T.contiguous()

    stored = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.half()}
    return stored, ((codes - zeros[g_idx]) * scales[g_idx]).T


def compressed(weight: torch.Tensor, scheme: Any, chosen: str) -> Made:
    """As compressed-tensors' own library compresses it; the weight by the plain formula."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    args, state, more = scheme.weights, {"weight": weight.bfloat16()}, {}
    grouped = in_groups(weight, 1, args.group_size)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if "nvfp4" in chosen:
        more["global_scale"] = state["weight_global_scale"] = 6 * 448 / weight.abs().amax()[None]
    scale, zero = calculate_qparams(low, high, args, **more)
    state["weight_scale"] = scale.to(weight.dtype if more else torch.bfloat16)
    if not args.symmetric:
        state["weight_zero_point"] = zero
    stored = BaseCompressor.get_value_from_registry(chosen).compress(state, scheme)
    each = spread(stored["weight_scale"].float(), (1, args.group_size), weight.shape)
    packed = stored["weight_packed"].view(torch.uint8)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()
    if more:
        return stored, FP4[codes] * (each / state["weight_global_scale"])
    zeros = 0 if args.symmetric else spread(zero.float(), (1, args.group_size), weight.shape)
    return stored, (codes - 8 - zeros) * each


@dataclass(frozen=True)
class Format:
    """A format as somebody publishes it.

    weight  makes a matrix of it
    config  what config.json declares
    dtype   of the model
    family  that is published so, with `sizes`
    """

    weight: Callable[[str, torch.Tensor], Made]
    config: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    family: str = "qwen3_moe"
    sizes: dict[str, Any] = field(default_factory=dict)


def publish(published: Format, folder: Path, plain: Path, **changes: Any) -> Path:
    """Write a checkpoint into `folder`, and the same values unquantised into `plain`."""
    make_checkpoint(published.family, plain, **{**WIDE, **published.sizes, **changes})
    change_config(plain, dtype=str(published.dtype).removeprefix("torch."))
    change_weights(plain, lambda t: t.update({n: w.to(published.dtype) for n, w in t.items()}))
    shutil.copytree(plain, folder)

    def parts(tensors: Tensors) -> Iterator[tuple[str, Made]]:
        for name in [n for n in tensors if is_matrix(n)]:
            yield name, published.weight(name, tensors[name].float())

    def quantised(tensors: Tensors) -> None:
        for name, (stored, _) in parts(tensors):
            del tensors[name]
            base = name.removesuffix("weight")
            tensors.update({base + part: tensor for part, tensor in stored.items()})

    def dequantised(tensors: Tensors) -> None:
        tensors.update({name: made.to(published.dtype) for name, (_, made) in parts(tensors)})

    change_weights(folder, quantised)
    change_weights(plain, dequantised)
    change_config(folder, quantization_config=published.config)
    return folder


def publish_gpt_oss(folder: Path, plain: Path, **changes: Any) -> Path:
    """gpt-oss in MXFP4: fused experts as blocks of 32, the router and attention unquantised."""
    make_checkpoint("gpt_oss", plain, intermediate_size=64, **changes)
    change_config(plain, dtype="bfloat16")
    change_weights(plain, lambda t: t.update({n: w.bfloat16() for n, w in t.items()}))
    shutil.copytree(plain, folder)

    def experts(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            grouped = in_groups(tensors[name].float().transpose(1, 2), -1, 32)
            scales = power_of_two(grouped.abs().amax(-1) / 6)
            yield name, scales, fp4_codes(grouped / scales.float()[..., None])

    def quantised(tensors: Tensors) -> None:
        for name, scales, codes in list(experts(tensors)):
            del tensors[name]
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = (
                pairs(codes),
                scales.view(torch.uint8),
            )

    def dequantised(tensors: Tensors) -> None:
        for name, scales, codes in list(experts(tensors)):
            values = FP4[codes.int()] * scales.float()[..., None]
            tensors[name] = values.flatten(-2).transpose(1, 2).bfloat16()

    change_weights(folder, quantised)
    change_weights(plain, dequantised)
    kept = [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    change_config(
        folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept}
    )
    return folder


def _scheme(chosen: str, symmetric: bool = True) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "group_size": 32}
    weights["strategy"] = "group"
    if chosen == "nvfp4-pack-quantized":
        weights |= {"type": "float", "group_size": 16, "strategy": "tensor_group"}
    if chosen == "mxfp4-pack-quantized":
        weights |= {"type": "float", "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return {"targets": ["Linear"], "weights": weights}


def _compressed(chosen: str, **more: Any) -> Format:
    from compressed_tensors.quantization import QuantizationScheme

    scheme = _scheme(chosen, **more)
    return Format(
        lambda _, weight: compressed(weight, QuantizationScheme.model_validate(scheme), chosen),
        {
            "quant_method": "compressed-tensors",
            "format": chosen,
            "quantization_status": "compressed",
            "config_groups": {"group_0": scheme},
            "ignore": ["lm_head", "re:.*mlp.gate$"],
        },
    )


def _eight_bits(kind: str, chosen: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel"}
    dynamic = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": dynamic}
    return {
        "quant_method": "compressed-tensors",
        "format": chosen,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def _of_v4(name: str, weight: torch.Tensor) -> Made:
    return fp4_e8m0(weight) if ".experts." in name else fp8_e8m0(weight)


BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def formats() -> dict[str, Format]:
    """Every format but that of gpt-oss, by a name for tests."""
    return {
        "fp8-block": Format(lambda _, w: fp8_block(w), BLOCKS),
        "fp8-block-cut-off": Format(
            lambda _, w: fp8_block(w),
            BLOCKS,
            sizes={"hidden_size": 320, "moe_intermediate_size": 192},
        ),
        "fp8-block-deepseek": Format(
            lambda _, w: fp8_block(w),
            BLOCKS | {"scale_fmt": "ue8m0"},
            family="deepseek_v3",
            sizes={"kv_lora_rank": 112, "q_lora_rank": 128},
        ),
        "fp8-block-minimax": Format(
            lambda _, w: fp8_block(w),
            BLOCKS | {"modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]},
            family="minimax_m2",
        ),
        "fp8-tensor": Format(
            lambda _, w: fp8_tensor(w), {"quant_method": "modelopt", "quant_algo": "FP8"}
        ),
        "fp8-row": Format(lambda _, w: fp8_row(w), _eight_bits("float", "float-quantized")),
        "int8-row": Format(lambda _, w: int8_row(w), _eight_bits("int", "int-quantized")),
        "e8m0": Format(_of_v4, BLOCKS | {"scale_fmt": "ue8m0"}),
        "int4-group": _compressed("pack-quantized"),
        "int4-group-zeros": _compressed("pack-quantized", symmetric=False),
        "nvfp4-compressed": _compressed("nvfp4-pack-quantized"),
        "mxfp4-compressed": replace(
            _compressed("mxfp4-pack-quantized"), weight=lambda _, w: mxfp4_packed(w)
        ),
        "nvfp4-modelopt": Format(
            lambda _, w: nvfp4(w), {"quant_method": "modelopt", "quant_algo": "NVFP4"}
        ),
        "awq": Format(
            lambda _, w: awq(w),
            {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
            | {"version": "gemm", "modules_to_not_convert": ["mlp.gate."]},
            torch.float16,
        ),
        "gptq": Format(
            lambda _, w: gptq(w),
            {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False},
            torch.float16,
        ),
        "gptq-8bit-v2": Format(
            lambda _, w: gptq(w, bits=8, v2=True),
            {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": True, "sym": False}
            | {"checkpoint_format": "gptq_v2"},
            torch.float16,
        ),
        "gptq-3bit": Format(
            lambda _, w: gptq(w, bits=3),
            {"quant_method": "gptq", "bits": 3, "group_size": 64, "desc_act": True, "sym": False},
            torch.float16,
        ),
    }
