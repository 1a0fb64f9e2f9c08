"""Packing attention apart from experts: precisions, killed packs, damage, shared files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from moepolicy import find_policy
from moerun.errors import RunError
from moerun.live.runner import Runner
from moerun.perplexity.table1 import published
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.find import find_store
from moerun.store.index import ATTENTION_FILE
from moerun.store.pack import pack
from moerun.store.pack_folder import JOURNAL_FILE
from support.moe_models import random_model
from support.stores import files_of, verify


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "mixtral"
    random_model("mixtral", intermediate_size=64).save_pretrained(path)
    return path


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


SLOW_PACK = """
import sys, time
from pathlib import Path
from moerun.store.pack import pack
def progress(done, total):
    print(done, flush=True)
    time.sleep(0.05 if done > 30 else 0)
pack(Path(sys.argv[1]), Path(sys.argv[2]), attention="4bit", workers=1, progress=progress)
"""


@pytest.mark.slow
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
