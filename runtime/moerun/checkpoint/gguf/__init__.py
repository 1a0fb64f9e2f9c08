"""Reading checkpoints in llama.cpp's GGUF files."""
