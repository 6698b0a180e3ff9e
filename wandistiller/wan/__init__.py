"""The parts of a released Wan on disk: layouts, names of tensors, settings, VAE and text encoder, and the mock in their place.

It may import model, prompts, files and the modules beside the packages.
"""
