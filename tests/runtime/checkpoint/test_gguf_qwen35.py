"""The GGUF architecture whose configuration and names transformers' own loader gives: qwen35moe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from gguf.constants import GGMLQuantizationType as Kind
from moerun.checkpoint.gguf.config import gguf_config
from moerun.offload.load import load_offloaded
from moerun.store.pack import pack
from support.gguf_files import stored, values_in
from support.runs import ResidentProvider

SIZES: dict[str, Any] = {
    **{"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_experts": 4},
    **{"num_experts_per_tok": 3, "moe_intermediate_size": 32, "max_position_embeddings": 128},
    **{"shared_expert_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 32},
    **{"num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4},
    **{"full_attention_interval": 2, "bos_token_id": 1, "eos_token_id": 2},
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        **{"mrope_section": [2, 1, 1], "mrope_interleaved": True},
    },
}
KEYS, EACH, WIDTH = 2, 2, 8  # key heads, value heads of each, rows of a value head
LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tiled(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Value heads as llama.cpp has them: the first of every key head, then the second of each."""
    heads = rows.reshape(KEYS, EACH, width, *rows.shape[1:])
    return heads.transpose(0, 1).reshape(rows.shape).contiguous()


def written(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor as llama.cpp's converter changes it."""
    if "norm" in name and "linear_attn" not in name:
        return value + 1
    if "shared_expert_gate" in name:
        return value.squeeze(0)
    return delta_net(name, value) if "linear_attn" in name else value


def delta_net(name: str, value: torch.Tensor) -> torch.Tensor:
    """Of a layer of linear attention: the order of value heads, and the decay."""
    if name.endswith("A_log"):
        return tiled(-value.exp(), 1)
    if name.endswith("dt_bias") or "in_proj_a" in name or "in_proj_b" in name:
        return tiled(value, 1)
    if "in_proj_qkv" in name or "conv1d" in name:
        flat, start = value.squeeze(1) if value.dim() == 3 else value, 2 * KEYS * WIDTH
        return torch.cat([flat[:start], tiled(flat[start:], WIDTH)])
    if "out_proj" in name:
        return tiled(value.T, WIDTH).T.contiguous()
    return tiled(value, WIDTH) if "in_proj_z" in name else value


def kept(name: str, value: torch.Tensor) -> torch.Tensor:
    """What is left of the value once llama.cpp's change is undone, in float32."""
    if "norm" in name and "linear_attn" not in name:
        return (value + 1) - 1
    return torch.log(value.exp()) if name.endswith("A_log") else value


def fields(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_rope_dimension_sections([2, 1, 1, 0])
    writer.add_expert_count(4)
    writer.add_expert_used_count(3)
    writer.add_expert_feed_forward_length(32)
    writer.add_expert_shared_feed_forward_length(32)
    writer.add_full_attention_interval(2)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_state_size(8)
    writer.add_ssm_group_count(2)
    writer.add_ssm_time_step_rank(4)
    writer.add_ssm_inner_size(32)
    writer.add_token_list([f"t{n}" for n in range(128)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def blocks(part: torch.Tensor) -> tuple[np.ndarray[Any, Any], torch.Tensor]:
    """Bytes of all experts in Q8_0, and their values."""
    held = [stored(each, Kind.Q8_0) for each in part]
    return np.stack([data for data, _ in held]), torch.stack([values_in(each) for each in held])


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A random model whose weights are those of ``model.gguf`` beside it."""
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(tf.Qwen3_5MoeTextConfig(**SIZES)).eval()
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen35moe")
    fields(writer)
    state = {}
    for name, drawn in made.state_dict().items():
        value = torch.randn_like(drawn) * 0.15
        block = f"blk.{name.split('.')[2]}" if ".layers." in name else ""
        if name.endswith("experts.gate_up_proj"):
            parts = [blocks(half) for half in value.chunk(2, dim=1)]
            for which, (data, _) in zip(("gate", "up"), parts, strict=True):
                named = f"{block}.ffn_{which}_exps.weight"
                writer.add_tensor(named, data, raw_dtype=Kind.Q8_0)
            state[name] = torch.cat([values for _, values in parts], dim=1)
        elif name.endswith("experts.down_proj"):
            data, state[name] = blocks(value)
            writer.add_tensor(f"{block}.ffn_down_exps.weight", data, raw_dtype=Kind.Q8_0)
        else:
            leaf = name.split(".", 3)[-1].removesuffix(".weight")
            ending = ".weight" if name.endswith(".weight") else ""
            published = WHOLE.get(name) or f"{block}.{LEAVES[leaf]}{ending}"
            writer.add_tensor(published, written(name, value).numpy())
            state[name] = kept(name, value)
    made.load_state_dict(state)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@torch.no_grad()
def test_qwen35_equals_stock(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    assert gguf_config(file)["model_type"] == "qwen3_5_moe_text"
    store = pack(file, tmp_path / "store", precision="fp32", dense_precision="fp32")
    ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    ids = torch.tensor([[5, 9, 17, 101, 64, 3, 77, 9, 12, 1, 33, 90]])
    found, expected = ours(ids).logits, model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
