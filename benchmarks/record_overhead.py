"""What recording costs over the plain forward pass, measured interleaved in one run.

    python benchmarks/record_overhead.py            # the bundled model, and a wider random Mixtral

Each round times the same batches plain, then recorded (hooks, predictions, rows, checks, parts on
disk), in turn first. Joining the parts into the finished trace is timed apart, and counted in the
second ratio. Medians over the rounds, with the quartiles, of wall-clock time and of the process's
own CPU time, which other load on the machine disturbs less.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from moeroute import TraceWriter
from moetrace.capture import RoutingCapture
from moetrace.corpus import Windows
from moetrace.model import Checkpoint, load
from moetrace.record import Settings, batches, describe_recording, teacher_forced


def wide_model(tiny: Checkpoint) -> Checkpoint:
    """A random Mixtral of hidden size 1024, where gates and experts are nearer to real ones."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=tiny.model.config.vocab_size,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=8,
        max_position_embeddings=512,
    )
    model = MixtralForCausalLM(config).eval()
    return replace(tiny, name="wide (random)", model=model, stored=torch.float32)


class Stopwatch:
    """Wall-clock and CPU seconds since the last call of `lap`."""

    def __init__(self) -> None:
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        then, self._last = self._last, self._now()
        return self._last[0] - then[0], self._last[1] - then[1]


class Round(NamedTuple):
    """(wall, CPU) seconds of each part."""

    plain: tuple[float, float]
    recorded: tuple[float, float]
    finished: tuple[float, float]


def measure(
    checkpoint: Checkpoint, windows: Windows, settings: Settings, rounds: int
) -> list[Round]:
    """Time the same windows plain and recorded, taking turns in being first."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "t.parquet"
        for turn in range(rounds + 1):
            if turn % 2:
                recorded = record_once(checkpoint, windows, settings, out)
                found.append(Round(run_plain(checkpoint, windows, settings), *recorded))
            else:
                plain = run_plain(checkpoint, windows, settings)
                found.append(Round(plain, *record_once(checkpoint, windows, settings, out)))
    return found[1:]  # the first warms up


def run_plain(checkpoint: Checkpoint, windows: Windows, settings: Settings) -> tuple[float, float]:
    """The model alone."""
    body, watch = checkpoint.model.base_model, Stopwatch()
    for batch in batches(windows, settings.batch_tokens, checkpoint.model.device):
        body(input_ids=batch.ids, use_cache=False)
    return watch.lap()


def record_once(
    checkpoint: Checkpoint, windows: Windows, settings: Settings, out: Path
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Recording, and the end of it."""
    with RoutingCapture(checkpoint.model, settings.horizon) as capture:
        meta = describe_recording(checkpoint, windows, settings, capture)
        writer, watch = TraceWriter(out, meta), Stopwatch()
        for rows in teacher_forced(checkpoint, windows, settings, capture):
            writer.write(rows)
        writer.flush()
        written = watch.lap()
        writer.close()
        return written, watch.lap()


def tell(name: str, found: list[Round], n_tokens: int) -> None:
    """The ratios of all rounds."""
    seconds = statistics.median(one.plain[0] for one in found)
    typer.echo(f"{name}: plain forward {n_tokens / seconds:,.0f} tokens/s")
    for clock, kind in enumerate(("wall clock", "CPU time")):
        ratios = {
            "recording": [r.recorded[clock] / r.plain[clock] for r in found],
            "with finishing": [
                (r.recorded[clock] + r.finished[clock]) / r.plain[clock] for r in found
            ],
        }
        for label, values in ratios.items():
            low, middle, high = statistics.quantiles(values, n=4)
            line = (
                f"{kind}, {label} / plain: median {middle:.3f}, quartiles {low:.3f} to {high:.3f}"
            )
            typer.echo(f"  {line}")


def main(
    rounds: Annotated[int, typer.Option(min=2)] = 9,
    tokens: Annotated[int, typer.Option(help="Of the bundled model; the wide one an 8th.")] = 16384,
    horizon: Annotated[int, typer.Option(min=0)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    wide: Annotated[bool, typer.Option(help="Also the wide model.")] = True,
) -> None:
    """Print how much longer a recorded forward pass takes than a plain one."""
    torch.set_num_threads(threads)
    typer.echo(f"horizon {horizon}, {threads} thread(s), {rounds} rounds, interleaved")
    tiny = load("tiny", device="cpu")
    models = [(tiny, tokens)]
    if wide:
        models.append((wide_model(tiny), tokens // 8))
    for checkpoint, n_tokens in models:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, 2048, (n_tokens,), generator=generator).tolist()
        windows = Windows([ids[i : i + 512] for i in range(0, n_tokens, 512)], "random tokens")
        with torch.inference_mode():
            found = measure(checkpoint, windows, Settings(horizon=horizon), rounds)
        tell(checkpoint.name, found, n_tokens)


if __name__ == "__main__":
    typer.run(main)
