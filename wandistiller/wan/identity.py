"""What makes two runs, or two caches, those of one teacher and of the same prompts."""

import hashlib
from collections.abc import Sequence

from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.wan_files import WanFiles


def describe_teacher(wan_files: WanFiles, settings: TeacherSettings) -> dict[str, object]:
    """Return what makes the teacher's velocities what they are: its weights, guidance and sampling.

    LoRAs stand beside the fingerprint of the weights on disk, into which they are merged as these are read. Unusual ways to sample
    are there only where they are used.
    """
    recorded = settings.recorded()
    return {
        "teacher": wan_files.fingerprint(),
        "guidance_scale": settings.guidance_scale,
        "guidance_scale_2": settings.guidance_scale_2,
        "boundary_ratio": settings.boundary_ratio,
        "negative_prompt": settings.negative_prompt if settings.uses_guidance else None,
        "shift": settings.shift,
        "num_inference_steps": settings.num_inference_steps,
        **({"teacher_lora": [lora.identity for lora in wan_files.loras]} if wan_files.loras else {}),
        **{name: recorded[name] for name in ("teacher_sampler", "guidance_range") if name in recorded},
    }


def prompts_digest(prompts: Sequence[str]) -> str:
    """Return a digest of prompts in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]
