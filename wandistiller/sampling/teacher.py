"""The frozen teacher: a guided velocity field over one or two 2D experts, with the settings its release was made for."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from wandistiller.device import to_device
from wandistiller.model.hidden_states import block_outputs
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.sampling.flow import NUM_TRAIN_TIMESTEPS, sigma_to_timestep
from wandistiller.wan.settings import TeacherSettings


class Teacher:
    """The guided velocity field a student learns; its weights never change.

    Args:
        experts: 2D models of the teacher's own shape, {"high": ...} or {"high": ..., "low": ...}.
        settings: guidance and boundary.
        negative_prompt_embeds: (S, text_dim) text tokens of the negative prompt; None where every guidance scale is 1.
        offload_to: device that the expert in use is brought to, while all stay in host memory, where they must be; None
            leaves them where they are.
        any_process: whether something is true in any of the processes that experts are spread over, which must ask the same
            ones together.

    Attributes:
        num_swaps: how often the expert in use has changed.
    """

    def __init__(
        self,
        experts: dict[str, WanLiteStudent],
        settings: TeacherSettings,
        negative_prompt_embeds: Tensor | None = None,
        offload_to: str | torch.device | None = None,
        any_process: Callable[[bool], bool] = bool,
    ):
        if settings.uses_guidance and negative_prompt_embeds is None:
            raise ValueError("guidance needs negative_prompt_embeds")
        self.settings = settings
        self.negative_prompt_embeds = negative_prompt_embeds
        self.experts = {name: expert.eval().requires_grad_(False) for name, expert in experts.items()}
        self.offloaded = None if offload_to is None else OffloadedExperts(self.experts, offload_to)
        self.any_process = any_process
        self.in_use: str | None = None
        self.num_swaps = 0

    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Guided velocity; each sample goes to the expert of its own noise level.

        Args:
            latents: (B, C, H, W) in model space.
            sigma: (B,) noise levels; on the CPU the choice of expert costs no synchronisation.
            prompt_embeds: (B, S, text_dim), prompt_lengths (B,).
        """
        return self.velocity_and_features(latents, sigma, prompt_embeds, prompt_lengths)[0]

    @torch.no_grad()
    def velocity_and_features(
        self,
        latents: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        prompt_lengths: Tensor,
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Guided velocity as `velocity` gives it, and the hidden states (B, L, D) after `layers`, of the prompt's own half."""
        if "low" not in self.experts:
            return self._guided("high", latents, sigma, prompt_embeds, prompt_lengths, layers)
        is_high = self.is_high(sigma)
        velocity, features = torch.empty_like(latents), []
        # The expert in use first: a batch for both is then one change of experts, not two.
        for name in ("low", "high") if self.in_use == "low" else ("high", "low"):
            rows = (is_high if name == "high" else ~is_high).nonzero().flatten()
            if not self.any_process(len(rows) > 0):
                continue
            if not len(rows):
                # Only to lend this process's part of the weights to those that ask.
                self._guided(name, *(value[:1] for value in (latents, sigma, prompt_embeds, prompt_lengths)), ())
                continue
            on_device = to_device(rows, latents.device)
            part = latents[on_device], sigma[rows], prompt_embeds[on_device], prompt_lengths[on_device]
            velocity[on_device], hidden = self._guided(name, *part, layers)
            features = features or [state.new_empty(len(latents), *state.shape[1:]) for state in hidden]
            for whole, state in zip(features, hidden, strict=True):
                whole[on_device] = state
        return velocity, tuple(features)

    def is_high(self, sigma: Tensor) -> Tensor:
        """Which samples (B,) the high-noise expert answers, of two."""
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
        """v_uncond + g (v_cond - v_uncond), both halves in one call that shares what is equal; g = 1 needs only one half."""
        expert = self.use(name)
        scale = self.settings.guidance_scale if name == "high" else self.settings.guidance_scale_2
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
        """The negative prompt beside the prompts, brought there once."""
        self.negative_prompt_embeds = self.negative_prompt_embeds.to(prompt_embeds)
        return self.negative_prompt_embeds

    def use(self, name: str) -> WanLiteStudent:
        """An expert, on the device that it is to answer on."""
        if name != self.in_use:
            self.num_swaps += self.in_use is not None
            self.in_use = name
        if self.offloaded is not None:
            self.offloaded.use(name)
        return self.experts[name]


def queued_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; from pinned memory the copy is queued there and the host does not wait."""
    return tensor.to(device, non_blocking=True)


class OffloadedExperts:
    """Brings the weights of one expert at a time to the device; the experts are changed in place.

    Weights never change, so nothing is ever copied back: an expert that leaves the device takes up its host copy again. On a
    device that is the host itself no byte moves.

    Args:
        experts: frozen models in host memory; for a GPU that memory is pinned. (torch rounds each pinned tensor up to
            a power of two: the experts of A14B take about half as much host memory again.)
    """

    def __init__(self, experts: Mapping[str, nn.Module], device: str | torch.device):
        self.device = torch.device(device)
        self.on_device: str | None = None
        self._tensors = {name: [*expert.parameters(), *expert.buffers()] for name, expert in experts.items()}
        if self.device.type == "cuda":
            for tensors in self._tensors.values():
                for tensor in tensors:
                    tensor.data = tensor.data.pin_memory()  # one at a time: no expert is there twice
        self._host = {name: [tensor.data for tensor in tensors] for name, tensors in self._tensors.items()}

    @torch.inference_mode(False)  # an expert brought in while a picture is drawn serves training later
    def use(self, name: str) -> None:
        """Have this expert on the device, and no other; the other leaves first, so that both never need to fit."""
        if name == self.on_device:
            return
        if self.on_device is not None:
            for tensor, host in zip(self._tensors[self.on_device], self._host[self.on_device], strict=True):
                tensor.data = host
        for tensor, host in zip(self._tensors[name], self._host[name], strict=True):
            tensor.data = queued_copy(host, self.device)
        self.on_device = name
