"""The loop does what loops written by hand do: loss, clipping, AdamW, the weights' average, measurements, and stops by a signal.

Three steps are written out with AdamW's formula. A loss, gradient or weight that is not finite must stop the run by name. What the
student learns from are batches made up by the test.
"""

import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from support.lessons import Lessons, Watching, make_batch, make_student
from support.processes import fork
from wandistiller.training.loop import NonFiniteError, TrainingResult, check_finite, steps_of_epochs, train
from wandistiller.training.objective import FeatureLoss, Objective, TrainedStudent
from wandistiller.training.optimizer import OptimizationOptions, learning_rate
from wandistiller.training.state import RunState, TrainingOptions
from wandistiller.training.stop import StopRequest

OPTIMIZATION = OptimizationOptions(lr=3e-3, max_grad_norm=0.05, weight_decay=0.1)
OPTIONS = TrainingOptions(num_steps=3, optimization=OPTIMIZATION)
OBJECTIVE = Objective()


def copy_of(student) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in student.state_dict().items()}


def learn(student, lessons, options=OPTIONS, watching=None, objective: Objective = OBJECTIVE) -> TrainingResult:
    return train(RunState(TrainedStudent(student, objective), lessons, options), watching)


# ---- the length of a run, its learning rate and average ----


@pytest.mark.parametrize(
    "epochs, prompts, batch, steps", [(1, 55, 2, 28), (1, 55, 55, 1), (3, 55, 54, 6), (2, 1, 8, 2)]
)
def test_an_epoch_is_the_prompts_over_the_batch_rounded_up(epochs, prompts, batch, steps):
    assert steps_of_epochs(epochs, prompts, batch) == steps


@pytest.mark.parametrize(
    "name, after",
    [
        ("constant", lambda part: 1.0),
        ("linear", lambda part: 1 - part),
        ("cosine", lambda part: 0.5 * (1 + math.cos(math.pi * part))),
    ],
)
def test_the_learning_rate_rises_and_follows_its_schedule(name, after):
    options = OptimizationOptions(lr=0.5, lr_scheduler=name, lr_warmup_steps=4)
    rates = [learning_rate(step, 20, options) for step in range(20)]
    expected = [0.5 * step / 4 if step < 4 else 0.5 * after((step - 4) / 16) for step in range(20)]
    assert rates == pytest.approx(expected)


def test_a_student_trained_with_an_average_ends_as_that_average():
    student, averaged, seen = make_student(), make_student(), []
    plain = replace(OPTIONS, optimization=OptimizationOptions(lr=1e-2))
    learn(student, Lessons(), plain, Watching(lambda _: seen.append(copy_of(student))))
    learn(averaged, Lessons(), replace(OPTIONS, optimization=replace(plain.optimization, ema_decay=0.9)))
    expected = seen[0]
    for n, weights in enumerate(seen[1:], start=1):
        decay = (1 + n) / (10 + n)
        expected = {name: decay * expected[name] + (1 - decay) * weight for name, weight in weights.items()}
    for name, weight in averaged.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)


# ---- the step ----


def loss_by_hand(student, lessons, step: int) -> torch.Tensor:
    """MSE of the two velocities, one sample and its own text at a time, with 1000 sigma written out."""
    (batch,), squares = lessons.of_step(step - 1), []
    for row, length in enumerate(batch.prompt_lengths.tolist()):
        x, timestep, text = (value[row : row + 1] for value in (batch.latents, 1000 * batch.sigma, batch.prompt_embeds))
        velocity = student(x, timestep, text[:, :length], torch.tensor([length]))
        squares.append((velocity - batch.velocity[row]).square().mean() / batch.velocity[row].square().mean())
    return torch.stack(squares).mean()


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
    student, reported = make_student(), []
    result = learn(student, Lessons(), OPTIONS, Watching(reported.append))

    expected, lessons = make_student(), Lessons()
    parameters = list(expected.parameters())
    moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters]
    for step in range(1, 4):
        loss = loss_by_hand(expected, lessons, step)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert norm > OPTIMIZATION.max_grad_norm, "clipping was not tested"
        assert reported[step - 1].grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert result.losses[step - 1] == pytest.approx(loss.item(), rel=1e-4)
        with torch.no_grad():
            adamw_by_hand(parameters, gradients, moments, step)

    start = make_student()
    for name, parameter in expected.named_parameters():
        moved = parameter - start.get_parameter(name)
        # AdamW divides by tiny second moments, so rounding shows most where the gradient is almost zero:
        error = (student.get_parameter(name) - parameter).norm() / moved.norm()
        assert error < 1e-2, f"{name}: {error:.1e} of its change"
    assert [metrics.step for metrics in reported] == [metrics.teacher_calls for metrics in reported] == [1, 2, 3]
    assert [metrics.loss for metrics in reported] == result.losses
    assert not result.interrupted and not student.training


def test_the_map_of_the_feature_loss_learns_beside_the_student_and_is_no_part_of_it():
    features = tuple(torch.randn(2, 3, 4, 12, generator=torch.Generator().manual_seed(0)))
    student, feature_loss = make_student(), FeatureLoss(12, 2)
    names, before = list(student.state_dict()), [parameter.clone() for parameter in feature_loss.parameters()]
    objective = replace(OBJECTIVE, feature_loss=feature_loss, feature_weight=1.0)
    seen = []
    with_features = learn(student, Lessons(features=features), OPTIONS, Watching(seen.append), objective).losses
    assert all(not torch.equal(old, new) for old, new in zip(before, feature_loss.parameters(), strict=True))
    assert list(student.state_dict()) == names
    plain = learn(make_student(), Lessons()).losses
    # The loss that is shown is that of velocities, whatever is learnt beside it:
    assert with_features[0] == pytest.approx(plain[0], rel=1e-6) and with_features[-1] != plain[-1]
    assert all(metrics.feature_loss > 0 for metrics in seen)


# ---- what a step reports ----


def test_losses_are_reported_by_noise_level():
    sigma = torch.tensor([0.05, 0.07, 0.875, 0.999, 1.0])
    velocity = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])[:, None, None, None].expand(5, 16, 4, 4)
    same = {"size": 5, "sigma": sigma, "velocity": velocity}
    by_sample = OBJECTIVE(make_student(), make_batch(1, **same)).by_sample.tolist()
    reported = []
    learn(make_student(), Lessons(**same), replace(OPTIONS, num_steps=1), Watching(reported.append))
    (metrics,) = reported
    expected = [sum(by_sample[:2]) / 2, *[None] * 7, by_sample[2], sum(by_sample[3:]) / 2]
    assert metrics.loss_by_sigma == pytest.approx(expected) and metrics.stage == 1


@pytest.mark.parametrize("every, due", [(0, []), (3, [3, 6, 7]), (7, [7]), (100, [7])])
def test_the_student_is_measured_every_so_many_steps_and_at_the_last(every, due):
    reported, measured = [], []
    watching = Watching(reported.append, lambda student: measured.append(student) or {"error": float(len(measured))})
    learn(make_student(), Lessons(), replace(OPTIONS, num_steps=7, eval_every=every), watching)
    found = {metrics.step: metrics.held_out for metrics in reported if metrics.held_out is not None}
    assert found == {step: {"error": float(number)} for number, step in enumerate(due, start=1)}
    assert len(measured) == len(due)


def test_what_is_measured_is_what_will_be_saved():
    student, measured = make_student(), []
    options = replace(OPTIONS, eval_every=3, optimization=replace(OPTIMIZATION, ema_decay=0.9))
    learn(student, Lessons(), options, Watching(evaluate=lambda model: measured.append(copy_of(model)) or {}))
    (weights,) = measured
    assert all(torch.equal(weights[name], weight) for name, weight in student.state_dict().items())


# ---- not a number ----


def test_a_loss_or_gradient_that_is_not_finite_stops_with_step_and_causes_and_is_not_applied():
    sigma, broken = [0.25, 0.75], float("inf")
    check_finite(4, sigma, 1.0, 2.0, OPTIONS)
    with pytest.raises(NonFiniteError, match=r"^step 4: loss is .*sigma 0\.250 to 0\.750, lr 0\.003.*--lr 0\.0003"):
        check_finite(4, sigma, broken, 2.0, OPTIONS)
    with pytest.raises(NonFiniteError, match=r"^step 4: gradient norm is .*loss 1\).*--dtype fp32"):
        check_finite(4, sigma, 1.0, broken, OPTIONS)
    student = make_student()
    before = copy_of(student)
    with pytest.raises(NonFiniteError, match="step 1"):
        learn(student, Lessons(broken_at=1))
    assert all(torch.equal(before[name], weight) for name, weight in student.state_dict().items())
    assert NonFiniteError.exit_code == 1


def test_a_weight_that_is_not_finite_is_named():
    student = make_student()

    def break_a_weight(metrics) -> None:
        with torch.no_grad():
            student.proj_out.bias[0] = torch.nan if metrics.step == 3 else 0.0

    with pytest.raises(NonFiniteError, match=r"step 3: 1 of the student's weights, the first is proj_out\.bias"):
        learn(student, Lessons(), OPTIONS, Watching(break_a_weight))


# ---- stopping ----


def test_a_signal_ends_the_loop_after_the_step_in_hand_and_nothing_is_measured_any_more():
    number = signal.SIGTERM
    before, lessons, measured = signal.getsignal(number), Lessons(), []
    give = lessons.of_step

    def interrupt_the_fourth(step: int):
        if step == 3:
            os.kill(os.getpid(), number)
        return give(step)

    lessons.of_step = interrupt_the_fourth
    watching = Watching(evaluate=lambda _: measured.append(lessons.num_calls) or {})
    result = learn(make_student(), lessons, replace(OPTIONS, num_steps=50, eval_every=2), watching)
    assert result.interrupted and result.num_steps == len(result.losses) == 4
    assert measured == [2] and signal.getsignal(number) is before


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
    process = fork(signal_twice)
    process.join()
    assert process.exitcode == 130
