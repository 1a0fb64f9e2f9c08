"""Attention quantised apart from experts: found in every family, and computed as packed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from moepolicy import find_policy
from moerun.checkpoint.families import empty_model, find_attention, text_alone
from moerun.format.bitplanes import dequantise
from moerun.format.precision import SCHEMES
from moerun.kernels.slots import SlotForm
from moerun.live.runner import Runner
from moerun.offload.attention import PackedLinear, packed_attention_bytes
from moerun.offload.load import dense_model, load_offloaded
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from safetensors.torch import load_file
from support.families import FAMILIES as ALL
from support.families import small_config as small_of
from support.moe_models import random_model
from support.runs import ResidentProvider
from support.stores import verify

# bfloat16 has 8 bits of mantissa: the kernel's activations, scales and sums round to them.
KERNEL_TOLERANCE = 0.01
# Of a token's logits after all layers of random weights. A median, for a gate that was close to
# its next choice may take it.
LOGITS_TOLERANCE = 0.05
# Latent attention divides into groups of 64 from these sizes on.
NOT_ATTENDING = ("linear_attention", "moe", "mlp")
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "v_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64},
    "qwen2_moe": {},  # biases in attention
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {},  # biases and sinks
    "deepseek_v3": LATENT,  # latent attention, and a dense layer with attention of its own
    "minimax_m2": {},  # norms inside attention
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        path = folder / family
        if not path.exists():
            random_model(family, **FAMILIES[family]).save_pretrained(path)
        return path

    return get


@pytest.fixture
def mixtral(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("mixtral")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def plain_weights(store: ExpertStore) -> dict[str, torch.Tensor]:
    """Every packed projection, by the plain formula."""
    attention = store.index.attention
    assert attention is not None
    found = {}
    for linear in attention.linears:
        layout = attention.layout(linear)
        record = torch.empty(layout.record_bytes, dtype=torch.uint8)
        store.read_attention(linear.module, record)
        parts = {name.removeprefix("weight."): view for name, view in layout.views(record).items()}
        scheme = SCHEMES[attention.precision]
        found[linear.module] = dequantise(parts, scheme, linear.rows, linear.columns)
    return found


def dequantised_stock(source: Path, weights: dict[str, torch.Tensor]) -> Any:
    """The stock model in float32, its projections being the dequantised ones."""
    stock = tf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    projections = dict(find_attention(stock))
    assert projections.keys() == weights.keys()
    with torch.no_grad():
        for name, weight in weights.items():
            projections[name].weight.copy_(weight)
    return stock


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of a prompt and then of single tokens."""
    past = tf.DynamicCache(config=model.config)
    found = [model(ids, past_key_values=past, use_cache=True).logits]
    for step in range(3):
        found.append(model(ids[:, step : step + 1], past_key_values=past, use_cache=True).logits)
    return torch.cat(found, dim=1)


IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("precision", list(SCHEMES))
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_attention_computes_what_plain_dequantisation_does(
    family: str, precision: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint_of(family)
    store = pack(source, tmp_path / "out", attention=precision)
    weights = plain_weights(store)
    ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    stock = dequantised_stock(source, weights)

    packed = {n: m for n, m in ours.named_modules() if isinstance(m, PackedLinear)}
    assert packed.keys() == weights.keys()
    for name, module in packed.items():
        plain = stock.get_submodule(name)
        for shape in ((1, 1, plain.in_features), (2, 5, plain.in_features)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                found = module(x)
                assert found.dtype == x.dtype
                assert relative(found, plain(x)) < KERNEL_TOLERANCE, name
    found, wanted = logits_of(ours, IDS), logits_of(stock, IDS)
    errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert errors.median() < LOGITS_TOLERANCE


@pytest.mark.parametrize("precision", list(SCHEMES))
def test_the_kernels_of_a_gpu_give_the_logits_of_the_dequantised_weights(
    mixtral: Path,
    tmp_path: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    interpreted: None,
) -> None:
    monkeypatch.setattr("moerun.kernels.slots.SlotForm._takes_nibbles", False)
    store = pack(mixtral, tmp_path / "out", attention=precision)
    ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    stock = dequantised_stock(mixtral, plain_weights(store))
    found, wanted = logits_of(ours, IDS), logits_of(stock, IDS)
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("precision", list(SCHEMES))
def test_the_memory_of_packed_attention_is_known_beforehand(
    mixtral: Path, tmp_path: Path, precision: str
) -> None:
    store = pack(mixtral, tmp_path / "out", attention=precision)
    taken: list[int] = []
    real = SlotForm.bind

    def bind(form: SlotForm, memory: torch.Tensor) -> Any:
        taken.append(memory.untyped_storage().nbytes())
        return real(form, memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlotForm, "bind", bind)
        dense_model(store, "cpu")
    assert sum(taken) == packed_attention_bytes(store, torch.device("cpu")) > 0
    assert packed_attention_bytes(pack(mixtral, tmp_path / "plain"), torch.device("cpu")) == 0


def test_only_projections_of_attention_are_quantised(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint_of("deepseek_v3")
    plain = pack(source, tmp_path / "plain")
    packed = pack(source, tmp_path / "packed", attention="4bit")
    before, after = load_file(plain.dense_path), load_file(packed.dense_path)
    gone = before.keys() - after.keys()
    assert {name.split(".")[-2] for name in gone} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    assert {name.split(".")[2] for name in gone} == {"0", "1", "2", "3"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert packed.index.layers == plain.index.layers
    assert (plain.index.attention_precision, packed.index.attention_precision) == ("native", "4bit")
    assert packed.n_weights == plain.n_weights
    assert packed.total_bytes < plain.total_bytes
    assert packed.index.layer_bytes < plain.index.layer_bytes


@pytest.mark.parametrize("family", ALL)
def test_every_family_has_its_attention_found(family: str) -> None:
    config = text_alone(small_of(family))
    model = empty_model(config, torch.bfloat16)
    found = dict(find_attention(model))
    places = [re.fullmatch(r".*layers\.(\d+)\.(self_attn|mixer)\.(.+)", name) for name in found]
    assert all(places)
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"] * 2
    attending = {str(i) for i, kind in enumerate(kinds) if kind not in NOT_ATTENDING}
    assert {place[1] for place in places if place} == attending
    assert {"o_proj", "o_b_proj"} & {place[3] for place in places if place}
    # Those that are more than a product with their weight are left as they are.
    assert all(type(linear).forward is torch.nn.Linear.forward for linear in found.values())


def test_attention_and_experts_have_precisions_of_their_own(mixtral: Path, tmp_path: Path) -> None:
    store = pack(mixtral, tmp_path / "out", precision="2bit", attention="3bit")
    index = ExpertStore.open(store.path).index
    assert (index.precision, index.attention_precision) == ("2bit", "3bit")
    verify(store)
    with Runner(store, Settings(find_policy("lru-spec"), slots=2)) as runner:
        assert torch.isfinite(logits_of(runner.model, IDS)).all()
