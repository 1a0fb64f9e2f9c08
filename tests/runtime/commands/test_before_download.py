"""Plans and benches of models that are not here: by name, by the hub's config.json, by a header."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gguf.constants import GGMLQuantizationType as Kind
from moerun.bench.generated import GeneratedModel
from moerun.bench.models import find_config
from moerun.bench.routing import choose_routing
from moerun.bench.shapes import find_shape, shape_names
from moerun.checkpoint.hub import resolve
from moerun.store.pack import pack
from support import published
from support.commands import Call, error_line
from support.gguf_files import Converter
from support.hub import fake_hub

CONFIG = (resolve("tiny") / "config.json").read_bytes()
MOERUN = (sys.executable, "-c", "from moerun.cli import main; main()")
BUDGET = ("--precision", "4bit", "--memory", "100MiB", "--format", "json")


def run_from(hub: str, home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A process whose hub is at ``hub``; the client is the real one."""
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    env = {k: v for k, v in os.environ.items() if k.lower() not in proxies}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def moerun_from(hub: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_from(hub, home, *MOERUN, *arguments)


@pytest.mark.slow
def test_a_plan_by_the_hub_fetches_the_configuration_alone(moerun: Call, tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "model.safetensors": b"not to be read"}
    with fake_hub({"maker/small": files}) as (address, asked):
        done = moerun_from(address, tmp_path, "--plan", "--model", "maker/small", *BUDGET)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(moerun("--plan", *BUDGET).stdout)
    files_asked = {path for path in asked if path.startswith("/maker/")}
    assert files_asked == {"/maker/small/resolve/main/config.json"}


def fetched(hub: str, home: Path, name: str) -> str:
    """What fetching a configuration says or raises, in a process of its own."""
    code = (
        "from moerun.checkpoint.hub_config import fetch_config\n"
        f"try: print((fetch_config({name!r}) / 'config.json').read_text())\n"
        "except ValueError as error: print(error)"
    )
    done = run_from(hub, home, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_the_hub_does_not_give_is_one_line(tmp_path: Path) -> None:
    held = {"maker/small": {"config.json": CONFIG}, "maker/small-GGUF": {"small.gguf": b"GGUF"}}
    with fake_hub(held) as (address, _):
        assert json.loads(fetched(address, tmp_path, "maker/small")) == json.loads(CONFIG)
        without = fetched(address, tmp_path, "maker/small-GGUF")
        missing = fetched(address, tmp_path, "maker/none")
    assert "has no config.json (a repository of GGUF files has none)" in without
    assert "the Hugging Face hub has no model 'maker/none'" in missing
    nobody = "http://127.0.0.1:9"
    assert json.loads(fetched(nobody, tmp_path, "maker/small")) == json.loads(CONFIG)
    offline = fetched(nobody, tmp_path, "maker/other")
    assert "did not give the config.json of 'maker/other'" in offline
    assert "check the network, or download that file elsewhere" in offline


def plan_of(moerun: Call, *arguments: str | Path) -> dict[str, object]:
    done = moerun("--plan", *arguments)
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("prompt", [(), ("--prompt", "Once upon a time")])
def test_a_plan_is_that_of_the_packed_store(
    moerun: Call, tmp_path: Path, prompt: tuple[str, ...]
) -> None:
    before = plan_of(moerun, *BUDGET, *prompt)
    made = moerun("pack", "tiny", "--precision", "4bit", "--out", tmp_path / "store")
    assert made.returncode == 0, made.stderr
    packed = plan_of(moerun, "--model", tmp_path / "store", *BUDGET[2:], *prompt)
    assert before == packed


def test_a_plan_may_be_for_a_gpu_that_is_not_here(moerun: Call) -> None:
    asked = ("--plan", "--model", "mixtral-8x7b", "--precision", "2bit", "--device", "cuda:63")
    done = moerun(*asked, "--memory", "12GiB")
    assert done.returncode == 0, done.stderr
    assert "cuda:63, which is not here" in done.stdout
    assert "3 of 8 experts in each of 32 layers" in done.stdout
    assert "auto takes what is free on the device" in error_line(moerun(*asked, "--memory", "auto"))


def test_a_plan_tells_that_slots_of_the_cpu_hold_four_bits(moerun: Call) -> None:
    asked = ("--plan", "--model", "mixtral-8x7b", "--device", "cpu", "--slots", "1")
    two, four = (moerun(*asked, "--precision", each).stdout for each in ("2bit", "4bit"))
    assert "2bit codes take 4 bits in slots on the CPU" in " ".join(two.split())
    assert "codes take" not in four
    assert "device                   cpu" in two


def test_a_plan_by_a_gguf_header_needs_no_weights(moerun: Call, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in resolve("tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = Converter(folder, "mixtral", lambda _name: Kind.F16).write(tmp_path / "tiny.gguf")
    assert plan_of(moerun, "--model", file, *BUDGET) == plan_of(moerun, *BUDGET)


def test_a_plan_of_a_gguf_file_counts_experts_in_its_own_blocks(
    moerun: Call, tmp_path: Path
) -> None:
    """As the store's plan does, once the file is packed."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in resolve("tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = Converter(folder, "mixtral", lambda _name: Kind.Q8_0).write(tmp_path / "tiny.gguf")
    budget = ("--memory", "300MiB", "--format", "json")
    before = plan_of(moerun, "--model", file, "--precision", "native", *budget)
    store = pack(file, tmp_path / "store")
    assert store.index.expert_label == "native (q8_0)"
    assert store.index.attention_precision == "q8_0"
    assert before == plan_of(moerun, "--model", store.path, *budget)


@pytest.mark.parametrize("name", ["gpt-oss", "fp8-block", "fp8-block-cut-off", "fp8-tensor"])
def test_a_plan_by_a_configuration_counts_experts_as_they_are_published(
    moerun: Call, tmp_path: Path, name: str
) -> None:
    """As the store's plan does, once the checkpoint is packed. Of a scale a tensor (fp8-tensor) the
    configuration does not tell what is kept: experts count unquantised, and the plan says so."""
    folder, alone = tmp_path / "published", tmp_path / "alone"
    if name == "gpt-oss":
        published.publish_gpt_oss(folder, tmp_path / "plain")
    else:
        published.publish(published.formats()[name], folder, tmp_path / "plain")
    alone.mkdir()
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    asked = ("--precision", "native", "--memory", "600MiB", "--format", "json")
    done = moerun("--plan", "--model", alone, *asked)
    assert done.returncode == 0, done.stderr
    store = pack(folder, tmp_path / "store")
    packed = plan_of(moerun, "--model", store.path, *asked[2:])
    if name == "fp8-tensor":
        assert "the plan counts them unquantised" in done.stderr
        assert json.loads(done.stdout)["staging_bytes"] > packed["staging_bytes"]
    else:
        assert f"published in {store.index.expert_format}: the plan counts" in done.stderr
        assert json.loads(done.stdout) == packed


@pytest.mark.parametrize("name", shape_names())
def test_every_shape_by_name_has_sizes_and_a_model(name: str) -> None:
    shape = find_shape(name)
    shape.check_family()
    sizes = shape.sizes()
    assert sizes is not None
    index = GeneratedModel(find_config(shape), name=name, precision="native", seed=0).index
    assert (index.n_layers, index.n_experts, index.top_k) == (
        sizes.n_layers,
        sizes.n_experts,
        sizes.top_k,
    )


def test_the_routing_of_a_shape_is_found_by_its_experts() -> None:
    assert choose_routing(32, 8, 2)[0] == "mixtral-like"
    assert choose_routing(4, 8, 2, of_layers=32)[0] == "mixtral-like"  # a part of Mixtral
    assert choose_routing(8, 8, 2)[0] == "tiny"
    assert choose_routing(4, 8, 2) == (
        "tiny",
        "routing: the sample tiny (recorded), of 4 layers, top-2 of 8 experts, of whose 8 layers "
        "the first count",
    )
    assert "of 1 layer, top-2 of 8 experts" in choose_routing(1, 8, 2)[1]
    assert choose_routing(33, 8, 2)[0] == choose_routing(48, 128, 8)[0] == "uniform"


@pytest.mark.slow
def test_a_bench_finds_its_routing_and_says_which(moerun: Call, tmp_path: Path) -> None:
    brief = ("--tokens", "2", "--warm-up", "0", "--rounds", "1", "--policy", "lru")
    done = moerun("bench", "--shape", "tiny", *brief)
    assert done.returncode == 0, done.stderr
    assert "routing: the sample tiny (recorded), of 8 layers, top-2 of 8 experts" in done.stderr
    fields = json.loads(CONFIG) | {"num_experts_per_tok": 3, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    other = moerun("bench", "--shape", tmp_path, *brief)
    assert other.returncode == 0, other.stderr
    assert "routing: uniform, drawn without locality: no sample is of 2 layers" in other.stderr
