"""A student and its teacher, ready to draw: their files are checked first, and a model comes into memory as it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from wandistiller import __version__
from wandistiller.device import pick_device, pick_dtype
from wandistiller.errors import UserError
from wandistiller.flags import ComputeFlags, TeacherFlags
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.project import project_experts
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, alone, sample_in_batches
from wandistiller.sampling.teacher import Teacher
from wandistiller.students.parts import find_recorded_encoder, open_recorded_teacher, recorded_settings, teacher_paths
from wandistiller.students.record import StudentRecord, load_student_config
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.text_encoder import embed_texts
from wandistiller.wan.vae import find_vae
from wandistiller.wan.vae_2d import WanVae2D, load_vae_2d
from wandistiller.wan.wan_files import left_out


@dataclass(frozen=True)
class Artist:
    """Whoever draws: a student or teacher as a velocity field, how it is sampled, and the VAE that makes pictures of its latents.

    Attributes:
        settings: guidance, and the statistics of the latents.
    """

    field: Teacher
    options: SamplingOptions
    settings: TeacherSettings
    vae: WanVae2D

    def draw(
        self, embeds: PromptEmbeds, indices: Sequence[int], seeds: Sequence[int], latent_shape: tuple[int, int, int]
    ) -> np.ndarray:
        """Return pictures (B, H, W, 3) uint8 of the prompts at `indices`, each from the noise of its seed, drawn at once."""
        noise = seeded_noise(seeds, latent_shape)
        latents = sample_in_batches(self.field, noise, embeds, indices, self.options, len(noise))
        return self.vae.pictures(latents, self.settings.latents_mean, self.settings.latents_std)

    def metadata(self) -> dict[str, object]:
        low = self.settings.guidance_scale_2
        return {
            "num_inference_steps": self.options.num_inference_steps,
            "guidance_scale": self.settings.guidance_scale,
            **({} if low is None else {"guidance_scale_2": low}),
            "shift": self.options.shift,
            "Software": f"WanDistiller {__version__}",
        }


def sampling_of(
    who: str, config: StudentConfig, num_inference_steps: int | None, compute_dtype: torch.dtype, device: str
) -> SamplingOptions:
    """Return how a "student" or its "teacher" draws; None steps are as recorded.

    A student draws as its teacher does, or by whole steps where it learnt them.
    """
    record = StudentRecord.of(config)
    if who == "teacher":
        record = replace(record, student_steps=None, recommended_steps=None)
    steps, levels = num_inference_steps or record.steps, tuple(record.teacher_levels or ())
    if levels and steps > len(levels):
        raise UserError(f"--num_inference_steps {steps}: there are {len(levels)} noise levels; allowed: as many")
    return SamplingOptions(
        shift=record.shift,
        num_inference_steps=steps,
        sampler=record.sampler,
        levels=levels,
        compute_dtype=compute_dtype,
        device=device,
    )


class Pair:
    """A trained student and the teacher that it records, which draw from the same prompts and noises.

    Args:
        folder: of the student.
        given: where the parts of a Wan are, where not as the student records.
        with_teacher: whether the teacher will be asked; its files are then opened too.

    Attributes:
        settings: the teacher's, as recorded.
        teacher_files: the opened teacher, or None.
        vae: in memory.
        encoder: text encoder and tokenizer on disk; None: the mock's embeddings.
    """

    def __init__(
        self, folder: str, given: TeacherFlags, compute: ComputeFlags, prompt_cache: str, with_teacher: bool = True
    ):
        self.folder, self.prompt_cache = folder, prompt_cache
        self.device = pick_device(compute.device)
        self.dtype = pick_dtype(compute.dtype, self.device)
        self.config = load_student_config(folder)
        self.settings = recorded_settings(self.config)
        needs_place = with_teacher or not (given.vae_path and given.text_encoder_path)
        teacher = teacher_paths(self.config, given) if needs_place else ("mock", None)
        self.teacher_files = open_recorded_teacher(self.config, teacher, given) if with_teacher else None
        vae = find_vae(given.vae_path, teacher[0], self.config.num_channels)
        self.encoder = find_recorded_encoder(self.config, given.text_encoder_path, teacher[0])
        self.vae = load_vae_2d(vae, self.config.num_channels, self.config.vae_scale_factor, self.device)

    def settings_of(self, who: str, guidance_scale: float | None = None) -> TeacherSettings:
        """Return how "teacher" or "student" is guided; a student has learnt guided velocities, and needs none."""
        if who == "student":
            return alone(self.settings, 1.0 if guidance_scale is None else guidance_scale)
        if guidance_scale is None:
            return self.settings
        low = None if self.settings.boundary_ratio is None else guidance_scale
        return replace(self.settings, guidance_scale=guidance_scale, guidance_scale_2=low)

    def embed(
        self, prompts: Sequence[str], settings: TeacherSettings | None = None
    ) -> tuple[PromptEmbeds, Tensor | None]:
        """Return the text tokens of prompts, and of the negative prompt where these settings guide (the teacher's by default)."""
        settings = settings or self.settings
        if self.encoder and (line := left_out([self.encoder.umt5])):
            print(line)
        negative = [settings.negative_prompt] if settings.uses_guidance else []
        embeds = embed_texts([*prompts, *negative], self.encoder, self.config, self.prompt_cache, self.device)
        embeds.warn_of_cuts(self.config.text_max_length)
        return embeds.part(0, len(prompts)), embeds.read(len(prompts)) if negative else None

    def artist(
        self,
        who: str,
        steps: int | None = None,
        settings: TeacherSettings | None = None,
        negative: Tensor | None = None,
    ) -> Artist:
        """Load "teacher" or "student"; None steps are as recorded.

        Args:
            settings: what `settings_of` returned; by default without another guidance.
            negative: text tokens of the negative prompt, where these settings guide.
        """
        settings = settings or self.settings_of(who)
        options = sampling_of(who, self.config, steps, self.dtype, self.device)
        if who == "teacher":
            experts = project_experts(self.teacher_files, self.config.text_max_length, self.dtype, self.device)
        else:
            experts = {"high": WanLiteStudent.from_pretrained(self.folder, self.device)}
        return Artist(Teacher(experts, settings, negative), options, settings, self.vae)
