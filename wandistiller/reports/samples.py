"""Sample pictures of a run: fixed prompts and noise, the teacher's row above the student's."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wandistiller.device import is_out_of_memory
from wandistiller.errors import UserError
from wandistiller.evaluation.held_out import StudentField, evaluation_mode
from wandistiller.files.pictures import labelled_grid, save_png
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, VelocityField, sample_in_batches
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings
from wandistiller.wan.vae import VaeLocation, decode, load_vae

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH_SIZE = 8  # prompts drawn at a time, or as many as a step learns from where these are fewer
SEED = 0  # of the first picture's noise; each next one has one more


@contextlib.contextmanager
def undisturbed(student: WanLiteStudent, device: str) -> Iterator[None]:
    """What is drawn inside leaves the student's modes and the global random numbers as they were."""
    gpus = [device] if torch.device(device).type == "cuda" else []
    with evaluation_mode(student), torch.random.fork_rng(gpus):
        yield


class Samples:
    """Draws the same prompts from the same noise every time, so that the pictures of a run can be compared.

    The teacher's row is drawn the first time and kept. The VAE is in memory only while it decodes. All processes call this
    where weights are spread over them, the first one decodes and writes; else the first alone draws. A picture that cannot
    be made is told of once and is the last: it must not turn a run into a failed one.

    Args:
        folder: where step_XXXXXX.png go.
        teacher: None where it does not fit beside the student, whose row then stands alone.
        latent_shape: (C, H, W).
        is_sharded: whether drawing needs all processes.
        batch_size: prompts at a time.
        on_picture: told the step and the picture, in the process that writes.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher | None,
        settings: TeacherSettings,
        prompts: Sequence[str],
        prompt_embeds: PromptEmbeds,
        latent_shape: tuple[int, int, int],
        vae_location: VaeLocation,
        teacher_options: SamplingOptions,
        student_options: SamplingOptions,
        processes: Processes,
        is_sharded: bool,
        on_picture: "Callable[[int, Image], None]",
        batch_size: int = BATCH_SIZE,
    ):
        self.folder, self.teacher, self.settings = folder, teacher, settings
        self.prompts, self.prompt_embeds, self.vae_location = prompts, prompt_embeds, vae_location
        self.teacher_options, self.student_options = teacher_options, student_options
        self.processes, self.is_sharded, self.on_picture = processes, is_sharded, on_picture
        self.batch_size = min(BATCH_SIZE, batch_size)
        self.noise = seeded_noise(range(SEED, SEED + len(prompts)), latent_shape)
        self.teacher_latents: Tensor | None = None
        self.teacher_row: list[np.ndarray] = []
        self.is_over = False

    @property
    def what(self) -> str:
        return "The student" if self.teacher is None else "Teacher above, student below"

    def __call__(self, student: WanLiteStudent, step: int) -> Path | None:
        """Draw and write the picture of a step; the student stays as it is. None where nothing was written.

        The others wait for the first process here, and not in the gradients of the next step.
        """
        if self.is_over:
            return None
        file = self.folder / f"step_{step:06d}.png"
        if self.processes.is_first or self.is_sharded:
            self.is_over = not self._draw(student, step, file)
        self.is_over = bool(self.processes.from_first(self.is_over))
        return file if self.processes.is_first and not self.is_over else None

    def _draw(self, student: WanLiteStudent, step: int, file: Path) -> bool:
        """Whether it worked."""
        needs_others = self.is_sharded and self.processes.are_many
        try:
            with undisturbed(student, self.student_options.device):
                if self.teacher is not None and self.teacher_latents is None:
                    self.teacher_latents = self._latents("teacher", self.teacher, self.teacher_options)
                latents = self._latents("student", StudentField(student), self.student_options)
        except RuntimeError as error:
            if needs_others or not is_out_of_memory(error):  # the others are waiting for this one's part of the weights
                raise
            return self._give_up(error)
        if not self.processes.is_first:
            return True
        try:
            with undisturbed(student, self.student_options.device):
                self._write(latents, step, file)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            return self._give_up(error)
        return True

    def _give_up(self, error: Exception) -> bool:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:200]}"
        tqdm.write(f"No sample pictures: {reason}", file=sys.stdout)
        return False

    def _latents(self, name: str, field: VelocityField, options: SamplingOptions) -> Tensor:
        count = len(self.prompts)
        with tqdm(total=count, desc=f"drawing with the {name}", disable=None, leave=False) as bar:
            return sample_in_batches(
                field, self.noise, self.prompt_embeds, range(count), options, self.batch_size, bar.update
            )

    def _write(self, latents: Tensor, step: int, file: Path) -> None:
        grid = self._grid(latents)
        file.parent.mkdir(exist_ok=True)
        about = {"num_inference_steps": self.student_options.num_inference_steps, "shift": self.settings.shift}
        save_png(grid, file, {**about, "seed": SEED, "step": step})
        self.on_picture(step, grid)

    def _grid(self, latents: Tensor) -> "Image":
        vae = load_vae(self.vae_location, latents.shape[1], self.settings.vae_scale_factor, self.student_options.device)
        if self.teacher_latents is not None and not self.teacher_row:
            self.teacher_row = self._pictures(vae, self.teacher_latents)
        rows = {"teacher": self.teacher_row} if self.teacher_row else {}
        rows["student"] = self._pictures(vae, latents)
        del vae
        gc.collect()  # its modules hold each other
        captions = [self.prompts, [""] * len(self.prompts)][: len(rows)]
        return labelled_grid(list(rows.values()), captions, list(rows))

    def _pictures(self, vae, latents: Tensor) -> list[np.ndarray]:
        mean, std = self.settings.latents_mean, self.settings.latents_std
        return [picture for part in latents.split(self.batch_size) for picture in decode(vae, part, mean, std)]
