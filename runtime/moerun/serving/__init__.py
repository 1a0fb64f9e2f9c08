"""An HTTP server that speaks OpenAI's protocol: one model, one answer at a time."""
