"""Models whose weights are in llama.cpp's blocks: the file's own bits, and text that no policy
changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from gguf.constants import GGMLQuantizationType as Kind
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.checkpoint.source import ModelSource
from moerun.format.blocks import dequantise_blocks
from moerun.format.precision import BLOCK_SCHEMES
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.offload.load import load_offloaded
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.families import FAMILIES, SMALL
from support.gguf_files import gguf_of
from support.runs import ResidentProvider

IDS = torch.tensor([[5, 9, 17, 101, 64, 3, 77, 9, 12, 1, 33, 90]])
KINDS = {"q4_0": Kind.Q4_0, "q8_0": Kind.Q8_0}


def packed(family: str, precision: str, folder: Path) -> tuple[Path, Path, ExpertStore]:
    """A GGUF file whose matrices are of one type, its values as a checkpoint, and the store."""
    kind, sizes = FAMILIES[family]
    config = kind(**{**SMALL, **sizes, "norm_topk_prob": True})
    file, checkpoint = gguf_of(family, folder, lambda _name: KINDS[precision], config)
    store = pack(file, folder / "store", precision=precision, attention=precision)
    return file, checkpoint, store


@pytest.mark.parametrize(("family", "precision"), [("mixtral", "q4_0"), ("qwen3_moe", "q8_0")])
def test_a_file_is_kept_to_the_bit_and_computed_near_stock(
    family: str, precision: str, tmp_path: Path
) -> None:
    file, checkpoint, store = packed(family, precision, tmp_path)
    source = ModelSource(file)
    record = torch.empty(store.record_bytes, dtype=torch.uint8)
    store.read_into(3, record)
    views = store.layout.views(record)
    for name, wanted in source.read_expert(0, 3).items():
        parts = {part: views[f"{name}.{part}"] for part in ("codes", "scales")}
        kept = dequantise_blocks(parts, BLOCK_SCHEMES[precision], len(wanted))
        assert torch.equal(kept, wanted)
    source.close()
    assert store.index.attention is not None
    ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    stock = tf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits, wanted = ours(IDS).logits.float(), stock(IDS).logits
    # Activations of 8 bits in 32 blocks, and of bfloat16 elsewhere.
    assert (logits - wanted).norm() < 0.1 * wanted.norm()


def test_no_policy_changes_a_token(tmp_path: Path) -> None:
    _, _, store = packed("qwen3_moe", "q4_0", tmp_path)
    sampling = replace(Sampling(), stop=False, max_new_tokens=12)
    told = []
    for policy, slots in (("lru", store.n_experts), ("lru", 2), ("foresight-bypass", 3)):
        with Runner(store, Settings(policy=find_policy(policy), slots=slots)) as runner:
            done = runner.generation().run(IDS, sampling)
            told.append(done.token_ids)
            assert (done.totals.hit_ratio < 1) == (slots < store.n_experts) or not told[1:]
    assert told[0] == told[1] == told[2]
    assert len(told[0]) == 12


def test_a_plain_checkpoint_is_quantised_to_blocks(tmp_path: Path) -> None:
    tiny = resolve("tiny")
    store = pack(tiny, tmp_path / "store", precision="q8_0", attention="q8_0")
    with Runner(store, Settings(policy=find_policy("lru"), slots=4)) as runner:
        ids = runner.encode("Once upon a time")
        text = runner.generation().run(ids, Sampling(max_new_tokens=12)).text
    with Runner(
        pack(tiny, tmp_path / "native"), Settings(policy=find_policy("lru"), slots=4)
    ) as runner:
        assert runner.generation().run(ids, Sampling(max_new_tokens=12)).text == text
