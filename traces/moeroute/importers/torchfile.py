"""Files of PyTorch and safetensors, read without running any code of theirs.

torch and safetensors are no dependencies of this package: they are imported where such a file is.
"""

from __future__ import annotations

import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeroute.foreign import SAFETENSORS, TORCH, Source
from moeroute.schema import TraceError


def load_torch(source: Source) -> Any:
    """The object in a .pt file: tensors, numbers, text, lists and dicts of them.

    Raises TraceError where the file is damaged, or holds anything that would have to run code.
    """
    try:
        import torch
    except ImportError:
        raise TraceError(
            f"{source.path}: reading a PyTorch file needs torch: pip install torch"
        ) from None
    try:
        if source.kind == TORCH:
            with source.open() as file, zipfile.ZipFile(file) as packed:
                for info in packed.infolist():
                    source.check_unpacked(info.file_size, info.compress_size)
        with source.open() as file:
            mapped = source.kind == TORCH
            return torch.load(file.name, map_location="cpu", weights_only=True, mmap=mapped)
    except TraceError:
        raise
    except Exception as error:  # torch's own, pickle's, zip's, as many as there are damages
        text = str(error)
        if "weights_only" in text or "Unsupported" in text:
            raise TraceError(
                f"{source.path}: holds more than tensors, numbers and text; reading that would run "
                "code of the file, which is never done"
            ) from None
        reason = text.splitlines()[0].split(". ")[0][:120] if text else type(error).__name__
        raise TraceError(f"{source.path}: cannot be read as a PyTorch file ({reason})") from None


def as_array(tensor: Any) -> NDArray[Any] | None:
    """A tensor as an array, bfloat16 as float32; None for anything else."""
    if not hasattr(tensor, "detach") or not hasattr(tensor, "numpy"):
        return None
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.float()
    found: NDArray[Any] = tensor.cpu().numpy()
    return found


class Tensors:
    """The tensors of a safetensors file, each read when asked for.

    Raises TraceError where the file is damaged, or safetensors is not installed.
    """

    def __init__(self, source: Source) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise TraceError(
                f"{source.path}: reading safetensors needs it: pip install safetensors"
            ) from None
        assert source.kind == SAFETENSORS
        self._source = source
        self._failures: tuple[type[Exception], ...] = (SafetensorError, OSError, TypeError)
        try:
            opening: Any = safe_open
            self._opened = opening(source.path, "numpy")
            self.names = sorted(self._opened.keys())
            self.metadata: dict[str, str] = self._opened.metadata() or {}
        except self._failures as error:
            raise TraceError(f"{source.path}: is no whole safetensors file ({error})") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._opened.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.rows(name, None, None)

    def rows(self, name: str, start: int | None, stop: int | None) -> NDArray[Any]:
        """Entries start..stop-1 of a tensor's first axis."""
        try:
            found: NDArray[np.generic] = self._opened.get_slice(name)[start:stop]
        except self._failures as error:
            raise TraceError(
                f"{self._source.path}: tensor {name} cannot be read ({error})"
            ) from None
        return found
