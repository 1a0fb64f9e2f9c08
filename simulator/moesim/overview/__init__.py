"""A report on a trace: what it says of itself, and what policies make of it on a machine."""
