"""Exported students in the tools they are for: diffusers' transformer, pipeline and single-file loader, and back as teachers.

pytest tests/test_export.py
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from wan_folders import relative_error

import export_student
import generate_images
import train_distillation
from projection_mapper import project_teacher
from wandistiller import StudentConfig, WanLiteStudent
from wandistiller.comfyui import comfyui_warnings
from wandistiller.command_line import run_command

DEMO_TEACHER = ROOT / "data" / "demo_teacher"
PROMPT = "a red ring on a white background"
FORMATS = ["diffusers", "original", "pipeline"]
# Of a Wan: float32 in every file of the released models too
ISLANDS = re.compile(r"time_embed|time_proj|modulation|scale_shift_table|norm")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A student of the shipped teacher, of half its depth, after one step, with what a run records."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "prompts.txt").write_text(PROMPT, encoding="utf-8")
    argv = [
        "--data_path", folder / "prompts.txt", "--prompt_cache", folder / "cache", "--output_dir", folder / "student",
        "--max_steps", 1, "--batch_size", 1, "--num_samples", 0, "--save_every", 0, "--device", "cpu",
    ]  # fmt: skip
    assert run_command(lambda: train_distillation.main([str(word) for word in argv])) == 0
    return folder


@pytest.fixture(scope="module")
def exports(demo) -> dict[str, Path]:
    """The student in every format, in float32."""
    places = {name: demo / f"as_{name}" for name in FORMATS} | {
        "original": demo / "as_original" / "student.safetensors"
    }
    for name, place in places.items():
        argv = ["--student", str(demo / "student"), "--format", name, "--output", str(place)]
        assert run_command(lambda argv=argv: export_student.main(argv)) == 0
    return places


@pytest.fixture
def export(run_main, demo, tmp_path):
    """Export the demo's student, or another; what a person sees, and where it was to go."""

    def run(export_format: str, *flags: object, student: Path | None = None, output: Path | None = None):
        place = output or tmp_path / "export"
        argv = ["--student", student or demo / "student", "--format", export_format, "--output", place, *flags]
        return run_main(export_student.main, *argv), place

    return run


def inputs_of(config: StudentConfig) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, config.num_channels, 8, 12, generator=generator)
    text = torch.randn(2, 512, config.text_encoder_output_dim, generator=generator)
    return latents, torch.tensor([37.5, 912.25]), text


def velocity_of(transformer, latents, timestep, text) -> torch.Tensor:
    with torch.no_grad():
        return transformer(latents[:, :, None], timestep, text, return_dict=False)[0][:, :, 0]


def copy_of(student: Path, folder: Path, **record) -> Path:
    """A student's folder with another record of its distillation."""
    shutil.copytree(student, folder)
    settings = json.loads((folder / "student_config.json").read_text())
    settings["distillation"] |= record
    (folder / "student_config.json").write_text(json.dumps(settings))
    return folder


# ---- the same model elsewhere ----


@pytest.mark.parametrize("name", FORMATS)
def test_a_student_comes_back_from_every_format_bit_for_bit(demo, exports, name):
    student = WanLiteStudent.from_pretrained(demo / "student")
    back, _ = project_teacher(exports[name], None)
    weights = student.state_dict()
    assert weights.keys() == back.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in back.state_dict().items())


def test_diffusers_answers_as_the_student_does(demo, exports):
    from diffusers import WanTransformer3DModel

    student = WanLiteStudent.from_pretrained(demo / "student")
    latents, timestep, text = inputs_of(student.config)
    with torch.no_grad():
        expected = student(latents, timestep, text)
    folder = WanTransformer3DModel.from_pretrained(exports["diffusers"])
    single = WanTransformer3DModel.from_single_file(str(exports["original"]), config=str(exports["diffusers"]))
    assert relative_error(velocity_of(folder, latents, timestep, text), expected) <= 1e-5
    assert relative_error(velocity_of(single, latents, timestep, text), expected) <= 1e-5


def test_wan_pipeline_draws_what_generate_images_draws(demo, exports, tmp_path):
    from diffusers import WanPipeline

    steps, argv = 4, ["--student", str(demo / "student"), "--prompt", PROMPT, "--output", str(tmp_path / "ours")]
    argv += ["--prompt_cache", str(demo / "cache"), "--num_inference_steps", "4", "--seed", "5", "--device", "cpu"]
    assert run_command(lambda: generate_images.main(argv)) == 0
    ours = np.asarray(Image.open(next((tmp_path / "ours").glob("[0-9]*.png")))).astype(int)

    pipeline = WanPipeline.from_pretrained(exports["pipeline"])
    assert pipeline.text_encoder.dtype == torch.float32  # the teacher's config names bf16
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    settings = {"num_frames": 1, "guidance_scale": 1.0, "num_inference_steps": steps, "height": 64, "width": 64}
    theirs = (pipeline(PROMPT, generator=generator, **settings).frames[0, 0] * 255).round().astype(int)
    assert ours.std() > 5  # a flat picture would agree with anything
    assert np.abs(ours - theirs).max() <= 2


@pytest.mark.parametrize(
    ("name", "dtype"), [("original", "bf16"), ("original", "fp16"), ("original", "fp8"), ("diffusers", "bf16")]
)
def test_a_file_holds_the_precision_asked_for_and_its_islands_in_float32(export, demo, tmp_path, name, dtype):
    outcome, place = export(name, "--dtype", dtype)
    assert outcome.code == 0 and dtype in outcome.out
    (file,) = place.glob("*.safetensors")
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}[dtype]
    found = {key: tensor.dtype for key, tensor in load_file(file).items()}
    islands = {key for key in found if ISLANDS.search(key)}
    assert islands and {found[key] for key in islands} == {torch.float32}
    if dtype == "fp8":
        eight_bits = {key for key, kept in found.items() if kept == wanted}
        linears = r"blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]\.weight|blocks\.\d+\.ffn\.[02]\.weight"
        assert eight_bits == {key for key in found if re.fullmatch(linears, key)}
        wanted = torch.bfloat16
    else:
        eight_bits = set()
    assert {found[key] for key in found.keys() - islands - eight_bits} == {wanted}


def test_diffusers_keeps_the_islands_of_a_bf16_folder(export, demo):
    from diffusers import WanTransformer3DModel

    _, place = export("diffusers", "--dtype", "bf16")
    transformer = WanTransformer3DModel.from_pretrained(place, torch_dtype=torch.bfloat16)
    student = WanLiteStudent.from_pretrained(demo / "student")
    latents, timestep, text = inputs_of(student.config)
    with torch.no_grad():
        expected = student(latents, timestep, text)
    theirs = velocity_of(transformer, latents.bfloat16(), timestep, text.bfloat16()).float()
    assert relative_error(theirs, expected) < 0.03


# ---- a student as a teacher ----


@pytest.mark.parametrize("name", FORMATS)
def test_an_exported_student_is_a_teacher(run_main, demo, exports, tmp_path, name):
    encoder = [] if name == "pipeline" else ["--text_encoder_path", DEMO_TEACHER]
    argv = [
        "--teacher_path", exports[name], *encoder, "--student_config", demo / "student" / "student_config.json",
        "--data_path", demo / "prompts.txt", "--prompt_cache", demo / "cache", "--output_dir", tmp_path / "out",
        "--max_steps", 1, "--batch_size", 1, "--num_samples", 0, "--save_every", 0, "--device", "cpu",
    ]  # fmt: skip
    outcome = run_main(train_distillation.main, *argv)
    assert outcome.code == 0, outcome.err
    assert read_metrics(tmp_path / "out")[0]["loss"] < 1e-9  # of its own shape it starts as its teacher
    assert "guidance_scale 1" in outcome.out  # the guided velocity is what it learnt


# ---- nothing lost, nothing half done ----


def test_a_lite_student_is_told_plainly(export, tmp_path):
    config = StudentConfig(
        block="lite", hidden_size=16, depth=1, num_heads=2, num_channels=4, image_size=64, text_encoder_output_dim=8
    )
    WanLiteStudent(config).save_pretrained(tmp_path / "lite")
    for name in FORMATS:
        outcome, place = export(name, student=tmp_path / "lite")
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and not place.exists()
        assert '"lite"' in outcome.err or "lite" in outcome.err


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_there_is_never_replaced(export, tmp_path, name):
    place = tmp_path / "taken.safetensors" if name == "original" else tmp_path / "taken"
    if name == "original":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "file").write_text("mine")
    outcome, _ = export(name, output=place)
    assert outcome.code == 2 and str(place) in outcome.err
    assert (place if name == "original" else place / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("diffusers", ["--dtype", "fp8"], "--format original"),
        ("pipeline", ["--dtype", "fp8"], "--format original"),
        ("original", ["--link"], "--format pipeline"),
        ("diffusers", ["--vae_path", "x"], "--format pipeline"),
        ("pipeline", ["--teacher_path", "no/such"], "no/such"),
        ("pipeline", ["--vae_path", "no/such"], "no/such"),
        ("pipeline", ["--text_encoder_path", "no/such"], "no/such"),
        ("pipeline", ["--student", "no/such/student"], "no/such/student"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(export, name, flags, said):
    outcome, place = export(name, *flags)
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert said in outcome.err and not place.exists()


def test_the_teacher_may_have_moved(export, demo, tmp_path):
    moved = copy_of(demo / "student", tmp_path / "student", teacher_path=str(tmp_path / "gone"))
    outcome, place = export("pipeline", student=moved)
    assert outcome.code == 2 and "gone" in outcome.err and not place.exists()
    outcome, place = export("pipeline", "--teacher_path", DEMO_TEACHER, "--link", student=moved)
    assert outcome.code == 0 and "torch_dtype=torch.float32" in outcome.out
    assert (place / "vae").is_symlink() and (place / "text_encoder").resolve() == DEMO_TEACHER / "text_encoder"
    assert not (place / "transformer").is_symlink()


def test_a_vae_of_other_latents_is_refused(export, demo, tmp_path):
    other = copy_of(demo / "student", tmp_path / "student", latents_mean=[0.5] * 16)
    outcome, place = export("pipeline", student=other)
    assert outcome.code == 2 and "latents_mean" in outcome.err and not place.exists()


def test_a_student_of_a_part_of_the_noise_levels_is_exported_with_a_warning(export, demo, tmp_path):
    part = copy_of(demo / "student", tmp_path / "student", sigma_range=[0.5, 1.0])
    outcome, _ = export("diffusers", student=part)
    assert outcome.code == 0 and "sigma 0.5 to 1 only" in outcome.out


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_leaves_nothing_behind(export, tmp_path, monkeypatch, name):
    def fail(*_args, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wandistiller.export.save_file", fail)
    outcome, place = export(name)
    assert outcome.code != 0 and "No space left" in outcome.err
    assert not place.exists() or not list(place.iterdir())
    assert not [path for path in tmp_path.iterdir() if path != place]


# ---- what the weights say of themselves ----


@pytest.mark.parametrize("name", FORMATS)
def test_weights_carry_their_config(exports, demo, name):
    places = {
        "original": exports["original"],
        "diffusers": exports["diffusers"] / "diffusion_pytorch_model.safetensors",
    }
    path = places.get(name, exports["pipeline"] / "transformer" / "diffusion_pytorch_model.safetensors")
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["student_config"]
    assert StudentConfig.from_json(text, "metadata") == StudentConfig.load(demo / "student")


def test_weights_alone_are_a_student(demo, tmp_path):
    shutil.copy(demo / "student" / "diffusion_model.safetensors", tmp_path)
    assert WanLiteStudent.from_pretrained(tmp_path).config == StudentConfig.load(demo / "student")


def test_weights_without_a_config_are_no_student(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "diffusion_model.safetensors")
    with pytest.raises(Exception, match=r"student_config\.json"):
        WanLiteStudent.from_pretrained(tmp_path)


def test_a_hub_id_that_cannot_be_had_says_what_works_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(Exception, match=r"somebody/some-student.*student's folder"):
        WanLiteStudent.from_pretrained("somebody/some-student")


# ---- what ComfyUI makes of it ----

READ_RIGHT = StudentConfig(
    block="wan", hidden_size=256, depth=2, num_heads=2, ffn_dim=512, num_channels=16, image_size=64
)


@pytest.mark.parametrize("name", ["student_config.json", "student_config_0.5B.json", "student_config_5B.json"])
def test_comfyui_reads_the_ready_configs_right(name):
    assert comfyui_warnings(StudentConfig.load(ROOT / "config" / name)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"num_heads": 4}, "number of heads"),
        ({"hidden_size": 192, "num_heads": 1}, None),
        ({"hidden_size": 96, "num_heads": 1}, "number of heads"),
        ({"patch_size": 4}, "patch_size"),
        ({"freq_dim": 128}, "freq_dim"),
        ({"eps": 1e-5}, "eps"),
        ({"text_encoder_output_dim": 128}, "text_encoder_output_dim"),
        ({"text_max_length": 64}, "text_max_length"),
        ({"num_channels": 4}, "channels"),
        ({"distillation": {"latents_mean": [0.0] * 16}}, "normalises latents"),
    ],
)  # fmt: skip
def test_shapes_that_comfyui_misreads_are_warned_of(changes, said):
    warnings = comfyui_warnings(replace(READ_RIGHT, **changes))
    assert len(warnings) == (0 if said is None else 1)
    assert said is None or said in warnings[0]


def test_an_original_file_is_told_how_to_draw_with_and_what_is_misread(export):
    outcome, _ = export("original")
    assert outcome.code == 0 and "In ComfyUI: Load Diffusion Model" in outcome.out
    assert "Warning: ComfyUI takes" in outcome.out  # the demo's heads are of 32 channels
