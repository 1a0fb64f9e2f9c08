"""What every test of the runtime starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from moerun.checkpoint.hub import resolve
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads share a product out by its shape, which can show in its last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExpertStore]:
    """The bundled model's experts by precision; not to be changed."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        precision: pack(resolve("tiny"), folder / precision, precision=precision)
        for precision in ("native", "4bit", "2bit")
    }


@pytest.fixture(scope="session")
def interpreted() -> Iterator[None]:
    """Triton's kernels run by its interpreter, on tensors of the CPU."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    import triton.language as tl

    builder = interpreter.InterpreterBuilder
    stock = builder.create_dot

    def floats(handle: Any) -> Any:
        # It keeps bfloat16 as bit patterns, and takes those of a product for integers.
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = floats(a), floats(b)
        return stock(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", create_dot)
        import moerun.kernels.gpu  # noqa: F401

        yield
