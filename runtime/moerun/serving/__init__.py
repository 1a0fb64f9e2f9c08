"""An HTTP server that speaks OpenAI's protocol for one model, and chat on the terminal."""
