"""Where training states x_sigma come from."""

import torch
from torch import Tensor

from wandistiller.flow import sample_sigmas
from wandistiller.student_config import StudentConfig
from wandistiller.teacher import TeacherSettings


class NoiseStates:
    """Pure noise at every noise level: the simple baseline, on distribution only near sigma 1."""

    def __init__(
        self,
        latent_shape: tuple[int, int, int],
        shift: float,
        sigma_range: tuple[float, float],
        generator: torch.Generator,
    ):
        self.latent_shape = latent_shape  # (C, H, W)
        self.shift = shift
        self.sigma_range = sigma_range
        self.generator = generator

    @classmethod
    def for_student(
        cls, config: StudentConfig, settings: TeacherSettings, sigma_range: tuple[float, float], seed: int
    ) -> "NoiseStates":
        """States of the student's image size behind the teacher's VAE, at the teacher's shift."""
        side = config.image_size // settings.vae_scale_factor
        generator = torch.Generator().manual_seed(seed)
        return cls((config.num_channels, side, side), settings.shift, sigma_range, generator)

    def draw(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Latents (B, C, H, W) in model space and their sigma (B,), both on the CPU."""
        sigma = sample_sigmas(batch_size, self.shift, self.sigma_range, self.generator)
        return torch.randn(batch_size, *self.latent_shape, generator=self.generator), sigma
