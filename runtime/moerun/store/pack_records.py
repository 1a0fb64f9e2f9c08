"""Making records on threads, a few at a time: read, quantised block by block, written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from moerun.errors import RunError
from moerun.format.blocks import quantise_blocks
from moerun.format.precision import PACKED_SCHEMES, BlockScheme, Scheme
from moerun.format.quantise import quantise
from moerun.format.tensorfile import TensorFileWriter
from moerun.store.pack_plan import Record, crc32_of

_IN_FLIGHT = 3  # reading, quantising and writing at once; each holds one expert in memory


class UnfitError(RunError):
    """Weights that a pack can never take, however often it is begun again."""


class RecordMaker:
    """Threads that make records: some read and write, ``workers`` quantise. A context manager.

    Each computes with one thread of torch: the workers are the parallelism.
    """

    def __init__(self, workers: int, device: str) -> None:
        self._device = device
        self._open = ExitStack()
        self._open.callback(torch.set_num_threads, torch.get_num_threads())
        self._blocks = ThreadPoolExecutor(workers, "quantise", _one_thread)
        self._records = ThreadPoolExecutor(_IN_FLIGHT, "record", _one_thread)
        self._open.enter_context(self._blocks)
        self._open.enter_context(self._records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(
        self, records: Iterable[Record], precision: str, writer: TensorFileWriter
    ) -> Iterator[tuple[str, int]]:
        """Names of records as they are written, with their CRC-32."""
        scheme = PACKED_SCHEMES.get(precision)

        def one(record: Record) -> tuple[str, int]:
            made = self._make(record, scheme)
            writer.write(record.name, made)
            return record.name, crc32_of(made)

        pending: set[Future[tuple[str, int]]] = set()
        try:
            for record in records:
                if len(pending) == _IN_FLIGHT:
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
                pending.add(self._records.submit(one, record))
            yield from (future.result() for future in wait(pending).done)
        except BaseException:
            self._blocks.shutdown(wait=False, cancel_futures=True)  # so that they end soon
            wait(pending)  # nothing may write to a file that is being closed
            raise

    def _make(self, record: Record, scheme: Scheme | BlockScheme | None) -> torch.Tensor:
        """The record's bytes, uint8[record_bytes]."""
        parts: dict[str, torch.Tensor] = {}
        dtypes = {part.name: part.dtype for part in record.layout.parts}
        params = {param.name: param for param in record.shape.params}
        for name, tensor in record.read().items():
            if name in dtypes:
                parts[name] = tensor.to(dtypes[name])
                continue
            assert scheme is not None
            weight = tensor.T.contiguous() if params[name].transposed else tensor
            try:
                packed = self._quantised(weight, scheme)
            except RunError as error:
                raise UnfitError(f"{name} of {record.what}: {error}") from error
            parts |= {f"{name}.{part}": value for part, value in packed.items()}
        made = torch.empty(record.layout.record_bytes, dtype=torch.uint8)
        record.layout.write(parts, made)
        return made

    def _quantised(
        self, weight: torch.Tensor, scheme: Scheme | BlockScheme
    ) -> dict[str, torch.Tensor]:
        if isinstance(scheme, BlockScheme):
            return quantise_blocks(weight, scheme)
        return quantise(weight, scheme, device=self._device, run=self._blocks.map)


def _one_thread() -> None:
    torch.set_num_threads(1)
