"""`moerun perplexity` over policies: what answers to misses cost, as text is decoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moepolicy import Kind, PolicyFailed, console, find_policy
from moepolicy.tables import Format
from moerun.checkpoint.hub import resolve
from moerun.commands.perplexity import held_out_text
from moerun.perplexity import measure as perplexity
from moerun.perplexity.measure import Measurement
from moerun.perplexity.report import render
from moerun.perplexity.results import Cell, Results
from moerun.perplexity.windows import nats_by_token
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack
from support.commands import Call, caller
from support.moe_models import random_model, save_checkpoint

SUPPORT = Path(__file__).parents[2] / "support"
OWN, ROUTING, FAILING = (SUPPORT / f"{name}.py" for name in ("policies", "routing", "failing"))
TEXT = held_out_text()[:3000]
TOKENS = 90


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model("mixtral", vocab_size=4096, intermediate_size=64)
    return save_checkpoint(model, resolve("tiny"), tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def stores(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExpertStore]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        precision: pack(checkpoint, folder / precision, precision=precision)
        for precision in ("native", "4bit")
    }


@pytest.fixture
def moerun(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    home = tmp_path_factory.getbasetemp() / "policies-home"
    return caller(monkeypatch, capsys, "perplexity", home=home)


def cell_of(
    checkpoint: Path, folder: Path, store: ExpertStore, policy: str, **options: Any
) -> Cell:
    """One cell, measured into a file of its own."""
    low = options.pop("low", None)
    settings = Settings(find_policy(policy), slots=options.pop("slots", 2), low=low)
    measurement = Measurement(str(checkpoint), TEXT, settings, tokens=TOKENS, **options)
    with Results(folder / f"{len([*folder.iterdir()])}.jsonl", measurement.identity) as results:
        return measurement.measure(
            store, "native", store.index.precision, settings.policy, results, lambda: None
        )


@pytest.mark.parametrize("stride", [None, 20])
def test_decoding_gives_the_numbers_of_reading(
    checkpoint: Path, stores: dict[str, ExpertStore], tmp_path: Path, stride: int | None
) -> None:
    read, decoded = (
        cell_of(checkpoint, tmp_path, stores["native"], "lru", stride=stride, by_token=by_token)
        for by_token in (False, True)
    )
    assert decoded.scored_tokens == read.scored_tokens
    assert decoded.nats == pytest.approx(read.nats, rel=1e-5)
    assert not decoded.lossy
    assert decoded.skipped_share == decoded.substituted_share == decoded.low_share == 0


def test_what_a_policy_makes_of_misses_is_what_is_measured(
    checkpoint: Path, stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    def cell(store: str, policy: str, **options: Any) -> Cell:
        return cell_of(checkpoint, tmp_path, stores[store], policy, by_token=True, **options)

    native, four = cell("native", "lru"), cell("4bit", "lru")
    assert abs(native.nats - four.nats) > 1e-3
    answers = {
        kind: cell("native", f"{OWN}:AnswersLow:answer={int(kind)}", slots=0, low=stores["4bit"])
        for kind in (Kind.LOW, Kind.SKIP, Kind.COMPUTE)
    }
    low, skipped, on_cpu = answers.values()
    assert low.nats == pytest.approx(four.nats, rel=1e-4)  # every expert is the lower one
    assert low.low_share == pytest.approx(1)
    assert low.low_expert_bytes == four.expert_bytes
    assert skipped.skipped_share == pytest.approx(1)
    assert abs(skipped.nats - native.nats) > 1e-3
    assert on_cpu.nats == pytest.approx(native.nats, rel=1e-5)
    assert native.low_expert_bytes == 0


def test_routing_is_measured_and_its_share_is_of_all_windows(
    checkpoint: Path, stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    def cell(policy: str) -> Cell:
        return cell_of(checkpoint, tmp_path, stores["native"], policy, by_token=True)

    native, kept, second = cell("lru"), cell(f"{ROUTING}:Kept"), cell(f"{ROUTING}:Second")
    assert kept.nats == pytest.approx(native.nats, rel=1e-6)
    assert (native.rerouted_share, kept.rerouted_share) == (0, 0)
    assert 0 < second.rerouted_share < 0.5
    assert abs(second.nats - native.nats) > 1e-3
    about = {"model": "m", "tokens": TOKENS, "text_bytes": 300, "context": 64, "stride": 64}
    about |= {"by_token": True, "device": "cpu", "low": None}
    shown = render([kept, second], about, Format.table, {})
    [line] = [line for line in shown.splitlines() if "Second" in line and "|" in line]
    assert f"| {100 * second.rerouted_share:.1f}" in line
    assert "routed to another expert" in " ".join(shown.split())
    row = json.loads(render([second], about, Format.json, {}))["cells"][0]
    assert row["rerouted_share"] == second.rerouted_share


def test_a_policy_that_fails_has_no_figure(
    checkpoint: Path, stores: dict[str, ExpertStore], tmp_path: Path
) -> None:
    """Half a text under LRU would be no measurement of the policy."""
    policy = f"{FAILING}:Failing:hook=victim,at=30"
    with pytest.raises(PolicyFailed, match="my victim failed"):
        cell_of(checkpoint, tmp_path, stores["native"], policy, by_token=True)


@pytest.mark.slow
def test_the_command_compares_policies_and_goes_on_where_it_was(
    moerun: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    policies = ("lru", "hobbit", "adapmoe-skip:sensitivity=0.5")
    arguments = (
        *(text, "--model", checkpoint, "--attention", "native", "--experts", "native"),
        *("--low", "2bit", "--slots", "2", "--tokens", "200", "--out", tmp_path / "out.jsonl"),
        *(option for policy in policies for option in ("--policy", policy)),
    )
    real, left = nats_by_token, [5]  # the second window of the second policy

    def interrupted(*arguments: Any) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(perplexity, "nats_by_token", interrupted)
    code, _, err = moerun(*arguments)
    assert code == console.INTERRUPTED
    assert "experts native, policy lru: perplexity" in err
    windows = [json.loads(w) for w in (tmp_path / "out.jsonl.windows").read_text().splitlines()]
    assert [window[2:4] for window in windows][3:] == [["lru", 3], ["hobbit", 0]]
    left[0] = 100
    code, table, err = moerun(*arguments)
    assert code == 0, err
    assert left[0] == 100 - (3 * 4 - 5)
    assert "1 of 3 cells are in" in err
    for line in ("hobbit (changes what the model computes)", "lower precision: 2bit, "):
        assert line in table
    code, out, _ = moerun(*arguments, "--format", "json")
    found = json.loads(out)
    assert (found["by_token"], found["low"]) == (True, "2bit")
    cells = {cell["policy"]: cell for cell in found["cells"]}
    assert [cell["lossy"] for cell in cells.values()] == [False, True, True]
    hobbit = cells["hobbit"]
    assert hobbit["low_share"] > 0
    assert hobbit["low_expert_bytes"] > 0 == cells["lru"]["low_expert_bytes"]
    assert hobbit["perplexity"] != cells["lru"]["perplexity"]
    # Windows that were taken up count into the shares, too.
    mass = sum(window[5] for window in windows if window[2] == "hobbit")
    assert mass > 0
    code, _, err = moerun(*arguments, "--by-window")
    assert code == 1
    assert "holds results of another measurement (by_token is True, not False)" in err


@pytest.mark.parametrize(
    ("arguments", "expected", "message"),
    [
        (("--policy", "hobbit"), 1, "policy 'hobbit' loads experts at a lower"),
        (("--policy", "belady"), 1, "needs the future"),
        (("--low", "5bit"), 2, "--low 5bit is neither a precision"),
        (("--experts", "2bit", "--policy", "hobbit", "--low", "2bit"), 2, "is no lower than"),
    ],
)
def test_policies_that_cannot_run_are_refused_before_anything_is_packed(
    moerun: Call, checkpoint: Path, arguments: tuple[str, ...], expected: int, message: str
) -> None:
    code, out, err = moerun("--model", checkpoint, *arguments)
    assert (code, out) == (expected, "")
    assert message in err
    assert "packing" not in err
