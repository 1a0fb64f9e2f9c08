"""What the values of options may be, checked without torch: before anything that takes seconds."""

from __future__ import annotations

import re

from moerun.amounts import parse_bytes
from moerun.errors import UsageError
from moerun.format.names import RECORD_ALIGN

AUTO = "auto"
DEVICE = r"cuda(?::(\d+))?"
REUSES = ("exact", "near")


def check_ways(streams: int, chunk_bytes: int) -> None:
    """UsageError where no link could carry records so."""
    if not 1 <= streams <= 3:
        raise UsageError.of("streams", f"must be 1, 2 or 3, not {streams}")
    if chunk_bytes < 0 or chunk_bytes % RECORD_ALIGN:
        raise UsageError(f"a chunk must be a multiple of {RECORD_ALIGN} bytes, not {chunk_bytes}")


def check_rate(bytes_per_s: float) -> None:
    """UsageError for a cap that no link could have."""
    if not 0 < bytes_per_s < float("inf"):
        raise UsageError.of("link_gbps", f"must be above 0, not {bytes_per_s / 1e9:g}")


def check_device(name: str) -> None:
    """UsageError for a name that is no device's: whether it is here, torch has to say."""
    if name not in (AUTO, "cpu") and not re.fullmatch(DEVICE, name):
        raise UsageError(f"unknown device '{name}'; there are: auto, cpu, cuda, cuda:N")


def check_threads(threads: int) -> None:
    """UsageError for a number of threads that cannot be."""
    if threads < 1:
        raise UsageError.of("threads", f"must be 1 or more, not {threads}")


def check_link(streams: int, chunk: str | int | None, link_gbps: float | None) -> None:
    """UsageError where an option of the link cannot be."""
    check_ways(streams, 0 if chunk is None else read_bytes(chunk))
    if link_gbps is not None:
        check_rate(link_gbps * 1e9)


def check_cache(
    *,
    slots: int | None,
    memory: str | int | None,
    host_memory: str | int | None,
    context: int | None,
    prompt_chunk: int | None,
    scope: str,
    horizon: int | None,
    budgeted: bool,
) -> None:
    """UsageError where an option of the cache cannot be, or lacks another; ``budgeted``: there is
    a budget of memory, which ``context`` is planned in."""
    if slots is not None and slots < 0:
        raise UsageError.of("slots", f"must be 0 or more, not {slots}")
    if context is not None and context < 2:
        raise UsageError.of("context", f"must be 2 or more tokens, not {context}")
    if context is not None and not budgeted:
        raise UsageError.of("context", "is what memory plans for: give that, too")
    if prompt_chunk is not None and prompt_chunk < 1:
        raise UsageError.of("prompt_chunk", f"must be 1 or more tokens, not {prompt_chunk}")
    if horizon is not None and horizon < 0:
        raise UsageError.of("horizon", f"must be 0 or more, not {horizon}")
    if scope not in ("layer", "global"):
        raise UsageError(f"unknown scope '{scope}': it is 'layer' or 'global'")
    if isinstance(memory, str) and memory.strip().lower() != AUTO:
        parse_bytes(memory)
    if host_memory is not None:
        read_bytes(host_memory)


def check_on_policy_error(answer: str) -> None:
    """UsageError for an unknown answer to a policy that fails."""
    if answer not in ("fallback", "stop"):
        raise UsageError.of("on_policy_error", f"must be 'fallback' or 'stop', not '{answer}'")


def check_reuse(reuse: str | None) -> None:
    """UsageError for an unknown way to go on from what is kept of a text."""
    if reuse is not None and reuse not in REUSES:
        raise UsageError.of("reuse", f"must be 'exact' or 'near', not '{reuse}'")


def check_sampling(
    max_new_tokens: int, temperature: float, top_p: float, seed: int, stop_strings: tuple[str, ...]
) -> None:
    """UsageError that names what is out of range."""
    if max_new_tokens < 1:
        raise UsageError.of("max_new_tokens", f"must be 1 or more, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UsageError.of("temperature", f"must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise UsageError.of("top_p", f"must be above 0 and at most 1, not {top_p}")
    if not 0 <= seed < 2**32:
        raise UsageError.of("seed", f"must be 0 to {2**32 - 1}, not {seed}")
    if not all(stop_strings):
        raise UsageError("a stop string must not be empty")


def check_rounds(rounds: int) -> None:
    """UsageError for a number of repeated measurements that cannot be."""
    if rounds < 1:
        raise UsageError.of("rounds", f"must be 1 or more, not {rounds}")


def check_counts(tokens: int, warm_up: int, rounds: int) -> None:
    """UsageError for a bench of no tokens or rounds."""
    for name, given, least in (("tokens", tokens, 1), ("warm_up", warm_up, 0)):
        if given < least:
            raise UsageError.of(name, f"must be {least} or more, not {given}")
    check_rounds(rounds)


def read_bytes(amount: str | int) -> int:
    """Bytes of "9GiB", or as they are. Raises UsageError."""
    return amount if isinstance(amount, int) else parse_bytes(amount)
