"""Links, session and resize under random schedules, on a device of threads.

Each seed draws a cache, a link and a device with delays, serves passes while another thread changes
the number of slots, and lets a read, a copy or the policy's thread fail in some. Every expert must
be computed from its own record, the counters must agree, an error must surface in the serving
thread and a reset session serve again, and nothing may hang.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moepolicy import Context, find_policy
from moerun.errors import RunError
from moerun.links import HostTier, Throttle
from moerun.links.arena import Arena
from moerun.links.pinned import PinnedLink
from moerun.live.session import Session
from runtime.links.test_pinned_session import Compute
from runtime.live.test_session import random_passes
from support.links import MemoryRecords
from support.pinned import CHUNK, FIRST_LOW, LOW, RECORD, dual_slot
from support.thread_device import ThreadDevice

JOURNAL = "schedules.jsonl"
PATIENCE_S = 120.0
OWN = Path(__file__).parents[1] / "support" / "policies.py"
POLICIES = ("lru", "lfu", "lru-spec:n=2,staging=2", "lru-spec:n=1", "hobbit", f"{OWN}:SlotSpec")
SHAPE = (3, 6, 2)  # layers, experts, top-k


@dataclass(frozen=True)
class Ran:
    """A seed and its fault, if it has one; ``failing``: what was made to fail."""

    seed: int
    failing: str
    resizes: int
    fault: str


class Schedules:
    """A folder with the outcomes so far; ``run`` adds to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        folder.mkdir(parents=True, exist_ok=True)
        self.journal = folder / f"{seed}-{JOURNAL}"
        self.stacks = folder / f"{seed}-hung.txt"
        self.outcomes: list[Ran] = []
        if self.journal.exists():
            lines = self.journal.read_text().splitlines()
            self.outcomes = [Ran(**json.loads(line)) for line in lines]

    def run(self, count: int, *, minutes: float) -> None:
        """Run seeds until ``count`` are on record, the time is up, or one hangs."""
        until = time.monotonic() + 60 * minutes
        interval = sys.getswitchinterval()
        try:
            for number in range(len(self.outcomes), count):
                if time.monotonic() > until:
                    break
                ran = self._watched(self.seed * 1_000_000 + number)
                self.outcomes.append(ran)
                with self.journal.open("a") as file:
                    file.write(json.dumps(asdict(ran)) + "\n")
                if ran.fault == "hangs":
                    break  # its threads are still there
        finally:
            sys.setswitchinterval(interval)

    @property
    def faults(self) -> list[Ran]:
        """Seeds that found something."""
        return [ran for ran in self.outcomes if ran.fault]

    def rows(self) -> list[dict[str, str | int]]:
        """Seeds by what was made to fail."""
        found: list[dict[str, str | int]] = []
        for failing in (*sorted(Counter(ran.failing for ran in self.outcomes)), "all"):
            of = [ran for ran in self.outcomes if failing in (ran.failing, "all")]
            found.append({"failing": failing, "schedules": len(of),
                          "resizes": sum(ran.resizes for ran in of),
                          "faults": sum(bool(ran.fault) for ran in of)})  # fmt: skip
        return found

    def _watched(self, seed: int) -> Ran:
        found: list[Ran] = []
        one = _Schedule(seed)
        thread = threading.Thread(target=lambda: found.append(one.run()), daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        if thread.is_alive():
            with self.stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            return Ran(seed, one.failing, one.resizes, "hangs")
        return found[0] if found else Ran(seed, one.failing, one.resizes, "raises")


class _Schedule:
    """What a seed draws."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.failing = rng.choice(("nothing", "nothing", "disk", "device"))
        self.policy = rng.choice(POLICIES)
        self.context = Context(*SHAPE, rng.randrange(7), rng.choice(("layer", "global")))
        self.streams, self.chunk_bytes = rng.randint(1, 3), rng.choice((0, CHUNK))
        # A link that holds all records reads them before it serves, and would fail then.
        self.held = rng.choice((9, 0, 3, 9) if self.failing == "disk" else (None, 0, 3, 9))
        self.derives, self.capped = rng.random() < 0.5, rng.random() < 0.3
        self.resizes = 0
        sys.setswitchinterval(rng.choice((1e-6, 1e-5, 1e-4, 5e-3)))
        broken = frozenset({rng.randrange(self.context.n_keys)})
        self.records = MemoryRecords(
            self.context.n_keys,
            broken if self.failing == "disk" else frozenset(),
            record_bytes=RECORD,
        )
        self.low = MemoryRecords(self.context.n_keys, record_bytes=LOW, first=FIRST_LOW)
        copy = frozenset({rng.randrange(40)}) if self.failing == "device" else frozenset()
        self.device = ThreadDevice(seed, failing=copy)

    def run(self) -> Ran:
        """Serve, resize, fail, reset, serve again; what was wrong."""
        try:
            fault = self._serve()
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        finally:
            self.device.end()
        return Ran(self.seed, self.failing, self.resizes, fault)

    def _link(self, n_slots: int) -> PinnedLink:
        copies = self.streams * (2 if self.chunk_bytes else 1)
        n_bytes = None if self.held is None else (copies + self.held) * RECORD
        return PinnedLink(
            HostTier(self.records, n_bytes, self.low, read_bytes=CHUNK),
            Arena(partial(dual_slot, self.derives), n_slots),
            self.device,
            streams=self.streams,
            chunk_bytes=self.chunk_bytes,
            throttle=Throttle(bytes_per_s=1e9) if self.capped else None,
        )

    def _serve(self) -> str:
        passes = random_passes(self.seed % 10**6, *SHAPE, 2, [5, 0, 0, 3, 0])
        sizes: dict[str, Any] = {"record_bytes": RECORD, "low_record_bytes": LOW}
        spec = find_policy(self.policy)
        with Session(self.context, spec, self._link, **sizes) as session:
            ended = threading.Event()
            changing = threading.Thread(target=self._resize, args=(session, ended))
            changing.start()
            error = ""
            try:
                compute = Compute(session, self.device)
                compute.run(passes, [])
            except (RunError, RuntimeError) as told:
                error = str(told)
            finally:
                ended.set()
                changing.join()
            if error:
                if self.failing == "nothing":
                    return f"failed of nothing: {error}"
                self.records.broken = frozenset()
                session.reset()
                compute = Compute(session, self.device)
                compute.run(passes, [])
            elif (wrong := self._counts(session)) is not None:
                return wrong
        if compute.wrong:
            return f"computed from another record: {compute.wrong[:3]}"
        return "" if compute.computed else "computed nothing"

    def _counts(self, session: Session) -> str | None:
        session.settle()
        totals, copied = session.totals, session.link.statistics
        if (copied.copies, copied.bytes_copied) == (totals.loads, totals.bytes_loaded):
            return None
        try:
            session.raise_failure()
        except (RunError, RuntimeError) as error:
            # Of a copy that no step was left to wait for: the next step would say so.
            return f"failed of nothing: {error}" if self.failing == "nothing" else None
        return f"{copied.copies} copies, {totals.loads} loads counted"

    def _resize(self, session: Session, ended: threading.Event) -> None:
        rng = random.Random(self.seed)
        while not ended.wait(rng.choice((0.0, 1e-4, 1e-3, 1e-2))):
            session.resize(rng.randrange(7))
            self.resizes += 1


def main(folder: Path, seed: int, count: int, minutes: float) -> Schedules:
    """Run schedules; where one hangs, its threads are not waited for."""
    campaign = Schedules(folder, seed)
    campaign.run(count, minutes=minutes)
    if campaign.faults and campaign.faults[-1].fault == "hangs":
        print(campaign.stacks.read_text(), file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    return campaign
