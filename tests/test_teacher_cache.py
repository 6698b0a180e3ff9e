"""The teacher's answers on disk: built once, stopped anywhere, learnt from without a teacher.

pytest tests/test_teacher_cache.py
"""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter, namedtuple
from dataclasses import replace

import pytest
import torch
from conftest import PRUNED_CONFIG

from projection_mapper import open_teacher, project_experts
from wandistiller import StudentConfig, teacher_cache
from wandistiller.answers import TeacherAnswers
from wandistiller.errors import UserError
from wandistiller.prompt_embeds import mock_prompt_embeds
from wandistiller.state_sources import StatesOptions, build_states
from wandistiller.teacher import Teacher, resolve_settings
from wandistiller.teacher_cache import CachedAnswers, TeacherCache, describe_cache

PROMPTS = [f"prompt {number}" for number in range(7)]
CONFIG = StudentConfig.from_dict(PRUNED_CONFIG)
OPTIONS = StatesOptions(kind="trajectory", seed=5)
BATCH_SIZE = 3
NUM_BATCHES = 2 * teacher_cache.SHARD_BATCHES + 5


def make_description(options: StatesOptions = OPTIONS, prompts: list[str] = PROMPTS, **settings) -> dict:
    checkpoint = open_teacher("mock", CONFIG)
    settings = resolve_settings(checkpoint, **{"guidance_scale": 3.0, "shift": 3.0} | settings)
    shape = (CONFIG.num_channels, CONFIG.latent_size, CONFIG.latent_size)
    return describe_cache(checkpoint, settings, options, prompts, shape, CONFIG.text_max_length, BATCH_SIZE)


def make_answers() -> TeacherAnswers:
    torch.set_num_threads(1)
    checkpoint = open_teacher("mock", CONFIG)
    settings = replace(resolve_settings(checkpoint, guidance_scale=3.0, shift=3.0), num_inference_steps=6)
    embeds = mock_prompt_embeds([*PROMPTS, ""], CONFIG.text_encoder_output_dim)
    teacher = Teacher(project_experts(checkpoint, CONFIG.text_max_length), settings, embeds.read(len(PROMPTS)))
    states = build_states(OPTIONS, CONFIG, settings, len(PROMPTS), BATCH_SIZE)
    return TeacherAnswers(teacher, states, embeds, "cpu", torch.float32)


def build(folder, on_progress=lambda done: None) -> TeacherCache:
    cache = TeacherCache(folder, make_description())
    cache.build(make_answers(), NUM_BATCHES, on_progress)
    return cache


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A complete cache: its folder, to be read only."""
    folder = tmp_path_factory.mktemp("caches") / "whole"
    build(folder)
    return folder


@pytest.fixture
def own(built, tmp_path):
    """A complete cache to break."""
    return shutil.copytree(built, tmp_path / "own")


# ---- what is in it ----


def test_a_cache_holds_what_the_teacher_answers_and_gives_every_answer_once_an_epoch(built):
    answers, expected = make_answers(), {}
    for _ in range(NUM_BATCHES):
        answer = answers.next()
        answers.advance(answer, answer.velocity, 0.0)
        for row, prompt in enumerate(answer.prompts):
            values = answer.latents[row], answer.velocity[row]
            expected[answer.sigma[row].item(), prompt, round(values[0].sum().item(), 1)] = values
    cache = TeacherCache(built, make_description())
    assert cache.is_complete and cache.num_answers == NUM_BATCHES * BATCH_SIZE
    cached, seen = CachedAnswers(cache, BATCH_SIZE, "cpu", seed=1), Counter()
    for _ in range(2 * NUM_BATCHES):
        answer = cached.next()
        assert len(answer.prompts) == BATCH_SIZE and answer.latents.dtype == answer.sigma.dtype == torch.float32
        for row, prompt in enumerate(answer.prompts):
            close = [
                key
                for key in expected
                if key[:2] == (answer.sigma[row].item(), prompt)
                and torch.allclose(answer.latents[row], expected[key][0], rtol=1e-3, atol=1e-3)
            ]
            assert len(close) == 1
            torch.testing.assert_close(answer.velocity[row], expected[close[0]][1], rtol=1e-3, atol=1e-3)
            seen[close[0]] += 1
    assert set(seen.values()) == {2} and len(seen) == NUM_BATCHES * BATCH_SIZE and cached.num_calls == 0


def test_the_order_differs_from_epoch_to_epoch_and_goes_on_bit_for_bit_from_a_saved_state(built):
    cache = TeacherCache(built, make_description())
    one, other = CachedAnswers(cache, 4, "cpu", seed=1), CachedAnswers(cache, 4, "cpu", seed=2)
    first = [tuple(one.next().sigma.tolist()) for _ in range(30)]
    assert len(set(first)) == 30
    other.load_state_dict(one.state_dict())
    for _ in range(60):
        left, right = one.next(), other.next()
        assert torch.equal(left.latents, right.latents) and torch.equal(left.sigma, right.sigma)
        assert left.prompts == right.prompts


# ---- stopped and gone on ----


@pytest.mark.parametrize("stop_at", [1, teacher_cache.SHARD_BATCHES + 1, NUM_BATCHES])
def test_a_stopped_build_goes_on_and_ends_as_one_never_stopped(built, tmp_path, stop_at):
    def stop(done):
        if done == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "cache", stop)
    assert not TeacherCache(tmp_path / "cache", make_description()).is_complete
    asked = []
    build(tmp_path / "cache", asked.append)
    assert asked[0] == (stop_at - 1) // teacher_cache.SHARD_BATCHES * teacher_cache.SHARD_BATCHES + 1
    assert contents(tmp_path / "cache") == contents(built)


@pytest.mark.parametrize("seconds", [0.02, 0.15, 0.4])
def test_a_killed_build_goes_on_and_ends_as_one_never_stopped(built, tmp_path, seconds):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=build, args=(tmp_path / "cache", lambda done: started.set()))
    process.start()
    assert started.wait(60)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not TeacherCache(tmp_path / "cache", make_description()).is_complete:
        build(tmp_path / "cache")
    found = {name: value for name, value in contents(tmp_path / "cache").items() if not name.endswith(".tmp")}
    assert found == contents(built)


# ---- refused ----


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"guidance_scale": 5.0}, ["guidance_scale 3.0", "5.0"]),
        ({"shift": 7.0}, ["shift 3.0", "7.0"]),
        ({"negative_prompt": "blurry"}, ["negative_prompt", "'blurry'"]),
        ({"prompts": PROMPTS[:5]}, ["num_prompts 7", "5", "prompts '"]),
        ({"options": replace(OPTIONS, kind="renoise", renoise_fraction=0.5)}, ["'trajectory'", "'renoise'", "0.5"]),
        ({"options": replace(OPTIONS, seed=6)}, ["states_seed 5", "6"]),
    ],
)
def test_answers_to_something_else_are_refused_with_both_values(built, changes, words):
    before = contents(built)
    with pytest.raises(UserError) as error:
        TeacherCache(built, make_description(**changes))
    assert all(word in str(error.value) for word in [str(built), *words])
    assert contents(built) == before


def test_another_teacher_of_the_same_shape_is_refused(built, tmp_path):
    with pytest.raises(UserError, match="teacher '"):
        TeacherCache(built, make_description() | {"teacher": "0123"})


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match="not a teacher cache"):
        TeacherCache(tmp_path, make_description())
    assert contents(tmp_path) == {"holiday.jpg": b"mine"}


@pytest.mark.parametrize("damage", ["cut", "gone", "description"])
def test_a_damaged_cache_is_named(own, damage):
    shard = own / "answers_00001.safetensors"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "gone":
        shard.unlink()
    else:
        (own / "cache.json").write_text('{"is_complete": true', encoding="utf-8")
    with pytest.raises(UserError) as error:
        TeacherCache(own, make_description())
    assert ("cache.json" if damage == "description" else shard.name) in str(error.value) and "remove" in str(
        error.value
    )


def test_a_disk_too_small_is_refused_before_the_teacher_is_asked(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**4, 10**4))
    with pytest.raises(UserError, match="10,000 are free"):
        build(tmp_path / "cache", lambda done: pytest.fail("the teacher was asked"))


def test_a_velocity_beyond_what_is_stored_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "_guided", lambda self, name, latents, *rest: (latents * 1e6, ()))
    with pytest.raises(ValueError, match="--guidance_scale"):
        build(tmp_path / "cache")
    assert not json.loads((tmp_path / "cache" / "cache.json").read_text(encoding="utf-8"))["is_complete"]
