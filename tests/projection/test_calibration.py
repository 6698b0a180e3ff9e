"""Calibrated projection: the fits against directly formed oracles, and a student that starts nearer to its teacher.

pytest tests/projection/test_calibration.py
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import projection_mapper
from support.wan_folders import write_pipeline_folder
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.errors import UserError
from wandistiller.files.safetensors_files import read_header
from wandistiller.model.config import ConfigError
from wandistiller.projection import repair, ridge
from wandistiller.projection.calibrated import Calibration, calibrate, calibrated_student, velocity_error
from wandistiller.projection.calibration import CalibrationOptions, measure_energies, options_for
from wandistiller.projection.calibration_file import load_calibration, save_calibration
from wandistiller.projection.ladder import shapes_of_budget
from wandistiller.projection.project import project_experts, project_teacher
from wandistiller.projection.selection import select
from wandistiller.sampling.flow import sigma_to_timestep
from wandistiller.sampling.teacher import Teacher
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.prompt_embeds import PromptEmbeds, mock_prompt_embeds
from wandistiller.wan.settings import resolve_settings
from wandistiller.wan.wan_files import WanFiles

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "data" / "demo_teacher"
SHAPE = {"heads": 3, "head_dim": 12, "layers": 4, "ffn_dim": 60, "channels": 16, "text_dim": 20}
OPTIONS = CalibrationOptions(num_paths=12, num_held_back=4, num_levels=5, num_texts=12, batch_size=6)


def wan_config(heads: int = 3, depth: int = 4, ffn_dim: int = 60, **changes) -> StudentConfig:
    values = {"block": "wan", "hidden_size": heads * 12, "depth": depth, "num_heads": heads, "ffn_dim": ffn_dim}
    return StudentConfig(**values | {"num_channels": 16, "image_size": 32, "text_encoder_output_dim": 20} | changes)


def random_prompts(text_dim: int, scale: float = 1.0, count: int = 12) -> tuple[PromptEmbeds, Tensor]:
    embeds = mock_prompt_embeds([f"prompt number {number}" for number in range(count + 1)], text_dim)
    return PromptEmbeds(count, text_dim, lambda index: scale * embeds.read(index)), scale * embeds.read(count)


def calibrated_teacher(
    folder: Path, options: CalibrationOptions = OPTIONS, expert: str = "high"
) -> tuple[WanFiles, Teacher, Calibration]:
    """A teacher in a folder, asked with prompts of noise."""
    wan_files = open_teacher(folder, None)
    settings = resolve_settings(wan_files)
    embeds, negative = random_prompts(wan_files.config.text_encoder_output_dim, 10.0)
    teacher = Teacher(project_experts(wan_files, 512), settings, negative)
    return wan_files, teacher, calibrate(teacher, embeds, (16, 4, 4), expert, options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[WanFiles, Teacher, Calibration]:
    folder = tmp_path_factory.mktemp("tiny") / "wan"
    write_pipeline_folder(folder, **SHAPE)
    return calibrated_teacher(folder)


def same_weights(one: WanLiteStudent, other: WanLiteStudent) -> bool:
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


# ---- the fits ----


def random_layer(inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)


def test_without_a_penalty_a_fit_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(3, 40, size, generator=generator) for size in (5, 4))
    fit = ridge.LinearFit(5, 4)
    for part in zip(inputs, targets, strict=True):
        fit.add(*part)
    weight, bias = fit.solve(*random_layer(5, 4, generator), ridge=0.0)
    rows = ridge.with_one(inputs)
    expected = torch.linalg.lstsq(rows, targets.flatten(0, 1).double()).solution.T
    torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), expected.float(), rtol=1e-5, atol=1e-6)


def test_a_penalised_fit_is_least_squares_with_the_prior_as_more_rows():
    generator = torch.Generator().manual_seed(1)
    inputs, targets = (torch.randn(40, size, generator=generator).double() for size in (5, 4))
    prior, bias = random_layer(5, 4, generator)
    fit = ridge.LinearFit(5, 4)
    fit.add(inputs, targets)
    weight, _ = fit.solve(prior, bias, ridge=0.1)
    penalty = 0.1 * inputs.square().sum(dim=0).mean()
    rows = torch.cat([ridge.with_one(inputs), penalty.sqrt() * torch.eye(5, 6, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([targets, penalty.sqrt() * prior.T.double()])).solution.T
    torch.testing.assert_close(weight, expected[:, :5].float(), rtol=1e-5, atol=1e-6)


def test_a_gated_fit_is_least_squares_of_each_output_with_its_gated_inputs():
    generator = torch.Generator().manual_seed(2)
    levels, inputs, outputs = 3, 5, 4
    x = torch.randn(levels, 30, inputs, generator=generator).double()
    targets = torch.randn(levels, 30, outputs, generator=generator).double()
    gates = torch.randn(levels, outputs, generator=generator).double()
    prior, bias = random_layer(inputs, outputs, generator)
    fit = ridge.GatedFit(levels, inputs, outputs)
    for level in range(levels):
        fit.add(level, x[level, :10], targets[level, :10])
        fit.add(level, x[level, 10:], targets[level, 10:])
    weight, fitted_bias = fit.solve(gates, prior, bias, ridge=0.1)
    for row in range(outputs):
        gated = ridge.with_one(x).unflatten(0, (levels, -1)) * gates[:, row, None, None]
        penalty = 0.1 * gated[..., :inputs].square().sum(dim=(0, 1)).mean()
        rows = torch.cat([gated.flatten(0, 1), penalty.sqrt() * torch.eye(inputs, inputs + 1, dtype=torch.float64)])
        right = torch.cat([targets[:, :, row].flatten(), penalty.sqrt() * prior[row].double()])
        expected = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0].float()
        torch.testing.assert_close(torch.cat([weight[row], fitted_bias[row, None]]), expected, rtol=1e-5, atol=1e-6)


def test_outputs_solved_a_few_at_a_time_are_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    fit = ridge.GatedFit(2, 5, 7)
    for level in range(2):
        fit.add(level, torch.randn(20, 5, generator=generator), torch.randn(20, 7, generator=generator))
    inputs = (torch.randn(2, 7, generator=generator), *random_layer(5, 7, generator), 0.01)
    at_once = fit.solve(*inputs)
    monkeypatch.setattr(ridge, "CHUNK_BYTES", 2 * 8 * 6**2)
    torch.testing.assert_close(fit.solve(*inputs), at_once)


@pytest.mark.parametrize("closed", [True, False])
def test_what_nothing_is_known_of_keeps_its_weights(closed):
    """Inputs that are all zero, and outputs whose gate is closed at every noise level."""
    generator = torch.Generator().manual_seed(4)
    prior, bias = random_layer(5, 4, generator)
    if closed:
        fit = ridge.GatedFit(1, 5, 4)
        fit.add(0, torch.randn(20, 5, generator=generator), torch.randn(20, 4, generator=generator))
        weight, kept = fit.solve(torch.zeros(1, 4), prior, bias, 0.01)
        torch.testing.assert_close(kept, bias)
    else:
        fit = ridge.LinearFit(5, 4)
        fit.add(torch.zeros(20, 5), torch.randn(20, 4, generator=generator))
        weight, _ = fit.solve(prior, bias, 0.01)
    torch.testing.assert_close(weight, prior)


# ---- energies and selection ----


def test_a_walk_through_sublayers_is_the_model(tiny):
    """The parts that the refit computes with, put together, are the model's own forward pass."""
    _, teacher, calibration = tiny
    expert, states = teacher.experts["high"], calibration.fitted
    walker = repair.Walker(expert, states, calibration.embeds, "cpu")
    batches = list(states.batches(5))
    with torch.no_grad(), repair.temporary_streams(walker.stream_shape) as (stream,):
        walker.start(stream, batches)
        for block in expert.blocks:
            for sublayer in repair.SUBLAYERS:
                for batch in batches:
                    walker.step(block, sublayer, batch)
        level, paths = batches[4]
        shift, scale = expert.scale_shift_table[0] + walker.temb[level]
        answer = expert.proj_out(repair.modulate(expert.norm_out(walker.at((level, paths))), shift, scale))
        text = calibration.embeds.batch(states.prompts[paths])
        expected = expert(states.latents[level, paths], sigma_to_timestep(states.sigma[level]), *text)
    torch.testing.assert_close(answer, repair.patches(expected, 2), rtol=1e-4, atol=1e-5)


def test_energies_are_the_mean_squares_of_what_layers_read(tiny):
    _, teacher, calibration = tiny
    expert, states, embeds = teacher.experts["high"], calibration.fitted, calibration.embeds
    read: dict[str, list[Tensor]] = {"neurons": [], "attn2": []}
    hooks = [
        expert.blocks[1].ffn.net[2].register_forward_pre_hook(lambda _, x: read["neurons"].append(x[0])),
        expert.blocks[1].attn2.to_out[0].register_forward_pre_hook(lambda _, x: read["attn2"].append(x[0])),
    ]
    with torch.no_grad():
        for level, sigma in enumerate(states.sigma):
            expert(states.latents[level], sigma_to_timestep(sigma), *embeds.batch(states.prompts))
    for hook in hooks:
        hook.remove()
    neurons, attended = (torch.cat(parts).flatten(0, 1).double() for parts in read.values())
    squares = calibration.energies.squares
    torch.testing.assert_close(squares["neurons.1"], neurons.square().mean(dim=0), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(squares["attn2.1"], attended.var(dim=0, correction=0), rtol=1e-3, atol=1e-7)


def test_the_largest_channels_are_kept_in_order(tiny):
    wan_files, _, calibration = tiny
    files = wan_files.experts["high"]
    selection = select(files, wan_config(heads=2, depth=2, ffn_dim=30), None, calibration.energies.score)
    channels = selection.axes["channels"]
    assert torch.equal(channels, calibration.energies.channels.topk(24).indices.sort().values)
    weight = files.read("blocks.3.ffn.net.2.weight")[channels].double()
    expected = calibration.energies.squares["neurons.3"] * weight.square().sum(dim=0)
    assert torch.equal(selection.axes["neurons.3"], expected.topk(30).indices.sort().values)
    assert len(selection.axes["attn1.0"]) == 24 and selection.axes["attn1.0"][0] % 12 == 0


def test_states_held_back_are_of_other_prompts_and_noises(tiny):
    fitted, held_back = tiny[2].fitted, tiny[2].held_back
    assert fitted.latents.shape == (5, 12, 16, 4, 4) and held_back.num_paths == 4
    assert fitted.sigma[0] > 0.99 and (fitted.sigma.diff() < 0).all()
    noises = torch.cat([fitted.latents[0], held_back.latents[0]]).flatten(1)
    assert len({tuple(noise.tolist()) for noise in noises}) == 16


# ---- the student ----


def test_at_the_teachers_own_shape_the_student_is_the_teacher(tiny):
    wan_files, teacher, calibration = tiny
    student, report = calibrated_student(wan_files, teacher, calibration, wan_config())
    assert same_weights(student, teacher.experts["high"])
    assert all(entry["status"] == "exact" for entry in report.student.values())


@pytest.mark.parametrize("config", [wan_config(heads=2, depth=2, ffn_dim=36), wan_config(depth=2), wan_config(heads=2)])
def test_the_same_calibration_gives_the_same_student(tiny, config):
    wan_files, teacher, calibration = tiny
    random_state = torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in teacher.experts["high"].state_dict().items()}
    students = [calibrated_student(wan_files, teacher, calibration, config)[0] for _ in range(2)]
    assert same_weights(*students)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.experts["high"].state_dict().items())
    assert all(tensor.isfinite().all() for tensor in students[0].state_dict().values())
    assert all(parameter.requires_grad for parameter in students[0].parameters())


def test_a_full_width_student_follows_the_teacher_through_the_layers_it_has(tiny):
    """Its first block has nothing to correct, so that the refit leaves its answers as they are."""
    wan_files, teacher, calibration = tiny
    student, report = calibrated_student(wan_files, teacher, calibration, wan_config(depth=2), layers=[0, 1])
    expert = teacher.experts["high"]
    stages = {stage["name"]: stage["residual_error"] for stage in report.calibration["stages"]}
    assert stages["block 0"] < 1e-4 and stages["block 1"] < 1e-4
    torch.testing.assert_close(
        student.blocks[1].ffn.net[0].proj.weight, expert.blocks[1].ffn.net[0].proj.weight, rtol=1e-2, atol=1e-3
    )


def test_the_refitted_demo_student_starts_nearer_to_its_teacher():
    from wandistiller.prompts.prompts import load_prompts
    from wandistiller.sampling.recorded import embed_with_negative

    config = StudentConfig.load(ROOT / "config" / "demo_student_config.json")
    config = config.replace(hidden_size=96, depth=3, num_heads=3, ffn_dim=128)
    wan_files = open_teacher(DEMO, None)
    settings = resolve_settings(wan_files)
    prompts = load_prompts(ROOT / "data" / "demo_prompts.txt").prompts[:60]
    cache = DEMO.parents[1] / "outputs" / "prompt_cache"
    embeds, negative = embed_with_negative(prompts, settings, wan_files.text_encoder(), config, str(cache), "cpu")
    teacher = Teacher(project_experts(wan_files, 512), settings, negative)
    options = CalibrationOptions(num_paths=40, num_held_back=8, num_levels=8, num_texts=60, batch_size=48)
    calibration = calibrate(teacher, embeds, settings.latent_shape(config), "high", options)
    student, report = calibrated_student(wan_files, teacher, calibration, config)
    errors = report.calibration["velocity_error"]
    assert errors["refitted"] < 0.9 * min(errors["norm"], errors["selected"])
    assert errors["refitted"] == velocity_error(student, calibration)
    names = [stage["name"] for stage in report.calibration["stages"]]
    assert names == ["embedders", "block 0", "block 1", "block 2", "head"]
    assert f"{errors['refitted']:.3f}" in report.summary()
    selected, plain = calibrated_student(wan_files, teacher, calibration, config, refit=False)
    assert (
        plain.calibration["velocity_error"]["selected"] == errors["selected"] == velocity_error(selected, calibration)
    )


def test_the_report_says_of_every_tensor_whether_it_is_still_the_teachers(tiny):
    wan_files, teacher, calibration = tiny
    config = wan_config(heads=2, depth=2, ffn_dim=36)
    student, report = calibrated_student(wan_files, teacher, calibration, config)
    selection = select(wan_files.experts["high"], config, None, calibration.energies.score)
    selected, _ = project_teacher(wan_files, config, selection=selection)
    for name, tensor in student.state_dict().items():
        assert (report.student[name]["status"] == "refitted") != torch.equal(tensor, selected.state_dict()[name]), name
    for name in ("patch_embedding.weight", "blocks.0.scale_shift_table"):
        assert report.student[name]["status"] == "selected"
    assert sum(report.num_parameters.values()) == config.num_parameters


@pytest.mark.parametrize("expert", ["high", "low"])
def test_of_two_experts_the_guided_answers_are_of_both_and_one_is_followed(tmp_path, expert):
    write_pipeline_folder(tmp_path, **SHAPE, two_experts=True, boundary_ratio=0.7)
    wan_files, teacher, calibration = calibrated_teacher(tmp_path, expert=expert)
    is_high = teacher.is_high(calibration.fitted.sigma)
    assert is_high.any() and not is_high.all()
    energies = measure_energies(teacher.experts[expert], calibration.fitted, calibration.embeds, OPTIONS)
    assert torch.equal(energies.channels, calibration.energies.channels)
    _, report = calibrated_student(wan_files, teacher, calibration, wan_config(heads=2, depth=2, ffn_dim=36))
    assert report.expert == expert and len(report.calibration["stages"]) == 4
    own, _ = calibrated_student(wan_files, teacher, calibration, wan_config())
    assert same_weights(own, teacher.experts[expert])


@pytest.mark.parametrize(("stored", "dtype"), [("fp8", torch.float32), ("bf16", torch.bfloat16)])
def test_a_teacher_in_less_memory_is_calibrated_on_as_it_is(tiny, stored, dtype):
    wan_files, _, exact = tiny
    embeds, negative = random_prompts(20, 10.0)
    experts = project_experts(wan_files, 512, dtype, fp8=stored == "fp8")
    teacher = Teacher(experts, resolve_settings(wan_files), negative, "cpu")
    calibration = calibrate(teacher, embeds, (16, 4, 4), "high", replace(OPTIONS, compute_dtype=dtype))
    assert not torch.equal(calibration.fitted.velocity, exact.fitted.velocity)
    config = wan_config(heads=2, depth=2, ffn_dim=36)
    student, report = calibrated_student(wan_files, teacher, calibration, config)
    expected = calibrated_student(wan_files, tiny[1], exact, config)[1].calibration["velocity_error"]["refitted"]
    assert report.calibration["velocity_error"]["refitted"] == pytest.approx(expected, rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())


# ---- memory ----


def test_the_sums_of_a_layer_do_not_grow_with_the_states():
    fit = ridge.GatedFit(3, 10, 4)
    size = fit.inputs.numel() + fit.targets.numel()
    for _ in range(50):
        fit.add(1, torch.ones(100, 10), torch.ones(100, 4))
    assert fit.inputs.numel() + fit.targets.numel() == size == 3 * (11 * 11 + 11 * 4)


def test_one_batch_at_a_time_is_read(tiny, monkeypatch):
    """No model is asked for more than a batch of states or prompts."""
    wan_files, teacher, calibration = tiny
    sizes: list[int] = []
    for owner in (repair.Walker, PromptEmbeds):
        name = "at" if owner is repair.Walker else "batch"
        original = getattr(owner, name)

        def watched(*args, original=original):
            result = original(*args)
            sizes.append(len(result[0]) if isinstance(result, tuple) else len(result))
            return result

        monkeypatch.setattr(owner, name, watched)
    small = replace(calibration, options=replace(OPTIONS, batch_size=3))
    calibrated_student(wan_files, teacher, small, wan_config(heads=2, depth=2, ffn_dim=36))
    assert max(sizes) == 3


def test_a_disk_without_room_is_refused_in_words(monkeypatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repair.os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"no room .* TMPDIR"), repair.temporary_streams((2, 2, 2, 2)):
        pass


# ---- another size, and the ladder ----


def test_a_saved_calibration_makes_the_same_student(tiny, tmp_path):
    wan_files, teacher, calibration = tiny
    about, config = {"teacher": "tiny"}, wan_config(heads=2, depth=2, ffn_dim=36)
    save_calibration(tmp_path / "file", calibration, about)
    read = load_calibration(tmp_path / "file", calibration.embeds, about, "high", OPTIONS)
    students = [calibrated_student(wan_files, teacher, given, config)[0] for given in (calibration, read)]
    assert same_weights(*students)


@pytest.mark.parametrize(
    ("about", "options", "said"),
    [
        ({"teacher": "another"}, OPTIONS, "teacher 'tiny', this one has 'another'"),
        ({"teacher": "tiny"}, replace(OPTIONS, seed=1), "seed 0, this one has 1"),
    ],
)
def test_a_calibration_of_something_else_is_refused(tiny, tmp_path, about, options, said):
    calibration = tiny[2]
    save_calibration(tmp_path / "file", calibration, {"teacher": "tiny"})
    with pytest.raises(UserError, match=said):
        load_calibration(tmp_path / "file", calibration.embeds, about, "high", options)


def test_a_damaged_calibration_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_bytes(b"no")
    with pytest.raises(UserError, match="not a whole calibration"):
        load_calibration(tmp_path / "file", tiny[2].embeds, {}, "high", OPTIONS)


@pytest.mark.parametrize("damage", ["lacks a tensor", "not finite", "nested metadata", "a pipe"])
def test_a_calibration_with_damaged_parts_is_refused(tiny, tmp_path, damage):
    path = tmp_path / "file"
    save_calibration(path, tiny[2], {"teacher": "tiny"})
    tensors, metadata = load_file(path), read_header(path).metadata
    if damage == "lacks a tensor":
        del tensors["held_back.sigma"]
    elif damage == "not finite":
        tensors["fitted.velocity"][0] = float("nan")
    elif damage == "nested metadata":
        metadata["calibration"] = "[" * 10_000
    save_file(tensors, path, metadata)
    if damage == "a pipe":
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(UserError, match="not a whole calibration"):
        load_calibration(path, tiny[2].embeds, {"teacher": "tiny"}, "high", OPTIONS)


@pytest.mark.parametrize(("side", "num_paths"), [(8, 96), (16, 48), (64, 48)])
def test_pictures_of_few_tokens_are_calibrated_on_more_paths(side, num_paths):
    assert options_for((16, side, side), 2).num_paths == num_paths
    assert options_for((16, side, side), 2, num_paths=7, seed=3) == CalibrationOptions(num_paths=7, seed=3)


def test_the_shapes_of_a_budget_are_students_of_this_teacher():
    teacher, config = wan_config(heads=6, depth=8, ffn_dim=180), wan_config(heads=3, depth=4, ffn_dim=96)
    shapes = shapes_of_budget(teacher, config, 5)
    assert shapes[0] == config and 2 <= len(shapes) <= 5
    assert len({(shape.depth, shape.num_heads) for shape in shapes}) == len(shapes)
    for shape in shapes:
        assert abs(shape.num_parameters / config.num_parameters - 1) <= 0.03
        assert shape.head_dim == 12 and shape.depth <= 8 and shape.ffn_dim <= 180
    assert shapes_of_budget(teacher, config, 1) == [config]


# ---- the command ----


@pytest.fixture
def command(tmp_path, run_main):
    """projection_mapper.py on a tiny teacher; later flags win."""
    write_pipeline_folder(tmp_path / "wan", **SHAPE)
    (tmp_path / "student.json").write_text(wan_config(heads=2, depth=2, ffn_dim=36).to_json())
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green ring\n")

    def run(*flags: object):
        given = ["--teacher_path", tmp_path / "wan", "--student_config", tmp_path / "student.json"]
        given += ["--prompt_cache", tmp_path / "cache", "--device", "cpu", "--calibration_paths", 4]
        return run_main(projection_mapper.main, *given, *flags)

    return run


def test_the_command_makes_a_calibrated_student_and_another_size_from_its_cache(command, tmp_path):
    flags = ["--selection", "calibrated", "--calibration_prompts", tmp_path / "prompts.txt"]
    flags += ["--calibration_cache", tmp_path / "calibration.safetensors"]
    outcome = command(*flags, "--output_dir", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "velocity error before training" in outcome.out and "Asking the teacher" in outcome.out
    report = json.loads((tmp_path / "out" / "projection_report.json").read_text())
    assert set(report["calibration"]["velocity_error"]) == {"norm", "selected", "refitted"}
    WanLiteStudent.from_pretrained(tmp_path / "out")
    ladder = command(*flags, "--size_ladder", 2)
    assert ladder.code == 0, ladder.err
    assert "Asking the teacher" not in ladder.out and "refitted" in ladder.out
    assert "24" in ladder.out.splitlines()[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--selection", "calibrated"], ["--calibration_prompts"]),
        (["--selection", "calibrated", "--calibration_prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["--calibration_prompts", "prompts.txt"], ["--selection calibrated"]),
        (["--size_ladder", "3"], ["--selection calibrated"]),
        (["--selection", "calibrated", "--calibration_prompts", "prompts.txt", "--size_ladder", "3"], ["--output_dir", "leave"]),
        (["--selection", "energy"], ["--selection", "norm", "calibrated"]),
        (["--selection", "calibrated", "--calibration_prompts", "prompts.txt", "--student_config", "lite.json"], ["lite", "--selection norm"]),
        (["--selection", "calibrated", "--calibration_prompts", "prompts.txt", "--expert", "low"], ["low"]),
        (["--selection", "calibrated", "--calibration_prompts", "prompts.txt", "--layers", "0,9"], ["--layers"]),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_line(command, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    lite = StudentConfig(block="lite", hidden_size=24, depth=2, num_heads=2, num_channels=16, image_size=32, text_encoder_output_dim=20)  # fmt: skip
    Path("lite.json").write_text(lite.to_json())
    outcome = command(*flags, "--output_dir", tmp_path / "out")
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome
    assert all(word in outcome.err for word in words), outcome.err
    assert not (tmp_path / "out").exists()


def test_a_lite_student_is_refused(tiny):
    lite = StudentConfig(block="lite", hidden_size=24, depth=2, num_heads=2, num_channels=16, image_size=32, text_encoder_output_dim=20)  # fmt: skip
    with pytest.raises(ConfigError, match="lite"):
        calibrated_student(*tiny, lite)
