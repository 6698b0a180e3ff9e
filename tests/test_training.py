"""The loop held against loops written by hand: batches, states, loss, optimiser step, signals, and what it reports.

pytest tests/test_training.py
"""

import io
import json
import math
import os
import signal
import statistics
from collections import Counter
from dataclasses import replace
from itertools import chain, islice

import pytest
import torch
from conftest import PRUNED_CONFIG, read_metrics

from projection_mapper import open_teacher, project_experts, project_teacher
from wandistiller import StudentConfig
from wandistiller.answers import REPLAY_BATCHES, ReplayedAnswers, TeacherAnswers
from wandistiller.optimization import OptimizationOptions, make_ema, make_lr_scheduler, make_optimizer
from wandistiller.prompt_embeds import mock_prompt_embeds
from wandistiller.reporting import Progress, StepMetrics, Stopwatch, format_duration
from wandistiller.states import NoiseStates, build_states, prompt_batches
from wandistiller.teacher import Teacher, resolve_settings
from wandistiller.training import (
    NonFiniteError,
    StopRequest,
    TrainingOptions,
    TrainingResult,
    check_finite,
    check_weights,
    distillation_loss,
    steps_of_epochs,
    train,
)

NUM_PROMPTS = 7
OPTIMIZATION = OptimizationOptions(lr=3e-3, max_grad_norm=0.05, weight_decay=0.1)
OPTIONS = TrainingOptions(batch_size=3, num_steps=3, optimization=OPTIMIZATION, seed=11)


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
    return build_states("noise", config, settings, NUM_PROMPTS, 3, sigma_range=(0.1, 0.9), seed=5)


def answers(teacher, states, embeds, dtype: torch.dtype = torch.float32) -> TeacherAnswers:
    return TeacherAnswers(teacher, states, embeds, "cpu", dtype)


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


# ---- batches ----


@pytest.mark.parametrize("num_prompts, batch_size", [(7, 3), (8, 4), (5, 9), (1, 1)])
def test_batches_cover_every_prompt_once_an_epoch_in_an_order_of_its_own(num_prompts, batch_size):
    steps = steps_of_epochs(1, num_prompts, batch_size)
    batches = list(islice(prompt_batches(num_prompts, batch_size, seed=2), 3 * steps))
    epochs = [list(chain(*batches[start : start + steps])) for start in range(0, 3 * steps, steps)]
    assert all(sorted(epoch) == list(range(num_prompts)) for epoch in epochs)
    assert max(map(len, batches)) <= batch_size
    if num_prompts > 4:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_batches_repeat_with_their_seed_alone():
    first, again, other = (list(islice(prompt_batches(20, 4, seed), 9)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "epochs, prompts, batch, steps", [(1, 55, 2, 28), (1, 55, 55, 1), (3, 55, 54, 6), (2, 1, 8, 2)]
)
def test_an_epoch_is_the_prompts_over_the_batch_rounded_up(epochs, prompts, batch, steps):
    assert steps_of_epochs(epochs, prompts, batch) == steps


# ---- replay ----


def test_replay_gives_every_answer_as_often_as_asked_and_unchanged():
    _, teacher, embeds, states = make_run()
    replayed = ReplayedAnswers(answers(teacher, states, embeds), replay=3, batch_size=3)
    fresh, uses, calls = {}, Counter(), []
    for _ in range(1500):
        before = replayed.num_calls
        answer = replayed.next()
        calls.append(len(answer.prompts) * (replayed.num_calls > before))
        for row, prompt in enumerate(answer.prompts):
            key = answer.latents[row].sum().item()
            entry = (answer.sigma[row].item(), prompt, answer.velocity[row].sum().item())
            assert fresh.setdefault(key, entry) == entry
            uses[key] += 1
    assert all(calls[: REPLAY_BATCHES // 2]), "the store is filled first"
    # What is still in the store at the end has uses left; all others had exactly three:
    counts = Counter(uses.values())
    assert max(counts) == 3
    assert sum(counts[n] for n in (1, 2)) <= REPLAY_BATCHES * 3
    assert sum(calls) / sum(uses.values()) == pytest.approx(1 / 3, abs=0.02)


def test_replayed_batches_mix_the_answers_of_several_calls():
    _, teacher, embeds, states = make_run()
    replayed, born = ReplayedAnswers(answers(teacher, states, embeds), replay=4, batch_size=3), {}
    mixed = []
    for _ in range(400):
        before, answer = replayed.num_calls, replayed.next()
        keys = [latents.sum().item() for latents in answer.latents]
        if replayed.num_calls > before:
            born |= dict.fromkeys(keys, replayed.num_calls)
        else:
            mixed.append(len({born[key] for key in keys}))
    assert statistics.fmean(mixed) > 2.5


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
    ema, expected = make_ema(model, 0.9), None
    for n in range(200):
        with torch.no_grad():
            model.weight.fill_(math.sin(n))
        ema.update_parameters(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = math.sin(n) if expected is None else decay * expected + (1 - decay) * math.sin(n)
        assert ema.module.weight.item() == pytest.approx(expected, abs=1e-5)
    assert make_ema(model, 0.0) is None


def test_a_student_trained_with_an_average_ends_as_that_average():
    student, teacher, embeds, states = make_run()
    seen = []
    plain = OptimizationOptions(lr=1e-2)
    train(
        student,
        answers(teacher, states, embeds),
        embeds,
        replace(OPTIONS, optimization=plain),
        lambda _: seen.append(copy_of(student)),
    )
    averaged, _, _, states = make_run()
    options = replace(OPTIONS, optimization=replace(plain, ema_decay=0.9))
    train(averaged, answers(teacher, states, embeds), embeds, options, lambda metrics: None)
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
    loss = distillation_loss(student, answers(teacher, states, embeds).next(), embeds, OPTIONS)
    again = make_states(student.config, teacher.settings)
    torch.testing.assert_close(loss, loss_by_hand(student, teacher, embeds, again), rtol=1e-5, atol=1e-7)


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
    result = train(student, answers(teacher, states, embeds), embeds, OPTIONS, reported.append)

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
    assert not result.interrupted and not student.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_products_of_student_and_teacher_are_in_the_compute_dtype(dtype):
    student, teacher, embeds, states = make_run()
    seen: dict[str, torch.dtype] = {}
    for side, model in (("student", student), ("teacher", teacher.experts["high"])):
        linear = model.get_submodule("blocks.0.ffn.net.2")
        linear.register_forward_hook(lambda module, inputs, output, side=side: seen.update({side: output.dtype}))
    options = TrainingOptions(batch_size=2, num_steps=1, optimization=OptimizationOptions(lr=1e-3), compute_dtype=dtype)
    train(student, answers(teacher, states, embeds, dtype), embeds, options, lambda metrics: None)
    assert seen == {"student": dtype, "teacher": dtype}


def test_the_teacher_is_not_trained():
    student, teacher, embeds, states = make_run()
    before = {name: tensor.clone() for name, tensor in teacher.experts["high"].state_dict().items()}
    train(student, answers(teacher, states, embeds), embeds, OPTIONS, lambda metrics: None)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.experts["high"].state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.experts["high"].parameters())


def test_bf16_steps_stay_close_to_float32_and_weights_stay_float32():
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, embeds, states = make_run()
        options = TrainingOptions(
            batch_size=3, num_steps=4, optimization=OptimizationOptions(lr=1e-3), compute_dtype=dtype
        )
        losses[dtype] = train(
            student, answers(teacher, states, embeds, dtype), embeds, options, lambda metrics: None
        ).losses
        assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.03)
    assert losses[torch.bfloat16] != losses[torch.float32], "autocast changed nothing"


# ---- stopping ----


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_or_gradient_that_is_not_finite_stops_with_step_and_causes(broken):
    sigma = torch.tensor([0.25, 0.75])
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
        train(student, answers(teacher, states, embeds), embeds, OPTIONS, lambda metrics: None)
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
    result = train(student, answers(teacher, states, embeds), embeds, options, interrupt)
    assert result.interrupted and result.num_steps == len(result.losses) == 2
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_process_at_once():
    with StopRequest().watching() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(SystemExit) as ending:
            os.kill(os.getpid(), signal.SIGINT)
    assert ending.value.code == 130


# ---- reporting ----


def metrics_at(step: int, elapsed_s: float) -> StepMetrics:
    return StepMetrics(step, 0.5 / step, 1.25, 1e-4, 8.0, elapsed_s, 100.0 - elapsed_s)


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal


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
    }  # fmt: skip


def test_a_terminal_gets_a_bar_with_loss_rate_and_remaining_time(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", screen := Screen(is_terminal=True))
    with Progress(3, tmp_path / "metrics.jsonl") as progress:
        for step in (1, 2, 3):
            progress.step(metrics_at(step, float(step)))
    last = screen.getvalue().split("\r")[-1]
    assert "3/3" in last and "loss 0.1667" in last and "samples/s" in last
    assert len(read_metrics(tmp_path)) == 3


def test_metrics_survive_a_loop_that_fails(tmp_path):
    with pytest.raises(RuntimeError), Progress(9, tmp_path / "metrics.jsonl") as progress:
        progress.step(metrics_at(1, 1.0))
        raise RuntimeError
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1


def test_rate_and_remaining_time_count_from_the_first_step_on(monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr("wandistiller.reporting.time.perf_counter", lambda: next(clock))
    stopwatch = Stopwatch(num_steps=5)
    assert stopwatch.lap(1, 4) == (0.4, 10.0, 40.0)  # warming up: all there is to go by
    assert stopwatch.lap(2, 4) == (2.0, 12.0, 6.0)
    assert stopwatch.lap(3, 2) == (1.5, 14.0, 4.0)


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (90, "1m30s"), (4000, "1h06m")])
def test_durations_read_as_people_write_them(seconds, text):
    assert format_duration(seconds) == text


def test_the_average_is_over_every_step():
    assert TrainingResult(2, [1.0, 2.0], interrupted=False).average_loss == 1.5
