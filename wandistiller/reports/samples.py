"""Sample pictures of a run: fixed prompts and noise, the teacher's row above the student's."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from tqdm import tqdm

from wandistiller.device import is_out_of_memory
from wandistiller.errors import UserError
from wandistiller.files.output_folder import OVER_TIME_NAME, sample_files
from wandistiller.files.pictures import labelled_grid, save_png, stacked_rows
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.processes import Processes
from wandistiller.sampling.flow import seeded_noise
from wandistiller.sampling.sampler import SamplingOptions, StudentField, VelocityField, sample_in_batches
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds
from wandistiller.wan.settings import TeacherSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from wandistiller.wan.vae_2d import WanVae2D

MAX_BATCH_SIZE = 8  # prompts drawn at a time; a smaller training batch also limits it
MAX_ROWS = 12  # of samples_over_time.png


@dataclass(kw_only=True)
class Samples:
    """Draws the same prompts from the same noise every time, so that the pictures of a run can be compared.

    The teacher's row is drawn the first time and kept. The VAE is in memory only while it decodes. All processes call this;
    the first one draws and writes, and the others draw with it only where weights are sharded. A picture that cannot be made
    must not turn a run into a failed one: it is reported once, and no more are tried.

    Attributes:
        folder: where step_XXXXXX.png go.
        teacher: None if it does not fit beside the student, whose row then stands alone.
        prompts: what is drawn, with a picture for each.
        seed: of the first prompt's noise; each next prompt has the next seed.
        latent_shapes: (C, H, W) of each image size; the prompts take them in turn.
        settings: the teacher's, for the VAE's statistics and the record in each picture.
        batch_size: prompts of a training batch; drawing takes no more at a time.
        needs_all_processes: whether weights are sharded, so that all processes must draw together.
        on_picture: called with the step and the picture, in the process that writes it.
    """

    folder: Path
    teacher: Teacher | None
    prompts: Sequence[str]
    seed: int
    prompt_embeds: PromptEmbeds
    latent_shapes: Sequence[tuple[int, int, int]]
    vae_location: Path
    settings: TeacherSettings
    teacher_sampling: SamplingOptions
    student_sampling: SamplingOptions
    batch_size: int
    needs_all_processes: bool
    processes: Processes
    on_picture: "Callable[[int, Image], None]"
    teacher_latents: list[Tensor] = field(default_factory=list, init=False)
    teacher_row: list[np.ndarray] = field(default_factory=list, init=False)
    is_over: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.batch_size = min(MAX_BATCH_SIZE, self.batch_size)

    def __call__(self, student: WanLiteStudent, step: int) -> Path | None:
        """Draw the picture of a step and return its file, or None if this process wrote none. The student stays as it is.

        The other processes wait for the first one here, and not for the gradients of the next step.
        """
        if self.is_over:
            return None
        file = self.folder / f"step_{step:06d}.png"
        if self.processes.is_first or self.needs_all_processes:
            self.is_over = not self._draw(student, step, file)
        self.is_over = bool(self.processes.from_first(self.is_over))
        return file if self.processes.is_first and not self.is_over else None

    def _draw(self, student: WanLiteStudent, step: int, file: Path) -> bool:
        """Draw, and write the picture in the first process. Return False if drawing had to be given up."""
        latents = None
        try:
            if self.teacher is not None and not self.teacher_latents:
                self.teacher_latents = self._latents("teacher", self.teacher, self.teacher_sampling)
            latents = self._latents("student", StudentField(student), self.student_sampling)
            if self.processes.is_first:
                self._write(latents, step, file)
        except (UserError, OSError, RuntimeError) as error:
            # The others may be waiting for this process's shard of the weights, so only a process by itself can give up:
            is_awaited = latents is None and self.needs_all_processes and self.processes.are_many
            if is_awaited or (isinstance(error, RuntimeError) and not is_out_of_memory(error)):
                raise
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:200]}"
            tqdm.write(f"No sample pictures: {reason}", file=sys.stdout)
            return False
        return True

    def _of_sizes(self) -> Iterator[tuple[range, tuple[int, int, int]]]:
        """Yield the prompts of each size, by their indices, and its latent shape."""
        for first, shape in enumerate(self.latent_shapes[: len(self.prompts)]):
            yield range(first, len(self.prompts), len(self.latent_shapes)), shape

    def _latents(self, name: str, who: VelocityField, options: SamplingOptions) -> list[Tensor]:
        with tqdm(total=len(self.prompts), desc=f"drawing with the {name}", disable=None, leave=False) as bar:
            return [
                sample_in_batches(
                    who,
                    seeded_noise([self.seed + index for index in indices], shape),
                    self.prompt_embeds,
                    indices,
                    options,
                    self.batch_size,
                    bar.update,
                )
                for indices, shape in self._of_sizes()
            ]

    def _write(self, latents: list[Tensor], step: int, file: Path) -> None:
        from wandistiller.wan.vae_2d import load_vae_2d

        factor, device = self.settings.vae_scale_factor, self.student_sampling.device
        vae = load_vae_2d(self.vae_location, latents[0].shape[1], factor, device)
        if self.teacher_latents and not self.teacher_row:
            self.teacher_row = self._pictures(vae, self.teacher_latents)
        rows = {"teacher": self.teacher_row} if self.teacher_row else {}
        rows["student"] = self._pictures(vae, latents)
        del vae
        gc.collect()  # its modules hold each other
        grid = labelled_grid(rows, self.prompts)
        file.parent.mkdir(exist_ok=True)
        steps, shift = self.student_sampling.num_inference_steps, self.settings.shift
        save_png(grid, file, {"num_inference_steps": steps, "shift": shift, "seed": self.seed, "step": step})
        self.on_picture(step, grid)
        found = sample_files(self.folder.parent)
        chosen = sorted({round(index) for index in np.linspace(0, len(found) - 1, MAX_ROWS)})
        earlier = {f"step {found[index][0]}": found[index][1] for index in chosen}
        if len(earlier) > 1:
            save_png(stacked_rows(earlier, grid.info["row"]), self.folder.with_name(OVER_TIME_NAME))

    def _pictures(self, vae: "WanVae2D", latents: list[Tensor]) -> list[np.ndarray]:
        """Return the pictures in the order of their prompts."""
        mean, std = self.settings.latents_mean, self.settings.latents_std
        pictures: dict[int, np.ndarray] = {}
        for of_size, (indices, _) in zip(latents, self._of_sizes(), strict=True):
            decoded = [picture for part in of_size.split(self.batch_size) for picture in vae.pictures(part, mean, std)]
            pictures |= dict(zip(indices, decoded, strict=True))
        return [pictures[index] for index in sorted(pictures)]
