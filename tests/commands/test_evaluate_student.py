"""The measures against closed forms, and evaluate_student.py end to end.

pytest tests/commands/test_evaluate_student.py
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_student
from support.measures import count_flops
from support.students import train_student, write_teacher
from wandistiller.command_line import run_command
from wandistiller.evaluation import demo_judge, measures
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.reports.tables import equal_steps, finite
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.files import open_wan_files
from wandistiller.wan.settings import resolve_settings

WORLD_PROMPTS = [
    "a small red circle on the left, on a white background",
    "a large blue square on the right, on a black background",
    "a large green ring in the center, on a gray background",
]


def random_latents(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grey(value: float, size: int = 32) -> np.ndarray:
    return np.full((1, size, size, 3), value, np.uint8)


def stripes(frequency: float, amplitude: float, size: int = 64) -> np.ndarray:
    wave = 128 + amplitude * np.cos(2 * math.pi * frequency * np.arange(size))
    return np.broadcast_to(wave.round()[None, None, :, None], (1, size, size, 3)).astype(np.uint8)


# ---- measures ----


def test_sample_plan_pairs_neighbouring_prompts():
    prompts, seeds = measures.sample_plan(num_prompts=5, num_seeds=3, seed=100)
    assert prompts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert seeds[:3] == seeds[3:6] == [100, 101, 102]
    assert seeds[6:9] == seeds[9:12] == [103, 104, 105]
    assert len(set(seeds)) == 9


def test_relative_error_of_a_scaled_velocity():
    velocity = random_latents(3, 4, 5, 5)
    scales = torch.tensor([1.0, 1.25, -1.0])
    errors = measures.relative_errors(velocity * scales[:, None, None, None], velocity)
    torch.testing.assert_close(errors, torch.tensor([0.0, 0.25, 2.0], dtype=torch.float64), atol=1e-6, rtol=1e-6)


def test_buckets_hold_every_state_once():
    sigmas = torch.tensor([0.0, 0.05, 0.1, 0.95, 1.0], dtype=torch.float64)
    rows = measures.bucket_means(sigmas, torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]))
    assert [row["count"] for row in rows] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert [rows[0]["mean"], rows[1]["mean"], rows[2]["mean"], rows[9]["mean"]] == [2.0, 5.0, None, 8.0]
    assert rows[3]["sigma"] == [0.3, 0.4]


def test_endpoint_error_is_0_for_equal_1_for_flat_colour_and_linear_between():
    reference = random_latents(4, 3, 6, 6) + torch.tensor([5.0, -2.0, 0.5])[:, None, None]
    flat = reference.mean(dim=(0, 2, 3), keepdim=True).expand_as(reference)
    assert measures.endpoint_error(reference, reference) == 0
    assert measures.endpoint_error(flat, reference) == pytest.approx(1)
    assert measures.endpoint_error(reference + 0.3 * (flat - reference), reference) == pytest.approx(0.3)


def test_psnr_of_a_constant_offset_and_of_equal_pictures():
    assert measures.psnr(grey(110), grey(100)) == pytest.approx([20 * math.log10(255 / 10)])
    assert measures.psnr(grey(7), grey(7)) == [measures.IDENTICAL_PSNR_DB]


def test_ssim_of_flat_pictures_is_its_luminance_term():
    """Wang et al. 2004, equation 6, with C1 = (0.01 L)^2: all other terms are 1 where nothing varies."""
    c1 = (0.01 * 255) ** 2
    expected = (2 * 60 * 180 + c1) / (60**2 + 180**2 + c1)
    assert measures.ssim(grey(60), grey(180)) == pytest.approx([expected])
    assert measures.ssim(stripes(0.25, 100), stripes(0.25, 100)) == pytest.approx([1.0])


def test_high_frequency_energy_is_that_of_the_fine_wave_alone():
    """A cosine of amplitude A has mean square A^2 / 2, up to its rounding to uint8."""
    assert measures.high_frequency_energy(stripes(0.375, 80)) == pytest.approx(80**2 / 2, rel=0.02)
    assert measures.high_frequency_energy(stripes(0.125, 80)) < 1
    assert measures.high_frequency_energy(grey(200)) == pytest.approx(0, abs=1e-9)


def test_blur_lowers_high_frequency_energy():
    sharp = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    blurred = ((sharp.astype(int) + np.roll(sharp, 1, 1) + np.roll(sharp, 1, 2)) / 3).astype(np.uint8)
    assert measures.high_frequency_energy(blurred) < 0.4 * measures.high_frequency_energy(sharp)


def test_diversity_and_prompt_sensitivity_are_mean_distances():
    latents = torch.zeros(3, 3, 1, 2, 2)  # prompts, seeds, C, H, W
    latents[:, :, 0, 0, 0] = torch.tensor([[0.0, 1.0, 3.0], [10.0, 11.0, 13.0], [0.0, 0.0, 0.0]])
    assert measures.diversity(latents) == pytest.approx((1 + 2 + 3 + 1 + 2 + 3 + 0 + 0 + 0) / 9)
    assert measures.prompt_sensitivity(latents) == pytest.approx(10)  # the third prompt has no partner
    assert measures.diversity(latents[:, :1]) is None
    assert measures.prompt_sensitivity(latents[:1]) is None
    assert measures.ratio(None, 3.0) is None and measures.ratio(1.0, 0.0) is None


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (0.9, (None, 2), "fewer than 2 steps"),
        (0.5, (2, 4), "2 to 4 steps"),
        (0.3, (2, 4), "2 to 4 steps"),
        (0.1, (4, 10), "4 to 10 steps"),
        (0.01, (10, None), "10 steps or more"),
    ],
)
def test_student_is_placed_among_the_teachers_steps(error, expected, words):
    low, high = measures.steps_of_equal_error(error, {2: 0.5, 4: 0.2, 10: 0.05})
    assert (low, high) == expected
    assert equal_steps({"student_equals": {"at_least_steps": low, "fewer_than_steps": high}}) == words


def test_fewer_steps_are_fewer():
    assert measures.fewer_steps(20) == [2, 4, 5, 10]
    assert measures.fewer_steps(4) == [1, 2]
    assert measures.fewer_steps(1) == []


def test_accuracy_counts_every_fact():
    pictures = np.stack([grey(value)[0] for value in (0, 100, 200)])
    share = measures.accuracy(
        pictures, ["a", "b", "c"], lambda image, _: {"dark": image.mean() < 150, "correct": False}
    )
    assert share == {"dark": pytest.approx(2 / 3), "correct": 0.0}


@pytest.mark.parametrize("block", ["wan", "lite"])
def test_flops_of_a_picture_are_those_that_torch_counts(house, block):
    own = {"hidden_size": 24, "depth": 2, "num_heads": 2, "num_channels": 16, "image_size": 64}
    model = WanLiteStudent(StudentConfig(block=block, text_encoder_output_dim=20, **own)).eval()
    latents, prompt = torch.zeros(1, 16, 8, 8), (torch.zeros(1, 3, 20), torch.tensor([3]))
    settings = resolve_settings(open_wan_files(house / "teacher"), guidance_scale=3.0)
    field = Teacher({"high": model}, settings, torch.zeros(7, 20))
    forward, step = measures.picture_flops(field, 8, 3)
    assert forward == pytest.approx(count_flops(lambda: model(latents, torch.tensor([500.0]), *prompt)), rel=0.01)
    assert step == pytest.approx(count_flops(lambda: field.velocity(latents, torch.ones(1), *prompt)), rel=0.01)


def test_timed_calls_take_turns_and_the_first_turn_warms_up(monkeypatch):
    order: list[str] = []
    clock = iter(range(1000))
    monkeypatch.setattr(measures.time, "perf_counter", lambda: next(clock))
    calls = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), next(clock))}
    assert measures.median_seconds(calls, repeats=2) == {"a": 1, "b": 2}
    assert order == ["a", "b"] * 3


def test_json_values_are_finite():
    assert finite({"a": [1.0, math.nan], "b": {"c": math.inf, "d": "nan"}}) == {
        "a": [1.0, None],
        "b": {"c": None, "d": "nan"},
    }


# ---- the command ----


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A teacher of the demo world by its record (its pictures are of nothing), and a student of it."""
    root = tmp_path_factory.mktemp("house")
    write_teacher(root / "teacher", seed=5)
    record = {"world": "shapes", "guidance_scale": 3.0, "num_inference_steps": 6}
    (root / "teacher" / "teacher_record.json").write_text(json.dumps(record), encoding="utf-8")
    (root / "world.txt").write_text("\n".join(WORLD_PROMPTS), encoding="utf-8")
    (root / "other.txt").write_text("a photo of a cat\na cathedral at dusk\n", encoding="utf-8")
    train_student(root / "of", root / "teacher")
    return root


def evaluate(student: Path, prompts_file: Path, output: Path, *flags: str) -> dict:
    argv = ["--student", str(student), "--prompts_file", str(prompts_file), "--output", str(output), "--device", "cpu"]
    assert evaluate_student.main([*argv, "--prompt_cache", str(student.parent / "cache"), *flags]) == 0
    return json.loads((output / "evaluation.json").read_text(encoding="utf-8"))


def test_table_json_and_picture(house, tmp_path, capsys):
    results = evaluate(
        house / "of" / "student", house / "world.txt", tmp_path, "--num_prompts", "3", "--num_seeds", "2"
    )
    printed = capsys.readouterr().out
    assert results["num_inference_steps"] == 6 and results["guidance_scale"] == 3.0
    buckets = results["velocity_error"]["by_sigma"]
    assert sum(bucket["count"] for bucket in buckets) == 3 * 2 * 6
    assert set(results["teacher_at_fewer_steps"]["latent_relative_error"]) == {"1", "2", "3", "4"}
    assert set(results["accuracy"]["student"]) == {*demo_judge.FACTS, "correct"}
    assert results["accuracy"]["num_pictures"] == 6
    cost = results["cost"]
    assert cost["parameters"]["student"] == sum(
        parameter.numel() for parameter in WanLiteStudent.from_pretrained(house / "of" / "student").parameters()
    )
    assert 0 < cost["parameters"]["ratio"] < 1
    assert cost["step_flops"]["student"] == cost["forward_flops"]["student"]
    assert 1 < cost["step_flops"]["teacher"] / cost["forward_flops"]["teacher"] < 3  # guidance: two passes
    for words in (
        "prompt accuracy (6 pictures)",
        "the student equals the teacher at",
        "sigma 0.9 to 1.0",
        "gain: share",
    ):
        assert words in printed
    assert "diversity" in results and "diversity" not in printed  # kept in the file, but it cannot tell shrinkage
    noise = results["noise"]
    assert noise["num_noises"] == 2 and sum(bucket["count"] for bucket in noise["by_sigma"]) == 3 * 2 * 6
    in_quadrature = math.hypot(noise["mean_error"], noise["noise_error"])
    assert noise["mean_error"] == 0 or in_quadrature == pytest.approx(results["endpoint"]["latent_relative_error"])
    assert noise["meaning"][:40] in printed
    image = Image.open(tmp_path / "teacher_vs_student.png")
    assert image.width > 3 * 160 and image.height > 2 * 160
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "teacher_vs_student.png"]


def test_a_student_equal_to_its_teacher_scores_perfectly(house, tmp_path):
    """The teacher's own shape, no guidance and no learning to speak of: every measure must say equal."""
    shape = {"hidden_size": 24, "depth": 3, "num_heads": 2, "ffn_dim": 40}
    flags = ["--guidance_scale", "1", "--lr", "1e-12"]
    student = train_student(tmp_path / "same", house / "teacher", *flags, **shape)
    results = evaluate(
        student, house / "other.txt", tmp_path / "out", "--teacher_path", str(strip_world(house, tmp_path))
    )
    assert "accuracy" not in results
    assert results["velocity_error"]["mean"] < 1e-5
    assert results["endpoint"]["latent_relative_error"] < 1e-4
    assert results["endpoint"]["psnr_db"] > 60 and results["endpoint"]["ssim"] > 0.999
    for name in ("high_frequency_energy", "diversity", "prompt_sensitivity"):
        assert results[name]["ratio"] == pytest.approx(1, abs=1e-3)
        assert results[name]["teacher"] > 0
    for name in ("norm_ratio", "cosine", "gain"):
        assert results["noise"][name] == pytest.approx(1, abs=1e-3)
    assert results["noise"]["noise_error"] < 1e-4
    for name in ("parameters", "forward_flops", "step_flops"):
        assert results["cost"][name]["ratio"] == 1


def strip_world(house: Path, root: Path) -> Path:
    """The same teacher without its record: a world nobody knows."""
    import shutil

    return Path(
        shutil.copytree(house / "teacher", root / "teacher", ignore=shutil.ignore_patterns("teacher_record.json"))
    )


def test_fewer_steps_lead_away_from_the_full_trajectory(house, tmp_path):
    results = evaluate(house / "of" / "student", house / "world.txt", tmp_path, "--num_inference_steps", "16")
    errors = {int(steps): error for steps, error in results["teacher_at_fewer_steps"]["latent_relative_error"].items()}
    assert sorted(errors) == [2, 4, 8]
    assert errors[2] > errors[4] > errors[8] > 0


def test_results_do_not_depend_on_the_batch(house, tmp_path):
    one, many = (
        evaluate(house / "of" / "student", house / "world.txt", tmp_path / size, "--batch_size", size)
        for size in ("1", "16")
    )
    assert one["endpoint"]["latent_relative_error"] == pytest.approx(
        many["endpoint"]["latent_relative_error"], rel=1e-3
    )
    assert one["velocity_error"]["mean"] == pytest.approx(many["velocity_error"]["mean"], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts_file", "{house}/other.txt"], "no object of the demo world in the prompt 'a photo of a cat'"),
        (["--prompts_file", "{house}/none.txt"], "none.txt: cannot be read"),
        (["--student", "{house}/none"], "there is no such folder"),
        (["--teacher_path", "{house}/none"], "there is no such file or folder"),
        (["--vae_path", "{house}"], "holds no VAE"),
    ],
)
def test_mistakes_are_answered_in_one_line(house, tmp_path, capsys, flags, message):
    argv = ["--student", str(house / "of" / "student"), "--prompts_file", str(house / "world.txt")]
    argv += ["--output", str(tmp_path / "out"), *[flag.format(house=house) for flag in flags]]
    assert run_command(lambda: evaluate_student.main(argv)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
