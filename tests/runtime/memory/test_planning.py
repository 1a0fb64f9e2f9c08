"""What a plan counts besides weights, cache and slots, and what is compiled within a budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import Kind, find_policy, pointers
from moepolicy.calls import CompiledCalls
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.memory.compiling import Compiling
from moerun.memory.fit import plan_memory
from moerun.memory.plan import COMPILED_BYTES, MIB, MemoryPlan, Needs
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.big_models import big_store
from support.moe_models import random_model, save_checkpoint
from support.runs import generate

OWN = Path(__file__).parents[2] / "support" / "policies.py"
PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom"
ON_CPU = f"{OWN}:AnswersLow:answer={int(Kind.COMPUTE)}"


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return big_store(tmp_path_factory.mktemp("big"))


@pytest.mark.parametrize("precision", ["native", "4bit", "2bit"])
def test_what_computes_on_the_cpu_is_planned(
    stores: dict[str, ExpertStore], precision: str
) -> None:
    store = stores[precision]
    plain = Settings(find_policy("lru"), slots=1, low=stores["2bit"])
    assert plan_memory(store, plain).needs.cpu_expert_bytes == 0
    with Runner(store, Settings(find_policy(ON_CPU), slots=1, low=stores["2bit"])) as runner:
        generate(runner, PROSE, Sampling(max_new_tokens=2))
        assert runner.session.totals.cpu_experts > 0
        on_cpu: Any = runner.session.cpu_experts
        held = on_cpu._form.slot_bytes
        held += 0 if on_cpu._buffer is None else on_cpu._buffer.nbytes
        planned = runner.plan
    assert planned.needs.cpu_expert_bytes > held
    assert planned.total_bytes == planned.needs.total_bytes + planned.slots_bytes
    assert ("CPU experts", planned.needs.cpu_expert_bytes) in [row[:2] for row in planned.rows()]
    assert planned.least_bytes > plan_memory(store, plain).least_bytes + held
    gpu = Settings(find_policy(ON_CPU), slots=1, low=stores["2bit"], device=torch.device("cuda", 0))
    assert plan_memory(store, gpu).needs.cpu_expert_bytes == 0


def test_shares_of_the_slots_change_no_sum(stores: dict[str, ExpertStore]) -> None:
    equal, shared, one = (
        plan_memory(stores["native"], Settings(find_policy(policy), slots=3, scope=scope))
        for policy, scope in (
            ("lru", "layer"),
            ("adapmoe-slots", "layer"),
            ("adapmoe-slots", "global"),
        )
    )
    assert shared.total_bytes == equal.total_bytes
    assert "3 of 8 experts in each of 8 layers, on average" in shared.table()
    assert "on average" not in equal.table()
    assert "on average" not in one.table()


def test_experts_between_disk_and_slots_are_planned(stores: dict[str, ExpertStore]) -> None:
    store = stores["native"]
    for host_bytes, planned in ((10 * store.record_bytes, 10), (1 << 40, store.n_keys)):
        settings = Settings(find_policy("lru"), slots=1, host_bytes=host_bytes)
        assert plan_memory(store, settings).needs.host_tier_bytes == planned * store.record_bytes


def test_pieces_and_the_lower_precision_need_their_buffers(stores: dict[str, ExpertStore]) -> None:
    def workspace(**options: Any) -> int:
        settings = Settings(find_policy("lru"), slots=1, **options)
        return plan_memory(stores["native"], settings).needs.workspace_bytes

    plain, low = workspace(), workspace(low=stores["2bit"])
    pieces = workspace(low=stores["2bit"], chunk_bytes=4096)
    buffers = 3 * stores["2bit"].record_bytes
    assert pieces - low == buffers
    assert low - plain > buffers  # and the blocks in which a prompt's tokens are multiplied


@pytest.mark.parametrize(
    ("budget", "compiling", "slots"),
    [
        (100, Compiling.NEVER, 0),
        (400, Compiling.NEVER, 3),  # 112 MiB would cost a slot in every layer, and more
        (1010, Compiling.KEPT, 8),  # all experts have slots, and 120 MiB are left
        (1200, Compiling.ALWAYS, 8),
        (100_000, Compiling.ALWAYS, 8),
    ],
)
def test_compiling_gets_what_slots_leave(budget: int, compiling: Compiling, slots: int) -> None:
    plan = MemoryPlan(Needs(80 * MIB, 0, 0, 9), None, 0, 10, 8, 1, 10 * MIB)
    chosen = plan.within(budget * MIB).with_compiling()
    assert (chosen.compiling, chosen.slots) == (compiling, slots)
    assert chosen.needs.compiled_bytes == COMPILED_BYTES[compiling]
    assert chosen.total_bytes <= budget * MIB


def test_what_is_compiled_already_counts_and_nothing_else_does() -> None:
    plan = MemoryPlan(Needs(80 * MIB, 0, 0, 9), None, 0, 10, 8, 1, 10 * MIB)
    least = plan.least_bytes
    for done, n_bytes in COMPILED_BYTES.items():
        exact = plan.on_host_within(least + n_bytes, done)
        assert (exact.compiling, exact.needs.compiled_bytes) == (done, n_bytes)
        # One that is made from it does not count what it has counted again.
        assert exact.on_host_within(least, Compiling.NEVER).total_bytes == least
        if done is not Compiling.NEVER:
            assert exact.slots == 0
            with pytest.raises(RunError, match=r"compiled \d+\.00 MiB.*code cannot be unloaded"):
                plan.on_host_within(least + n_bytes - 1, done)


def nothing_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No code lies on disk, and this process has none, as if it had just begun."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    monkeypatch.setattr(pointers, "_entries", {})


@pytest.mark.parametrize("memory_bytes", [None, 1 << 30])
def test_a_running_process_may_shrink_to_what_it_could_have_begun_with(
    stores: dict[str, ExpertStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory_bytes: int | None,
) -> None:
    nothing_kept(tmp_path / "none", monkeypatch)
    store = stores["native"]
    smallest = plan_memory(store, Settings(find_policy("lru"), context_tokens=64)).least_bytes
    begun = Settings(find_policy("lru"), context_tokens=64, memory_bytes=memory_bytes)
    with Runner(store, begun) as runner:
        runner.set_memory(smallest)
        assert (runner.plan.slots, runner.plan.compiling) == (0, Compiling.NEVER)
        runner.session.wait_compiled()
        runner.session.reset()
        runner.session.wait_compiled()
        assert not isinstance(runner.session.cache._calls, CompiledCalls)
        assert runner.session.compilation.done is Compiling.NEVER
    assert not (tmp_path / "none").exists()


def test_what_a_running_process_has_compiled_stays(stores: dict[str, ExpertStore]) -> None:
    chosen = Settings(find_policy("lru"), context_tokens=64, memory_bytes=60 * MIB)
    with Runner(stores["native"], chosen) as runner:
        assert runner.plan.compiling is Compiling.NEVER
        runner.set_memory(1 << 30)
        runner.session.wait_compiled()
        assert isinstance(runner.session.cache._calls, CompiledCalls)
        done = runner.session.compilation.done
        assert done is not Compiling.NEVER
        runner.session.reset()
        assert runner.session.compilation.done is done
        with pytest.raises(RunError, match="compiled code cannot be unloaded"):
            runner.set_memory(60 * MIB)
        assert runner.plan.budget_bytes == 1 << 30


def test_kept_code_may_cost_a_small_part_of_the_budget() -> None:
    plan = MemoryPlan(Needs(80 * MIB, 0, 0, 9), None, 0, 10, 64, 1, 10 * MIB)
    for budget, compiling, slots in ((1750, Compiling.NEVER, 16), (1800, Compiling.KEPT, 15)):
        chosen = plan.within(budget * MIB).with_compiling()
        assert (chosen.compiling, chosen.slots) == (compiling, slots)


KEEPS = """
import json, sys
from moepolicy import find_policy
from moepolicy.calls import CompiledCalls
from moerun.live.sampling import Sampling
from moerun.live.runner import Runner
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
path, budget, policy, low, prompt = sys.argv[1:]
store = ExpertStore.open(path)
settings = Settings(find_policy(policy), memory_bytes=int(budget), context_tokens=600,
                    low=ExpertStore.open(low))
with Runner(store, settings) as runner:
    runner.session.wait_compiled()
    runner.generation().run(runner.encode(prompt), Sampling(max_new_tokens=8, stop=False))
    plan = runner.plan
    print(json.dumps({
        "compiling": plan.compiling.value, "peak": runner.peak_bytes, "planned": plan.total_bytes,
        "compiled": isinstance(runner.session.cache._calls, CompiledCalls),
        "slots": plan.slots, "on_cpu": runner.session.totals.cpu_experts,
    }))
"""


def measured(store: ExpertStore, budget: int, policy: str, code: Path) -> dict[str, Any]:
    done = subprocess.run(
        [
            *(sys.executable, "-c", KEEPS, str(store.path), str(budget), policy),
            *(str(store.path), PROSE * 20),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(code)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_a_process_that_compiles_or_loads_keeps_to_its_budget(
    big: ExpertStore, tmp_path: Path
) -> None:
    settings = Settings(find_policy("lru"), slots=8, context_tokens=600, low=big)
    whole = plan_memory(big, settings).total_bytes
    for room, compiling in ((260, "always"), (120, "kept")):
        found = measured(big, whole + room * MIB, "lru", tmp_path / "code")
        assert (found["compiling"], found["compiled"]) == (compiling, True)
        assert found["slots"] == 8
        assert found["peak"] <= found["planned"] <= whole + room * MIB


@pytest.mark.slow
def test_a_process_that_computes_on_the_cpu_keeps_to_its_budget(
    big: ExpertStore, tmp_path: Path
) -> None:
    budget = 300 * MIB
    found = measured(big, budget, f"{OWN}:Anything", tmp_path / "code")
    assert found["on_cpu"] > 0
    assert found["compiling"] == "never"
    assert 0 < found["slots"] < 8
    assert 0.5 * found["planned"] < found["peak"] <= budget


SCORES = """
import json, sys
import torch
from moepolicy import find_policy
from moerun.perplexity.measure import Measurement
from moerun.live.runner import Runner
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
path, budget = sys.argv[1:]
settings = Settings(find_policy("lru"), memory_bytes=int(budget))
measurement = Measurement(path, "once upon a time there was " * 400, settings)
with Runner(ExpertStore.open(path), measurement.settings) as runner:
    measurement._score(runner, measurement.ids, measurement.windows[0], 0)
    print(json.dumps({"peak": runner.peak_bytes, "context": measurement.context,
                      "slots": runner.context.slots}))
"""


@pytest.mark.slow
def test_a_process_that_scores_long_windows_keeps_to_its_budget(big: ExpertStore) -> None:
    budget = 380 * MIB  # of which 40 MB are the logits of a window
    done = subprocess.run(
        [sys.executable, "-c", SCORES, str(big.path), str(budget)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["context"] == 2048
    assert 0 < found["slots"] < 8
    assert 0.5 * budget < found["peak"] <= budget


def test_scores_of_keys_wider_than_values_are_planned_on_the_cpu(tmp_path: Path) -> None:
    """torch's kernel for the CPU takes no such heads, which DeepSeek has: it holds their scores."""

    def workspace(v_head_dim: int, device: str) -> int:
        store = ExpertStore.open(tmp_path / f"{v_head_dim}")
        settings = Settings(
            find_policy("lru"), slots=1, context_tokens=1000, device=torch.device(device)
        )
        return plan_memory(store, settings).needs.workspace_bytes

    widths = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "max_position_embeddings": 1000}
    for width in (128, 192):
        model = random_model("deepseek_v2", v_head_dim=width, **widths)
        source = save_checkpoint(model, resolve("tiny"), tmp_path / f"model-{width}")
        pack(source, tmp_path / f"{width}").close()
    heads = model.config.num_attention_heads
    scores = 3 * 4 * heads * 999 * 1000
    narrow = heads * 64 * 4 * (3 * 999 + 1000)  # keys and values take less as they are narrower
    assert workspace(128, "cpu") == workspace(192, "cpu") + scores - narrow
    assert workspace(128, "cuda:0") == workspace(192, "cuda:0") - narrow


LENGTHS = """
import json, sys
from moepolicy import find_policy
from moerun.live.sampling import Sampling
from moerun.live.runner import Runner
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
path, budget, policy, prompt = sys.argv[1:]
store = ExpertStore.open(path)
settings = Settings(find_policy(policy), memory_bytes=int(budget), context_tokens=300, low=store)
with Runner(store, settings) as runner:
    ids = runner.encode(prompt)
    for length in range(20, 280, 8):
        runner.generation().run(ids[:, :length], Sampling(max_new_tokens=2, stop=False))
    print(json.dumps({"peak": runner.peak_bytes, "planned": runner.plan.total_bytes,
                      "numba": "numba" in sys.modules}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "policy"), [("native", "lru"), ("native", f"{OWN}:Anything"), ("4bit", "lru")]
)
def test_a_process_that_computes_many_shapes_in_bfloat16_keeps_to_its_budget(
    big: ExpertStore, tmp_path: Path, attention: str, policy: str
) -> None:
    """torch would keep oneDNN's operations for every shape, 0.7 MiB each, and each thread its own.
    Where no weights are in blocks, no kernels of numba are loaded, either."""
    source = big.path.parent / "model"
    store = pack(source, tmp_path / "store", precision="bf16", attention=attention)
    done = subprocess.run(
        [sys.executable, "-c", LENGTHS, str(store.path), str(160 * MIB), policy, PROSE * 20],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["numba"]
    assert 0.4 * found["planned"] < found["peak"] <= found["planned"] <= 160 * MIB


def test_code_that_was_kept_is_loaded_and_no_other_compiled(
    stores: dict[str, ExpertStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores["native"]
    with Runner(store, Settings(find_policy("lru"), slots=8, context_tokens=64)) as runner:
        runner.session.wait_compiled()  # and so kept, if it was not
        whole = runner.plan.total_bytes
    chosen = Settings(find_policy("lru"), memory_bytes=whole + 120 * MIB, context_tokens=64)
    with Runner(store, chosen) as runner:
        runner.session.wait_compiled()
        assert isinstance(runner.session.cache._calls, CompiledCalls)
    nothing_kept(tmp_path / "none", monkeypatch)
    with Runner(store, chosen) as runner:
        runner.session.wait_compiled()
        assert not isinstance(runner.session.cache._calls, CompiledCalls)
    assert not (tmp_path / "none").exists()
