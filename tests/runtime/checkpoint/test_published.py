"""Checkpoints as publishers quantise them: the stock model's logits, in their own bits or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import moerun
import pytest
import torch
import transformers as tf
from moerun.checkpoint.published.table import FORMATS, formats_table
from moerun.checkpoint.source import ModelSource
from moerun.errors import RunError
from moerun.offload.load import load_offloaded
from moerun.store.expert_store import ExpertStore
from moerun.store.index import CODED_VERSION, FORMAT_VERSION
from moerun.store.pack import pack
from safetensors.torch import load_file
from support import checkpoints as made
from support import published
from support.runs import ResidentProvider

GPT_OSS = "mxfp4-gpt-oss"
# Kept at native precision in the bits of the publication, and transformers can load them on a CPU.
KEPT = {
    "fp8-block": ("fp8", True),
    "fp8-block-cut-off": ("fp8", False),  # transformers divides weights into equal blocks
    "fp8-block-deepseek": ("fp8", True),
    "fp8-block-minimax": ("fp8", True),
    "fp8-tensor": ("fp8", False),
    "fp8-row": ("fp8", True),
    "e8m0": ("mxfp4", True),
    "mxfp4-compressed": ("mxfp4", True),
    GPT_OSS: ("mxfp4", True),
}
# Others, and whether transformers can load them. Of compressed-tensors' NVFP4 transformers forgets
# the experts' global scale, of integers of 8 bits and of zeros it says that it cannot.
DEQUANTISED = {
    "int8-row": False,
    "int4-group": True,
    "int4-group-zeros": False,
    "nvfp4-compressed": False,
    "nvfp4-modelopt": False,
    "awq": False,
    "gptq": False,
    "gptq-8bit-v2": False,
    "gptq-3bit": False,
}
OFTEN = ("fp8-block", GPT_OSS, "e8m0", "int4-group", "awq", "gptq", "nvfp4-modelopt")


def among(names: Any) -> list[Any]:
    """All names as parameters, the less common formats among the slow tests."""
    return [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """By format: a published checkpoint and the same values unquantised. Not to be changed."""
    root, done = tmp_path_factory.mktemp("published"), {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in done:
            folder, plain = root / name, root / f"{name}-plain"
            if name == GPT_OSS:
                published.publish_gpt_oss(folder, plain)
            else:
                published.publish(published.formats()[name], folder, plain)
            done[name] = folder, plain
        return done[name]

    return get


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Of a prompt, and of a single token."""
    ids = torch.randint(3, 120, (1, 24), generator=torch.Generator().manual_seed(1))
    return torch.cat([model(ids).logits, model(ids[:, :1]).logits], 1)


def ours(store: ExpertStore) -> torch.Tensor:
    model, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    return logits_of(model)


def stock(folder: Path) -> torch.Tensor:
    config = tf.AutoConfig.from_pretrained(folder)
    described = getattr(config, "quantization_config", None) or {}
    more = {}
    if described.get("quant_method") == "compressed-tensors":
        more = {"quantization_config": tf.CompressedTensorsConfig(dequantize=True)}
    return logits_of(tf.AutoModelForCausalLM.from_pretrained(folder, **more).eval())


@pytest.mark.parametrize("name", among(KEPT))
def test_experts_in_their_own_bits_give_the_stock_models_logits(
    folders: Any, tmp_path: Path, name: str
) -> None:
    folder, plain = folders(name)
    notes: list[str] = []
    with pack(folder, tmp_path / "store", report=notes.append) as store:
        kept, loads = KEPT[name]
        assert store.index.expert_format == kept
        assert any(f"kept in their own bits ({kept})" in note for note in notes)
        n_weights = sum(p.shape[0] * p.shape[1] for p in store.index.shape.params if p.is_matrix)
        bits = 8 * sum(p.nbytes for p in store.layout.parts if not p.name.endswith("bias"))
        assert bits / n_weights < {"fp8": 8.26, "mxfp4": 4.2501}[kept]
        found = ours(store)
        assert torch.equal(found, stock(plain))
        if loads:
            assert torch.equal(found, stock(folder))


@pytest.mark.parametrize("name", among(DEQUANTISED))
def test_what_has_no_kernel_is_kept_dequantised(folders: Any, tmp_path: Path, name: str) -> None:
    folder, plain = folders(name)
    with pack(folder, tmp_path / "store") as store:
        assert store.index.expert_format == "native"
        assert store.layout.parts[0].dtype in (torch.bfloat16, torch.float16)
        found = ours(store)
        assert torch.equal(found, stock(plain))
        if DEQUANTISED[name]:
            assert torch.equal(found, stock(folder))


@pytest.mark.parametrize("name", ["fp8-block", GPT_OSS])
@pytest.mark.parametrize("precision", ["bf16", "4bit"])
def test_requantised_they_are_what_the_unquantised_checkpoint_becomes(
    folders: Any, tmp_path: Path, name: str, precision: str
) -> None:
    one, two = (
        pack(folder, tmp_path / folder.name, precision=precision, attention=attention)
        for folder, attention in zip(
            folders(name), ["4bit" if precision == "4bit" else "native"] * 2, strict=True
        )
    )
    for layer, other in zip(one.index.layers, two.index.layers, strict=True):
        assert layer.crc32 == other.crc32
    assert one.index.dense_crc32 == two.index.dense_crc32
    assert one.index.attention == two.index.attention


def test_in_float32_weights_are_not_rounded_to_16_bits_first(folders: Any) -> None:
    folder, _ = folders("fp8-block")
    stored = load_file(folder / made.WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = stored[name].float()
    scales = published.spread(stored[f"{name}_scale_inv"], (128, 128), weight.shape)
    with closing(ModelSource(folder, dtype=torch.float32)) as source:
        assert torch.equal(dict(source.read_dense())[name], weight * scales)
        assert source.read_expert(0, 0)["down_proj"].dtype == torch.float32


def test_records_hold_the_published_bits_themselves(folders: Any, tmp_path: Path) -> None:
    folder, _ = folders("fp8-block")
    stored = load_file(folder / made.WEIGHTS)
    base = "model.layers.1.mlp.experts.2."
    with pack(folder, tmp_path / "store") as store:
        record = torch.empty(store.record_bytes, dtype=torch.uint8)
        store.read_into(store.n_experts + 2, record)
        views = store.layout.views(record)
    joined = [stored[f"{base}{n}_proj.weight"].view(torch.uint8) for n in ("gate", "up")]
    assert torch.equal(views["gate_up_proj.codes"], torch.cat(joined))
    assert torch.equal(views["down_proj.scales"], stored[f"{base}down_proj.weight_scale_inv"])


def test_stores_with_published_bits_have_a_version_of_their_own(
    folders: Any, tmp_path: Path
) -> None:
    folder, plain = folders("fp8-block")
    with pack(folder, tmp_path / "kept") as kept, pack(plain, tmp_path / "plain") as unquantised:
        assert kept.index.to_json()["version"] == CODED_VERSION
        assert unquantised.index.to_json()["version"] == FORMAT_VERSION


def test_every_format_that_is_read_is_tested_and_listed() -> None:
    read = {each.name for each in FORMATS if each.reader}
    listed = {row["format"] for row in formats_table() if row["read"] == "yes"}
    assert read == listed
    assert len(read) == 9


def test_fused_experts_are_read_one_at_a_time(folders: Any, tmp_path: Path) -> None:
    """As transformers saves a model whose experts it has in FP8."""

    def fuse(tensors: made.Tensors) -> None:
        for layer in range(2):
            base = f"model.layers.{layer}.mlp.experts"
            for part in ("weight", "weight_scale_inv"):
                gate, up, down = (
                    torch.stack([tensors.pop(f"{base}.{e}.{n}_proj.{part}") for e in range(4)])
                    for n in ("gate", "up", "down")
                )
                ending = part.removeprefix("weight")
                tensors[f"{base}.gate_up_proj{ending}"] = torch.cat([gate, up], 1)
                tensors[f"{base}.down_proj{ending}"] = down

    fused = broken(folders, "fp8-block", tmp_path, fuse)
    with (
        pack(fused, tmp_path / "one") as one,
        pack(folders("fp8-block")[0], tmp_path / "two") as two,
    ):
        assert [each.crc32 for each in one.index.layers] == [e.crc32 for e in two.index.layers]


MISSES_ON_CPU = """
from moepolicy import Policy
from moepolicy.kinds import COMPUTE

class MissesOnCpu(Policy):
    requires = frozenset({"cpu"})

    def __init__(self, context): pass
    def on_miss(self, step, rank): return COMPUTE
    def victim(self, layer, incoming, candidates): return int(candidates[0])
"""


@pytest.mark.parametrize("policy", ["lru", "MissesOnCpu"])
@pytest.mark.parametrize("name", ["fp8-block", GPT_OSS])
def test_greedy_tokens_are_stock_generates(
    folders: Any, tmp_path: Path, name: str, policy: str
) -> None:
    """On the CPU misses are computed by a thread of their own, with a matrix of its own."""
    if policy != "lru":
        (tmp_path / "policy.py").write_text(MISSES_ON_CPU)
        policy = f"{tmp_path / 'policy.py'}:{policy}"
    folder, _ = folders(name)
    prompt = torch.randint(3, 120, (1, 12), generator=torch.Generator().manual_seed(2))
    asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = model.generate(prompt, **asked)
    with moerun.load(str(folder), policy=policy, slots=3, store=tmp_path / "store") as loaded:
        assert torch.equal(loaded.generate(prompt, **asked), expected)


# --- bad input


def broken(folders: Any, name: str, to: Path, change: Callable[[made.Tensors], object]) -> Path:
    copy = Path(shutil.copytree(folders(name)[0], to / "model"))
    return made.change_weights(copy, change)


def refusal(folder: Path) -> str:
    """What packing says, in one line; nothing is left of the pack."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(RunError) as caught:
        pack(folder, folder.parent / "out")
    assert sorted(folder.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


UP = "model.layers.1.mlp.experts.2.up_proj."
BAD: dict[str, tuple[str, Callable[[made.Tensors], object], str]] = {
    "no scale": (
        "fp8-block",
        lambda t: t.pop(f"{UP}weight_scale_inv"),
        f"{UP}weight' (float8_e4m3fn [128, 256]) has no scale, which other weights",
    ),
    "no codes": (
        "gptq",
        lambda t: t.pop(f"{UP}qweight"),
        f"of which '{UP}qweight' is missing",
    ),
    "scales of another size": (
        "fp8-block",
        lambda t: t.update({f"{UP}weight_scale_inv": torch.ones(5, 2)}),
        "scales [5, 2] do not fit a weight [128, 256] in blocks of 128 x 128",
    ),
    "blocks and scales": (
        GPT_OSS,
        lambda t: t.update(
            {"model.layers.0.mlp.experts.down_proj_scales": torch.zeros(8, 9, 2, dtype=torch.uint8)}
        ),
        "do not fit scales [8, 9, 2]",
    ),
    "two precisions": (
        "awq",
        lambda t: t.update({f"{UP}weight": torch.ones(128, 256).half()}),
        f"has {UP}weight in two precisions, plain and as '{UP}qweight'",
    ),
    "groups": (
        "int4-group",
        lambda t: t.update({f"{UP}weight_scale": torch.ones(128, 3).bfloat16()}),
        "scales [128, 3] do not fit a weight [128, 256] in groups of 32",
    ),
    "one more expert": (
        "fp8-block",
        lambda t: t.update(
            {n.replace("experts.3.", "experts.4."): w.clone() for n, w in t.items()}
        ),
        "where config.json says 4 experts",
    ),
    "other experts": (
        "nvfp4-modelopt",
        lambda t: t.update(
            {n: w[:64] for n, w in t.items() if n in (f"{UP}weight", f"{UP}weight_scale")}
        ),
        "has another shape than expert 0's",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_tensors_that_do_not_belong_together_are_named(
    folders: Any, tmp_path: Path, case: str
) -> None:
    name, change, said = BAD[case]
    assert said in refusal(broken(folders, name, tmp_path, change))


DECLARED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another method": ("fp8-block", {"quant_method": "gptq", "bits": 4}, "said to be gptq, as"),
    "no groups": ("int4-group", {"quant_method": "compressed-tensors"}, "no quantization_config"),
    "groups that are none": (
        "int4-group",
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": 5}}},
        "quantization_config cannot be used",
    ),
    "another layout": (
        "gptq",
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
        "(GPTQ): it has the GPTQ layout 'marlin', which is not read",
    ),
    "another version": (
        "awq",
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        "(AWQ): it has the AWQ layout 'gemv', which is not read",
    ),
}


@pytest.mark.parametrize("case", DECLARED)
def test_a_config_that_contradicts_the_tensors_is_told(
    folders: Any, tmp_path: Path, case: str
) -> None:
    name, declared, said = DECLARED[case]
    folder = Path(shutil.copytree(folders(name)[0], tmp_path / "model"))
    made.change_config(folder, quantization_config=declared)
    assert said in refusal(folder)


def test_a_shard_that_is_missing_or_cut_off_is_named(folders: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("fp8-block")[0], tmp_path / "model"))
    first, second = made.shard(folder)
    data = second.read_bytes()
    second.write_bytes(data[:-100])
    assert second.name in refusal(folder)
    second.unlink()
    assert f"{second.name} is missing (1 of the 2 files" in refusal(folder)
    assert first.is_file()


def test_a_group_beyond_the_last_is_damage(folders: Any, tmp_path: Path) -> None:
    def change(tensors: made.Tensors) -> None:
        tensors[f"{UP}g_idx"][0] = 99

    folder = broken(folders, "gptq", tmp_path, change)
    with pytest.raises(RunError, match=rf"{UP}weight has a g_idx beyond its 4 groups"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_without_a_declaration_are_the_usual_ones(folders: Any, tmp_path: Path) -> None:
    folder, plain = folders("fp8-block")
    copy = made.change_config(
        Path(shutil.copytree(folder, tmp_path / "model")), quantization_config=None
    )
    one, two = ModelSource(copy), ModelSource(plain)
    for (name, tensor), (other, same) in zip(one.read_dense(), two.read_dense(), strict=True):
        assert name == other
        assert torch.equal(tensor, same)


def test_the_guide_lists_every_format() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")
    for row in formats_table():
        assert f"| {' | '.join(row.values())} |" in guide
