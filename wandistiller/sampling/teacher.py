"""The frozen teacher: a guided velocity field over one or two 2D experts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wandistiller.device import to_device
from wandistiller.model.transformer import WanLiteStudent, block_outputs
from wandistiller.sampling.flow import NUM_TRAIN_TIMESTEPS, sigma_to_timestep
from wandistiller.wan.settings import TeacherSettings


class Teacher:
    """The guided velocity field a student learns; its weights never change.

    Args:
        experts: 2D models of the teacher's own shape, {"high": ...} or {"high": ..., "low": ...}.
        settings: guidance, and the boundary between the experts.
        negative_prompt_embeds: (S, text_dim) text tokens of the negative prompt; None where every guidance scale is 1.
        any_process: tells whether something is true in any of the processes that experts are sharded over, because these
            must ask the same expert together.

    Attributes:
        num_swaps: how often the expert in use has changed.
    """

    def __init__(
        self,
        experts: dict[str, WanLiteStudent],
        settings: TeacherSettings,
        negative_prompt_embeds: Tensor | None = None,
        any_process: Callable[[bool], bool] = bool,
    ):
        if settings.uses_guidance and negative_prompt_embeds is None:
            raise ValueError("guidance needs negative_prompt_embeds")
        self.settings = settings
        self.negative_prompt_embeds = negative_prompt_embeds
        self.experts = {name: expert.eval().requires_grad_(False) for name, expert in experts.items()}
        self.any_process = any_process
        self.in_use: str | None = None
        self.num_swaps = 0

    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Return the guided velocity (B, C, H, W); each sample is answered by the expert of its own noise level.

        Args:
            latents: (B, C, H, W) in model space.
            sigma: (B,) noise levels; on the CPU the choice of expert costs no synchronisation.
            prompt_embeds: (B, S, text_dim).
            prompt_lengths: (B,).
        """
        return self.velocity_and_features(latents, sigma, prompt_embeds, prompt_lengths)[0]

    @torch.no_grad()
    def velocity_and_features(
        self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor, layers: Sequence[int] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the guided velocity, and the hidden states (B, L, D) after `layers` of the half that sees the prompt."""
        if "low" not in self.experts:
            return self._guided("high", latents, sigma, prompt_embeds, prompt_lengths, layers)
        velocity = torch.empty_like(latents)
        features: list[Tensor] = []
        is_high = self.is_high(sigma)
        # The expert in use comes first, so that a batch for both takes one change of experts and not two.
        groups = [("high", is_high), ("low", ~is_high)]
        for name, is_asked in reversed(groups) if self.in_use == "low" else groups:
            rows = is_asked.nonzero().flatten()
            if not self.any_process(len(rows) > 0):
                continue
            if not len(rows):
                # This call only lends this process's shard of the weights to the processes that need the expert.
                self._guided(name, latents[:1], sigma[:1], prompt_embeds[:1], prompt_lengths[:1], ())
                continue
            on_device = to_device(rows, latents.device)
            part = latents[on_device], sigma[rows], prompt_embeds[on_device], prompt_lengths[on_device]
            velocity[on_device], hidden = self._guided(name, *part, layers)
            features = features or [state.new_empty(len(latents), *state.shape[1:]) for state in hidden]
            for feature, state in zip(features, hidden, strict=True):
                feature[on_device] = state
        return velocity, tuple(features)

    def _scale_of(self, name: str) -> float:
        return self.settings.guidance_scale if name == "high" else self.settings.guidance_scale_2

    def scale_at(self, sigma: float) -> float:
        """Return the guidance scale at a noise level; 1 takes one pass."""
        is_low = "low" in self.experts and not self.is_high(torch.tensor(sigma))
        return self._scale_of("low" if is_low else "high")

    def is_high(self, sigma: Tensor) -> Tensor:
        """Return which samples (B,) of a teacher of two experts are the high-noise expert's."""
        return sigma_to_timestep(sigma) >= self.settings.boundary_ratio * NUM_TRAIN_TIMESTEPS

    def _guided(
        self,
        name: str,
        latents: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        prompt_lengths: Tensor,
        layers: Sequence[int],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return v_uncond + g (v_cond - v_uncond) of one expert, and its hidden states after `layers`.

        Both halves are computed in one call, which shares what is equal in them; g = 1 needs only one half.
        """
        if name != self.in_use:
            self.num_swaps += self.in_use is not None
            self.in_use = name
        expert, scale = self.experts[name], self._scale_of(name)
        timestep = to_device(sigma_to_timestep(sigma), latents.device)
        if scale == 1.0:
            with block_outputs(expert, layers) as features:
                velocity = expert(latents, timestep, prompt_embeds, prompt_lengths)
            return velocity, tuple(features)
        with block_outputs(expert, layers, len(latents)) as features:
            velocity = expert(latents, timestep, prompt_embeds, prompt_lengths, self._negative(prompt_embeds))
        velocity_cond, velocity_uncond = velocity.chunk(2)
        guided = velocity_uncond + scale * (velocity_cond - velocity_uncond)
        return guided, tuple(features)

    def _negative(self, prompt_embeds: Tensor) -> Tensor:
        """Return the negative prompt in the dtype and on the device of the prompts; only the first call moves it there."""
        self.negative_prompt_embeds = self.negative_prompt_embeds.to(prompt_embeds)
        return self.negative_prompt_embeds
