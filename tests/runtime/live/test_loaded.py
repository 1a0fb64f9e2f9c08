"""`moerun.load` as somebody's own script would use it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import moerun
import pytest
import torch
from moepolicy import PolicyError
from moerun.checkpoint.hub import resolve
from moerun.store.expert_store import ExpertStore
from transformers import AutoModelForCausalLM, GenerationMixin, MixtralForCausalLM, pipeline

PROMPT = "The house was quiet, and"


@pytest.fixture(scope="module")
def expected() -> list[int]:
    stock = AutoModelForCausalLM.from_pretrained(resolve("tiny")).eval()
    with moerun.load("tiny", slots=2) as model:
        ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    written: list[int] = stock.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    return written


def test_it_is_the_stock_model_and_says_what_its_cache_did(
    stores: dict[str, ExpertStore], expected: list[int]
) -> None:
    with moerun.load(stores["native"], policy="lru-spec", slots=4) as model:
        assert isinstance(model, MixtralForCausalLM)
        assert isinstance(model, GenerationMixin)
        assert type(model).__name__ == "MixtralForCausalLM"
        ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
        before = model.totals
        assert model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist() == expected
        done = model.totals.since(before)
        assert done.steps == 12 * 8
        assert done.requests == done.hits + done.late + done.misses > 0
        assert done.bytes_loaded == done.loads * stores["native"].record_bytes > 0


def test_others_code_takes_it_for_a_model(
    stores: dict[str, ExpertStore], expected: list[int]
) -> None:
    model = moerun.load(stores["native"], policy="lfu", memory="62MiB", context=64)
    try:
        generator = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
        made = generator(PROMPT, max_new_tokens=12, do_sample=False, return_full_text=True)
        text = model.tokenizer.decode(expected, skip_special_tokens=True)
        assert made[0]["generated_text"].strip() == text.strip()
        logits = model(torch.tensor([expected])).logits
        assert logits.shape == (1, len(expected), model.config.vocab_size)
        slots = model.runner.plan.slots
        model.set_memory("56MiB")
        assert model.runner.plan.slots < slots
    finally:
        model.close()
        model.close()
    with pytest.raises(moerun.RunError, match="closed"):
        model(torch.tensor([expected]))
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("link", "reader", "compile", "budget"))]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"slots": 2, "memory": "1GiB"}, moerun.UsageError, "slots or memory"),
        ({"policy": "lru-spek"}, PolicyError, "lru-spec"),
        ({"policy": "belady"}, PolicyError, "future"),
        ({"memory": "1MiB"}, moerun.RunError, "MiB"),
        ({"device": "tpu"}, moerun.UsageError, "unknown device"),
        ({"scope": "node"}, moerun.UsageError, "unknown scope 'node'"),
        ({"memory": "1GiB", "context": 1}, moerun.UsageError, "2 or more tokens, not 1"),
        ({"slots": 2, "context": 64}, moerun.UsageError, "what memory plans for"),
        ({"streams": 4}, moerun.UsageError, "streams must be 1, 2 or 3, not 4"),
        ({"chunk": 1000}, moerun.UsageError, "a chunk must be a multiple"),
        ({"link_gbps": 0.0}, moerun.UsageError, "link_gbps must be above 0"),
        ({"low": "2bits"}, moerun.UsageError, "2bits is neither a precision .native"),
        ({"low": "2bit"}, moerun.RunError, "packed store, which cannot be packed again at 2bit"),
    ],
)
def test_what_cannot_run_is_refused(
    stores: dict[str, ExpertStore], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        moerun.load(stores["native"], **options)  # type: ignore[arg-type]


def test_a_policy_is_refused_before_a_checkpoint_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="future"):
        moerun.load(tmp_path / "not-there", policy="belady")
    with pytest.raises(moerun.RunError, match="not-there"):
        moerun.load(tmp_path / "not-there", policy="lru")


def test_the_package_is_imported_without_torch() -> None:
    code = (
        "import sys, moerun; assert 'torch' not in sys.modules; "
        "assert 'load' in dir(moerun); moerun.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith(
        "AttributeError: module 'moerun' has no attribute 'nothing'"
    )
