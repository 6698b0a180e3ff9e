"""What is read from and written to disk with care: files that appear whole or not at all, checked JSON, prompts, pictures, the hub.

It may import only the modules beside the packages."""
