"""Flow matching as Wan uses it: pure functions of noise levels.

`sigma` is in [0, 1] and 1 is pure noise; x_sigma = (1 - sigma) x_0 + sigma noise; models predict
velocity = noise - x_0 and are fed timestep = 1000 sigma, a float that is never rounded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Warp u in [0, 1] towards noise: sigma = shift u / (1 + (shift - 1) u) (Wan2.2:wan/utils/fm_solvers_unipc.py)."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Return the u that `shift_sigma` maps to sigma; shifting by 1/shift is the inverse."""
    return shift_sigma(sigma, 1 / shift)


def sigma_to_timestep(sigma: Tensor) -> Tensor:
    """Return what the transformer is fed: 1000 sigma, not rounded."""
    return NUM_TRAIN_TIMESTEPS * sigma


def seeded_noise(seeds: Sequence[int], latent_shape: tuple[int, int, int]) -> Tensor:
    """Draw noise (B, C, H, W), each sample from its own seed and on the CPU, so that it depends on nothing but the seed."""
    return torch.stack([torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
