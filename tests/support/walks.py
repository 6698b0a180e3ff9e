"""Walks over velocity fields that are known in closed form: no weights, and every oracle is a formula."""

from dataclasses import fields

import torch

from wandistiller.walk.walk import Walk, WalkOptions
from wandistiller.wan.prompt_embeds import PromptEmbeds, mock_prompt_embeds

SHAPE = (2, 1, 1)
SHIFT = 3.0
BOUNDARY = 0.875  # u = 0.7 at this shift: three tenths of the levels lie above
NUM_PROMPTS = 10
EMBEDS = mock_prompt_embeds([f"prompt {number}" for number in range(NUM_PROMPTS)], 6)


class Field:
    """A velocity field, v = rate x + constant, that notes what it is asked."""

    def __init__(self, rate: float = 0.0, constant: float = 0.0):
        self.rate, self.constant = rate, constant
        self.asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def velocity_and_features(self, latents, sigma, prompt_embeds, prompt_lengths, layers=()):
        self.asked.append((latents.clone(), sigma.clone()))
        hidden = [latents.flatten(1)[..., None].expand(-1, -1, 3) * (layer + 1) for layer in layers]
        return self.rate * latents + self.constant, tuple(hidden)

    def velocity(self, latents, sigma, prompt_embeds, prompt_lengths):
        return self.velocity_and_features(latents, sigma, prompt_embeds, prompt_lengths)[0]


class TowardsClean(Field):
    """The true velocity of paths that all end at one clean sample."""

    def __init__(self, clean: torch.Tensor):
        super().__init__()
        self.clean = clean

    def velocity_and_features(self, latents, sigma, prompt_embeds, prompt_lengths, layers=()):
        return (latents - self.clean) / sigma.float()[:, None, None, None], ()


def walk_options(num_slots: int = 8, **changes) -> WalkOptions:
    values = {
        "key": (3, 0), "latent_shape": SHAPE, "num_prompts": NUM_PROMPTS, "num_slots": num_slots, "batch_size": num_slots,
        "shift": SHIFT, "num_steps": 20,
    }  # fmt: skip
    assert changes.keys() <= {known.name for known in fields(WalkOptions)}
    return WalkOptions(**values | changes)


def make_walk(
    teacher: Field | None = None, slots: range | None = None, embeds: PromptEmbeds = EMBEDS, **changes
) -> Walk:
    """A walk of 8 slots, or of a range of them, along the constant field 1 unless another teacher is given."""
    options = walk_options(**changes)
    return Walk(teacher or Field(constant=1.0), embeds, options, slots or range(options.batch_size))


def ask(walk: Walk, num_calls: int, first: int = 0) -> list[dict[str, torch.Tensor]]:
    """The answers of some calls in a row."""
    rows = range(len(walk.slots))
    return [walk.ask(call, rows) for call in range(first, first + num_calls)]


def unshift(sigma):
    return sigma / (SHIFT - (SHIFT - 1) * sigma)
