"""Recording routing traces from live models."""

__version__ = "0.1.0"
