"""What each answer to a miss does to the logits of the bundled model, decoding a text it is given.

Every token of the text is fed whatever the model would have said, so that each differs from the
stock model's by what the policy changed and nothing else.

    python benchmarks/miss_logits.py --slots 4 --tokens 200
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from moepolicy import Context, Kind, PolicySpec, Step, find_policy
from moepolicy.library.recency.lru import Lru
from moerun.checkpoint.hub import resolve
from moerun.live.runner import Runner
from moerun.live.totals import Totals
from moerun.settings import Settings
from moerun.store.pack import pack
from transformers import AutoModelForCausalLM

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age "
    "of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the "
    "season of Light, it was the season of Darkness, it was the spring of hope, it was the winter "
    "of despair, we had everything before us, we had nothing before us, we were all going direct "
    "to Heaven, we were all going direct the other way."
)
PROMPT_TOKENS = 16
LOW = ("4bit", "3bit", "2bit")


class Always(Lru):
    """LRU with one answer to the misses of decoded tokens."""

    requires = frozenset({"cpu", "low"})
    lossy = True

    def __init__(self, context: Context, answer: int = int(Kind.LOAD)) -> None:
        super().__init__(context)
        self.answer = answer

    def on_miss(self, step: Step, rank: int) -> int:
        return self.answer if step.tokens == 1 else int(Kind.LOAD)

    def substitute(self, step: Step, rank: int, candidates: Any) -> int:
        return int(candidates[0])


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] after each token of the text behind its prompt."""
    out = model(ids[:, :PROMPT_TOKENS], use_cache=True)
    rows = []
    for i in range(PROMPT_TOKENS, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1].float())
    return torch.stack(rows)


def line(name: str, found: torch.Tensor, stock: torch.Tensor, totals: Totals) -> str:
    off = (found - stock).abs()
    said, meant = found.log_softmax(-1), stock.log_softmax(-1)
    kl = (meant.exp() * (meant - said)).sum(-1).mean()
    same = (found.argmax(-1) == stock.argmax(-1)).float().mean()
    shares = "  ".join(f"{100 * share:5.1f}" for share in totals.shares.values())
    return (
        f"{name:24} {off.max():9.5f} {off.mean():9.5f} {kl:9.5f} {100 * same:6.1f}  {shares}  "
        f"{totals.cpu_experts:6} {totals.bytes_loaded / 1e6:8.1f}"
    )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--slots", type=int, default=4)
    asked.add_argument("--tokens", type=int, default=200, help="of the text, at most")
    options = asked.parse_args()
    torch.set_num_threads(1)
    stock_model = AutoModelForCausalLM.from_pretrained(resolve("tiny")).eval()
    policies: list[tuple[str, PolicySpec, str]] = [
        (f"{kind.name} every miss" + f", {low}" * (kind is Kind.LOW), spec, low)
        for kind in (Kind.LOAD, Kind.COMPUTE, Kind.LOW, Kind.SUBSTITUTE, Kind.SKIP)
        for low in (LOW if kind is Kind.LOW else LOW[-1:])
        for spec in [PolicySpec(kind.name, Always, {"answer": int(kind)})]
    ]
    names = ("fiddler", "hobbit", "adapmoe-skip", "emoe-substitute")
    policies += [(name, find_policy(name), "2bit") for name in names]
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            precision: pack(resolve("tiny"), Path(folder) / precision, precision=precision)
            for precision in ("native", *LOW)
        }
        print(f"bundled model, {options.slots} of 8 experts a layer; against the stock logits")
        print(f"{'':24} {'max |d|':>9} {'mean |d|':>9} {'KL':>9} {'top-1 %':>6}  "
              "skip%  subst%  low%  on CPU   MB loaded")  # fmt: skip
        for name, spec, low in policies:
            with Runner(stores["native"], Settings(spec, options.slots, low=stores[low])) as runner:
                ids = runner.encode(TEXT)[:, : options.tokens]
                found = decode(runner.model, ids)
                print(line(name, found, decode(stock_model, ids), runner.session.totals))


if __name__ == "__main__":
    main()
