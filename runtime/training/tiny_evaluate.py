"""Scores a trained checkpoint on the held-out tails of its sources; prints the model card's table.

    python runtime/training/tiny_evaluate.py pg1342.txt pg2600.txt tinyshakespeare.txt --model tiny

Needs the recorder (moetrace): locality and recall are those of a trace of the held-out text.
"""

from __future__ import annotations

import gzip
import lzma
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from moeroute import Trace, open_trace
from moeroute.statistics import locality, popularity, read_routing, recall
from moerun.offload.gate_predictor import METHODS, find_routers
from moetrace.corpus import Document, cut_windows
from moetrace.model import Checkpoint, load
from moetrace.record import Settings, record
from tiny_corpus import Source, read_sources
from torch import nn
from torch.nn import functional

TRACED_TOKENS = 12_000
HEADINGS = " ".join(f"{h:>9}" for h in ("model", "gzip -9", "xz -9", "xz primed", "random"))


def nats(checkpoint: Checkpoint, text: str) -> float:
    """Cross-entropy of the whole text, each token once, after 256 to 511 tokens of context.

    (The first ones have less; the very first follows the end-of-text token.)
    """
    tokenizer, context = checkpoint.tokenizer, checkpoint.context
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
    if tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) != text:
        raise AssertionError("the tokenizer does not give the text back")
    total, scored = 0.0, 1
    for start in range(0, len(ids) - 1, context // 2):
        window = ids[start : start + context + 1]
        new = start + len(window) - scored
        if new <= 0:
            break
        logits = checkpoint.model(input_ids=window[None, :-1], use_cache=False).logits[0, -new:]
        total += functional.cross_entropy(logits.float(), window[-new:], reduction="sum").item()
        scored += new
    return total


@contextmanager
def random_experts(checkpoint: Checkpoint, seed: int) -> Iterator[None]:
    """Every gate's choice replaced by random experts, its weights kept."""
    generator = torch.Generator().manual_seed(seed)

    def shuffle(_router: nn.Module, _arguments: Any, output: Any) -> Any:
        logits, weights, ids = output
        chance = torch.rand(logits.shape, generator=generator)
        return logits, weights, chance.topk(ids.shape[-1]).indices

    hooks = [r.register_forward_hook(shuffle) for r in find_routers(checkpoint.model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def xz(data: bytes) -> int:
    """Bytes of `xz -9`'s output."""
    return len(lzma.compress(data, preset=9))


def compression_line(name: str, checkpoint: Checkpoint, sources: list[Source]) -> str:
    """Bits per byte on the held-out bytes of some sources: model, compressors, random experts.

    (`xz primed` has read the training text first; random experts are scored on an eighth.)
    """
    totals = np.zeros(6)
    for source in sources:
        training, held_out = source.split()
        raw, before = held_out.encode(), "".join(training).encode()
        with random_experts(checkpoint, seed=0):
            scrambled = nats(checkpoint, held_out[: len(held_out) // 8]) * 8
        sizes = (len(gzip.compress(raw, 9)), xz(raw), xz(before + raw) - xz(before))
        model_bytes = nats(checkpoint, held_out) / math.log(2) / 8
        totals += (len(raw), model_bytes, *sizes, scrambled / math.log(2) / 8)
    bits = totals[1:] / totals[0] * 8
    return f"{name:36} {int(totals[0]):>8,} " + " ".join(f"{b:>9.3f}" for b in bits)


def record_text(checkpoint: Checkpoint, text: str, out: Path, prediction: str) -> Trace:
    """A trace of the first tokens of a text, with predictions three layers ahead."""
    document = Document("held-out", text)
    windows = cut_windows([document], checkpoint.tokenizer, checkpoint.context, TRACED_TOKENS)
    record(checkpoint, windows, Settings(horizon=3, prediction=prediction), out)
    return open_trace(out)


def routing_lines(trace: Trace) -> list[str]:
    """Locality and balance of the routing, layer by layer and over all."""
    routing = read_routing(trace)
    repeats, chance = locality(routing), locality(routing.shuffled(0))
    use = popularity(routing)
    return [
        f"an expert was in the token before's pair: {repeats.mean[0]:.3f}, of the tokens "
        f"shuffled {chance.mean[0]:.3f}; by layer {listed(repeats.by_layer[:, 0])}",
        f"normalised entropy of use, by layer: {listed(use.entropy)}; the hottest expert of all "
        f"layers {use.hottest.max():.3f}",
    ]


def recall_line(trace: Trace) -> str:
    """Recall of the predictions, as many fetched as are used."""
    found = recall(trace, [trace.meta.top_k])
    by_horizon = " / ".join(f"{value:.3f}" for value in found.mean[:, 0])
    return (
        f"recall@{trace.meta.top_k} 1 / 2 / 3 layers ahead by {trace.meta.prediction}: "
        f"{by_horizon}; one ahead, by layer {listed(found.by_layer[0, 0, 1:])}"
    )


def listed(values: Iterable[float]) -> str:
    """The values with two decimals, on one line."""
    return " ".join(f"{value:.2f}" for value in values)


def difference_line(one: Trace, other: Trace) -> str:
    """How far two kinds of text part in the experts they use, and two halves of one kind."""
    a, b = read_routing(one).experts, read_routing(other).experts
    n_experts = one.meta.n_experts

    def distance(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> list[float]:
        shares = [
            [np.bincount(part[:, layer].ravel(), minlength=n_experts) / part[:, layer].size]
            for part in (x, y)
            for layer in range(x.shape[1])
        ]
        first, second = np.array(shares).reshape(2, x.shape[1], n_experts)
        return [float(d) for d in np.abs(first - second).sum(1) / 2]

    between = distance(a, b)
    half = len(a) // 2
    within = distance(a[:half], a[half:])
    return (
        f"prose against code, total variation of expert use by layer: {listed(between)}; "
        f"mean {np.mean(between):.3f} (two halves of the prose {np.mean(within):.3f})"
    )


def main(
    texts: Annotated[list[Path], typer.Argument(help="The texts the model was trained on.")],
    model: Annotated[str, typer.Option(help="'tiny' or a checkpoint's folder.")] = "tiny",
    python: Annotated[bool, typer.Option(help="Also this Python's library and topics.")] = True,
) -> None:
    """Print held-out bits per byte, and how the model routes held-out prose and code."""
    torch.set_num_threads(1)
    checkpoint, sources = load(model), read_sources(texts, python=python)
    kinds = {kind: [s for s in sources if s.kind == kind] for kind in ("prose", "code")}
    typer.echo(f"{'held-out bits per byte':36} {'bytes':>8} " + HEADINGS)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for source in sources:
            label = f"{source.name[:20]} [{source.held_out_from}:{source.n_bytes}]"
            typer.echo(compression_line(label, checkpoint, [source]))
        traces = {}
        for kind, members in kinds.items():
            if not members:
                continue
            typer.echo(compression_line(f"all {kind}", checkpoint, members))
            held_out = max(members, key=lambda source: source.n_bytes).split()[1]
            for method in METHODS:
                out = Path(folder) / f"{kind} {method}.parquet"
                trace = record_text(checkpoint, held_out, out, method)
                typer.echo(f"{kind}: {recall_line(trace)}")
            for line in routing_lines(trace):
                typer.echo(f"{kind}: {line}")
            traces[kind] = trace
        if len(traces) == 2:
            typer.echo(difference_line(traces["prose"], traces["code"]))


if __name__ == "__main__":
    typer.run(main)
