"""The tables of `llama_cpp.py`, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = Iterable[str]


def as_markdown(found: dict[str, Any]) -> str:
    """A table of speeds, and one of where ours goes."""
    hardware = found["hardware"]
    load = f"{hardware['load_before'][0]:.1f} before, {hardware['load_after'][0]:.1f} after"
    lines = [
        "# moerun beside llama.cpp",
        "",
        "Made by a command, and made anew by the same:",
        "",
        f"    {found['command']}",
        "",
        "All numbers are **measured**, with random weights. The popularity of experts is",
        "**synthetic**. Medians of rounds in turns; +- is half of the spread of the rounds.",
        "",
        f"- {hardware['cpu']}, {hardware['threads']} threads, load {load}, {hardware['date']}",
        f"- memory reads {found['memory_bytes_per_s'] / 1e9:.1f} GB/s, the disk "
        f"{found['disk_bytes_per_s'] / 1e9:.2f} GB/s, in the same run",
        *(f"- llama.cpp: {system}" for system in _systems(found)),
        "",
        *_speeds(found),
        "",
        "- x: times llama.cpp's speed.",
        "- CPU ms: of all threads, those that wait busily included.",
        "- GB/s: weights that the decoded tokens read; %: of what memory gives.",
        "- logits: correlation with llama.cpp's at the last token.",
        "",
    ]
    whole = any(case["where_ours_goes"] for case in found["cases"])
    for phase, name in enumerate(("the prompt", "decoding") if whole else ()):
        lines += [f"Where ours goes in {name}, all experts in memory, in ms a pass:", ""]
        lines += [*_parts(found, phase), ""]
    return "\n".join(lines)


def _systems(found: dict[str, Any]) -> list[str]:
    told = [e["system"] for case in found["cases"] for e in case["engines"] if e["system"]]
    return sorted(set(told))


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    align = ["---"] * 3 + ["--:"] * (len(head) - 3)
    return [f"| {' | '.join(row)} |" for row in (head, align, *rows)]


def _speeds(found: dict[str, Any]) -> list[str]:
    head = ["model", "experts in memory", "engine", "prompt tokens/s", "x", "decode tokens/s", "x"]
    head += ["GB/s", "%", "CPU ms a token", "hit %", "peak GB", "logits"]
    rows = []
    for case in found["cases"]:
        theirs = next((e for e in case["engines"] if e["engine"] == "llama.cpp"), None)
        for engine in case["engines"]:
            bytes_per_s = case["token_bytes"] * engine["decode_tokens_per_s"]
            row = [case["shape"], case["memory"], engine["engine"]]
            for phase in ("prompt", "decode"):
                speed, spread = engine[f"{phase}_tokens_per_s"], engine[f"{phase}_spread"]
                row.append(f"{speed:.2f} +- {speed * spread / 2:.2f}")
                row.append(f"{speed / theirs[f'{phase}_tokens_per_s']:.2f}" if theirs else "")
            row.append(f"{bytes_per_s / 1e9:.1f}")
            row.append(f"{100 * bytes_per_s / found['memory_bytes_per_s']:.0f}")
            row.append(f"{1e3 * engine['cpu_s'][1] / case['tokens']:.1f}")
            hits, peak = engine["hit_ratio"], engine["peak_bytes"]
            row.append("" if hits is None else f"{100 * hits:.0f}")
            row.append("" if peak is None else f"{peak / 1e9:.2f}")
            row.append(f"{engine['logits_correlation']:.4f}")
            rows.append(row)
    return _table(head, rows)


# What is told of a pass, as paths of the clock: added, and taken off.
_WHERE = {
    "experts: kernel": (("pass/experts/kernel",), ()),
    "experts: around it": (
        ("pass/experts",),
        ("pass/experts/kernel", "pass/experts/gate", "pass/experts/policy"),
    ),
    "gate": (("pass/experts/gate",), ()),
    "policy and cache": (("pass/experts/policy",), ()),
    "attention: kernel": (("pass/attention/kernel",), ()),
    "attention: around it": (("pass/attention",), ("pass/attention/kernel",)),
    "head": (("pass/head",), ()),
    "norms, sums, embedding": (("pass",), ("pass/experts", "pass/attention", "pass/head")),
}


def _parts(found: dict[str, Any], phase: int) -> list[str]:
    cases = [case for case in found["cases"] if case["where_ours_goes"]]
    head = ["part", *(str(case["shape"]) for case in cases)]
    columns = []
    for case in cases:
        told = case["where_ours_goes"]
        passes = told["tokens"] if phase else 1
        seconds, whole_s = told["parts"][phase], told["whole_s"][phase]
        column = [
            sum(seconds.get(p, 0) for p in plus) - sum(seconds.get(p, 0) for p in minus)
            for plus, minus in _WHERE.values()
        ]
        column += [whole_s - seconds.get("pass", 0.0), whole_s]
        columns.append([1e3 * each / passes for each in column])
    names = [*_WHERE, "choosing, text: around the pass", "all"]
    rows = [[name, *(f"{column[i]:.2f}" for column in columns)] for i, name in enumerate(names)]
    align = ["---", *("--:" for _ in cases)]
    return [f"| {' | '.join(row)} |" for row in (head, align, *rows)]
