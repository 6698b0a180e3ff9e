"""WanDistiller: distil a Wan text-to-video teacher into a small, 2D, image-only student."""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {"WanLiteStudent": "wandistiller.model.transformer", "StudentConfig": "wandistiller.model.config"}

__all__ = ["StudentConfig", "WanLiteStudent"]


def __getattr__(name: str):
    """Import the public names on first use: `--help` must not wait for torch (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'wandistiller' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
