"""Subcommands of `moesim` that fill a module of their own."""
