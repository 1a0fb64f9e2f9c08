"""What libraries keep for themselves where there is a budget."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moepolicy import find_policy
from moerun.checkpoint.hub import resolve
from moerun.live import runner as runner_module
from moerun.live import sizing as sizing_module
from moerun.live.runner import Runner
from moerun.settings import Settings
from moerun.store.pack import pack
from support.moe_models import random_model, save_checkpoint

MIB = 1 << 20
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 5000,
    "max_position_embeddings": 2048, "num_attention_heads": 4, "head_dim": 64,
}  # fmt: skip
GENERATES = "from moerun.cli import main; main()"
PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom. "
# Frees blocks of 24 MiB, after which malloc would put smaller ones side by side in its heap; then
# 30 of 8 MiB, but each third one. Prints the MiB that it has more than at its beginning.
FREES = """
import ctypes
from moerun.memory.libraries import keep_little
keep_little(on_host={on_host})
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def block(mib):
    address = libc.malloc(mib << 20)
    ctypes.memset(address, 1, mib << 20)
    return address
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * {page} >> 20
for _ in range(3):
    libc.free(block(24))
before = resident()
blocks = [block(8) for _ in range(30)]
for number, address in enumerate(blocks):
    if number % 3 != 2:
        libc.free(address)
print(resident() - before)
"""


def fresh(code: str, *arguments: str, **environment: str) -> str:
    """What a new process prints whose malloc nothing sets up but ``environment``."""
    ours = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=ours | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
@pytest.mark.parametrize(
    ("on_host", "environment", "returned"),
    [
        (True, {}, True),
        (False, {}, False),  # the budget is of another memory
        (True, {"MALLOC_MMAP_THRESHOLD_": "16777216"}, False),
        (True, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=16777216"}, False),
    ],
)
def test_freed_blocks_go_back_at_once_where_a_budget_is_of_host_memory(
    on_host: bool, environment: dict[str, str], returned: bool
) -> None:
    code = FREES.format(on_host=on_host, page=os.sysconf("SC_PAGE_SIZE"))
    kept = int(fresh(code, **environment)) - 10 * 8
    assert abs(kept) <= 4 if returned else kept > 100


def test_a_run_that_gets_a_budget_keeps_little_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    for module in (runner_module, sizing_module):
        monkeypatch.setattr(module, "keep_little", lambda *, on_host: told.append(on_host))
    with pack(resolve("tiny"), tmp_path / "tiny") as store:
        with Runner(store, Settings(find_policy("lru"), slots=2)) as runner:
            assert not told
            for n_bytes in (1 << 30, 1 << 29):
                runner.set_memory(n_bytes)
                assert told == [True]
        budget = Settings(find_policy("lru"), memory_bytes=1 << 30, context_tokens=64)
        with Runner(store, budget) as runner:
            runner.set_memory(1 << 29)
    assert told == [True, True]


@pytest.mark.slow
def test_a_prompt_whose_scores_are_held_keeps_to_its_plan(tmp_path: Path) -> None:
    model = random_model("gpt_oss", **SIZES)
    source = save_checkpoint(model, resolve("tiny"), tmp_path / "model")
    pack(source, tmp_path / "store", precision="4bit").close()
    options = ("--memory", "218MiB", "--scope", "global", "--policy", "lfu", "--device", "cpu")
    arguments = ("generate", "--model", str(tmp_path / "store"), *options, "--host-memory", "30MiB")
    told = ("--prompt", PROSE * 60, "--max-new-tokens", "8", "--format", "json")
    report = json.loads(fresh(GENERATES, *arguments, *told, OMP_NUM_THREADS="1"))
    assert report["prompt_tokens"] == 1501
    assert 0.6 * report["memory_planned_bytes"] < report["memory_peak_bytes"]
    # With what malloc keeps it takes 224 to 239 MiB, without it 184 or less.
    assert report["memory_peak_bytes"] <= 200 * MIB
