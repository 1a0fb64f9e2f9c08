"""Attention quantised apart from experts: packed, checked, taken up, and computed as packed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from moepolicy import find_policy
from moerun.checkpoint.families import SUPPORTED, empty_model, find_attention
from moerun.errors import RunError
from moerun.format.bitplanes import dequantise
from moerun.format.precision import SCHEMES
from moerun.kernels.slots import SlotForm
from moerun.live.runner import Runner
from moerun.offload.attention import PackedLinear, packed_attention_bytes
from moerun.offload.load import dense_model, load_offloaded
from moerun.perplexity.table1 import published
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.find import find_store
from moerun.store.index import ATTENTION_FILE
from moerun.store.pack import pack
from moerun.store.pack_folder import JOURNAL_FILE
from safetensors.torch import load_file
from support.moe_models import random_model, small_config
from support.runs import ResidentProvider
from support.stores import verify

# bfloat16 has 8 bits of mantissa: the kernel's activations, scales and sums round to them.
KERNEL_TOLERANCE = 0.01
# Of a token's logits after all layers of random weights. A median, for a gate that was close to
# its next choice may take it.
LOGITS_TOLERANCE = 0.05
# Latent attention divides into groups of 64 from these sizes on.
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


MORE: dict[str, dict[str, Any]] = {
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2] * 4, "head_dim": 16},
}


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_has_its_attention_found(family: str) -> None:
    config = small_config(family, **MORE.get(family, {}))
    found = [name.split(".") for name, _ in find_attention(empty_model(config, torch.bfloat16))]
    assert {name[2] for name in found} == {"0", "1", "2", "3"}
    assert {name[3] for name in found} == {"self_attn"}
    assert "o_proj" in {name[4] for name in found}


def test_attention_and_experts_have_precisions_of_their_own(mixtral: Path, tmp_path: Path) -> None:
    store = pack(mixtral, tmp_path / "out", precision="2bit", attention="3bit")
    index = ExpertStore.open(store.path).index
    assert (index.precision, index.attention_precision) == ("2bit", "3bit")
    verify(store)
    with Runner(store, Settings(find_policy("lru-spec"), slots=2)) as runner:
        assert torch.isfinite(logits_of(runner.model, IDS)).all()


def test_plain_attention_is_as_the_dense_weights(mixtral: Path, tmp_path: Path) -> None:
    store = pack(mixtral, tmp_path / "out", precision="4bit", attention="bf16")
    assert store.index.attention is None
    assert store.index.attention_precision == store.index.dense_precision == "bf16"
    with pytest.raises(RunError, match="attention in fp16 takes dense weights in fp16, not bf16"):
        pack(mixtral, tmp_path / "mixed", attention="fp16", dense_precision="bf16")
    with pytest.raises(RunError, match=r"attention cannot be '5bit': .*4bit, 3bit, 2bit"):
        pack(mixtral, tmp_path / "unknown", attention="5bit")


def test_attention_that_does_not_divide_into_groups_is_refused(tmp_path: Path) -> None:
    random_model("deepseek_v3").save_pretrained(tmp_path / "m")  # latent sizes of 16
    with pytest.raises(RunError, match=r"self_attn\.q_b_proj has 16 input columns.*groups of 64"):
        pack(tmp_path / "m", tmp_path / "out", attention="4bit")
    assert not list(tmp_path.glob("out*"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


SLOW_PACK = """
import sys, time
from pathlib import Path
from moerun.store.pack import pack
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.05 if done > 30 else 0)
pack(Path(sys.argv[1]), Path(sys.argv[2]), attention="4bit", workers=1, progress=progress)
"""


def test_a_pack_killed_in_attention_is_taken_up(mixtral: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", SLOW_PACK, str(mixtral), str(out)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 37:  # 32 experts, then 16 projections
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    journal = (tmp_path / "out.partial" / JOURNAL_FILE).read_text().splitlines()
    assert sum(json.loads(line)[0] == ATTENTION_FILE for line in journal) >= 5
    seen: list[int] = []
    resumed = pack(mixtral, out, attention="4bit", progress=lambda done, _: seen.append(done))
    assert 37 <= seen[0] < 48 == seen[-1]
    verify(resumed)
    pack(mixtral, tmp_path / "fresh", attention="4bit", name=resumed.index.model)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_damaged_attention_names_its_module(mixtral: Path, tmp_path: Path) -> None:
    store = pack(mixtral, tmp_path / "out", attention="2bit")
    assert store.index.attention is not None
    linear = store.index.attention.linears[5]
    with (store.path / ATTENTION_FILE).open("r+b") as file:
        file.seek(linear.offset + 100)
        byte = file.read(1)[0]
        file.seek(linear.offset + 100)
        file.write(bytes([byte ^ 1]))
    message = rf"{linear.module} is damaged \(its checksum differs\) in .*{ATTENTION_FILE}"
    with pytest.raises(RunError, match=message):
        verify(ExpertStore.open(store.path))
    with pytest.raises(RunError, match=message):
        Runner(ExpertStore.open(store.path), Settings(find_policy("lru")))
    os.truncate(store.path / ATTENTION_FILE, 5000)
    with pytest.raises(RunError, match=r"attention\.safetensors has 5000 bytes .* holds attention"):
        ExpertStore.open(store.path)


def test_attention_of_another_model_is_refused(mixtral: Path, tmp_path: Path) -> None:
    store = pack(mixtral, tmp_path / "out", attention="4bit")
    index = json.loads((store.path / "index.json").read_text())
    del index["attention"]["linears"][3]
    (store.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"attention in index\.json is not that of config\.json"):
        Runner(ExpertStore.open(store.path), Settings(find_policy("lru")))
    index["attention"]["precision"] = "7bit"
    (store.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"is damaged \(attention in '7bit'\)"):
        ExpertStore.open(store.path)


def test_stores_that_differ_in_attention_share_their_experts(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = str(mixtral)
    plain = find_store(model, precision="2bit")
    seen: list[int] = []
    told: list[str] = []
    packed = find_store(
        model,
        precision="2bit",
        attention="4bit",
        report=told.append,
        progress=lambda done, _: seen.append(done),
    )
    assert told[-1] == f"4 of 5 files are hard links to those of {plain.path}"
    assert plain.path != packed.path
    assert seen == list(range(32, 49))  # the experts were there already
    for layer in range(4):
        name = f"experts-{layer:05d}.safetensors"
        assert (plain.path / name).samefile(packed.path / name)
    verify(packed)
    alone = pack(mixtral, tmp_path / "alone", precision="2bit", attention="4bit", name="mixtral")
    assert files_of(packed.path) == files_of(alone.path)
    shutil.rmtree(plain.path)
    verify(packed)
    with pytest.raises(RunError, match=r"attention in .* is 4bit, not 3bit"):
        find_store(str(packed.path), attention="3bit")


def test_damage_is_not_shared(mixtral: Path, tmp_path: Path) -> None:
    first = pack(mixtral, tmp_path / "first", precision="2bit")
    with (first.path / "experts-00002.safetensors").open("r+b") as file:
        file.seek(first.location(2 * 8 + 3).offset + 500)
        file.write(b"\0" * 64)
    told: list[str] = []
    again = pack(mixtral, tmp_path / "again", precision="2bit", reuse=[first], report=told.append)
    assert told == [f"3 of 4 files are hard links to those of {first.path}"]
    verify(again)


def test_files_of_other_precisions_are_not_shared(mixtral: Path, tmp_path: Path) -> None:
    four = pack(mixtral, tmp_path / "four", precision="4bit", attention="4bit")
    seen: list[int] = []
    mixed = pack(
        mixtral,
        tmp_path / "mixed",
        precision="3bit",
        attention="4bit",
        reuse=[four],
        progress=lambda done, _: seen.append(done),
    )
    assert seen[0] == 16  # attention's
    verify(mixed)
    assert mixed.index.layers[0].crc32 != four.index.layers[0].crc32


def test_table_1_is_for_its_own_model_only(mixtral: Path, tmp_path: Path) -> None:
    assert published(pack(mixtral, tmp_path / "out", precision="2bit").index) is None


PACK_TRUE_SHAPES = """
import sys
from pathlib import Path
from moerun.devices import peak_host_bytes
from moerun.store.pack import pack
from transformers import MixtralConfig, MixtralForCausalLM
folder = Path(sys.argv[1])
def peak_kib():
    return peak_host_bytes() // 1024
if sys.argv[2] == "make":
    sizes = dict(vocab_size=64, num_hidden_layers=1, num_local_experts=3)
    config = MixtralConfig(**sizes, dtype="bfloat16")
    MixtralForCausalLM._from_config(config).save_pretrained(folder / "model")
else:
    peaks = []
    pack(
        folder / "model", folder / "store", precision="bf16", attention="4bit", workers=1,
        progress=lambda done, total: peaks.append(peak_kib()),
    )
    print(peaks[3], peaks[-1])
"""


@pytest.mark.slow
def test_attention_of_mixtrals_true_shape_adds_nothing_to_the_peak(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PACK_TRUE_SHAPES, str(tmp_path)]
    subprocess.run([*command, "make"], check=True, capture_output=True)  # 1.1 GB
    done = subprocess.run([*command, "pack"], check=True, capture_output=True, text=True)
    after_experts_kib, after_attention_kib = map(int, done.stdout.split())
    assert after_attention_kib - after_experts_kib < 64 << 10
    assert after_attention_kib < 6 << 20
    store = ExpertStore.open(tmp_path / "store")
    verify(store)
    assert store.index.attention is not None
    bits = 8 * store.attention_bytes / store.index.attention.n_weights
    assert 4.2 < bits < 4.3
