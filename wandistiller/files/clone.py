"""The folder that this code lies in, and what a clone holds beside it: the demo's teacher and the ready-made student configs.

An installed package brings the ready-made configs along, and neither the demo's teacher nor prompts.
"""

import os
from pathlib import Path

from wandistiller.errors import UserError

CLONE = Path(__file__).resolve().parents[2]
DEMO_TEACHER = "data/demo_teacher"
DEMO_WORLD = "shapes"  # what the record of the demo's teacher calls its world
_SHIPPED_CONFIGS = Path(__file__).resolve().parents[1] / "ready_configs"  # where pyproject.toml puts the folder config/
CONFIG_FOLDER = _SHIPPED_CONFIGS if _SHIPPED_CONFIGS.is_dir() else CLONE / "config"
# What flags are left at: a clone has these files, and an installation does not.
_OF_A_CLONE = {DEMO_TEACHER, "data/demo_prompts.txt", "data/static_prompts.txt"}


def ready_config(path: str) -> str:
    """Return where a file that is named as of a clone's config/ is: there, or where there is no clone, in the installation."""
    shipped = CONFIG_FOLDER / os.path.relpath(path, "config")
    is_shipped = path.startswith("config/") and not os.path.lexists(path) and shipped.is_file()
    return str(shipped) if is_shipped else path


def check_is_in_clone(given: dict[str, str]) -> None:
    """Refuse flags left at files of a clone where the command was started in another folder; `given` are the paths by flag."""
    missing = [f"--{flag} {path}" for flag, path in given.items() if path in _OF_A_CLONE and not os.path.lexists(path)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: lies in a clone of WanDistiller; start the command in one, or give your own"
        )
