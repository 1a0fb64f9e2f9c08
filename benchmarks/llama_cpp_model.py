"""The models that `llama_cpp.py` runs: true widths, few layers, random weights, one GGUF file each.

Matrices of attention and experts are random blocks of Q4_0; embedding and head are bfloat16, gates
and norms float32. `moerun pack` packs the same file at q4_0, which keeps the blocks' codes and
scales. A gate's rows have a part that all tokens share, so that some experts are used more than
others, as in recorded routing. That popularity is synthetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Kind

BLOCK, BLOCK_BYTES = 32, 18
GAIN = 0.5  # of a matrix: the size of what it gives, for inputs of size 1
SHARED = 0.5  # of an embedding: its part that all tokens share, beside a random part of size 1
TOKENIZER_TOKENS = 300


@dataclass(frozen=True)
class Shape:
    """A model's sizes. ``popularity`` is the spread of the gates' logits that all tokens share,
    beside that of a token's own, 1."""

    name: str
    architecture: str
    hidden: int
    inner: int
    heads: int
    key_value_heads: int
    head_width: int
    experts: int
    top_k: int
    layers: int
    vocabulary: int
    popularity: float

    @property
    def expert_bytes(self) -> int:
        """Bytes of an expert's blocks."""
        return 3 * self.hidden * self.inner // BLOCK * BLOCK_BYTES

    @property
    def all_experts_bytes(self) -> int:
        return self.layers * self.experts * self.expert_bytes

    @property
    def attention_bytes(self) -> int:
        """Bytes of a layer's projections."""
        width = (2 * self.heads + 2 * self.key_value_heads) * self.head_width
        return width * self.hidden // BLOCK * BLOCK_BYTES

    @property
    def head_bytes(self) -> int:
        return 2 * self.vocabulary * self.hidden

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything that is no expert."""
        gates = 4 * self.layers * self.experts * self.hidden
        return self.layers * self.attention_bytes + 2 * self.head_bytes + gates

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that one token reads."""
        gates = 4 * self.experts * self.hidden
        layer = self.attention_bytes + self.top_k * self.expert_bytes + gates
        return self.layers * layer + self.head_bytes


# The vocabulary is that of the whole model cut in proportion to the layers, so that the head has
# the share of a token's time that it has in the whole model.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral-8x7b", "llama", 4096, 14336, 32, 8, 128, 8, 2, 2, 2000, 0.5),
        Shape("qwen3-30b-a3b", "qwen3moe", 2048, 768, 32, 4, 128, 128, 8, 5, 15840, 0.5),
        Shape("tiny-mixtral", "llama", 64, 96, 4, 2, 16, 4, 2, 2, 320, 0.5),
        Shape("tiny-qwen3", "qwen3moe", 64, 32, 4, 2, 16, 8, 2, 2, 320, 0.5),
    )
}
"""The tiny ones are for tests of the script."""

Tensor = tuple[str, tuple[int, ...], Kind]


def write_gguf(shape: Shape, path: Path, seed: int = 0) -> None:
    """Write the model, a tensor in memory at a time; a file that is there is left as it is."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, shape.architecture)
    _add_fields(writer, shape)
    tensors = list(_tensors(shape))
    for name, size, kind in tensors:
        n_bytes = int(np.prod(size)) * (4 if kind is Kind.F32 else 2)
        stored = size
        if kind is Kind.Q4_0:
            stored = (*size[:-1], size[-1] // BLOCK * BLOCK_BYTES)
            n_bytes = int(np.prod(stored))
        plain = np.dtype(np.float32 if kind is Kind.F32 else np.uint8)
        if kind is Kind.BF16:
            stored = (*size[:-1], size[-1] * 2)
        writer.add_tensor_info(name, stored, plain, n_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, tensor in enumerate(tensors):
        writer.write_tensor_data(_draw(shape, tensor, np.random.default_rng([seed, number])))
    writer.close()
    partial.rename(path)


def _add_fields(writer: Any, shape: Shape) -> None:
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_expert_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocabulary)
    # Tokens are given by number; llama.cpp and transformers want a tokenizer all the same.
    words = [chr(0x4E00 + i) for i in range(shape.vocabulary - 3)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b", "ab", *words])
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def _tensors(shape: Shape) -> Iterator[Tensor]:
    hidden, inner, experts = shape.hidden, shape.inner, shape.experts
    queries, keys = shape.heads * shape.head_width, shape.key_value_heads * shape.head_width
    yield "token_embd.weight", (shape.vocabulary, hidden), Kind.BF16
    for layer in range(shape.layers):
        at = f"blk.{layer}."
        yield f"{at}attn_norm.weight", (hidden,), Kind.F32
        yield f"{at}attn_q.weight", (queries, hidden), Kind.Q4_0
        yield f"{at}attn_k.weight", (keys, hidden), Kind.Q4_0
        yield f"{at}attn_v.weight", (keys, hidden), Kind.Q4_0
        yield f"{at}attn_output.weight", (hidden, queries), Kind.Q4_0
        if shape.architecture == "qwen3moe":
            yield f"{at}attn_q_norm.weight", (shape.head_width,), Kind.F32
            yield f"{at}attn_k_norm.weight", (shape.head_width,), Kind.F32
        yield f"{at}ffn_norm.weight", (hidden,), Kind.F32
        yield f"{at}ffn_gate_inp.weight", (experts, hidden), Kind.F32
        yield f"{at}ffn_gate_exps.weight", (experts, inner, hidden), Kind.Q4_0
        yield f"{at}ffn_up_exps.weight", (experts, inner, hidden), Kind.Q4_0
        yield f"{at}ffn_down_exps.weight", (experts, hidden, inner), Kind.Q4_0
    yield "output_norm.weight", (hidden,), Kind.F32
    yield "output.weight", (shape.vocabulary, hidden), Kind.BF16


def _draw(shape: Shape, tensor: Tensor, random: np.random.Generator) -> np.ndarray:
    name, size, kind = tensor
    if kind is Kind.Q4_0:
        return _blocks(size, random)
    if "norm" in name:
        return np.ones(size, np.float32)
    values = random.standard_normal(size, np.float32)
    shared = np.random.default_rng(0).standard_normal(shape.hidden).astype(np.float32)
    if name.startswith("token_embd"):
        values += SHARED * shared
    elif "ffn_gate_inp" in name:
        liked = random.standard_normal((size[0], 1)).astype(np.float32)
        # The norm before the gate leaves the shared part as this share of its input.
        share = SHARED / math.sqrt(1 + SHARED**2)
        # A random row would have a part along it that makes its expert more or less popular, too.
        values -= np.outer(values @ shared, shared) / (shared @ shared)
        values /= math.sqrt(shape.hidden)
        values += shape.popularity * liked * shared / shape.hidden / share
    else:
        values /= math.sqrt(shape.hidden)
    return values if kind is Kind.F32 else _bfloat16(values)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    words = values.view(np.uint32)
    rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint8)


def _blocks(size: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Q4_0 blocks of weights around 0, each with a code 0 as llama.cpp's quantiser makes them."""
    n = int(np.prod(size)) // BLOCK
    blocks = random.integers(0, 256, (n, BLOCK_BYTES), dtype=np.uint8)
    blocks[:, 2] &= 0xF0
    spread = GAIN / math.sqrt(size[-1]) / 4.6  # codes around 8 have a spread of 4.6
    scales = random.uniform(0.5 * spread, 1.5 * spread, n).astype(np.float16)
    blocks[:, :2] = scales.view(np.uint8).reshape(n, 2)
    return blocks.reshape(*size[:-1], size[-1] // BLOCK * BLOCK_BYTES)
