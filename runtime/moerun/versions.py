"""Which packages a store and a run depend on, in the versions there are."""

from __future__ import annotations

from moepolicy.versions import installed

OF_STORES = ("torch", "transformers", "hqq", "safetensors")
OF_RUNS = ("moe-offload-lab", "torch", "transformers", "numpy")


def store_packages() -> dict[str, str]:
    """Versions that the bytes of a store depend on, as far as they are installed."""
    return installed(OF_STORES)


def run_packages() -> dict[str, str]:
    """Versions that a run depends on, as far as they are installed."""
    return installed(OF_RUNS)
