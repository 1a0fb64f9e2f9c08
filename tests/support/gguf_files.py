"""GGUF files of small models, as llama.cpp's converter writes them: conversion/ in its repository.

Names come from the package gguf (`get_tensor_name_map`), blocks from its quantisers; types without
a quantiser get random blocks. The checkpoint beside each file has the values in the blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as tf
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

TypeOf = Callable[[str], Kind]
Stored = tuple[np.ndarray, Kind]  # bytes or values of a tensor, and its type
_HALF_SCALES = {  # where the float16 scales of a block lie, so that random ones can be small
    **{Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2)},
    **{Kind.Q6_K: (208,), Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,), Kind.IQ2_XXS: (0,)},
    **{Kind.IQ2_XS: (0,), Kind.IQ2_S: (0,), Kind.IQ3_XXS: (0,), Kind.IQ3_S: (0,)},
    **{Kind.IQ1_S: (0,), Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2)},
    **{Kind.Q8_0: (0,), Kind.TQ1_0: (52,), Kind.TQ2_0: (64,)},
}
ARCHITECTURES = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "glm4_moe": "glm4moe",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "granitemoe": "granitemoe",
    "minimax_m2": "minimax-m2",
}


def random_blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """uint8[rows, bytes of a row] of blocks with small scales."""
    elements, n_bytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // elements, n_bytes), dtype=np.uint8)
    for at in _HALF_SCALES.get(kind, ()):
        scales = rng.uniform(-2e-3, 2e-3, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind is Kind.MXFP4:
        blocks[:, 0] = rng.integers(118, 124, len(blocks))
    if kind is Kind.IQ1_M:  # its scale is in the high bits of four words
        blocks[:, 48:56:2] &= 0x0F
        blocks[:, 49:56:2] &= 0x0F
        blocks[:, 55] |= 0x10
    return blocks.reshape(rows, -1)


def stored(values: torch.Tensor, kind: Kind) -> Stored:
    """A matrix as the file holds it: float32 where its rows are no whole blocks."""
    array = values.float().numpy()
    if kind is Kind.F32 or array.ndim < 2 or array.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        return array, Kind.F32
    if kind is Kind.BF16:
        return values.bfloat16().view(torch.int16).numpy().view(np.uint8), kind
    try:
        return quantize(array, kind), kind
    except NotImplementedError:
        return random_blocks(kind, *array.shape), kind


def values_in(held: Stored) -> torch.Tensor:
    """What the stored matrix stands for, float32."""
    return torch.from_numpy(np.array(dequantize(held[0], held[1]), dtype=np.float32))


class Converter:
    """Writes a checkpoint folder as GGUF, and its weights again with the values of the blocks."""

    def __init__(self, folder: Path, family: str, type_of: TypeOf, *, old: bool = False) -> None:
        """``old``: kv_b of DeepSeek in one piece, as files had it before April 2025."""
        self.folder, self.family, self.type_of, self.old = folder, family, type_of, old
        self.config = json.loads((folder / "config.json").read_text())
        arch = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == ARCHITECTURES[family])
        self._names = gguf.get_tensor_name_map(arch, self.config["num_hidden_layers"])
        self._given = load_file(folder / "model.safetensors")
        self._values: dict[str, torch.Tensor] = {}

    def tensors(self) -> dict[str, Stored]:
        """The file's tensors by their published names."""
        made: dict[str, Stored] = {}
        experts: dict[str, dict[int, Stored]] = {}
        for name, tensor in self._given.items():
            for part, held in self._converted(name, tensor):
                if match := re.search(r"\.experts\.(\d+)\.", part):
                    merged = part.replace(match[0], ".experts.")
                    experts.setdefault(merged, {})[int(match[1])] = held
                else:
                    made[self._published(part)] = held
        for name, each in experts.items():
            stacked = np.stack([each[n][0] for n in range(len(each))])
            made[self._published(name)] = stacked, each[0][1]
        return made

    @staticmethod
    def _block(name: str) -> str:
        return "blk." + name.split(".layers.")[1].split(".", maxsplit=1)[0]

    def _published(self, name: str) -> str:
        if name.startswith("blk."):
            return name
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        return found if found.endswith((".weight", ".bias")) else f"{found}.weight"

    def _converted(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Stored]]:
        special = getattr(self, f"_of_{self.family}", self._plain)
        yield from special(name, tensor)

    def _plain(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Stored]]:
        held = self._held(name, tensor)
        yield name, (held[0].squeeze(0) if "moe_statics" in name else held[0], held[1])

    def _held(self, name: str, tensor: torch.Tensor) -> Stored:
        routers = ("gate.weight", "router", "shared_expert_gate")
        kind = Kind.F32 if any(part in name for part in routers) else self.type_of(name)
        held = stored(tensor, kind)
        self._values[name] = values_in(held)
        return held

    def _of_mixtral(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Stored]]:
        heads = {
            "q_proj.weight": self.config["num_attention_heads"],
            "k_proj.weight": self.config["num_key_value_heads"],
        }
        count = next((n for end, n in heads.items() if name.endswith(end)), None)
        data, kind = self._held(name, tensor)
        if count is not None:
            half = data.shape[0] // count // 2
            data = data.reshape(count, 2, half, -1).swapaxes(1, 2).reshape(data.shape)
        yield name, (data, kind)

    def _of_granitemoe(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Stored]]:
        if name.endswith("block_sparse_moe.input_linear.weight"):
            halves = tensor.chunk(2, dim=1)
            kept = [self._stack(f"{name}.{n}", half) for n, half in enumerate(halves)]
            whole = [self._values.pop(f"{name}.{n}") for n in range(2)]
            self._values[name] = torch.cat(whole, dim=1)
            for which, held in zip(("gate", "up"), kept, strict=True):
                yield f"{self._block(name)}.ffn_{which}_exps.weight", held
        elif name.endswith("output_linear.weight"):
            yield f"{self._block(name)}.ffn_down_exps.weight", self._stack(name, tensor)
        else:
            yield from self._of_mixtral(name, tensor)

    def _stack(self, name: str, tensor: torch.Tensor) -> Stored:
        held = [stored(each, self.type_of(name)) for each in tensor]
        self._values[name] = torch.stack([values_in(each) for each in held])
        return np.stack([data for data, _ in held]), held[0][1]

    def _of_deepseek_v2(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Stored]]:
        if self.old or not name.endswith("kv_b_proj.weight"):
            yield from self._plain(name, tensor)
            return
        self._values[name] = tensor
        nope, v = self.config["qk_nope_head_dim"], self.config["v_head_dim"]
        split = tensor.view(self.config["num_attention_heads"], nope + v, -1).float()
        keys, values = torch.split(split, [nope, v], dim=1)
        yield name.replace("kv_b", "k_b"), (keys.transpose(1, 2).numpy().copy(), Kind.F32)
        yield name.replace("kv_b", "v_b"), (values.numpy().copy(), Kind.F32)

    _of_deepseek_v3 = _of_deepseek_v2

    def _of_gpt_oss(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, Stored]]:
        if name.endswith("sinks"):
            self._values[name] = tensor
            yield f"{name}.weight", (tensor.float().numpy(), Kind.F32)
        elif "gate_up_proj" in name:
            turned = tensor if name.endswith("bias") else tensor.transpose(1, 2)
            kept = []
            for start, which in enumerate(("gate_proj", "up_proj")):
                part = turned[:, start::2].contiguous()
                end = ".bias" if name.endswith("bias") else ".weight"
                named = re.sub(r"gate_up_proj(_bias)?$", f"{which}{end}", name)
                held = self._stack(named, part) if end == ".weight" else stored(part, Kind.F32)
                kept.append(self._values.pop(named, part))
                yield named, held
            whole = torch.stack(kept, dim=2).flatten(1, 2)
            self._values[name] = whole if name.endswith("bias") else whole.transpose(1, 2)
        elif name.endswith("down_proj"):
            held = self._stack(f"{name}.weight", tensor.transpose(1, 2).contiguous())
            self._values[name] = self._values.pop(f"{name}.weight").transpose(1, 2)
            yield f"{name}.weight", held
        elif name.endswith("down_proj_bias"):
            self._values[name] = tensor
            yield name.replace("_bias", ".bias"), (tensor.float().numpy(), Kind.F32)
        else:
            yield from self._plain(name, tensor)

    def write(self, out: Path, **options: Any) -> Path:
        """The GGUF file, of several parts with ``split_max_tensors``; the checkpoint's weights
        become the values in the blocks, as float32."""
        writer = gguf.GGUFWriter(out, ARCHITECTURES[self.family], **options)
        tensors = self.tensors()
        fields(writer, self.family, self.config)
        vocabulary(writer, self.folder)
        for name, (data, kind) in tensors.items():
            plain = data.dtype in (np.float32, np.float16)
            writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=None if plain else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        kept = {name: value.contiguous() for name, value in self._values.items()}
        save_file(kept, self.folder / "model.safetensors", metadata={"format": "pt"})
        return out


def fields(writer: gguf.GGUFWriter, family: str, config: dict[str, Any]) -> None:
    """The metadata, from a config.json, as the converter's class of the family writes it."""
    get, add = config.get, writer
    add.add_context_length(config["max_position_embeddings"])
    add.add_embedding_length(config["hidden_size"])
    add.add_feed_forward_length(config["intermediate_size"])
    add.add_block_count(config["num_hidden_layers"])
    add.add_head_count(config["num_attention_heads"])
    latent = family.startswith("deepseek")
    add.add_head_count_kv(1 if latent else config["num_key_value_heads"])
    add.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    add.add_layer_norm_rms_eps(config["rms_norm_eps"])
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    add.add_expert_count(next(config[name] for name in experts if name in config))
    add.add_expert_used_count(get("num_experts_per_tok") or config["moe_k"])
    width = get("moe_intermediate_size")
    if family in ("gpt_oss", "minimax_m2"):
        width = config["intermediate_size"]
    if width:
        add.add_expert_feed_forward_length(width)
    head = get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if get("head_dim") and not latent:
        add.add_key_length(head)
        add.add_value_length(head)
    shared = get("n_shared_experts") or get("moe_num_shared_experts")
    if shared:
        add.add_expert_shared_count(shared)
    if get("first_k_dense_replace") is not None:
        add.add_leading_dense_block_count(config["first_k_dense_replace"])
    if get("routed_scaling_factor") is not None:
        add.add_expert_weights_scale(config["routed_scaling_factor"])
    if get("norm_topk_prob") and family not in ("qwen3_moe",):
        add.add_expert_weights_norm(True)
    if get("n_group"):
        add.add_expert_group_count(config["n_group"])
        add.add_expert_group_used_count(config["topk_group"])
    _of_one_family(add, family, config, head)


def _of_one_family(add: gguf.GGUFWriter, family: str, config: dict[str, Any], head: int) -> None:
    rope = config["rope_parameters"]
    if family == "qwen2_moe":
        add.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if family == "gpt_oss":
        add.add_sliding_window(config["sliding_window"])
        add.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        add.add_rope_scaling_factor(rope["factor"])
        add.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if family == "glm4_moe":
        add.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 0.5)))
    if family == "minimax_m2":
        add.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    if family == "ernie4_5_moe":
        add.add_leading_dense_block_count(config["moe_layer_start_index"])
        add.add_interleave_moe_layer_step(config["moe_layer_interval"])
    if family == "granitemoe":
        add.add_embedding_scale(config["embedding_multiplier"])
        add.add_residual_scale(config["residual_multiplier"])
        add.add_attention_scale(config["attention_multiplier"])
        add.add_logit_scale(config["logits_scaling"])
    if family.startswith("deepseek"):
        if config.get("q_lora_rank"):
            add.add_q_lora_rank(config["q_lora_rank"])
        rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
        add.add_kv_lora_rank(rank)
        add.add_key_length(rank + turned)
        add.add_value_length(rank)
        add.add_key_length_mla(config["qk_nope_head_dim"] + turned)
        add.add_value_length_mla(config["v_head_dim"])
        add.add_rope_dimension_count(turned)
        sigmoid = gguf.ExpertGatingFuncType.SIGMOID
        softmax = gguf.ExpertGatingFuncType.SOFTMAX
        add.add_expert_gating_func(sigmoid if family == "deepseek_v3" else softmax)


def vocabulary(writer: gguf.GGUFWriter, folder: Path) -> None:
    """The tokenizer of a folder, where it is byte-level BPE; none where there is no tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return
    described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(False)


def gguf_of(
    family: str, out: Path, type_of: TypeOf, config: Any, *, old: bool = False, **options: Any
) -> tuple[Path, Path]:
    """A GGUF file of a random model of ``family``, and the checkpoint of the same values."""
    torch.manual_seed(0)
    folder = out / "checkpoint"
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in [*model.parameters(), *model.buffers()]:
            if parameter.is_floating_point() and parameter.ndim:
                parameter.normal_(mean=float(parameter.ndim == 1), std=0.15)
    model.save_pretrained(folder)
    return Converter(folder, family, type_of, old=old).write(out / "model.gguf", **options), folder
