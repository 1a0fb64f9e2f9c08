"""Offloaded models: the stock model's logits, to the last bit, whatever order experts arrive in."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from moeroute.families import FAMILIES as TABLE
from moeroute.families import family_of
from moerun.checkpoint.families import find_experts
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.offload.experts import SUMS, Served, Sums, attach
from moerun.offload.load import load_offloaded
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.families import (
    FAMILIES,
    HEAD,
    INNER,
    LIKE_OTHERS,
    SMALL,
    save_small,
    telling_fast,
)
from support.runs import ResidentProvider

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ShuffledProvider:
    """Serves resident experts in a random order, as a link might."""

    def __init__(self, resident: ResidentProvider, seed: int) -> None:
        self._resident = resident
        self._random = random.Random(seed)

    def serve(self, layer: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Served:
        served = self._resident.serve(layer, top_k_index, top_k_weights)
        experts = list(served)
        self._random.shuffle(experts)
        return Served(served.ids, (each for each in experts))


def stock_model(source: Path, precision: str, sums: Sums | None) -> Any:
    chosen = {} if sums is None else {"experts_implementation": sums}
    if tf.AutoConfig.from_pretrained(source).model_type == "llama4":
        chosen = {}  # which has one implementation of its own
    model = tf.AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[precision], **chosen)
    return model.eval()


def cache_for(model: Any, kind: str, tokens: int) -> Any:
    if kind == "dynamic":
        return tf.DynamicCache(config=model.config)
    return tf.StaticCache(config=model.config, max_cache_len=tokens + 8)


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor, cache: str = "dynamic", steps: int = 3) -> Any:
    """Of a prompt and then of single tokens."""
    past = cache_for(model, cache, ids.shape[1])
    found = [model(ids, past_key_values=past, use_cache=True).logits]
    for step in range(steps):
        found.append(model(ids[:, step : step + 1], past_key_values=past, use_cache=True).logits)
    return torch.cat(found, dim=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """By precision: the store of the bundled model, and all its experts in memory."""
    folder, made = tmp_path_factory.mktemp("tiny"), {}

    def get(precision: str) -> tuple[ExpertStore, ResidentProvider]:
        if precision not in made:
            store = pack(resolve("tiny"), folder / precision, precision=precision)
            made[precision] = store, ResidentProvider(store)
        return made[precision]

    return get


def text_ids(tokens: int) -> torch.Tensor:
    tokenizer = tf.AutoTokenizer.from_pretrained(resolve("tiny"))
    words = (
        "It is a truth universally acknowledged, that a single man in possession of a good "
        "fortune, must be in want of a wife. for index, value in enumerate(self.items): return"
    )
    ids: torch.Tensor = tokenizer(words, return_tensors="pt").input_ids
    return ids[:, :tokens]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("sums", SUMS)
@pytest.mark.parametrize("precision", list(DTYPES))
def test_the_bundled_model_equals_stock(tiny: Any, precision: str, sums: Sums, cache: str) -> None:
    store, resident = tiny(precision)
    ours, _ = load_offloaded(store, "cpu", ShuffledProvider(resident, 0), sums=sums)
    stock, ids = stock_model(resolve("tiny"), precision, sums), text_ids(40)
    assert torch.equal(logits_of(ours, ids, cache), logits_of(stock, ids, cache))


def test_by_default_the_logits_are_those_of_a_plain_from_pretrained(tiny: Any) -> None:
    store, resident = tiny("native")
    ours, _ = load_offloaded(store, "cpu", resident)
    stock = tf.AutoModelForCausalLM.from_pretrained(resolve("tiny")).eval()
    assert ours.dtype == stock.dtype == torch.float16
    assert torch.equal(logits_of(ours, text_ids(30)), logits_of(stock, text_ids(30)))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_p": 0.9}])
def test_generate_writes_what_the_stock_model_writes(tiny: Any, options: dict[str, Any]) -> None:
    store, resident = tiny("native")
    ours, tokenizer = load_offloaded(store, "cpu", ShuffledProvider(resident, 1))
    stock = tf.AutoModelForCausalLM.from_pretrained(resolve("tiny")).eval()
    inputs = tokenizer("The old man looked at", return_tensors="pt")
    written = []
    for model in (ours, stock):
        torch.manual_seed(0)
        written.append(model.generate(**inputs, max_new_tokens=12, **options))
    assert torch.equal(*written)


@pytest.mark.parametrize(("precision", "worst"), [("4bit", 0.07), ("3bit", 0.12), ("2bit", 0.5)])
def test_quantised_experts_keep_the_model_close(tiny: Any, precision: str, worst: float) -> None:
    store, resident = tiny(precision)
    ours, _ = load_offloaded(store, "cpu", resident)
    ids = text_ids(40)
    with torch.no_grad():
        stock = stock_model(resolve("tiny"), "fp32", None)
        losses = [float(model(ids, labels=ids).loss) for model in (ours, stock)]
    assert abs(losses[0] - losses[1]) < worst


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """By precision: a store of a random model that adds four experts, and its experts."""
    folder, made = tmp_path_factory.mktemp("wide"), {}
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        **SMALL | INNER | HEAD | {"num_experts": 8, "num_experts_per_tok": 4}
    )
    tf.Qwen3MoeForCausalLM(config).save_pretrained(folder / "m")

    def get(precision: str) -> tuple[ExpertStore, ResidentProvider]:
        if precision not in made:
            store = pack(folder / "m", folder / precision, precision=precision)
            made[precision] = store, ResidentProvider(store)
        return made[precision]

    return get


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 24),
    batch=st.integers(1, 3),
    precision=st.sampled_from(list(DTYPES)),
    sums=st.sampled_from(SUMS),
)
def test_the_order_of_arrival_changes_no_bit(
    wide: Any, seed: int, tokens: int, batch: int, precision: str, sums: Sums
) -> None:
    store, resident = wide(precision)
    ours, _ = load_offloaded(store, "cpu", resident, sums=sums)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128, (batch, tokens), generator=generator)
    steps = min(tokens, 2)
    wanted = logits_of(ours, ids, steps=steps)
    modules = [module for _, module in find_experts(ours)]
    attach(modules, ShuffledProvider(resident, seed), sums)
    assert torch.equal(logits_of(ours, ids, steps=steps), wanted)


def test_every_supported_family_is_tested() -> None:
    assert set(FAMILIES) == {each.model_type for each in TABLE}


@pytest.mark.parametrize("family", telling_fast(FAMILIES, LIKE_OTHERS))
def test_other_families_equal_their_stock_model(family: str, tmp_path: Path) -> None:
    source = save_small(family, tmp_path / "m")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 120, shape, generator=generator) for shape in ((1, 20), (2, 5))]
    cases: list[tuple[str, Sums]]
    cases = [("fp32", "grouped_mm"), ("bf16", "grouped_mm"), ("fp16", "eager")]
    entry = family_of(family)
    assert entry is not None
    for precision, sums in cases[: 2 if entry.no_float16 else 3]:
        store = pack(source, tmp_path / precision, precision=precision)
        provider = ShuffledProvider(ResidentProvider(store), 0)
        ours, tokenizer = load_offloaded(store, "cpu", provider, sums=sums)
        assert tokenizer is None
        stock = stock_model(source, precision, sums)
        for ids in prompts:
            found, wanted = logits_of(ours, ids), logits_of(stock, ids)
            assert torch.isfinite(wanted).all()
            assert torch.equal(found, wanted), (precision, sums)
        if precision == "fp32":
            how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
            written = [model.generate(prompts[0], **how) for model in (ours, stock)]
            assert torch.equal(*written)


def test_shape_facts_of_a_family_with_dense_layers_and_shared_experts(tmp_path: Path) -> None:
    index = pack(save_small("deepseek_v3", tmp_path / "m"), tmp_path / "out").index
    assert (index.n_layers, index.n_experts, index.top_k, index.n_shared_experts) == (1, 8, 3, 1)
    assert index.layers[0].module == "model.layers.1.mlp.experts"


@pytest.mark.parametrize("sums", SUMS)
def test_experts_that_are_skipped_add_nothing(tiny: Any, sums: Sums) -> None:
    store, resident = tiny("fp32")

    class Skipping:
        def serve(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> Served:
            served = resident.serve(layer, ids, weights)
            skipped = ((expert, None if layer == 3 else slot) for expert, slot in served)
            return Served(served.ids, skipped)

    ours, _ = load_offloaded(store, "cpu", Skipping(), sums=sums)
    seen: list[torch.Tensor] = []
    ours.model.layers[3].mlp.experts.register_forward_hook(lambda _m, _a, y: seen.append(y))
    logits_of(ours, text_ids(10))
    assert len(seen) == 4
    assert not any(y.any() for y in seen)


def test_a_store_whose_config_is_of_another_model(tiny: Any, tmp_path: Path) -> None:
    store, resident = tiny("fp32")
    copied = Path(shutil.copytree(store.path, tmp_path / "copied"))
    text = (copied / "config.json").read_text()
    (copied / "config.json").write_text(
        text.replace('"num_hidden_layers": 8', '"num_hidden_layers": 6')
    )
    with pytest.raises(RunError, match="do not belong together"):
        load_offloaded(ExpertStore.open(copied), "cpu", resident)


def test_a_store_that_lost_a_dense_tensor(tiny: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    store, resident = tiny("fp32")
    copied = Path(shutil.copytree(store.path, tmp_path / "copied"))
    tensors = load_file(copied / "dense.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copied / "dense.safetensors")
    with pytest.raises(RunError, match=r"does not fit config\.json \(model\.norm\.weight\)"):
        load_offloaded(ExpertStore.open(copied), "cpu", resident)


def test_unknown_sums_list_what_there_is(tiny: Any) -> None:
    store, resident = tiny("fp32")
    with pytest.raises(RunError, match="grouped_mm, eager"):
        load_offloaded(store, "cpu", resident, sums="batched")  # type: ignore[arg-type]  # not one of them
