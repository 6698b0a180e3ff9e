"""From noise to latents: diffusers' UniPC over a velocity field, the trajectory of WanPipeline at one frame.

A student is sampled as a teacher is: as a velocity field, of a single expert that needs no guidance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import NUM_TRAIN_TIMESTEPS
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings


class VelocityField(Protocol):
    """What is sampled: a `Teacher`, or anything that answers as one."""

    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How latents are drawn; `compute_dtype` is that of matrix products, latents stay float32.

    `sampler` is "unipc", as the released Wans are drawn, or "euler", for students that learnt whole steps.
    """

    shift: float
    num_inference_steps: int
    sampler: str = "unipc"
    compute_dtype: torch.dtype = torch.float32
    device: str = "cpu"


def student_field(
    student: WanLiteStudent,
    settings: TeacherSettings,
    guidance_scale: float = 1.0,
    negative_prompt_embeds: Tensor | None = None,
) -> Teacher:
    """A student as a velocity field: one pass at guidance 1, which is what a student of a guided teacher needs."""
    own = replace(settings, guidance_scale=guidance_scale, guidance_scale_2=None, boundary_ratio=None)
    return Teacher({"high": student}, own, negative_prompt_embeds)


def wan_scheduler(shift: float, num_inference_steps: int, sampler: str = "unipc"):
    """The flow-matching scheduler of the released Wan pipelines (diffusers: scheduling_unipc_multistep.py), steps set.

    Of order one and without its corrector UniPC is Euler's method, on the same noise levels.
    """
    from diffusers import UniPCMultistepScheduler

    # At every step there can be, so that a saved scheduler is Euler's at other numbers of steps too:
    euler = {"solver_order": 1, "disable_corrector": list(range(NUM_TRAIN_TIMESTEPS))}
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        flow_shift=shift,
        **euler if sampler == "euler" else {},
    )
    scheduler.set_timesteps(num_inference_steps)
    scheduler.set_begin_index(0)
    return scheduler


@torch.no_grad()  # not inference mode: a student that is measured or drawn with is trained on after
def sample(
    field: VelocityField,
    noise: Tensor,
    prompt_embeds: Tensor,
    prompt_lengths: Tensor,
    options: SamplingOptions,
) -> Tensor:
    """Latents x_0 (B, C, H, W) in model space, from noise (B, C, H, W)."""
    scheduler = wan_scheduler(options.shift, options.num_inference_steps, options.sampler)
    device_type = torch.device(options.device).type
    is_mixed = options.compute_dtype != torch.float32
    latents = noise.to(options.device)
    for timestep in scheduler.timesteps:
        # The scheduler's timesteps are whole numbers, as WanPipeline feeds them; float64 returns them exactly.
        sigma = (timestep.double() / NUM_TRAIN_TIMESTEPS).expand(len(latents))
        with torch.autocast(device_type, options.compute_dtype, enabled=is_mixed):
            velocity = field.velocity(latents, sigma, prompt_embeds, prompt_lengths)
        latents = scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
    return latents


def sample_in_batches(
    field: VelocityField,
    noise: Tensor,
    embeds: PromptEmbeds,
    prompt_indices: Sequence[int],
    options: SamplingOptions,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`sample` for any number of samples, a batch at a time; sample i draws prompt prompt_indices[i]. On the CPU."""
    parts = []
    for start in range(0, len(noise), batch_size):
        indices = prompt_indices[start : start + batch_size]
        prompt_embeds, prompt_lengths = embeds.batch(indices, options.device)
        part = sample(field, noise[start : start + batch_size], prompt_embeds, prompt_lengths, options)
        parts.append(part.cpu())
        if progress:
            progress(len(part))
    return torch.cat(parts)
