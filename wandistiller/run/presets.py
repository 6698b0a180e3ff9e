"""Ready values of the flags for a real run, by teacher and student; docs/recipes.md has what each costs and where they come from.

Standard library only. benchmarks/recipes.py computes that page's tables from here, and a test holds the two together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OTHER_LENGTHS = ("max_steps", "num_epochs")  # what says how long a run is, beside the --teacher_calls of presets


@dataclass(frozen=True)
class Preset:
    """Values of flags that go together.

    Attributes:
        num_prompts: how many prompts they are meant for.
        flags: the flags that are set; any of them may be typed instead.
    """

    num_prompts: int
    flags: Mapping[str, object]

    def flags_beside(self, typed: Mapping[str, object]) -> Mapping[str, object]:
        """Return the flags that are set beside typed ones: a run whose length is typed in steps or epochs has no other length."""
        has_length = any(typed[name] is not None for name in OTHER_LENGTHS)
        return {name: value for name, value in self.flags.items() if not (has_length and name == "teacher_calls")}


# A step learns from 32 samples, whatever of them is in memory at a time. Checkpoints hold gigabytes, so they are written rarely.
_COMMON = {"eval_prompts": "data/heldout_prompts.txt", "save_every": 2000, "sample_every": 2000, "num_samples": 8}


def _preset(teacher_path: str, student_config: str, num_prompts: int, **flags: object) -> Preset:
    named = {"teacher_path": teacher_path, "student_config": f"config/{student_config}"}
    return Preset(num_prompts, named | flags | _COMMON)


_WAN_1_3B, _WAN_5B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
_WAN_14B, _WAN_A14B = "Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
# An answer of 1.3B and 5B costs about what a student of half or a fifth of its size takes to learn from it four times, one of 14B
# eight times. The calls are those that about 96,000 steps take.
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
