"""Which families can be offloaded: known without torch, so that others are refused at once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moeroute.families import FAMILIES

from moerun.errors import RunError

# Those whose logits are tested equal to the stock model's, bit for bit; the text parts of some have
# a name of their own.
SUPPORTED = tuple(sorted(name for each in FAMILIES for name in (each.model_type, *each.also)))

_COUNTS = (
    *(
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "num_experts_list",
    ),
    *("num_moe_experts", "moe_num_routed_experts", "n_experts", "num_routed_experts"),
)
_LISTED = "'moerun families' lists those that are supported"
_TEXTS = ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config")


def refuse_unsupported(described: dict[str, Any], place: str) -> None:
    """RunError where a configuration, which stands at ``place``, is of a family that cannot be
    offloaded."""
    model_type = described.get("model_type")
    if model_type in SUPPORTED:
        return
    if model_type is None:
        raise RunError(f"{place} cannot be used: it has no model_type; {_LISTED}")
    texts = [described, *(v for k, v in described.items() if k in _TEXTS and isinstance(v, dict))]
    mixture = next((f"{n} {t[n]}" for t in texts for n in _COUNTS if t.get(n)), None)
    why = _why_unsupported(str(model_type), mixture)
    raise RunError(f"{place} is of a {model_type!r:.80} model, {why}; {_LISTED}")


def _why_unsupported(model_type: str, mixture: str | None) -> str:
    if mixture is None:
        return "which is no mixture of experts"
    what = f"which is a mixture of experts ({mixture}), but of a family that is not supported"
    if _transformers_has(model_type):
        return f"{what}: transformers has it, but its logits were not compared with stock's here"
    return f"{what}: this version of transformers does not have it either"


def _transformers_has(model_type: str) -> bool:
    """Whether transformers has models of this type; looked up in its files, since importing it
    takes seconds."""
    try:
        found = find_spec("transformers")
    except ValueError:
        return False
    folder = model_type.removesuffix("_text").replace("-", "_")
    places = found.submodule_search_locations if found else None
    return any((Path(place) / "models" / folder).is_dir() for place in places or ())
