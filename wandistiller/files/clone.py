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
# Prompts that no run of ours trains on: of the demo's world, and general ones
DEMO_HELD_OUT_PROMPTS = "data/demo_heldout_prompts.txt"
HELD_OUT_PROMPTS = "data/heldout_prompts.txt"
# What flags are left at: a clone has these files, and an installation does not.
_OF_A_CLONE = {
    DEMO_TEACHER,
    "config/demo_student_config.json",
    "config/student_config.json",
    "data/demo_prompts.txt",
    "data/static_prompts.txt",
}


def check_is_in_clone(name: str, given: dict[str, str]) -> None:
    """Refuse a flag that names a file of a clone, as its default does, where the command was started in another folder.

    Args:
        name: the flag whose file is read next.
        given: the paths of all such flags by their names, so that the message has each that is missing.
    """
    missing = [flag for flag, path in given.items() if path in _OF_A_CLONE and not os.path.lexists(path)]
    if name in missing:
        raise UserError(
            f"--{name} {given[name]}: lies in a clone of WanDistiller, and the command was started elsewhere; start it in a "
            f"clone, or give your own {', '.join(f'--{flag}' for flag in missing)}"
        )
