"""Files in the layouts of other recorders, of one routing.

A prompt of two tokens and two decoded ones through two layers, top-2 of 5 experts.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from moeroute.importers import ImportOptions

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.numpy")

IDS = np.array(
    [[[0, 1], [4, 3]], [[1, 2], [4, 0]], [[0, 2], [3, 4]], [[4, 1], [0, 1]]], np.int16
)  # [token, layer, rank]
WEIGHTS = np.array([[[0.75, 0.25], [0.5, 0.5]]] * 4, np.float32)
T, L, K, E, P = 4, 2, 2, 5, 2
# Experts of each step with how many tokens use them: layer 0, 1 of the prompt, then of each token.
PROMPT = [(0, {0: 1, 1: 2, 2: 1}), (1, {0: 1, 3: 1, 4: 2})]
DECODED = [(0, {0: 1, 2: 1}), (1, {3: 1, 4: 1}), (0, {1: 1, 4: 1}), (1, {0: 1, 1: 1})]
FIRST_DECODED = [(0, {0: 1, 1: 1}), (1, {3: 1, 4: 1}), (0, {1: 1, 2: 1}), (1, {0: 1, 4: 1})]
ALL_AT_ONCE = [(0, {0: 2, 1: 3, 2: 2, 4: 1}), (1, {0: 2, 1: 1, 3: 2, 4: 3})]


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def by_row(make: Callable[[int, int], dict[str, Any]], *, first: int = 0) -> list[dict[str, Any]]:
    return [make(t, layer) for t in range(first, T) for layer in range(L)]


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def saved(thing: Any) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def tensor(array: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(array))


def logits() -> Any:
    """Logits whose two largest are the experts: [token, layer, expert]."""
    found = np.zeros((T, L, E), np.float32)
    np.put_along_axis(found, IDS.astype(int), np.array([2.0, 1.0]), axis=-1)
    return found


def sglang_record(number: int, first: int, last: int) -> dict[str, Any]:
    return {
        "forward_pass_id": 7 + number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": [100 + t for t in range(first, last)],
        "positions": list(range(first, last)),
        "extend_seq_lens": [last - first] if number == 0 else None,
        "forward_mode": 1 if number == 0 else 2,
        "topk_ids_of_layer": tensor(IDS[first:last].transpose(1, 0, 2).astype(np.int32)),
        "misc_objects": [],
    }


def sglang_per_token() -> bytes:
    records = [sglang_record(0, 0, P)] + [sglang_record(1 + t - P, t, t + 1) for t in range(P, T)]
    each = torch.arange(E).repeat(L, 1)
    return saved({"records": records, "last_physical_to_logical_map": each})


def llama_binary() -> bytes:
    parts = [(0, P), *((t, t + 1) for t in range(P, T))]
    return b"".join(
        struct.pack("<3i", layer, last - first, K) + IDS[first:last, layer].astype("<i4").tobytes()
        for first, last in parts
        for layer in range(L)
    )


def llama_uses() -> bytes:
    parts = [(0, P), *((t, t + 1) for t in range(P, T))]
    rows = [
        f"{layer},{expert}\n"
        for first, last in parts
        for layer in range(L)
        for expert in IDS[first:last, layer].ravel()
    ]
    return ("layer,expert\n" + "".join(rows)).encode()


def llama_tokens() -> bytes:
    rows = [
        f"{'prefill' if t < P else 'decode'},{t},{layer},{rank},{IDS[t, layer, rank]}\n"
        for t in range(T)
        for layer in range(L)
        for rank in range(K)
    ]
    return ("phase,token,layer,rank,expert\n" + "".join(rows)).encode()


def llama_positions(header: str = "") -> bytes:
    """The prompt's batch a layer at a time, its positions below 0; decoded ones from 0 on."""
    prompt = [
        f"{t - P},{layer},{IDS[t, layer, 0]},{IDS[t, layer, 1]}\n"
        for layer in range(L)
        for t in range(P)
    ]
    decoded = [
        f"{t - P},{layer},{IDS[t, layer, 0]},{IDS[t, layer, 1]}\n"
        for t in range(P, T)
        for layer in range(L)
    ]
    return (header + "".join(prompt + decoded)).encode()


def policylang() -> bytes:
    head = {"model_name": "m", "num_layers": L, "num_experts": E, "top_k": K, "num_entries": 8}
    return lines(
        head | {"records_full_softmax": False},
        *by_row(
            lambda t, layer: {
                **{"p": 0, "t": t, "l": layer, "e": IDS[t, layer].tolist()},
                **{"s": [0.75, 0.25], "ph": "prefill" if t < P else "decode"},
            }
        ),
    )


def cachelab_v1() -> bytes:
    head: dict[str, Any] = {"record_type": "metadata", "format": "moe-cache-lab.routing-jsonl"}
    head |= {"format_version": 1, "model_id": "m", "num_experts": E, "experts_per_token": K}

    def event(t: int, layer: int) -> dict[str, Any]:
        return {
            "record_type": "routing_selection",
            "phase": "prompt" if t < P else "generated",
            "token_position": t,
            "layer": layer,
            "selected_experts": IDS[t, layer].tolist(),
            "selected_probabilities": [0.5, 0.25],
        }

    prompt = [event(t, layer) for layer in range(L) for t in range(P)]
    return lines(head, *prompt, *by_row(event, first=P))


def megatron() -> bytes:
    parts = [(0, P), *((t, t + 1) for t in range(P, T))]
    records = [
        {
            **{"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer + 1},
            **{"rank": 0, "num_tokens": last - first, "topk": K},
            "top_indices": IDS[first:last, layer].tolist(),
        }
        for step, (first, last) in enumerate(parts)
        for layer in range(L)
    ]
    extra = records[0] | {"block": "mtp", "mtp_idx": 0, "layer": 0}
    return lines(*records, extra)


def balance() -> bytes:
    return lines(
        *(
            {
                **{"layer": layer, "batch_id": 3, "origin_rows": [0] * T},
                "topk_experts": IDS[:, layer].tolist(),
                "topk_weights": WEIGHTS[:, layer].tolist(),
            }
            for layer in range(L)
        )
    )


def generic(t: int, layer: int) -> dict[str, Any]:
    return {
        **{"layer_idx": layer, "token_idx": t, "selected_ids": IDS[t, layer].tolist()},
        "gate_weights": WEIGHTS[t, layer].tolist(),
    }


def parquet() -> bytes:
    file = io.BytesIO()
    rows = by_row(
        lambda t, layer: {
            **{"prompt_id": "a", "token_idx": t, "layer_idx": layer},
            **{"phase": "prefill" if t < P else "decode", "expert_ids": IDS[t, layer].tolist()},
        }
    )
    pl.DataFrame(rows).write_parquet(file)
    return file.getvalue()


SGLANG_IDS = base64.b64encode(IDS.astype("<i4").tobytes()).decode()


USED: dict[str, Any] = {"prompt_tokens": P, "completion_tokens": T - P + 1}


def sglang_answer() -> dict[str, Any]:
    return {
        "text": "x",
        "meta_info": {
            "prompt_tokens": P,
            "completion_tokens": T - P + 1,
            "routed_experts": SGLANG_IDS,
        },
    }


VLLM = {
    **{"id": "cmpl-1", "model": "m", "prompt_routed_experts": IDS[:P].tolist()},
    "choices": [{"index": 0, "text": "x", "routed_experts": IDS[P:].tolist()}],
}
WHOLE, LATER = PROMPT + DECODED, FIRST_DECODED + DECODED
FILES: dict[str, tuple[str, str, bytes, list[Any], ImportOptions]] = {
    # what: format, file's name, contents, steps, options
    "npz": (
        "npz",
        "r.npz",
        npz(ids=IDS, seq=np.zeros(T, int), pos=np.arange(T), phase=np.array([0, 0, 1, 1])),
        WHOLE,
        ImportOptions(),
    ),
    "vllm .npy": ("npy", "r.npy", npy(IDS), LATER, ImportOptions()),
    "vllm .npy with its prompt": ("npy", "r.npy", npy(IDS), WHOLE, ImportOptions(prompt_tokens=P)),
    "vllm answer": ("vllm", "r.json", json.dumps(VLLM).encode(), WHOLE, ImportOptions()),
    "vllm answers by line": ("vllm", "r.jsonl", lines(VLLM), WHOLE, ImportOptions()),
    "vllm base64 of a .npy": (
        "vllm",
        "r.json",
        json.dumps(
            {
                "choices": [{"routed_experts": base64.b64encode(npy(IDS)).decode()}],
                "usage": USED,
            }
        ).encode(),
        WHOLE,
        ImportOptions(),
    ),
    "sglang answer": (
        "sglang",
        "r.json",
        json.dumps(sglang_answer()).encode(),
        WHOLE,
        ImportOptions(top_k=K),
    ),
    "sglang extension": (
        "sglang",
        "r.json",
        json.dumps(
            {
                "choices": [
                    {"sgl_ext": {"routed_experts": sglang_answer()["meta_info"]["routed_experts"]}}
                ],
                "usage": USED,
            }
        ).encode(),
        WHOLE,
        ImportOptions(top_k=K),
    ),
    "sglang per token": ("sglang-per-token", "r.pt", sglang_per_token(), WHOLE, ImportOptions()),
    "logits .pt": (
        "router-logits",
        "r.pt",
        saved(tuple(tensor(logits()[:, layer]) for layer in range(L))),
        LATER,
        ImportOptions(top_k=K),
    ),
    "logits of generate": (
        "router-logits",
        "r.pt",
        saved(
            tuple(
                tuple(tensor(logits()[first:last, layer]) for layer in range(L))
                for first, last in ((0, P), (2, 3), (3, 4))
            )
        ),
        WHOLE,
        ImportOptions(top_k=K),
    ),
    "logits .safetensors": (
        "router-logits",
        "r.safetensors",
        safetensors.save({f"layer_{i}": np.ascontiguousarray(logits()[:, i]) for i in range(L)}),
        WHOLE,
        ImportOptions(top_k=K, prompt_tokens=P),
    ),
    "logits .npz": (
        "router-logits",
        "r.npz",
        npz(router_logits=logits()),
        LATER,
        ImportOptions(top_k=K),
    ),
    "llama tokens": ("llama-tokens", "r.csv", llama_tokens(), WHOLE, ImportOptions()),
    "llama positions": ("llama-positions", "r.csv", llama_positions(), WHOLE, ImportOptions()),
    "llama positions, named": (
        "llama-positions",
        "r.csv",
        llama_positions("pos,layer,id0,id1\n"),
        WHOLE,
        ImportOptions(),
    ),
    "llama uses": ("llama-uses", "r.csv", llama_uses(), WHOLE, ImportOptions()),
    "llama binary": ("llama-binary", "r.bin", llama_binary(), WHOLE, ImportOptions()),
    "policylang": ("moe-policylang", "r.jsonl", policylang(), WHOLE, ImportOptions()),
    "cache lab 1": ("moe-cache-lab", "r.jsonl", cachelab_v1(), WHOLE, ImportOptions()),
    "megatron": ("megatron", "r.jsonl", megatron(), WHOLE, ImportOptions()),
    "balance": ("moe-balance", "r.jsonl", balance(), ALL_AT_ONCE, ImportOptions()),
    "json lines": ("jsonl", "r.jsonl", lines(*by_row(generic)), LATER, ImportOptions()),
    "layer lists": (
        "layer-lists",
        "r.json",
        json.dumps(
            [[layer, *IDS[t, layer].tolist()] for t in range(T) for layer in range(L)]
        ).encode(),
        LATER,
        ImportOptions(),
    ),
}


def every_file() -> dict[str, tuple[str, str, bytes, list[Any], ImportOptions]]:
    """FILES, and one that polars writes: polars has threads from then on, which no fork has."""
    return FILES | {"parquet": ("parquet", "r.parquet", parquet(), WHOLE, ImportOptions())}


def cache_eval(folder: Path) -> Path:
    """Two requests: a prompt of two tokens, then a pass in which both decode a token."""
    folder.mkdir()
    unions = [  # request, pass, phase, layer, tokens, uses by expert
        *((0, 0, 0, layer, 2, uses) for layer, uses in PROMPT),
        (0, 1, 1, 0, 1, {0: 1, 2: 1}),
        (1, 1, 1, 0, 1, {2: 1, 3: 1}),
        (0, 1, 1, 1, 1, {3: 1, 4: 1}),
        (1, 1, 1, 1, 1, {4: 1, 1: 1}),
    ]
    experts = [e for *_, uses in unions for e in uses]
    arrays = {
        "request_indices": np.array([u[0] for u in unions], np.int32),
        "scheduler_steps": np.array([u[1] for u in unions], np.int32),
        "forward_cycles": np.array([u[1] for u in unions], np.int32),
        "phases": np.array([u[2] for u in unions], np.uint8),
        "layer_ids": np.array([u[3] for u in unions], np.int16),
        "token_counts": np.array([u[4] for u in unions], np.int32),
        "offsets": np.cumsum([0] + [len(u[5]) for u in unions]).astype(np.int64),
        "expert_ids": np.array(experts, np.int16),
        "assignment_counts": np.array([n for *_, uses in unions for n in uses.values()], np.int32),
        "gate_mass": np.linspace(0.1, 1, len(experts), dtype=np.float32),
    }
    safetensors.save_file(arrays, folder / "events.safetensors")
    manifest = {
        "schema_version": 1,
        "model": {"num_layers": L, "num_experts": E},
        "artifacts": {"events": {"path": "events.safetensors"}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
