"""Numba's compiler with the options every kernel of the simulator shares, cached on disk.

Importing this imports numba, so modules of kernels are imported where they are first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def jit(function: Kernel) -> Kernel:
    """Compile ``function`` on its first call. Kernels that call each other share one file:
    numba's cache does not notice a change in another one."""
    return cast(Kernel, numba.njit(cache=True, nogil=True, error_model="numpy")(function))
