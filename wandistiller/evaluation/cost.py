"""What a picture costs from text to pixels: bytes in memory, FLOPs and seconds of text encoder, transformer and VAE."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from wandistiller.device import autocast
from wandistiller.evaluation.experiment import Experiment
from wandistiller.evaluation.measures import median_seconds
from wandistiller.model.sizes import count_parameters, num_image_tokens, transformer_flops
from wandistiller.prompts.prompts import clean_prompt
from wandistiller.sampling.flow import NUM_TRAIN_TIMESTEPS
from wandistiller.sampling.sampler import SamplingOptions, wan_scheduler
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.text_encoder import EncodingOptions
from wandistiller.wan.text_encoder_files import TextEncoderFiles, open_tokenizer


def measure_cost(experiment: Experiment) -> dict[str, dict]:
    """Return parameters, and seconds and FLOPs of one sampling step, for a single picture; guidance takes two passes."""
    options = experiment.teacher.options
    latents, sigma = experiment.noise[:1].to(options.device), torch.ones(1)
    text = experiment.embeds.batch([0], options.device)
    fields = {"student": experiment.student.field, "teacher": experiment.teacher.field}
    asked = {
        name: partial(autocast(field.velocity, options.device, options.compute_dtype), latents, sigma, *text)
        for name, field in fields.items()
    }
    parameters = {
        name: sum(count_parameters(expert.config).total for expert in field.experts.values())
        for name, field in fields.items()
    }
    flops = {name: step_flops(field, experiment.latent_size, experiment.num_tokens) for name, field in fields.items()}
    seconds = median_seconds(asked, options.device)
    rows: dict[str, dict] = {"parameters": parameters, "step_seconds": seconds, "step_flops": flops}
    return {name: row | {"ratio": row["student"] / row["teacher"]} for name, row in rows.items()}


def step_flops(field: Teacher, latent_size: tuple[int, int], num_tokens: int, sigma: float = 1.0) -> int:
    """Return the FLOPs of one sampling step, for one picture.

    Args:
        latent_size: height and width of the picture's latents.
        num_tokens: text tokens of the prompt.
    """
    config = field.experts["high"].config
    asked = config, num_image_tokens(config, latent_size), num_tokens + 1  # and the token that stands for the padding
    if field.scale_at(sigma) == 1.0:
        return transformer_flops(*asked)
    return transformer_flops(*asked, len(field.negative_prompt_embeds) + 1)


def picture_flops(field: Teacher, options: SamplingOptions, experiment: Experiment) -> int:
    scheduler = wan_scheduler(options.shift, options.num_inference_steps, options.sampler, options.levels)
    sigmas = [float(timestep) / NUM_TRAIN_TIMESTEPS for timestep in scheduler.timesteps]
    return sum(step_flops(field, experiment.latent_size, experiment.num_tokens, sigma) for sigma in sigmas)


def text_cost(files: TextEncoderFiles | None, prompt: str, text_max_length: int, device: str) -> dict[str, float]:
    """Return what embedding a prompt costs; the encoder is loaded for it, and has left memory on return. The mock's costs nothing."""
    if files is None:
        return {"bytes": 0, "flops": 0, "seconds": 0.0}
    tokens = open_tokenizer(files.tokenizer)([clean_prompt(prompt)])[0][:text_max_length]
    encoder: Any = files.umt5.load(EncodingOptions(device=device).encoder_dtype)
    encoder.to(device)
    return module_cost(encoder, partial(encoder, torch.tensor([tokens or [0]], device=device)), device)


def module_cost(module: nn.Module, call: Callable[[], object], device: str) -> dict[str, float]:
    """Return bytes of weights, and FLOPs and seconds of a call as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call()
    seconds = median_seconds({"call": call}, device, repeats=3)["call"]
    return {
        # Tied tables are one:
        "bytes": sum({weight.data_ptr(): weight.nbytes for weight in module.parameters()}.values()),
        "flops": counter.get_total_flops(),
        "seconds": seconds,
    }


def measure_picture(experiment: Experiment, text: dict[str, float], step_seconds: dict[str, float]) -> dict[str, dict]:
    """Return what each part of a picture costs, of both the same text encoder and VAE, and each one's transformer.

    Args:
        text: what `text_cost` found.
        step_seconds: of one sampling step, measured, of "student" and "teacher".
    """
    found: dict[str, dict] = {"text encoder": text}
    for who in ("student", "teacher"):
        artist = getattr(experiment, who)
        weights = [weight for expert in artist.field.experts.values() for weight in expert.parameters()]
        found[who] = {
            "bytes": sum(weight.nbytes for weight in weights),
            "flops": picture_flops(artist.field, artist.options, experiment),
            "seconds": artist.options.num_inference_steps * step_seconds[who],
        }
    vae, own = experiment.teacher.vae, experiment.teacher.settings
    decode = partial(vae.pictures, experiment.noise[:1], own.latents_mean, own.latents_std)
    return found | {"VAE": module_cost(vae, decode, experiment.teacher.options.device)}
