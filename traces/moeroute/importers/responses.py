"""Answers of inference servers that return the experts of each token: vLLM's and SGLang's."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import Source
from moeroute.importers.arrays import HEADER_DAMAGES, read_header
from moeroute.importers.findings import Findings
from moeroute.importers.npz import by_layer
from moeroute.importers.recording import Columns, Facts, ImportOptions, Recording
from moeroute.importers.records import Record, document, first_record, is_document, named, records
from moeroute.schema import DECODE, PROMPT, TraceError

Ids = NDArray[Any]  # [tokens, layers, top-k]
_PROBE_BYTES = 1 << 16


def detect_vllm(source: Source) -> bool:
    """Whether the text is JSON with the fields of vLLM's answers."""
    return _is_answer(source, b'"routed_experts"', b'"choices"') or _is_answer(
        source, b'"prompt_routed_experts"'
    )


def detect_sglang(source: Source) -> bool:
    """Whether the text is JSON with the fields of SGLang's answers."""
    return _is_answer(source, b'"meta_info"') or _is_answer(source, b'"sgl_ext"')


def read_vllm(source: Source, _options: ImportOptions) -> Recording:
    """Read vLLM's answers: one, a list of them, or one a line.

    `prompt_routed_experts` and `routed_experts` of each choice are lists [tokens, layers, top-k],
    or base64 of a .npy. A choice becomes a sequence. Raises TraceError naming the answer and the
    field.
    """
    findings = Findings()
    facts = Facts(source.path.name.split(".json")[0])
    facts.phase = "the answers do not tell how long the prompts are"
    return _recording(source, facts, findings, lambda one, at: _vllm(one, at, facts))


def read_sglang(source: Source, options: ImportOptions) -> Recording:
    """Read SGLang's answers: one, a list of them, or one a line.

    `routed_experts` of `meta_info` or `sgl_ext` is base64 of int32 [tokens, layers, top-k], and its
    shape is not told: `options.top_k`, or the largest K that lets no token name an expert twice in
    a layer. Raises TraceError naming the answer and the field.
    """
    findings = Findings()
    facts = Facts(source.path.name.split(".json")[0])
    facts.phase = "the answers do not tell how long the prompts are"
    shape = _FlatShape(options.top_k, findings)
    return _recording(source, facts, findings, lambda one, at: _sglang(one, at, shape))


def _is_answer(source: Source, *marks: bytes) -> bool:
    if not is_document(source, "{["):
        return False
    with source.open() as file:
        start = file.read(_PROBE_BYTES)
        size = file.seek(0, 2)
        file.seek(max(0, size - _PROBE_BYTES))
        ends = start + file.read()
    return all(mark in ends for mark in marks)


def _answers(source: Source) -> Iterator[tuple[str, Record]]:
    """The answers in the file, each with where it is."""
    first = first_record(source)
    if first is not None:
        for numbers, found in records(source):
            yield from ((f"line {i}", one) for i, one in zip(numbers, found, strict=True))
        return
    found = document(source)
    for i, one in enumerate(found if isinstance(found, list) else [found]):
        if not isinstance(one, dict):
            raise TraceError(f"{source.path}: answer {i}: is {named(one)}, not an object")
        yield f"answer {i}", one


Tokens = tuple[str, Ids, int | None, int, list[int] | None]
"""Of one sequence: where it is, ids, how many are prompt, the first's position, token ids."""


def _recording(
    source: Source,
    facts: Facts,
    findings: Findings,
    take: Callable[[Record, str], Iterator[Tokens]],
) -> Recording:
    places: list[tuple[int, str]] = []

    def chunks() -> Iterator[Columns]:
        start = sequence = 0
        for at, one in _answers(source):
            for where, ids, n_prompt, position, token_ids in take(one, f"{source.path}: {at}"):
                n = len(ids)
                places.append((start * ids.shape[1], f"{at}, {where}"))
                number = position + np.arange(n)
                columns = {"position": number, "sequence": np.full(n, sequence)}
                if n_prompt is not None:
                    columns["phase"] = np.where(number < n_prompt, PROMPT, DECODE)
                if token_ids is not None:
                    columns["token_id"] = np.array(token_ids)
                yield by_layer(ids, start, **columns)
                start, sequence = start + n, sequence + 1

    def place(row: int) -> str:
        first, where = max((p for p in places if p[0] <= row), default=(0, "row"))
        return f"{where}, entry {row - first}"

    return Recording(source.path, facts, chunks(), place, findings)


def _vllm(one: Record, at: str, facts: Facts) -> Iterator[Tokens]:
    if isinstance(one.get("model"), str):
        facts.model = one["model"]
    prompt = _array(one.get("prompt_routed_experts"), f"{at}, field prompt_routed_experts")
    choices = one.get("choices", one.get("outputs"))
    if choices is None:  # one request's output, written out field by field
        choices = [one]
    usage = one.get("usage") if isinstance(one.get("usage"), dict) else {}
    n_prompt = None if prompt is None else len(prompt)
    told = one.get("prompt_token_ids")
    if n_prompt is None and isinstance(usage, dict) and isinstance(usage.get("prompt_tokens"), int):
        n_prompt = usage["prompt_tokens"]
    elif n_prompt is None and isinstance(told, list):
        n_prompt = len(told)
    prompt_ids = told
    found = False
    for i, choice in enumerate(choices if isinstance(choices, list) else []):
        if not isinstance(choice, dict):
            raise TraceError(f"{at}, choice {i}: is {named(choice)}, not an object")
        ids = _array(choice.get("routed_experts"), f"{at}, choice {i}, field routed_experts")
        parts = [part for part in (prompt if i == 0 else None, ids) if part is not None]
        if not parts:
            continue
        found = True
        if len({part.shape[1:] for part in parts}) > 1:
            raise TraceError(
                f"{at}, choice {i}: prompt_routed_experts is {list(parts[0].shape)} and "
                f"routed_experts {list(parts[1].shape)}: not of the same layers and top-k"
            )
        joined = np.concatenate(parts)
        own = usage.get("completion_tokens") if isinstance(usage, dict) else None
        answer_alone = prompt is None and isinstance(own, int) and len(joined) <= own
        position = (n_prompt or 0) if answer_alone or (i and prompt is not None) else 0
        # Of completions each choice has the prompt's ids, of chats the answer as a whole.
        own_prompt = choice.get("prompt_token_ids", prompt_ids)
        tokens = _token_ids(own_prompt, choice.get("token_ids"), position, len(joined))
        yield f"choice {i}", joined, n_prompt, position, tokens
    if not found:
        raise TraceError(f"{at}: no routed_experts: was the server asked to return them?")


def _token_ids(prompt: Any, answer: Any, position: int, n: int) -> list[int] | None:
    if not isinstance(prompt, list) or not isinstance(answer, list):
        return None
    tokens = (prompt + answer)[position:]
    return tokens[:n] if len(tokens) >= n and all(type(t) is int for t in tokens) else None


def _array(value: Any, at: str) -> Ids | None:
    if value is None:
        return None
    if isinstance(value, str):
        data = _decoded(value, at)
        try:
            file = io.BytesIO(data)
            shape, fortran, dtype = read_header(file)
            found: Ids = np.frombuffer(data, dtype, offset=file.tell())
            found = found.reshape(shape, order="F" if fortran else "C")
        except HEADER_DAMAGES as error:
            raise TraceError(f"{at}: is base64 of no .npy ({error})") from None
    else:
        try:
            found = np.array(value)
        except (ValueError, TypeError, OverflowError):
            raise TraceError(f"{at}: tokens differ in layers or experts") from None
    if found.ndim != 3 or found.dtype.kind not in "iu" or 0 in found.shape[1:]:
        raise TraceError(
            f"{at}: is {found.dtype}{list(found.shape)}, not whole numbers [tokens, layers, top-k]"
        )
    return found


def _decoded(text: str, at: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TraceError(f"{at}: is no base64 ({error})") from None


class _FlatShape:
    """How many ids of a flat array are a token's in a layer: given, or found out once."""

    def __init__(self, top_k: int | None, findings: Findings) -> None:
        self.top_k, self.findings = top_k, findings
        self.told = False

    def of(self, flat: Ids, tokens: int, at: str) -> Ids:
        """The ids as [tokens, layers, top-k]. Raises TraceError."""
        if tokens < 1 or len(flat) % tokens or not len(flat):
            raise TraceError(f"{at}: {len(flat)} ids are no whole number a token of {tokens}")
        a_token = len(flat) // tokens
        if self.top_k is None:
            self.top_k = _largest_k(flat, a_token)
            self.findings.note(
                "top_k",
                f"not told: {self.top_k} guessed, the most that lets no token name an expert twice "
                "in a layer (--top-k says it)",
            )
        if a_token % self.top_k:
            raise TraceError(
                f"{at}: a token has {a_token} ids in all layers, no multiple of top-{self.top_k}"
            )
        return flat.reshape(tokens, -1, self.top_k)


def _largest_k(flat: Ids, a_token: int) -> int:
    for k in range(a_token, 1, -1):
        if a_token % k:
            continue
        groups = np.sort(flat.reshape(-1, k), axis=1)
        alike = (groups == groups[:, :1]).all(axis=1)  # how layers without experts are filled
        if not (groups[~alike][:, 1:] == groups[~alike][:, :-1]).any() and not alike.all():
            return k
    return 1


def _sglang(one: Record, at: str, shape: _FlatShape) -> Iterator[Tokens]:
    holders = [one.get("meta_info"), one.get("sgl_ext"), one]
    for choice in one.get("choices") or ():
        if isinstance(choice, dict):
            holders += [choice.get("sgl_ext"), choice.get("meta_info"), choice]
    usage = one.get("usage") if isinstance(one.get("usage"), dict) else {}
    number = 0
    for holder in holders:
        if not isinstance(holder, dict) or not holder.get("routed_experts"):
            continue
        text = holder["routed_experts"]
        where = f"{at}, field routed_experts"
        counts = [
            next((h[n] for h in (holder, usage or {}) if isinstance(h.get(n), int)), None)
            for n in ("prompt_tokens", "completion_tokens")
        ]
        ids = _flat(text, counts, where, shape) if isinstance(text, str) else _array(text, where)
        assert ids is not None
        yield f"request {number}", ids, counts[0], 0, None
        number += 1
    if not number:
        raise TraceError(f"{at}: no routed_experts: was the server asked to return them?")


def _flat(text: str, counts: list[Any], at: str, shape: _FlatShape) -> Ids:
    """Base64 of int32 as ids of all tokens but the last, which is not passed through the model."""
    data = _decoded(text, at)
    if len(data) % 4:
        raise TraceError(f"{at}: {len(data)} bytes are not whole int32 numbers")
    if None in counts:
        raise TraceError(f"{at}: no prompt_tokens and completion_tokens to cut the ids by")
    return shape.of(np.frombuffer(data, "<i4"), counts[0] + counts[1] - 1, at)
