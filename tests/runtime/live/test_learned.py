"""What a policy learns is kept from one run to the next."""

from __future__ import annotations

from pathlib import Path

import moerun
import numpy as np
import pytest
from moepolicy import PolicyError
from moepolicy.fitted import read_fitted
from moerun.errors import UsageError
from moerun.store.expert_store import ExpertStore


def generate(store: ExpertStore, learned: Path, policy: str = "foresight-bypass") -> None:
    with moerun.load(store, policy=policy, slots=3, learned=learned, device="cpu") as model:
        ids = model.tokenizer("The house was quiet, and", return_tensors="pt").input_ids
        model.generate(ids, max_new_tokens=6, do_sample=False)


def test_a_run_begins_with_what_the_last_one_left(
    stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    file, store = tmp_path / "learned.safetensors", stores["native"]
    generate(store, file)
    first = read_fitted(file, "foresight-bypass")
    assert (first.of.trace, first.of.n_layers) == ("a live run", store.n_layers)
    with moerun.load(store, policy="foresight-bypass", slots=3, learned=file) as model:
        begun = model.runner.session.cache.policy
        assert np.array_equal(begun.weight, first.arrays["weight"])
        assert np.array_equal(begun.bias, first.arrays["bias"])
    generate(store, file)
    second = read_fitted(file, "foresight-bypass")
    assert not np.array_equal(first.arrays["weight"], second.arrays["weight"])


def test_what_cannot_be_kept_is_refused(stores: dict[str, ExpertStore], tmp_path: Path) -> None:
    store, file = stores["native"], tmp_path / "learned.safetensors"
    with pytest.raises(UsageError, match="policy 'lru' learns nothing that can be kept"):
        generate(store, file, policy="lru")
    with pytest.raises(UsageError, match="there is no folder"):
        generate(store, tmp_path / "no" / "learned.safetensors")
    file.write_bytes(b"damaged")
    with pytest.raises(PolicyError, match="is damaged"):
        generate(store, file)
    assert file.read_bytes() == b"damaged"
