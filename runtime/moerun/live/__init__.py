"""A model that runs: session, runner, generation, and what a run leaves behind."""
