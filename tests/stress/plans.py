"""Random memory plans: the measured peak is at or under the budget.

The peak is the process's own (VmHWM) above what it had when all was imported. Each plan runs in a
child that is forked when all is imported and whose pages are those that its parent has in memory.
Every twentieth runs in a fresh process as well, and so does each that came near its budget; both
peaks are on record.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stress.journal import Journaled
from stress.warm import Request, Warm

JOURNAL = "plans.jsonl"
PATIENCE_S = 600.0
FRESH_EACH = 20
NEAR = 0.8  # of the budget
MIB = 1 << 20
PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom. "
KEPT, REFUSED = "kept", "refused"
BATCHED = "stress.batched"
_SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 5000,
    "max_position_embeddings": 2048, "num_attention_heads": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),  # the big one
    "qwen": ("qwen2_moe", {**_SIZES, "moe_intermediate_size": 256, "num_experts": 16,
                           "shared_expert_intermediate_size": 256}),
    "gpt-oss": ("gpt_oss", {**_SIZES, "head_dim": 64}),
    "deepseek": ("deepseek_v2", {**_SIZES, "moe_intermediate_size": 256, "n_routed_experts": 16,
                                 "q_lora_rank": 64, "kv_lora_rank": 64}),
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """One plan and its end: kept, refused in one line, or the fault that it showed.

    ``fresh_bytes`` is the peak of the same plan in a fresh process; 0 where it did not run in one.
    """

    number: int
    command: list[str]
    budget_bytes: int
    peak_bytes: int
    ended: str
    told: str = ""
    fresh_bytes: int = 0


class Plans(Journaled[Planned]):
    """A folder with models, their stores and the outcomes so far; ``run`` adds to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, f"{seed}-{JOURNAL}", Planned)
        self.seed = seed
        self._lock = threading.Lock()

    def run(self, count: int, *, minutes: float, workers: int = 1) -> None:
        """Run plans until ``count`` are on record, or the time is up."""
        for name in MODELS:
            _make(self.folder, name)
        until = time.monotonic() + 60 * minutes
        done = {planned.number for planned in self.outcomes}
        numbers = iter([number for number in range(count) if number not in done])

        def work(scratch: Path) -> None:
            with Warm(scratch) as warm:
                while time.monotonic() < until:
                    with self._lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    planned = self._one(number, warm)
                    with self._lock, self.journal.open("a") as file:
                        self.outcomes.append(planned)
                        file.write(json.dumps(asdict(planned)) + "\n")

        with ThreadPoolExecutor(workers) as pool:
            for ended in [pool.submit(work, self.folder / f"w{i}") for i in range(workers)]:
                ended.result()

    @property
    def faults(self) -> list[Planned]:
        """Plans that took more than their budget, or failed in another way than a refusal."""
        return [planned for planned in self.outcomes if planned.ended not in (KEPT, REFUSED)]

    def rows(self) -> list[dict[str, str | int]]:
        """Plans by how they ended; for those that ran, the most of a budget that one took, and
        by how much a fresh process's peak differed at most, in % of the budget."""
        found: list[dict[str, str | int]] = []
        for ended in sorted({planned.ended for planned in self.outcomes}):
            of = [planned for planned in self.outcomes if planned.ended == ended]
            most = max(planned.peak_bytes / planned.budget_bytes for planned in of)
            fresh = [p for p in of if p.fresh_bytes]
            more = max(((p.fresh_bytes - p.peak_bytes) / p.budget_bytes for p in fresh), default=0)
            found.append({"ended": ended, "plans": len(of), "peak %": f"{100 * most:.1f}",
                          "fresh too": len(fresh), "more %": f"{100 * more:.1f}"})  # fmt: skip
        return found

    def _one(self, number: int, warm: Warm) -> Planned:
        options, budget = self._drawn(random.Random(f"{self.seed} {number}"))
        env = {"XDG_CACHE_HOME": str(self.folder / "home")}
        request = Request(tuple(options), str(self.folder), env=env, resident=True,
                          patience_s=PATIENCE_S)  # fmt: skip
        done = warm.run(request)
        if done.code == 0:
            peak = _peak(done.stdout)
            sure = number % FRESH_EACH and peak < NEAR * budget
            fresh = 0 if sure else self._fresh(options, env)
            ended = KEPT if max(peak, fresh) <= budget else "exceeded"
            return Planned(number, options, budget, peak, ended, fresh_bytes=fresh)
        lines = done.stderr.strip().splitlines() or [""]
        clear = done.code in (1, 2) and re.match("error: ", lines[-1])
        told = lines[-1] if clear else f"{done.code}: {done.stderr[-1000:]}"
        return Planned(number, options, budget, 0, REFUSED if clear else "failed", told)

    def _fresh(self, options: list[str], env: dict[str, str]) -> int:
        program, *arguments = options
        module = program if program == BATCHED else f"{program}.cli"
        done = subprocess.run(
            [sys.executable, "-c", f"from {module} import main; main()", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env=os.environ | env | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            check=True,
        )
        return _peak(done.stdout)

    def _drawn(self, rng: random.Random) -> tuple[list[str], int]:
        """A command line, its program first, and its budget."""
        budget = rng.randrange(40, 400) * MIB
        model = rng.choice(("mixtral", "mixtral", *MODELS))
        precision = rng.choice(("native", "bf16", "4bit", "3bit", "2bit"))
        store = f"{model}-{precision}"
        options = ["--memory", str(budget), "--device", "cpu", "--model", model]
        options += ["--precision", precision]
        if rng.random() < 0.3:
            attention = rng.choice(("4bit", "3bit", "2bit"))
            options += ["--attention", attention]
            store += f"-{attention}"
        options += ["--store", store]
        low = precision in ("native", "bf16") and rng.random() < 0.15
        policies = ("lru", "lfu", "arc", "lru-spec", "lru-spec:n=1,staging=1")
        options += ["--policy", "hobbit" if low else rng.choice(policies)]
        options += ["--low", "4bit"] if low else []
        for option, values in (
            ("--scope", ("layer", "global")),
            ("--streams", ("1", "2", "3")),
            ("--chunk", ("256KiB", "1MiB", "3MiB")),
            ("--context", ("64", "500", "2048")),
            ("--threads", ("1", "2")),
            ("--horizon", ("1", "2", "3")),
            ("--host-memory", ("8MiB", "30MiB", "100MiB")),
        ):
            if rng.random() < 0.3:
                options += [option, rng.choice(values)]
        if rng.random() < 0.2:
            options.append("--direct")
        options += ["--prompt", PROSE * rng.choice((1, 4, 16, 60))]
        options += ["--max-new-tokens", str(rng.choice((1, 8, 40)))]
        if rng.random() < 0.2:
            return [BATCHED, *options, "--texts", str(rng.choice((2, 3, 8)))], budget
        return ["moerun", "generate", *options, "--format", "json"], budget


def _peak(printed: str) -> int:
    return int(json.loads(printed)["memory_peak_bytes"])


def _make(folder: Path, name: str) -> None:
    """The checkpoint ``name``, where it is not there."""
    from moerun.checkpoint.hub import resolve
    from support.big_models import big_store
    from support.moe_models import random_model, save_checkpoint

    if (folder / name).exists():
        return
    making = folder / "making"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    family, sizes = MODELS[name]
    if sizes:
        save_checkpoint(random_model(family, **sizes), resolve("tiny"), making / "model")
    else:
        big_store(making).close()
    (making / "model").rename(folder / name)
