"""The loop does what loops written by hand do: batches, states, loss, optimiser step, signals, and what it reports.

Clipping and AdamW are written out over three steps. A loss, gradient or weight that is not finite must stop the run by
name.

pytest tests/training/test_loop.py
"""

import io
import json
import math
import multiprocessing
import os
import signal
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.runs import PRUNED_CONFIG, read_metrics
from support.states import check_goes_on_from_a_saved_state
from wandistiller import StudentConfig
from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.reports.progress import Progress, format_duration
from wandistiller.sampling.teacher import Teacher
from wandistiller.step_metrics import StepMetrics, Stopwatch, mean_by_expert, mean_by_sigma
from wandistiller.targets.answers import Answer, HiddenStates, TeacherAnswers
from wandistiller.targets.lanes import Lanes
from wandistiller.targets.noise import NoiseStates
from wandistiller.targets.replay import LEAD_BATCHES, STORED_BATCHES, ReplayedAnswers
from wandistiller.targets.state_batch import DrawOptions, StateBatch
from wandistiller.targets.states import StatesOptions, build_states
from wandistiller.targets.trajectories import PathOptions, TrajectoryStates
from wandistiller.training.feature_loss import FeatureLoss
from wandistiller.training.loop import (
    NonFiniteError,
    Observer,
    TrainingOptions,
    TrainingResult,
    check_finite,
    check_weights,
    steps_of_epochs,
    train,
)
from wandistiller.training.objective import Objective
from wandistiller.training.optimizer import OptimizationOptions, WeightAverage, make_lr_scheduler, make_optimizer
from wandistiller.training.stop import StopRequest
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.prompt_embeds import mock_prompt_embeds
from wandistiller.wan.settings import resolve_settings

NUM_PROMPTS = 7
OPTIMIZATION = OptimizationOptions(lr=3e-3, max_grad_norm=0.05, weight_decay=0.1)
OPTIONS = TrainingOptions(batch_size=3, num_steps=3, optimization=OPTIMIZATION, seed=11)
OBJECTIVE = Objective(shift=3.0)


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


class Watching(Observer):
    """Tells a function of every step, and measures with another one."""

    def __init__(self, step: Callable[[StepMetrics], object] = lambda _: None, evaluate: Callable | None = None):
        self.step = step
        self.evaluate = evaluate or (lambda _: None)


def loss_by_hand(student, teacher, embeds, states) -> torch.Tensor:
    """MSE of the two velocities, one sample at a time, with guidance and 1000 sigma written out."""
    batch = states.draw()
    latents, sigma, squares = batch.latents, batch.sigma, []
    for row, index in enumerate(batch.prompts):
        x, timestep, text = latents[row : row + 1], 1000 * sigma[row : row + 1], embeds.read(index)[None]
        expert, negative = teacher.experts["high"], teacher.negative_prompt_embeds[None]
        with torch.no_grad():
            cond = expert(x, timestep, text, torch.tensor([text.shape[1]]))
            uncond = expert(x, timestep, negative, torch.tensor([negative.shape[1]]))
        target = uncond + 3.0 * (cond - uncond)
        squares.append((student(x, timestep, text, torch.tensor([text.shape[1]])) - target).square().mean())
    return torch.stack(squares).mean()


# ---- the length of a run ----


@pytest.mark.parametrize(
    "epochs, prompts, batch, steps", [(1, 55, 2, 28), (1, 55, 55, 1), (3, 55, 54, 6), (2, 1, 8, 2)]
)
def test_an_epoch_is_the_prompts_over_the_batch_rounded_up(epochs, prompts, batch, steps):
    assert steps_of_epochs(epochs, prompts, batch) == steps


# ---- replay ----


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


# ---- learning rate and average ----


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_and_follows_its_schedule(name):
    model = torch.nn.Linear(2, 2)
    options = OptimizationOptions(lr=0.5, lr_scheduler=name, lr_warmup_steps=4)
    optimizer = make_optimizer(model, options, "cpu")
    scheduler = make_lr_scheduler(optimizer, options, 20)
    rates = []
    for _ in range(20):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    after = {
        "constant": lambda part: 1.0,
        "linear": lambda part: 1 - part,
        "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    }[name]
    expected = [0.5 * step / 4 if step < 4 else 0.5 * after((step - 4) / 16) for step in range(20)]
    assert rates == pytest.approx(expected)


def test_the_average_starts_short_and_ends_with_the_memory_asked_for():
    model = torch.nn.Linear(1, 1, bias=False)
    average, expected = WeightAverage(model, 0.9), None
    for n in range(200):
        with torch.no_grad():
            model.weight.fill_(math.sin(n))
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = math.sin(n) if expected is None else decay * expected + (1 - decay) * math.sin(n)
        with average.in_place():
            assert model.weight.item() == pytest.approx(expected, abs=1e-5)
        assert model.weight.item() == pytest.approx(math.sin(n))


def test_a_student_trained_with_an_average_ends_as_that_average():
    student, teacher, embeds, states = make_run()
    seen = []
    plain = OptimizationOptions(lr=1e-2)
    train(
        student,
        answers(teacher, states, embeds),
        OBJECTIVE,
        replace(OPTIONS, optimization=plain),
        Watching(lambda _: seen.append(copy_of(student))),
    )
    averaged, _, _, states = make_run()
    options = replace(OPTIONS, optimization=replace(plain, ema_decay=0.9))
    train(averaged, answers(teacher, states, embeds), OBJECTIVE, options)
    expected = seen[0]
    for n, weights in enumerate(seen[1:], start=1):
        decay = (1 + n) / (10 + n)
        expected = {name: decay * expected[name] + (1 - decay) * weight for name, weight in weights.items()}
    for name, weight in averaged.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)


def copy_of(student) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in student.state_dict().items()}


# ---- the loss and the step ----


def test_the_loss_is_the_squared_error_between_student_and_guided_teacher():
    student, teacher, embeds, states = make_run()
    loss = OBJECTIVE(student, answers(teacher, states, embeds).next())
    again = make_states(student.config, teacher.settings)
    torch.testing.assert_close(loss.total, loss_by_hand(student, teacher, embeds, again), rtol=1e-5, atol=1e-7)


def adamw_by_hand(parameters, gradients, moments, step: int) -> None:
    """One AdamW step (decoupled decay, bias correction) after clipping the whole gradient's norm."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = min(1.0, OPTIMIZATION.max_grad_norm / (float(norm) + 1e-6))
    beta1, beta2 = OPTIMIZATION.betas
    for parameter, gradient, (mean, square) in zip(parameters, gradients, moments, strict=True):
        gradient = gradient * scale
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).add_(gradient**2, alpha=1 - beta2)
        step_size = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + 1e-8)
        parameter.mul_(1 - OPTIMIZATION.lr * OPTIMIZATION.weight_decay).sub_(OPTIMIZATION.lr * step_size)


def test_three_steps_equal_clipping_and_adamw_written_by_hand():
    student, teacher, embeds, states = make_run()
    reported: list[StepMetrics] = []
    result = train(student, answers(teacher, states, embeds), OBJECTIVE, OPTIONS, Watching(reported.append))

    expected, _, _, states = make_run()
    parameters = list(expected.parameters())
    moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters]
    for step in range(1, 4):
        loss = loss_by_hand(expected, teacher, embeds, states)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > OPTIMIZATION.max_grad_norm, "clipping was not tested"
        assert reported[step - 1].grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert result.losses[step - 1] == pytest.approx(loss.item(), rel=1e-4)
        with torch.no_grad():
            adamw_by_hand(parameters, gradients, moments, step)

    start, *_ = make_run()
    for name, parameter in expected.named_parameters():
        moved = parameter - start.get_parameter(name)
        # AdamW divides by tiny second moments, so rounding shows most where the gradient is almost zero:
        error = (student.get_parameter(name) - parameter).norm() / moved.norm()
        assert error < 1e-2, f"{name}: {error:.1e} of its change"
    assert [metrics.step for metrics in reported] == [1, 2, 3]
    assert [metrics.loss for metrics in reported] == result.losses
    assert [metrics.teacher_calls for metrics in reported] == [1, 2, 3]
    assert not result.interrupted and not student.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_products_of_student_and_teacher_are_in_the_compute_dtype(dtype):
    student, teacher, embeds, states = make_run()
    seen: dict[str, torch.dtype] = {}
    for side, model in (("student", student), ("teacher", teacher.experts["high"])):
        linear = model.get_submodule("blocks.0.ffn.net.2")
        linear.register_forward_hook(lambda module, inputs, output, side=side: seen.update({side: output.dtype}))
    objective = replace(OBJECTIVE, compute_dtype=dtype)
    train(student, answers(teacher, states, embeds, dtype), objective, replace(OPTIONS, num_steps=1))
    assert seen == {"student": dtype, "teacher": dtype}


def test_the_teacher_is_not_trained():
    student, teacher, embeds, states = make_run()
    before = {name: tensor.clone() for name, tensor in teacher.experts["high"].state_dict().items()}
    train(student, answers(teacher, states, embeds), OBJECTIVE, OPTIONS)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.experts["high"].state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.experts["high"].parameters())


def test_bf16_steps_stay_close_to_float32_and_weights_stay_float32():
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, embeds, states = make_run()
        options = TrainingOptions(batch_size=3, num_steps=4, optimization=OptimizationOptions(lr=1e-3))
        objective = replace(OBJECTIVE, compute_dtype=dtype)
        losses[dtype] = train(student, answers(teacher, states, embeds, dtype), objective, options).losses
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.03)
    assert losses[torch.bfloat16] != losses[torch.float32], "autocast changed nothing"


# ---- what a step reports ----


def reported_by(answers, num_steps: int = 30, objective: Objective = OBJECTIVE, evaluate=None, **changes) -> list:
    """The metrics of a run."""
    student, *_ = make_run()
    options = replace(OPTIONS, num_steps=num_steps, **changes)
    reported: list[StepMetrics] = []
    train(student, answers, objective, options, Watching(reported.append, evaluate))
    return reported


def test_the_teacher_is_called_once_a_step_and_less_with_replay():
    _, teacher, embeds, states = make_run()
    sizes = []
    teacher.experts["high"].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    reported = reported_by(answers(teacher, states, embeds))
    assert [metrics.teacher_calls for metrics in reported] == list(range(1, 31)) and len(sizes) == 30

    sizes.clear()
    reported = reported_by(ReplayedAnswers(answers(teacher, states, embeds), embeds, 4, num_steps=30))
    calls = [metrics.teacher_calls for metrics in reported]
    assert calls[:5] == [1, 2, 3, 4, 5] and calls[-1] == len(sizes) == 8


class FixedAnswers:
    """The same answer at every step, of a student that is far off at some noise levels."""

    num_calls = 0

    def __init__(self, sigma: torch.Tensor, velocity: torch.Tensor):
        prompts = [0] * len(sigma)
        prompt_embeds, prompt_lengths = make_run()[2].batch(prompts)
        self.answer = Answer(
            latents=torch.zeros_like(velocity),
            sigma=sigma,
            prompts=prompts,
            prompt_embeds=prompt_embeds,
            prompt_lengths=prompt_lengths,
            velocity=velocity,
            weights=torch.ones(len(sigma)),
        )
        self.lanes = Lanes(len(sigma))

    def next(self) -> Answer:
        return self.answer

    def advance(self, answer, student_velocity, progress) -> None:
        self.advanced = student_velocity, progress


def test_losses_are_reported_by_noise_level_and_expert_unweighted():
    sigma = torch.tensor([0.05, 0.07, 0.875, 0.999, 1.0])
    velocity = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])[:, None, None, None].expand(5, 16, 4, 4)
    student, *_ = make_run()
    by_sample = OBJECTIVE(student, FixedAnswers(sigma, velocity).answer).by_sample.tolist()
    objective = replace(OBJECTIVE, sigma_weighting="x0")
    (metrics,) = reported_by(FixedAnswers(sigma, velocity), 1, objective, boundary=0.875)
    expected = [sum(by_sample[:2]) / 2, *[None] * 7, by_sample[2], sum(by_sample[3:]) / 2]
    assert metrics.loss_by_sigma == pytest.approx(expected)
    assert metrics.loss_by_expert == pytest.approx({"high": sum(by_sample[2:]) / 3, "low": sum(by_sample[:2]) / 2})
    assert metrics.loss != pytest.approx(sum(by_sample) / 5)
    (metrics,) = reported_by(FixedAnswers(sigma, velocity), 1)
    assert metrics.loss_by_expert is None


def test_the_students_velocity_and_the_part_that_is_done_reach_the_answers():
    student, *_ = make_run()
    source = FixedAnswers(torch.tensor([0.3]), torch.ones(1, 16, 4, 4))
    before = OBJECTIVE(student, source.answer).student_velocity
    reported_by(source, 1)
    assert torch.equal(source.advanced[0], before) and source.advanced[1] == 0
    reported_by(source, 4)
    assert source.advanced[1] == 0.75 and not source.advanced[0].requires_grad


def test_buckets_of_noise_levels_hold_the_mean_of_theirs():
    means = mean_by_sigma([0.0, 0.0999, 0.1, 0.55, 0.95, 1.0], [1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    assert means == [2.0, 5.0, None, None, None, 7.0, None, None, None, 10.0]
    assert mean_by_sigma([], []) == [None] * 10
    with pytest.raises(ValueError):
        mean_by_sigma([0.5], [1.0, 2.0])


def test_experts_share_the_losses_by_the_boundary_which_is_the_high_ones():
    assert mean_by_expert([0.5, 0.9, 0.875, 0.8749], [1.0, 2.0, 4.0, 3.0], 0.875) == {"high": 3.0, "low": 2.0}
    assert mean_by_expert([0.5], [1.0], 0.875) == {"high": None, "low": 1.0}


@pytest.mark.parametrize("every, due", [(0, []), (1, [*range(1, 8)]), (3, [3, 6, 7]), (7, [7]), (100, [7])])
def test_the_student_is_measured_every_so_many_steps_and_at_the_last(every, due):
    _, teacher, embeds, states = make_run()
    measured = []

    def evaluate(student) -> dict[str, float]:
        measured.append(student)
        return {"teacher_states": float(len(measured))}

    reported = reported_by(answers(teacher, states, embeds), 7, evaluate=evaluate, eval_every=every)
    assert [metrics.step for metrics in reported if metrics.velocity_error is not None] == due
    found = [metrics.velocity_error for metrics in reported if metrics.velocity_error is not None]
    assert found == [{"teacher_states": float(number)} for number in range(1, len(due) + 1)]
    assert len(measured) == len(due)


def test_nothing_is_measured_while_someone_waits_for_the_end():
    student, teacher, embeds, states = make_run()
    calls, measured = [], []

    def interrupt(*_) -> None:
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    teacher.experts["high"].register_forward_pre_hook(interrupt)
    options = replace(OPTIONS, num_steps=6, eval_every=2)
    source = answers(teacher, states, embeds)
    result = train(student, source, OBJECTIVE, options, Watching(evaluate=lambda _: measured.append(len(calls)) or {}))
    assert result.num_steps == 4 and measured == [2]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_what_is_measured_is_what_will_be_saved(decay):
    student, teacher, embeds, states = make_run()
    measured = []
    options = replace(OPTIONS, eval_every=3, optimization=replace(OPTIMIZATION, ema_decay=decay))

    def evaluate(model) -> dict[str, float]:
        measured.append(copy_of(model))
        return {}

    train(student, answers(teacher, states, embeds), OBJECTIVE, options, Watching(evaluate=evaluate))
    (weights,) = measured
    assert all(torch.equal(weights[name], weight) for name, weight in student.state_dict().items())


def test_the_map_of_the_feature_loss_learns_beside_the_student_and_is_no_part_of_it():
    _, teacher, embeds, states = make_run()
    student, *_ = make_run()
    names = list(student.state_dict())
    feature_loss = FeatureLoss(12, teacher.experts["high"].config.hidden_size, 2, has_maps=True)
    before = [parameter.clone() for parameter in feature_loss.parameters()]
    objective = replace(OBJECTIVE, feature_loss=feature_loss, feature_weight=1.0)
    source = answers(teacher, states, embeds, hidden_states=HiddenStates((0, 2)))
    seen: list[StepMetrics] = []
    with_features = train(student, source, objective, OPTIONS, Watching(seen.append)).losses
    assert all(not torch.equal(old, new) for old, new in zip(before, feature_loss.parameters(), strict=True))
    assert list(student.state_dict()) == names

    without, teacher, embeds, states = make_run()
    plain = train(without, answers(teacher, states, embeds), OBJECTIVE, OPTIONS).losses
    # The loss that is shown is that of velocities, whatever is learnt beside it:
    assert with_features[0] == pytest.approx(plain[0], rel=1e-6) and with_features[-1] != plain[-1]
    assert all(metrics.feature_loss > 0 for metrics in seen)


# ---- stopping ----


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_or_gradient_that_is_not_finite_stops_with_step_and_causes(broken):
    sigma = [0.25, 0.75]
    check_finite(4, sigma, 1.0, 2.0, OPTIONS)
    with pytest.raises(NonFiniteError, match=r"^step 4: loss is .*sigma 0\.250 to 0\.750, lr 0\.003.*--lr 0\.0003"):
        check_finite(4, sigma, broken, 2.0, OPTIONS)
    with pytest.raises(NonFiniteError, match=r"^step 4: gradient norm is .*loss 1\).*--dtype fp32"):
        check_finite(4, sigma, 1.0, broken, OPTIONS)
    assert NonFiniteError.exit_code == 1


def test_a_step_that_is_not_finite_is_not_applied():
    student, teacher, embeds, states = make_run()
    with torch.no_grad():
        teacher.experts["high"].proj_out.bias[0] = torch.inf
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(NonFiniteError, match="step 1"):
        train(student, answers(teacher, states, embeds), OBJECTIVE, OPTIONS)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_a_weight_that_is_not_finite_is_named():
    student, *_ = make_run()
    check_weights(student, 3, OPTIONS)
    with torch.no_grad():
        student.proj_out.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"step 3: 1 of the student's weights .* proj_out\.bias"):
        check_weights(student, 3, OPTIONS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_loop_after_the_step_in_hand(number):
    student, teacher, embeds, states = make_run()
    before = signal.getsignal(number)

    def interrupt(metrics: StepMetrics) -> None:
        if metrics.step == 2:
            os.kill(os.getpid(), number)

    options = TrainingOptions(batch_size=3, num_steps=50, optimization=OptimizationOptions(lr=1e-3))
    result = train(student, answers(teacher, states, embeds), OBJECTIVE, options, Watching(interrupt))
    assert result.interrupted and result.num_steps == len(result.losses) == 2
    assert signal.getsignal(number) is before


def signal_twice() -> None:
    with StopRequest().watching() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:  # as in torch.distributed.checkpoint, which makes a failed write of whatever ends one
            os._exit(1)
    os._exit(2)


def test_a_second_signal_ends_the_process_at_once_also_where_exceptions_are_caught():
    process = multiprocessing.get_context("fork").Process(target=signal_twice)
    process.start()
    process.join()
    assert process.exitcode == 130


# ---- reporting ----


def metrics_at(step: int, elapsed_s: float) -> StepMetrics:
    return StepMetrics(step, 0.5 / step, 1.25, 1e-4, 8.0, elapsed_s, 100.0 - elapsed_s)


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal


def kept_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def enter_and_die(file: Path) -> None:
    with Progress(60, file, first_step=30):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_before_the_first_step_after_a_stop_loses_no_metrics(tmp_path):
    with Progress(60, tmp_path / "metrics.jsonl") as progress:
        for step in range(1, 36):  # five beyond the checkpoint
            progress.step(metrics_at(step, float(step)))
    process = multiprocessing.get_context("fork").Process(target=enter_and_die, args=(tmp_path / "metrics.jsonl",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and kept_steps(tmp_path) == list(range(1, 31))


def test_metrics_with_a_hole_and_a_step_twice_keep_what_they_say_of_each_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    with Progress(60, file) as progress:
        for step in (1, 2, 4, 5, 5, 6, 7):
            progress.step(metrics_at(step, float(step)))
    with file.open("a", encoding="utf-8") as broken:
        broken.write('{"step": 8, "lo')
    with Progress(60, file, first_step=5) as progress:
        progress.step(metrics_at(6, 1.0))
    assert kept_steps(tmp_path) == [1, 2, 4, 5, 6]


def test_plain_lines_when_not_a_terminal_and_one_metrics_line_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", screen := Screen(is_terminal=False))
    with Progress(100, tmp_path / "metrics.jsonl", line_every_s=10.0) as progress:
        for step in range(1, 101):
            progress.step(metrics_at(step, elapsed_s=float(step)))
            assert len(read_metrics(tmp_path)) == step  # a killed run keeps what it has measured
    lines = screen.getvalue().splitlines()
    assert [int(line[5:8]) for line in lines] == [*range(1, 101, 10), 100]  # first, every 10 s, last
    assert lines[0] == "step 001/100 (1.0%) | loss 0.5 | grad 1.25 | lr 1.0e-04 | 8.0 samples/s | eta 1m39s"
    assert not {"\r", "\x1b"} & set(screen.getvalue())
    assert read_metrics(tmp_path)[6] == {
        "step": 7, "loss": 0.5 / 7, "grad_norm": 1.25, "lr": 1e-4, "samples_per_s": 8.0, "elapsed_s": 7.0, "eta_s": 93.0,
        "teacher_calls": 0, "loss_by_sigma": [], "loss_by_expert": None, "feature_loss": None, "velocity_error": None, "memory_bytes": None,
        "noise_part": None,
    }  # fmt: skip


def test_a_terminal_gets_a_bar_with_loss_rate_and_remaining_time(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", screen := Screen(is_terminal=True))
    with Progress(3, tmp_path / "metrics.jsonl") as progress:
        for step in (1, 2, 3):
            progress.step(metrics_at(step, float(step)))
    last = screen.getvalue().split("\r")[-1]
    assert "3/3" in last and "loss 0.1667" in last and "samples/s" in last
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_measurement_is_shown_when_it_is_made(tmp_path, monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stderr", screen := Screen(is_terminal))
    errors = {"teacher_states": 0.1234, "student_states": 0.25}
    with Progress(9, tmp_path / "metrics.jsonl") as progress:
        for step in (1, 2, 3):
            progress.step(replace(metrics_at(step, float(step)), velocity_error=errors if step == 2 else None))
    line = "step 2: relative velocity error 0.123 at teacher states, 0.250 at student states"
    assert screen.getvalue().count("relative velocity error") == 1 and line in screen.getvalue()
    assert [metrics["velocity_error"] for metrics in read_metrics(tmp_path)] == [None, errors, None]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_newest_held_out_error_stands_beside_the_loss_also_after_a_stop(tmp_path, monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stderr", screen := Screen(is_terminal))
    measured = {2: {"teacher_states": 0.4321}, 3: {"teacher_states": 0.1234}}
    with Progress(9, tmp_path / "metrics.jsonl", line_every_s=0.0) as progress:
        for step in (1, 2, 3, 4):
            progress.step(replace(metrics_at(step, float(step)), velocity_error=measured.get(step)))
    shown = screen.getvalue()
    assert shown.index("loss 0.5") < shown.index("held-out 0.432") < shown.index("held-out 0.123")
    beside = ", held-out 0.123, " if is_terminal else "| loss 0.125 | held-out 0.123 | grad"
    assert beside in shown
    monkeypatch.setattr("sys.stderr", screen := Screen(is_terminal))
    with Progress(9, tmp_path / "metrics.jsonl", first_step=2) as progress:
        progress.step(metrics_at(3, 1.0))
    assert "held-out 0.432" in screen.getvalue() and "0.123" not in screen.getvalue()


def test_metrics_survive_a_loop_that_fails(tmp_path):
    with pytest.raises(RuntimeError), Progress(9, tmp_path / "metrics.jsonl") as progress:
        progress.step(metrics_at(1, 1.0))
        raise RuntimeError
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_rate_and_remaining_time_count_from_the_first_step_on(monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr("wandistiller.step_metrics.time.perf_counter", lambda: next(clock))
    stopwatch = Stopwatch(num_steps=5)
    assert stopwatch.lap(1, 4) == (0.4, 10.0, 40.0)  # warming up: all there is to go by
    assert stopwatch.lap(2, 4) == (2.0, 12.0, 6.0)
    assert stopwatch.lap(3, 2) == (1.5, 14.0, 4.0)


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (90, "1m30s"), (4000, "1h06m")])
def test_durations_read_as_people_write_them(seconds, text):
    assert format_duration(seconds) == text


def test_the_average_is_over_every_step():
    assert TrainingResult(2, [1.0, 2.0], interrupted=False).average_loss == 1.5
