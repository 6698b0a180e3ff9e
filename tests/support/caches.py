"""A tiny teacher and what its cache is asked for, for the tests of caches and of their builders."""

from dataclasses import replace
from pathlib import Path

import torch

from support.runs import PRUNED_CONFIG
from wandistiller import StudentConfig
from wandistiller.projection.project import project_experts
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.answers import TeacherAnswers
from wandistiller.targets.cache import describe_cache
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.states import StatesOptions, draws_by_size, states_of
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.prompt_embeds import mock_prompt_embeds
from wandistiller.wan.settings import resolve_settings

PROMPTS = [f"prompt {number}" for number in range(7)]
CONFIG = StudentConfig.from_dict(PRUNED_CONFIG)
OPTIONS = StatesOptions(kind="trajectory", seed=5)
BATCH_SIZE = 3


def make_description(options: StatesOptions = OPTIONS, prompts: list[str] = PROMPTS, **settings) -> dict:
    wan_files = open_teacher("mock", CONFIG)
    settings = resolve_settings(wan_files, **{"guidance_scale": 3.0, "shift": 3.0} | settings)
    return describe_cache(wan_files, settings, options, prompts, CONFIG, BATCH_SIZE)


def make_answers(options: StatesOptions = OPTIONS, part: tuple[int, int] = (0, 1)) -> TeacherAnswers:
    torch.set_num_threads(1)
    wan_files = open_teacher("mock", CONFIG)
    settings = replace(resolve_settings(wan_files, guidance_scale=3.0, shift=3.0), num_inference_steps=6)
    embeds = mock_prompt_embeds([*PROMPTS, ""], CONFIG.text_encoder_output_dim)
    teacher = Teacher(project_experts(wan_files, CONFIG.text_max_length), settings, embeds.read(len(PROMPTS)))
    shapes = [settings.latent_shape(CONFIG)]
    (draw,) = draws_by_size(options, shapes, settings, len(PROMPTS), Lanes(BATCH_SIZE))
    states = states_of(options, draw.of_part(*part), settings)
    return TeacherAnswers(teacher, states, embeds, "cpu", torch.float32)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
