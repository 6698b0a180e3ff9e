"""What is read from and written to disk with care: atomic writes, checked JSON, safetensors, pictures, the hub."""
