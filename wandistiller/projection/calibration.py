"""What a teacher does on its own sampling paths: the states that calibrate a student, and the energy of every unit there.

States lie on a grid of noise levels that all paths share. `draw_states` samples the guided teacher, both experts where it has
two; `measure_energies` traces the expert that a student is made of at those states, on the prompt's own branch.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from wandistiller.model.transformer import Context, WanBlock, WanLiteStudent, fold_text_padding
from wandistiller.projection.selection import Selection, TransformerTensors, squared_norms
from wandistiller.sampling.flow import seeded_noise, sigma_to_timestep
from wandistiller.sampling.sampler import SamplingOptions, VelocityField, sample
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds

FIRST_SEED = 3 * 2**31  # it lies far from the seeds of the noises that pictures and held-out errors are drawn from
FEWEST_PATHS, MOST_PATHS = 48, 96
ENOUGH_ROWS = 25_000  # a layer is fitted on the tokens of all states, so pictures of few tokens need more paths
NUM_TIMES = 400  # the time embedding is measured and fitted at so many noise levels


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """How much a student is calibrated on.

    Attributes:
        num_paths: the teacher's sampling paths that the student is fitted on, a prompt each.
        num_held_back: more of them that it is only measured on.
        num_levels: noise levels of a path.
        sampler: that of the paths, a name in SamplingOptions.
        num_texts: prompts that the text embedder is fitted on.
        ridge: the penalty on a change of the selected weights, relative to the mean square of a layer's inputs.
        batch_size: states that are in the device's memory at once.
    """

    num_paths: int = MOST_PATHS
    num_held_back: int = 16
    num_levels: int = 16
    sampler: str = "unipc"
    num_texts: int = 400
    ridge: float = 3e-2
    batch_size: int = 16
    seed: int = 0
    compute_dtype: torch.dtype = torch.float32
    device: str = "cpu"


def options_for(
    latent_shape: tuple[int, int, int], patch_size: int, num_paths: int | None = None, **others
) -> CalibrationOptions:
    """Return options for latents (C, H, W), with as many paths as give the fits enough rows unless `num_paths` is given."""
    options = CalibrationOptions(**others)
    num_tokens = latent_shape[1] * latent_shape[2] // patch_size**2
    enough = -(-ENOUGH_ROWS // (options.num_levels * num_tokens))
    return replace(options, num_paths=num_paths or min(max(enough, FEWEST_PATHS), MOST_PATHS))


@dataclass(frozen=True)
class CalibrationStates:
    """States on the teacher's paths and its guided answers, in host memory: S noise levels of P paths.

    Attributes:
        latents, velocity: (S, P, C, H, W).
        sigma: (S,).
        prompts: (P,) the index of each path's prompt.
    """

    latents: Tensor
    sigma: Tensor
    prompts: Tensor
    velocity: Tensor

    @property
    def num_paths(self) -> int:
        return len(self.prompts)

    def paths(self, start: int, stop: int) -> "CalibrationStates":
        """Return a part of the paths, which shares their values."""
        latents, velocity = (part[:, start:stop] for part in (self.latents, self.velocity))
        return CalibrationStates(latents, self.sigma, self.prompts[start:stop], velocity)

    def batches(self, size: int) -> Iterator[tuple[int, slice]]:
        """Yield every (noise level, paths), `size` paths at a time."""
        for level in range(len(self.sigma)):
            for start in range(0, self.num_paths, size):
                yield level, slice(start, min(start + size, self.num_paths))


class _RecordedPath:
    """A velocity field that keeps what it was asked and answered."""

    def __init__(self, field: VelocityField):
        self.field = field
        self.latents: list[Tensor] = []
        self.sigmas: list[float] = []
        self.velocities: list[Tensor] = []

    def velocity(self, latents: Tensor, sigma: Tensor, prompt_embeds: Tensor, prompt_lengths: Tensor) -> Tensor:
        velocity = self.field.velocity(latents, sigma, prompt_embeds, prompt_lengths)
        self.latents.append(latents.cpu())
        self.sigmas.append(float(sigma[0]))
        self.velocities.append(velocity.float().cpu())
        return velocity


def draw_states(
    teacher: Teacher, embeds: PromptEmbeds, latent_shape: tuple[int, int, int], options: CalibrationOptions
) -> tuple[CalibrationStates, CalibrationStates]:
    """Draw states to fit a student on, and others to measure it on, of other noises and, if there are enough, other prompts.

    A path takes as many steps as there are noise levels, so that every answer of the teacher is used.
    """
    count = options.num_paths + options.num_held_back
    generator = torch.Generator().manual_seed(options.seed)
    prompts = torch.randperm(len(embeds), generator=generator).repeat(-(-count // len(embeds)))[:count]
    first = FIRST_SEED + options.seed * count
    noise = seeded_noise(range(first, first + count), latent_shape)
    sampling = SamplingOptions(
        shift=teacher.settings.shift,
        num_inference_steps=options.num_levels,
        sampler=options.sampler,
        compute_dtype=options.compute_dtype,
        device=options.device,
    )
    parts = []
    for paths in torch.arange(count).split(options.batch_size):
        path = _RecordedPath(teacher)
        sample(path, noise[paths], *embeds.batch(prompts[paths], options.device), sampling)
        parts.append((torch.stack(path.latents), torch.stack(path.velocities)))
    latents, velocity = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
    states = CalibrationStates(latents, torch.tensor(path.sigmas), prompts, velocity)
    return states.paths(0, options.num_paths), states.paths(options.num_paths, count)


# ---- energies ----


@dataclass
class Energies:
    """Mean squares of a teacher's units at the calibration states, by name of the axis or of what they belong to.

    Attributes:
        channels: (D,) of the residual stream, each token's share of its own |x|^2, summed over the depth.
        squares: for every layer `attn1.i`, `attn2.i` and `neurons.i`: E[h^2] of what the output layer reads, for attn2 the
            variance; `time_hidden`, `text_hidden`: the same of the two embedders; `text_channels`: E[x^2] of the text stream.
    """

    channels: Tensor
    squares: dict[str, Tensor] = field(default_factory=dict)

    def score(self, teacher: TransformerTensors, axis: str, selection: Selection) -> Tensor:
        """Return how much each entry of an axis matters: its energy, times the squared weights that read it.

        Args:
            selection: what is chosen already; of the weights, only the rows of kept entries count.
        """
        if axis == "channels":
            return self.channels
        written, readers = _readers(axis, selection.layers)
        kept = None if written is None else selection.axes.get(written)
        norms = torch.zeros(())
        for name in readers:
            weight = teacher.read(name)
            norms = norms + squared_norms(weight if kept is None else weight[kept])[1]
        return self.squares[axis] * norms


def _readers(axis: str, layers: list[int]) -> tuple[str | None, list[str]]:
    """Return the axis that the readers of an axis write to, if it is one, and the names of their weights."""
    embedder = "condition_embedder.{}_embedder.linear_2.weight"
    if axis == "text_channels":
        return None, [f"blocks.{layer}.attn2.to_{name}.weight" for layer in layers for name in "kv"]
    if axis == "time_hidden":
        return "channels", [embedder.format("time")]
    if axis == "text_hidden":
        return "text_channels", [embedder.format("text")]
    kind, layer = axis.split(".")
    return "channels", [f"blocks.{layer}.{'ffn.net.2' if kind == 'neurons' else f'{kind}.to_out.0'}.weight"]


class _Sums:
    """The sums of values (..., K) and of their squares over rows, in float64 on the host."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        rows = values.flatten(0, -2).double()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(dim=0).cpu()
        self.squares = self.squares + rows.square().sum(dim=0).cpu()

    @property
    def mean_square(self) -> Tensor:
        return self.squares / self.count

    @property
    def variance(self) -> Tensor:
        return self.mean_square - (self.sum / self.count).square()


@contextlib.contextmanager
def watching_inputs(watchers: dict[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call each module's watcher with its input while the model answers inside."""
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, watcher=watcher: watcher(inputs[0]))
        for module, watcher in watchers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure_energies(
    expert: WanLiteStudent, states: CalibrationStates, embeds: PromptEmbeds, options: CalibrationOptions
) -> Energies:
    """Trace an expert over all states, on the prompts' own branch; a few vectors for each layer are all that is kept."""
    sums: dict[str, _Sums] = {}
    channels = _Sums()

    def add_shares(x: Tensor) -> None:
        channels.add(x.double() / x.double().norm(dim=-1, keepdim=True))

    watchers: dict[nn.Module, Callable[[Tensor], None]] = {expert.norm_out: add_shares}
    for layer, block in enumerate(wan_blocks(expert)):
        watchers[block.norm1] = add_shares
        readers = {"attn1": block.attn1.to_out[0], "attn2": block.attn2.to_out[0], "neurons": block.ffn.net[2]}
        for kind, reader in readers.items():
            sums[f"{kind}.{layer}"] = _Sums()
            watchers[reader] = sums[f"{kind}.{layer}"].add
    with watching_inputs(watchers), mixed_precision(options):
        for level, paths in states.batches(options.batch_size):
            latents = states.latents[level, paths].to(options.device)
            timestep = sigma_to_timestep(states.sigma[level]).to(options.device)
            expert(latents, timestep, *embeds.batch(states.prompts[paths], options.device))
    squares = {name: part.variance if name.startswith("attn2") else part.mean_square for name, part in sums.items()}
    depth = len(expert.blocks) + 1
    return Energies(channels.mean_square * depth, squares | _embedder_energies(expert, embeds, states, options))


def _embedder_energies(
    expert: WanLiteStudent, embeds: PromptEmbeds, states: CalibrationStates, options: CalibrationOptions
) -> dict[str, Tensor]:
    """Return the energies of the units inside the two embedders, and of the text stream."""
    embedder = expert.condition_embedder
    sums = {name: _Sums() for name in ("time_hidden", "text_hidden")}
    watchers: dict[nn.Module, Callable[[Tensor], None]] = {
        embedder.time_embedder.linear_2: sums["time_hidden"].add,
        embedder.text_embedder.linear_2: sums["text_hidden"].add,
    }
    text = _Sums()
    with watching_inputs(watchers), mixed_precision(options):
        embedder(times_of(states, options))
        for prompts in text_batches(embeds, options):
            embedded, is_there = embed_text(expert, *embeds.batch(prompts, options.device))
            text.add(embedded.embeds[is_there])
    return {name: part.mean_square for name, part in sums.items()} | {"text_channels": text.mean_square}


# ---- what tracing and fitting share ----


def wan_blocks(model: WanLiteStudent) -> list[WanBlock]:
    """Return the blocks of a wan model."""
    return cast(list[WanBlock], list(model.blocks))


def mixed_precision(options: CalibrationOptions) -> torch.autocast:
    """Return a context in which the teacher's matrix products are in the options' dtype."""
    is_mixed = options.compute_dtype != torch.float32
    return torch.autocast(torch.device(options.device).type, options.compute_dtype, enabled=is_mixed)


def times_of(states: CalibrationStates, options: CalibrationOptions) -> Tensor:
    """Return timesteps from pure noise to none, as dense everywhere as the noise levels of the states."""
    levels = torch.cat([torch.ones(1), states.sigma[1:], torch.zeros(1)])
    sigma = torch.nn.functional.interpolate(levels[None, None], NUM_TIMES, mode="linear", align_corners=True)
    return sigma_to_timestep(sigma[0, 0]).to(options.device)


def text_batches(embeds: PromptEmbeds, options: CalibrationOptions) -> list[Tensor]:
    """Return the prompts to fit on, a batch at a time, spread evenly over all of them."""
    count = min(options.num_texts, len(embeds))
    return torch.linspace(0, len(embeds) - 1, count).round().long().split(options.batch_size)


def embed_text(model: WanLiteStudent, prompt_embeds: Tensor, prompt_lengths: Tensor) -> tuple[Context, Tensor]:
    """Return what the model's blocks attend to, and which of its tokens (B, S) count.

    These are the tokens of the text, and one pad token if there is room for it.
    """
    folded, bias = fold_text_padding(prompt_embeds, prompt_lengths, model.config.text_max_length)
    dtype = model.patch_embedding.weight.dtype
    text = Context(model.condition_embedder.text_embedder(folded.to(dtype)), bias)
    return text, bias[:, 0, 0] > -torch.inf
