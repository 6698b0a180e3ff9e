"""From noise to latents: diffusers' schedulers follow a velocity field, as WanPipeline does at one frame.

Teacher and student are sampled alike. A student is a velocity field of its own (`StudentField`), or takes a teacher's place
as its single expert, by the settings that `alone` returns.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from wandistiller.device import autocast, to_device
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import NUM_TRAIN_TIMESTEPS, sigma_to_timestep
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings

SAMPLER_NAMES = {"unipc": "UniPC", "dpm++": "DPM-Solver++", "euler": "Euler", "renoise": "re-noising"}


class VelocityField(Protocol):
    """What can be sampled: a `Teacher`, a `StudentField`, or anything else that answers with velocities."""

    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How latents are drawn.

    Attributes:
        sampler: "unipc", by which the released Wans are drawn; "dpm++" on the same noise levels; or "euler" on levels
            that are even before the shift, for students that learnt whole steps and teachers that were distilled to few.
        levels: 1000 sigma of "renoise", which noises x_0 anew at each; fewer steps are the first of them.
        compute_dtype: dtype of matrix products; latents stay float32.
    """

    shift: float
    num_inference_steps: int
    sampler: str = "unipc"
    levels: tuple[float, ...] = ()
    compute_dtype: torch.dtype = torch.float32
    device: str = "cpu"


class StudentField:
    """A student as a velocity field that stays trainable; one pass answers, without guidance."""

    def __init__(self, student: WanLiteStudent):
        self.student = student

    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor) -> Tensor:
        return self.student(latents, to_device(sigma_to_timestep(sigma), latents.device), prompt_embeds, prompt_lengths)


def alone(settings: TeacherSettings, guidance_scale: float = 1.0) -> TeacherSettings:
    """Return the settings of a student in a teacher's place, as its only expert.

    Guidance is 1, which takes one pass, because a student of a guided teacher has learnt the guided velocity.
    """
    return replace(settings, guidance_scale=guidance_scale, guidance_scale_2=None, boundary_ratio=None)


def wan_scheduler(shift: float, num_inference_steps: int, sampler: str = "unipc", levels: Sequence[float] = ()):
    """Return diffusers' scheduler for a sampler of `SamplingOptions`, with its steps set. UniPC's is that of the released pipelines.

    Euler's steps are even before the shift, from 1 down to 0: the noise levels that step-distilled Wans are made for (1, 0.9375,
    0.8333 and 0.625 for 4 steps at shift 5), and those of ComfyUI's scheduler "simple". Its timesteps are not rounded, as UniPC's are.
    """
    if sampler in ("euler", "renoise"):
        if sampler == "euler":
            from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
                FlowMatchEulerDiscreteScheduler as Flow,
            )

            sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        else:
            from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler as Flow

            shift, sigmas = 1.0, [level / NUM_TRAIN_TIMESTEPS for level in levels[:num_inference_steps]]
        scheduler = Flow(NUM_TRAIN_TIMESTEPS, shift=shift)
        scheduler.set_timesteps(sigmas=sigmas)
    else:
        if sampler == "dpm++":
            from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler as Wans
        else:
            from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler as Wans

        scheduler = Wans(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            flow_shift=shift,
        )
        scheduler.set_timesteps(num_inference_steps)
    scheduler.set_begin_index(0)
    return scheduler


@torch.no_grad()  # not inference mode, because a student that has drawn a picture is trained further
def sample(
    field: VelocityField, noise: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor, options: SamplingOptions
) -> Tensor:
    """Return latents x_0 (B, C, H, W) in model space, from noise (B, C, H, W)."""
    scheduler = wan_scheduler(options.shift, options.num_inference_steps, options.sampler, options.levels)
    ask = autocast(field.velocity, options.device, options.compute_dtype)
    latents, fresh = to_device(noise, options.device), {}
    if options.sampler == "renoise":  # drawn by each sample's own noise, whatever batch it is in
        seeds = [zlib.crc32(row.float().cpu().numpy().tobytes()) for row in noise]
        fresh["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    for timestep in scheduler.timesteps:
        # UniPC's timesteps are whole numbers, as WanPipeline feeds them, and float64 keeps them exact.
        sigma = (timestep.double() / NUM_TRAIN_TIMESTEPS).expand(len(latents))
        velocity = ask(latents, sigma, prompt_embeds, prompt_lengths)
        latents = scheduler.step(velocity.float(), timestep, latents, return_dict=False, **fresh)[0]
    return latents


def sample_in_batches(
    field: VelocityField,
    noise: Tensor,
    embeds: PromptEmbeds,
    prompt_indices: Sequence[int],
    options: SamplingOptions,
    batch_size: int,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Sample any number of latents, a batch at a time, and return them on the CPU.

    Args:
        prompt_indices: which prompt of `embeds` each sample draws.
        progress: called with the size of every batch that is done.
    """
    parts = []
    for start in range(0, len(noise), batch_size):
        indices = prompt_indices[start : start + batch_size]
        prompt_embeds, prompt_lengths = embeds.batch(indices, options.device)
        part = sample(field, noise[start : start + batch_size], prompt_embeds, prompt_lengths, options)
        parts.append(part.cpu())
        if progress:
            progress(len(part))
    return torch.cat(parts)
