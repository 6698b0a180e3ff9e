"""The parts of a released Wan on disk: layouts, names of tensors, settings, VAE, text encoder, and the mock in their place.

It may import model and files."""
