"""Arrays that a policy was fitted with on a calibration trace, in a safetensors file.

The file says of which policy, trace, sequences and model they are, so that a policy is never given
another's, and never scored by mistake on what it was fitted on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepolicy.outputs import written_whole
from moepolicy.policy import Context, PolicyError, PolicyFailed

ABOUT = "moepolicy-fit"  # the key of the file's metadata
PARAMETER = "params"  # what a spec gives the file by: name:params=FILE
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class FittedOn:
    """What arrays were fitted on.

    policy      the policy's name
    trace       SHA-256 of the calibration trace
    sequences   which of the trace's sequences, counted from 0 in their order there
    n_sequences all that the trace has
    seed        by which the sequences were drawn, and the fit began
    """

    policy: str
    model: str
    n_layers: int
    n_experts: int
    top_k: int
    trace: str
    sequences: tuple[int, ...]
    n_sequences: int
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Fitted:
    """The arrays of a params file, and what they were fitted on."""

    path: Path
    of: FittedOn
    arrays: Arrays

    def given(self, context: Context, label: str) -> Arrays:
        """The arrays for a cache of ``context``. PolicyError where they are another shape's."""
        shape = (context.n_layers, context.n_experts, context.top_k)
        if (self.of.n_layers, self.of.n_experts, self.of.top_k) != shape:
            raise PolicyError(
                f"policy '{label}': {self.path} was fitted on {self.of.model}, "
                f"{_shape(self.of.n_layers, self.of.n_experts, self.of.top_k)}, and this model has "
                f"{_shape(*shape)}: fit the policy on a trace of this model"
            )
        return {name: array.copy() for name, array in self.arrays.items()}


def checked_arrays(policy: str, hook: str, answer: Any) -> Arrays:
    """What the hook ``fit`` or ``learned`` answered. PolicyFailed where it is no dict of arrays of
    finite numbers by name."""
    failed = f"policy '{policy}' failed: {hook} answered"
    if not isinstance(answer, dict) or not answer:
        raise PolicyFailed(f"{failed} no dict of arrays")
    for name, array in answer.items():
        if not isinstance(name, str):
            raise PolicyFailed(f"{failed} an array named {name!r:.60}, which is no text")
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise PolicyFailed(f"{failed} no array of numbers as '{name}'")
        if not np.isfinite(array).all():
            raise PolicyFailed(f"{failed} '{name}' that is not finite")
    return answer


def write_fitted(path: Path, arrays: Mapping[str, NDArray[Any]], of: FittedOn) -> None:
    """Write a params file, whole or not at all."""
    from safetensors.numpy import save

    about = {ABOUT: json.dumps(asdict(of))}
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with written_whole(path) as unfinished:
        # Not safetensors' own writing, whose errors are no OSError and name its temporary file.
        unfinished.write_bytes(save(contiguous, metadata=about))


def read_fitted(path: Path, policy: str) -> Fitted:
    """Read a params file. PolicyError where there is none, it is damaged, or another policy's."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise PolicyError(f"policy '{policy}': there is no params file {path}")
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = (file.metadata() or {}).get(ABOUT)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about is None:
            raise PolicyError(
                f"policy '{policy}': {path} is no params file of 'moesim fit': its metadata does "
                "not say what it was fitted on"
            )
        of = _fit_of(json.loads(about))
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"policy '{policy}': {path} is damaged: {error}") from error
    if _name_of(of.policy) != _name_of(policy):
        raise PolicyError(
            f"policy '{policy}': {path} holds the parameters of '{of.policy}': give them to that "
            f"policy, or fit '{policy}'"
        )
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise PolicyError(f"policy '{policy}': {path}: array '{broken[0]}' is not finite")
    return Fitted(path, of, arrays)


def _name_of(policy: str) -> str:
    """The name of a policy, or its file's and class's wherever the file lies."""
    file, mark, cls = policy.rpartition(".py:")
    return f"{Path(file).name}{mark}{cls}" if mark else policy


def _fit_of(described: dict[str, Any]) -> FittedOn:
    sequences: Sequence[int] = described["sequences"]
    found = FittedOn(**{**described, "sequences": tuple(sequences)})
    numbers = (found.n_layers, found.n_experts, found.top_k, found.n_sequences, found.seed)
    if not all(type(number) is int for number in (*numbers, *found.sequences)):
        raise ValueError("its description has something else where a number belongs")
    return found


def _shape(n_layers: int, n_experts: int, top_k: int) -> str:
    return f"{n_layers} layers of {n_experts} experts, top-{top_k}"
