"""The folder that this code lies in, and what a clone holds beside it: the demo's teacher and the ready-made student configs."""

from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
DEMO_TEACHER = "data/demo_teacher"
DEMO_WORLD = "shapes"  # what the record of the demo's teacher calls its world
CONFIG_FOLDER = CLONE / "config"
# Prompts that no run of ours trains on: of the demo's world, and general ones
DEMO_HELD_OUT_PROMPTS = "data/demo_heldout_prompts.txt"
HELD_OUT_PROMPTS = "data/heldout_prompts.txt"
