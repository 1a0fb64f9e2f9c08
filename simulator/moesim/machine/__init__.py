"""The machine: its profile in TOML, and what each thing it does costs."""
