"""Trains the bundled model: a byte-level BPE tokenizer and a small MixtralForCausalLM, on one core.

    python runtime/training/tiny_train.py pg1342.txt pg2600.txt tinyshakespeare.txt --out work/tiny

Seeded, and resumable: killed at any moment, the same command goes on from the last checkpoint (the
batch of a step depends on the seed and the step alone). Where the books are is in tiny_corpus.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tiny_corpus import Source, read_sources
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

END_OF_TEXT = "<|endoftext|>"
BALANCE_WEIGHT = 0.01  # a layer
Z_WEIGHT = 0.001  # a layer
WARM_UP_STEPS = 100
DECAY_SHARE = 0.3  # of all steps, at the end: until then a run may still be made longer or shorter
CHECKPOINT_EVERY_S = 240.0


@dataclass(frozen=True)
class Shape:
    """The sizes that decide what the model weighs: 15.5 MB in fp16 as they stand."""

    vocabulary: int = 4096
    hidden: int = 128
    intermediate: int = 256
    layers: int = 8
    experts: int = 8
    top_k: int = 2
    heads: int = 4
    kv_heads: int = 2
    context: int = 512


def train_tokenizer(sources: list[Source], shape: Shape) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the training part of all sources; any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = (document for source in sources for document in source.split()[0])
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=shape.context,
    )


def token_streams(
    sources: list[Source], tokenizer: PreTrainedTokenizerFast
) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Per kind of text, the training tokens of each source, documents parted by end of text."""
    streams: dict[str, list[np.ndarray[Any, Any]]] = {}
    end = tokenizer.eos_token_id
    for source in sources:
        ids: list[int] = []
        encoded = tokenizer.backend_tokenizer.encode_batch(source.split()[0])
        for document in encoded:
            ids += [end, *document.ids]
        streams.setdefault(source.kind, []).append(np.array(ids, dtype=np.int64))
    return streams


def build_model(shape: Shape, seed: int) -> MixtralForCausalLM:
    """A fresh model whose residual stream is led by the embedding, as in a model of full size."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=shape.context,
        sliding_window=None,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = MixtralForCausalLM(config)
    branch_std = 0.5 / math.sqrt(shape.hidden * 2 * shape.layers)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=0.3)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.normal_(std=branch_std)
            layer.mlp.experts.down_proj.normal_(std=branch_std)
            layer.mlp.experts.gate_up_proj.normal_(std=1 / math.sqrt(shape.hidden))
    return model


def bfloat16_experts(self: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The experts of one layer for training: tokens sorted by expert, products in bfloat16.

    (Autocast does not reach grouped products, and on AVX512-BF16 they run four times as fast so.)
    """
    order = ids.flatten().argsort()
    ends = ids.flatten().bincount(minlength=self.num_experts).cumsum(0).int()
    rows = hidden.bfloat16()[order // ids.shape[1]]
    inner = functional.grouped_mm(rows, self.gate_up_proj.bfloat16().mT, offs=ends)
    gate, up = inner.chunk(2, dim=-1)
    outer = functional.grouped_mm(self.act_fn(gate) * up, self.down_proj.bfloat16().mT, offs=ends)
    weighted = outer * weights.flatten()[order, None].bfloat16()
    by_token = weighted[order.argsort()].view(*ids.shape, -1)
    return by_token.sum(1).to(hidden.dtype)


def use_training_kernels(model: MixtralForCausalLM) -> None:
    """Make the model compute as fast as one AVX512-BF16 core trains it; nothing of it is saved."""
    ALL_EXPERTS_FUNCTIONS.register("bfloat16", bfloat16_experts)
    model.set_experts_implementation("bfloat16")
    model.set_attn_implementation("eager")  # twice as fast as the flash kernel in bfloat16 here


def router_losses(router_logits: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """Load-balancing and z-loss, each a sum over layers, every layer [T, E] balanced by itself.

    (Balanced over pooled layers, one that sends all its tokens to two experts can hide.)
    """
    balance, z = router_logits[0].new_zeros(()), router_logits[0].new_zeros(())
    for raw in router_logits:
        logits = raw.float()
        chances = logits.softmax(-1)
        chosen = functional.one_hot(logits.topk(top_k).indices, logits.shape[-1]).sum(1).float()
        balance = balance + logits.shape[-1] * (chosen.mean(0) / top_k * chances.mean(0)).sum()
        z = z + logits.logsumexp(-1).square().mean()
    return balance, z


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by five Newton-Schulz steps, for matrices and stacks of matrices."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(gradient))
                buffer.lerp_(gradient, 1 - group["momentum"])
                update = orthogonalise(gradient.lerp(buffer, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(gradient.shape[-2:]) ** 0.5)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with unit singular values, roughly: [..., m, n] to the same shape."""
    wide = matrix.shape[-1] >= matrix.shape[-2]
    x = (matrix if wide else matrix.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x if wide else x.mT
    return result.to(matrix.dtype)


def build_optimizers(model: MixtralForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for what multiplies inside a layer; AdamW for embeddings, head, gates and norms."""
    inner: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or any(part in name for part in ("embed", "lm_head", "gate.w"))
        (rest if plain else inner).append(parameter)
    adam = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(inner, lr=rate), adam]


def rate_share(step: int, steps: int) -> float:
    """The share of the full learning rate at a step: warm-up, level, then linearly to zero."""
    decay_steps = max(1, int(steps * DECAY_SHARE))
    return min((step + 1) / WARM_UP_STEPS, 1.0, (steps - step) / decay_steps)


def draw_batch(
    streams: dict[str, list[np.ndarray[Any, Any]]], rows: int, context: int, seed: int, step: int
) -> Tensor:
    """Windows [rows, context+1], as many of each kind, from anywhere in that kind's sources."""
    rng = np.random.default_rng([seed, step])
    kinds = sorted(streams)
    windows = []
    for row in range(rows):
        parts = streams[kinds[row % len(kinds)]]
        sizes = np.array([len(part) for part in parts], dtype=np.float64)
        part = parts[rng.choice(len(parts), p=sizes / sizes.sum())]
        start = int(rng.integers(0, len(part) - context))
        windows.append(part[start : start + context + 1])
    return torch.from_numpy(np.stack(windows))


def losses(model: MixtralForCausalLM, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy (nats a token) and the two router losses of one batch [B, context+1]."""
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.model(batch[:, :-1], output_router_logits=True, use_cache=False)
        logits = model.lm_head(outputs.last_hidden_state)
    entropy = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    balance, z = router_losses(outputs.router_logits, model.config.num_experts_per_tok)
    return entropy, balance, z


def keep_freed_memory() -> None:
    """Lets glibc keep large blocks: faulting fresh pages in at each step costs half the speed."""
    if sys.platform == "linux":
        allocator = ctypes.CDLL(None)
        allocator.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        allocator.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Written under another name and renamed: a kill leaves the checkpoint before."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(
    model: MixtralForCausalLM,
    streams: dict[str, list[np.ndarray[Any, Any]]],
    *,
    out: Path,
    steps: int,
    rows: int,
    rate: float,
    seed: int,
) -> None:
    """Runs to `steps`, from `out/state.pt` where there is one, saving there as it goes."""
    optimizers, first, state_file = build_optimizers(model, rate), 0, out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first = state["step"]
    context = model.config.max_position_embeddings
    saved_at = started = time.monotonic()
    model.train()
    for step in range(first, steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_share(step, steps)
        entropy, balance, z = losses(model, draw_batch(streams, rows, context, seed, step))
        loss = entropy + BALANCE_WEIGHT * balance + Z_WEIGHT * z
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 19:
            speed = (step + 1 - first) * rows * context / (time.monotonic() - started)
            typer.echo(
                f"step {step + 1}/{steps}  {entropy.item():.4f} nats/token  balance a layer "
                f"{balance.item() / model.config.num_hidden_layers:.4f}  {speed:,.0f} tokens/s",
                err=True,
            )
        if time.monotonic() - saved_at > CHECKPOINT_EVERY_S or step + 1 == steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "optimizers": states, "step": step + 1}
            save_state(state_file, state)
            saved_at = time.monotonic()


def main(
    texts: Annotated[list[Path], typer.Argument(help="Text files or folders of them.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder for the model and the training state.")],
    python: Annotated[bool, typer.Option(help="Also this Python's library and topics.")] = True,
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 1500,
    rows: Annotated[int, typer.Option(help="Windows a step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    seed: Annotated[int, typer.Option(help="Decides weights and batches.")] = 0,
) -> None:
    """Train tokenizer and model, and save both as a checkpoint in fp16."""
    torch.set_num_threads(1)
    keep_freed_memory()
    out.mkdir(parents=True, exist_ok=True)
    shape, sources = Shape(), read_sources(texts, python=python)
    tokenizer = train_tokenizer(sources, shape)
    streams = token_streams(sources, tokenizer)
    model = build_model(shape, seed)
    use_training_kernels(model)
    train(model, streams, out=out, steps=steps, rows=rows, rate=rate, seed=seed)
    model.half().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


if __name__ == "__main__":
    typer.run(main)
