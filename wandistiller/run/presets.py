"""Values of the flags that go together: for the demo teacher, and for a real run by teacher and student (docs/training.md).

Standard library only. benchmarks/recipes.py computes that page's tables from here, and a test compares the two.
"""

from typing import Any

from wandistiller.files.clone import DEMO_HELD_OUT_PROMPTS

# A step learns from 32 samples, however many of them are in memory at a time. Checkpoints hold gigabytes, so they are written rarely.
_COMMON = {"eval_prompts": "data/heldout_prompts.txt", "save_every": 2000, "sample_every": 2000, "num_samples": 8}


def _preset(teacher_path: str, student_config: str, **flags: object) -> dict[str, object]:
    return {"teacher_path": teacher_path, "student_config": f"config/{student_config}"} | flags | _COMMON


_WAN_1_3B, _WAN_5B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
_WAN_14B, _WAN_A14B = "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
# A batch of 1.3B and 5B costs about what a student of half or a fifth of its size takes to learn from it four times, one of 14B
# eight times. The calls are those of about 96,000 steps, beside those of the second stage.
_CHEAP: dict[str, Any] = {"num_prompts": 40_000, "teacher_calls": 24_000, "replay": 4}
_DEAR: dict[str, Any] = {"num_prompts": 20_000, "teacher_calls": 12_000, "replay": 8}
_WHOLE: dict[str, Any] = {"batch_size": 16, "grad_accum_steps": 2}
_PARTS: dict[str, Any] = {"batch_size": 8, "grad_accum_steps": 4}
_TWO_EXPERTS: dict[str, Any] = {"batch_size": 4, "grad_accum_steps": 8, "teacher_dtype": "fp8"}

PRESETS = {
    "1.3B-0.5B": _preset(_WAN_1_3B, "student_config_0.5B.json", **_CHEAP, **_WHOLE),
    "5B-1B": _preset(_WAN_5B, "student_config_5B.json", **_CHEAP, **_WHOLE),
    "14B-0.5B": _preset(_WAN_14B, "student_config_0.5B.json", **_DEAR, **_PARTS),
    "14B-1B": _preset(_WAN_14B, "student_config.json", **_DEAR, **_PARTS),
    "A14B-0.5B": _preset(_WAN_A14B, "student_config_0.5B.json", **_DEAR, **_TWO_EXPERTS),
    "A14B-1B": _preset(_WAN_A14B, "student_config.json", **_DEAR, **_TWO_EXPERTS),
}
# What counts for the demo teacher where nothing else is typed
DEMO: dict[str, object] = {
    "data_path": "data/demo_prompts.txt",
    "eval_prompts": DEMO_HELD_OUT_PROMPTS,
    "teacher_calls": 320,
    "batch_size": 64,
    "sample_every": 200,
}


def preset_lines(name: str, num_prompts: int) -> list[str]:
    """Return the flags that a preset stands for, and a warning below half of the preset's prompts."""
    lines = [
        f"Preset {name}: {' '.join(f'--{flag} {value}' for flag, value in PRESETS[name].items())}; typed flags go before"
    ]
    if 2 * num_prompts < (meant := int(str(PRESETS[name]["num_prompts"]))):
        lines.append(
            f"Hint: {num_prompts:,} prompts; the preset is meant for {meant:,} or more, and a student of few prompts learns to "
            "draw these alone"
        )
    return lines
