"""WanDistiller: distil a Wan text-to-video teacher into a small, 2D, image-only student."""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "Loss": "wandistiller.training.objective",
    "Objective": "wandistiller.training.objective",
    "StudentConfig": "wandistiller.model.config",
    "WanLiteStudent": "wandistiller.model.transformer",
    "open_run": "wandistiller.run.stages",
    "project_teacher": "wandistiller.projection.project",
}

__all__ = ["Loss", "Objective", "StudentConfig", "WanLiteStudent", "open_run", "project_teacher"]


def __getattr__(name: str):
    """Import the public names on first use: `--help` must not wait for torch (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'wandistiller' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
