"""The parts of a released Wan on disk: layouts, names of tensors, settings, VAE and text encoder, and the mock in their place."""
