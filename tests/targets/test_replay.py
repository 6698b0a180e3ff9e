"""Replayed answers are the teacher's own, each about as often as asked, and go on from a saved state bit for bit.

pytest tests/targets/test_replay.py
"""

import statistics
from collections import Counter

import pytest
import torch

from support.runs import PRUNED_CONFIG
from support.states import check_goes_on_from_a_saved_state
from wandistiller import StudentConfig
from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.sampling.teacher import Teacher
from wandistiller.targets.answers import HiddenStates, TeacherAnswers
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.noise import NoiseStates
from wandistiller.targets.replay import LEAD_BATCHES, STORED_BATCHES, ReplayedAnswers
from wandistiller.targets.state_batch import DrawOptions, StateBatch
from wandistiller.targets.states import StatesOptions, build_states
from wandistiller.targets.trajectories import PathOptions, TrajectoryStates
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.prompt_embeds import mock_prompt_embeds
from wandistiller.wan.settings import resolve_settings

NUM_PROMPTS = 7


def make_run(config: dict = PRUNED_CONFIG, guidance_scale: float = 3.0):
    """(student, teacher, prompt_embeds, fresh states) around the mock, all from fixed seeds."""
    config = StudentConfig.from_dict(config)
    checkpoint = open_teacher("mock", config)
    settings = resolve_settings(checkpoint, guidance_scale=guidance_scale, shift=3.0)
    embeds = mock_prompt_embeds([f"prompt {'word ' * i}" for i in range(NUM_PROMPTS + 1)], 20)
    student, _ = project_teacher(checkpoint, config)
    teacher = Teacher(project_experts(checkpoint, 512), settings, embeds.read(NUM_PROMPTS))
    return student, teacher, embeds.first(NUM_PROMPTS), make_states(config, settings)


def make_states(config: StudentConfig, settings) -> NoiseStates:
    options = StatesOptions(kind="noise", sigma_range=(0.1, 0.9), seed=5)
    return build_states(options, config, settings, NUM_PROMPTS, Lanes(3))


def answers(teacher, states, embeds, dtype: torch.dtype = torch.float32, **changes) -> TeacherAnswers:
    return TeacherAnswers(teacher, states, embeds, "cpu", dtype, **changes)


def test_replay_gives_answers_unchanged_and_about_as_often_as_asked():
    _, teacher, embeds, states = make_run()
    num_steps, replay = 600, 3
    replayed = ReplayedAnswers(answers(teacher, states, embeds), embeds, replay, num_steps)
    known, uses, is_fresh = {}, Counter(), []
    for _ in range(num_steps):
        before = replayed.num_calls
        answer = replayed.next()
        replayed.advance(answer, answer.velocity, 0.0)
        is_fresh.append(replayed.num_calls > before)
        for row, prompt in enumerate(answer.prompts):
            key = answer.latents[row].sum().item()
            entry = (answer.sigma[row].item(), prompt, answer.velocity[row].sum().item())
            assert known.setdefault(key, entry) == entry
            uses[key] += 1
    assert all(is_fresh[:LEAD_BATCHES])
    assert sum(is_fresh) == replayed.num_calls == num_steps / replay
    # The teacher answers early, and the second half of the steps learns from what it has answered:
    assert sum(is_fresh[: num_steps // 2]) == sum(is_fresh)
    counts = sorted(uses.values())
    assert statistics.fmean(counts) == pytest.approx(replay, rel=0.25) and counts[-1] <= 5 * replay  # short batches


def test_a_full_store_forgets_its_oldest_answers_and_the_last_ones_are_not_given_too_often():
    _, teacher, embeds, states = make_run()
    num_steps, replay = 8 * STORED_BATCHES, 2
    replayed = ReplayedAnswers(answers(teacher, states, embeds), embeds, replay, num_steps)
    born, age, last_fresh = {}, 0, 0
    for step in range(num_steps):
        before, answer = replayed.num_calls, replayed.next()
        key = answer.latents[0].sum().item()
        if replayed.num_calls > before:
            last_fresh = step
        age = max(age, replayed.num_calls - born.setdefault(key, replayed.num_calls))
    assert STORED_BATCHES // 2 < age < STORED_BATCHES
    assert num_steps - 1.1 * STORED_BATCHES < last_fresh < num_steps - STORED_BATCHES


def test_replayed_batches_mix_the_answers_of_several_calls():
    _, teacher, embeds, states = make_run()
    replayed, born = ReplayedAnswers(answers(teacher, states, embeds), embeds, 4, num_steps=250), {}
    mixed = []
    for _ in range(250):
        before, answer = replayed.num_calls, replayed.next()
        keys = [latents.sum().item() for latents in answer.latents]
        if replayed.num_calls > before:
            born |= dict.fromkeys(keys, replayed.num_calls)
        else:
            mixed.append(len({born[key] for key in keys}) / len(keys))
    assert statistics.fmean(mixed) > 0.85


def test_hidden_states_leave_the_store_where_a_longer_run_has_no_room_for_them(monkeypatch):
    _, teacher, embeds, _ = make_run(guidance_scale=1.0)

    def make(num_steps: int) -> ReplayedAnswers:
        return ReplayedAnswers(
            answers(teacher, make_paths(), embeds, hidden_states=HiddenStates((0, 2))), embeds, 2, num_steps
        )

    short, long = make(8), make(800)
    with_states = [bool(short.next().features) for _ in range(8)]
    assert all(with_states), "replayed answers have them too"
    room = short.features.nbytes
    monkeypatch.setattr("wandistiller.targets.replay.MAX_FEATURE_BYTES", 2 * room)
    long.load_state_dict(short.state_dict())
    assert len(long.features) == 0 and long.num_stored == short.num_stored
    assert torch.equal(long.latents[:, : short.num_stored], short.latents)


@pytest.mark.parametrize("replay, num_before", [(1, 7), (3, 0), (3, 4), (3, 60)])  # a store none, empty, filling, full
def test_answers_go_on_from_a_saved_state(replay, num_before):
    _, teacher, embeds, _ = make_run(guidance_scale=1.0)

    def make(seed: int) -> TeacherAnswers | ReplayedAnswers:
        source = answers(teacher, make_paths(seed), embeds, student_rollout=(0.5, 0.5))
        return source if replay == 1 else ReplayedAnswers(source, embeds, replay, 60, seed)

    def step(source) -> tuple:
        answer = source.next()
        seen = answer.latents.clone(), answer.sigma.clone(), answer.prompts, answer.velocity.clone(), source.num_calls
        source.advance(answer, -answer.velocity, 0.0)
        return seen

    check_goes_on_from_a_saved_state(make, step, num_before)


def make_paths(seed: int = 0) -> TrajectoryStates:
    draw = DrawOptions(latent_shape=(16, 4, 4), num_prompts=NUM_PROMPTS, lanes=Lanes(3), shift=3.0, seed=seed)
    return TrajectoryStates(draw, PathOptions(num_steps=4, per_lane=3))


class NotedStates:
    """States that note how they were moved on."""

    def __init__(self, states):
        self.states, self.lanes, self.moves = states, states.lanes, []

    def draw(self) -> StateBatch:
        self.batch = self.states.draw()
        return self.batch

    def advance(self, batch, velocity, student_velocity=None, student_share=0.0) -> None:
        self.moves.append((batch, velocity, student_velocity, student_share))
        self.states.advance(batch, velocity, student_velocity, student_share)


def test_asking_leaves_the_states_where_they_are_until_the_student_has_answered_too():
    _, teacher, embeds, _ = make_run(guidance_scale=1.0)
    states = NotedStates(make_paths())
    source = answers(teacher, states, embeds, student_rollout=(0.2, 0.6))
    for progress, share in ((0.0, 0.2), (0.5, 0.4), (1.0, 0.6)):
        answer = source.next()
        assert answer.states is states.batch and not states.moves
        student_velocity = torch.ones_like(answer.velocity)
        source.advance(answer, student_velocity, progress)
        ((batch, velocity, theirs, found),) = states.moves
        assert batch is answer.states and velocity is answer.velocity and theirs is student_velocity
        assert found == pytest.approx(share)
        states.moves.clear()


def test_replay_moves_the_states_on_once_for_every_call():
    _, teacher, embeds, _ = make_run(guidance_scale=1.0)
    states = NotedStates(make_paths())
    replayed = ReplayedAnswers(answers(teacher, states, embeds), embeds, 3, num_steps=90)
    for _ in range(90):
        answer = replayed.next()
        replayed.advance(answer, answer.velocity, 0.5)
        assert len(states.moves) == replayed.num_calls
    assert replayed.num_calls == 30
