"""A student and its teacher, ready to draw: their files are checked first, and a model comes into memory as it is asked for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from wandistiller.flags import ComputeFlags, TeacherFlags
from wandistiller.students.drawing import Artist, embed_with_negative, student_sampling, teacher_sampling
from wandistiller.students.parts import load_drawing_parts, open_recorded_teacher, recorded_settings, teacher_paths
from wandistiller.students.record import load_student_config

if TYPE_CHECKING:
    from torch import Tensor

    from wandistiller.wan.prompt_embeds import PromptEmbeds
    from wandistiller.wan.settings import TeacherSettings


class Pair:
    """A trained student and the teacher that it records, which draw from the same prompts and noises.

    Args:
        folder: of the student.
        given: where the parts of a Wan are, where not as the student records.
        with_teacher: whether the teacher will be asked; its files are then opened too.

    Attributes:
        settings: the teacher's, as recorded.
        teacher_files: the opened teacher, or None.
        parts: text encoder on disk, and the VAE in memory.
    """

    def __init__(
        self, folder: str, given: TeacherFlags, compute: ComputeFlags, prompt_cache: str, with_teacher: bool = True
    ):
        from wandistiller.device import pick_device, pick_dtype

        self.folder, self.prompt_cache = folder, prompt_cache
        self.device = pick_device(compute.device)
        self.dtype = pick_dtype(compute.dtype, self.device)
        self.config = load_student_config(folder)
        self.settings = recorded_settings(self.config)
        teacher = teacher_paths(self.config, given)
        self.teacher_files = open_recorded_teacher(self.config, teacher, given) if with_teacher else None
        self.parts = load_drawing_parts(self.config, teacher[0], given, self.device)

    def settings_of(self, who: str, guidance_scale: float | None = None) -> "TeacherSettings":
        """Return how "teacher" or "student" is guided; a student has learnt guided velocities, and needs none."""
        from wandistiller.sampling.sampler import alone

        if who == "student":
            return alone(self.settings, 1.0 if guidance_scale is None else guidance_scale)
        if guidance_scale is None:
            return self.settings
        low = None if self.settings.boundary_ratio is None else guidance_scale
        return replace(self.settings, guidance_scale=guidance_scale, guidance_scale_2=low)

    def embed(
        self, prompts: Sequence[str], settings: "TeacherSettings | None" = None
    ) -> "tuple[PromptEmbeds, Tensor | None]":
        """Return the text tokens of prompts, and of the negative prompt where these settings guide (the teacher's by default)."""
        own = settings or self.settings
        return embed_with_negative(prompts, own, self.parts.encoder, self.config, self.prompt_cache, self.device)

    def artist(
        self,
        who: str,
        steps: int | None = None,
        settings: "TeacherSettings | None" = None,
        negative: "Tensor | None" = None,
    ) -> Artist:
        """Load "teacher" or "student"; None steps are as recorded.

        Args:
            settings: what `settings_of` returned; by default without another guidance.
            negative: text tokens of the negative prompt, where these settings guide.
        """
        from wandistiller.model.transformer import WanLiteStudent
        from wandistiller.projection.project import project_experts
        from wandistiller.sampling.teacher import Teacher

        settings = settings or self.settings_of(who)
        if who == "teacher":
            options = teacher_sampling(self.config, steps, self.dtype, self.device)
            experts = project_experts(self.teacher_files, self.config.text_max_length, self.dtype, self.device)
        else:
            options = student_sampling(self.config, steps, self.dtype, self.device)
            experts = {"high": WanLiteStudent.from_pretrained(self.folder, self.device)}
        return Artist(Teacher(experts, settings, negative), options, settings, self.parts.vae)
