"""generate_images.py draws what diffusers' own WanPipeline draws, for teacher and student.

The rest are its files, the defaults that a student records, and its refusals.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate_images
import projection_mapper
from support.runs import snapshot
from support.students import PROMPTS, train_student, write_teacher
from support.wan_folders import write_pipeline_folder
from wandistiller.command_line import run_command
from wandistiller.model.config import StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.prompts.templates import is_held_out
from wandistiller.sampling.flow import seeded_noise
from wandistiller.wan.settings import DEFAULT_NEGATIVE_PROMPT


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A teacher of one expert, one of two, and a student of each."""
    root = tmp_path_factory.mktemp("house")
    for name, two_experts in (("one", False), ("two", True)):
        teacher = write_teacher(root / name, two_experts=two_experts, seed=5)
        train_student(root / f"of_{name}", teacher)
    return root


def draw(student: Path, output: Path, *flags: str, prompts: list[str] = PROMPTS) -> list[np.ndarray]:
    """What the command writes, in order."""
    argv = ["--student", str(student), "--output", str(output), "--prompt_cache", str(student.parent / "cache")]
    assert generate_images.main([*argv, "--device", "cpu", "--prompt", *prompts, *flags]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(output.glob("[0-9]*.png"))]


def draw_with_diffusers(
    pipeline, *, guidance_scale: float, steps: int, height: int = 32, width: int = 32, seed: int = 0
):
    """WanPipeline at one frame, prompt by prompt, from the same initial latents."""
    pipeline.set_progress_bar_config(disable=True)
    noise = seeded_noise([seed + index for index in range(len(PROMPTS))], (16, height // 8, width // 8))
    pictures = []
    for prompt, latents in zip(PROMPTS, noise, strict=True):
        frames = pipeline(
            prompt,
            negative_prompt=DEFAULT_NEGATIVE_PROMPT,
            height=height,
            width=width,
            num_frames=1,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=latents[None, :, None],
        ).frames
        pictures.append((frames[0, 0] * 255).round().astype(np.uint8))
    return pictures


def assert_same_pictures(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        assert reference.std() > 10  # a flat picture would agree with anything
        assert np.abs(mine.astype(int) - reference.astype(int)).max() <= 2


# ---- the pictures are WanPipeline's ----


def test_what_the_projection_mapper_writes_is_drawn_as_wan_pipeline_draws(house, tmp_path, run_main):
    from diffusers import WanPipeline

    flags = ["--teacher_path", house / "one", "--output_dir", tmp_path / "projected"]
    assert "--guidance_scale 5" in run_main(projection_mapper.main, *flags).ok().out
    flags = ["--num_inference_steps", "3", "--guidance_scale", "5", "--height", "32", "--width", "32"]
    theirs = draw_with_diffusers(WanPipeline.from_pretrained(house / "one"), guidance_scale=5.0, steps=3)
    assert_same_pictures(draw(tmp_path / "projected", tmp_path / "drawn", *flags), theirs)


def test_a_teacher_of_two_experts_draws_what_wan_pipeline_draws(house, tmp_path):
    """7 steps at shift 3 pass through both sides of the boundary."""
    from diffusers import WanPipeline

    ours = draw(house / "of_two" / "student", tmp_path, "--model", "teacher", "--num_inference_steps", "7")
    pipeline = WanPipeline.from_pretrained(house / "two", dtype=torch.float32)
    assert_same_pictures(ours, draw_with_diffusers(pipeline, guidance_scale=5.0, steps=7))


def test_guidance_steps_seed_and_size_follow_the_flags(house, tmp_path):
    from diffusers import WanPipeline

    flags = ["--guidance-scale", "2.5", "--num-inference-steps", "3", "--seed", "11", "--height", "48", "--width", "64"]
    ours = draw(house / "of_one" / "student", tmp_path, "--model", "teacher", *flags)
    pipeline = WanPipeline.from_pretrained(house / "one", dtype=torch.float32)
    theirs = draw_with_diffusers(pipeline, guidance_scale=2.5, steps=3, height=48, width=64, seed=11)
    assert ours[0].shape == (48, 64, 3)
    assert_same_pictures(ours, theirs)


# ---- defaults, guidance, noise ----


def test_defaults_come_from_the_record(house, tmp_path):
    settings = StudentConfig.load(house / "of_one" / "student").distillation
    draw(house / "of_one" / "student", tmp_path, prompts=["a red circle"])
    image = Image.open(tmp_path / "000_a-red-circle_seed0_32x32.png")
    assert image.size == (32, 32)
    expected = {"prompt": "a red circle", "seed": "0", "model": "student", "guidance_scale": "1.0", "shift": "3.0"}
    expected["num_inference_steps"] = str(settings["num_inference_steps"])
    assert {name: image.text[name] for name in expected} == expected


def test_a_prompt_is_drawn_as_often_as_it_is_asked_for_each_time_from_a_noise_of_its_own(house, tmp_path, run_main):
    """Typed twice, or several times by --num_images; a name tells the seed that draws the picture again."""
    flags = ["--num_inference_steps", 2, "--device", "cpu", "--prompt_cache", house / "cache"]

    def pictures(folder: str, *more: object) -> dict[str, np.ndarray]:
        output = tmp_path / folder
        student = house / "of_one" / "student"
        run_main(generate_images.main, "--student", student, "--output", output, *flags, *more).ok()
        return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted(output.glob("0*.png"))}

    twice = pictures("twice", "--prompt", "a cat", "a dog", "a cat")
    assert [*twice] == [f"{i:03d}_{what}_seed{i}_32x32.png" for i, what in enumerate(["a-cat", "a-dog", "a-cat"])]
    several = pictures("several", "--prompt", "a cat", "a dog", "--num_images", 2, "--seed", 5)
    names = [f"{i:03d}_{what}_seed{i + 5}_32x32.png" for i, what in enumerate(["a-cat", "a-cat", "a-dog", "a-dog"])]
    assert [*several] == names and not np.array_equal(several[names[0]], several[names[1]])
    (again,) = pictures("again", "--prompt", "a cat", "--seed", 6).values()
    assert np.abs(again - several[names[1]]).max() <= 1


def test_guiding_once_more_where_guidance_is_baked_in_is_warned_of(house, tmp_path, capsys):
    student, flags = house / "of_one" / "student", ["--num_inference_steps", "3"]
    plain = draw(student, tmp_path / "plain", *flags)
    assert "Warning" not in capsys.readouterr().out
    forced = draw(student, tmp_path / "forced", *flags, "--guidance_scale", "4")
    assert "Warning: this student learnt its teacher's guided velocity (guidance_scale 5)" in capsys.readouterr().out
    assert not np.array_equal(plain[0], forced[0])


def test_a_picture_depends_on_its_own_seed_and_not_on_the_batch(house, tmp_path):
    student, flags = house / "of_one" / "student", ["--num_inference_steps", "3"]
    prompts = ["a red circle", "a much longer prompt than the first", "a red circle"]
    alone = draw(student, tmp_path / "alone", *flags, "--batch_size", "1", prompts=prompts)
    together = draw(student, tmp_path / "together", *flags, "--batch_size", "3", prompts=prompts)
    later = draw(student, tmp_path / "later", *flags, "--seed", "2", prompts=prompts[2:])
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(alone, together, strict=True)) <= 1
    np.testing.assert_array_equal(alone[2], later[0])
    assert not np.array_equal(alone[0], alone[2])


# ---- what is there, and sizes ----


def test_nothing_is_replaced_without_overwrite(house, tmp_path, capsys):
    student = house / "of_one" / "student"
    argv = ["--student", str(student), "--output", str(tmp_path / "out"), "--prompt", "a cat"]
    argv += ["--prompt_cache", str(student.parent / "cache"), "--num_inference_steps", "1", "--device", "cpu"]
    assert run_command(lambda: generate_images.main(argv)) == 0
    file = tmp_path / "out" / "000_a-cat_seed0_32x32.png"
    file.write_bytes(b"mine")
    before = snapshot(tmp_path)
    assert run_command(lambda: generate_images.main(argv)) == 2
    error = capsys.readouterr().err
    assert f"{file}: is there already; give" in error and "--overwrite" in error
    assert snapshot(tmp_path) == before
    assert run_command(lambda: generate_images.main([*argv, "--overwrite"])) == 0
    assert Image.open(file).size == (32, 32)


def test_a_size_that_the_student_has_not_learnt_is_warned_of(house, tmp_path, capsys):
    flags = ["--num_inference_steps", "1", "--height", "48"]
    draw(house / "of_one" / "student", tmp_path / "a", *flags, "--width", "64")
    said = capsys.readouterr().out
    assert "Warning: this student was trained at 32x32 pixels alone, and is asked for 64 wide and 48" in said
    draw(house / "of_one" / "student", tmp_path / "b", *flags, "--model", "teacher")
    assert "trained at" not in capsys.readouterr().out


# ---- mistakes ----


def changed_record(student: Path, target: Path, **changes) -> Path:
    shutil.copytree(student, target)
    values = json.loads((target / "student_config.json").read_text(encoding="utf-8"))
    values["distillation"] |= changes
    (target / "student_config.json").write_text(json.dumps(values), encoding="utf-8")
    return target


MISTAKES = {
    "no such student": (["--student", "{tmp}/none"], "is not a folder; give the --output_dir"),
    "no prompt": (["--prompts_file", "{tmp}/none.txt"], "none.txt: cannot be read"),
    "odd height": (
        ["--height", "40"],
        "--height 40 is not a multiple of 16 (VAE factor 8 x patch size 2); use 32 or 48",
    ),
    "a picture without end": (
        ["--height", "65536", "--width", "65536"],
        "--height 65536 --width 65536: is 4,294,967,296 pixels; allowed: at most 4,194,304, as of 2048 x 2048",
    ),
    "bytes for a prompt": (["--prompt", "a \udcff"], "--prompt is not UTF-8 text"),
    "control characters": (["--prompt", "a \x1b[2J"], "--prompt holds the control character U+001B"),
    "no VAE": (
        ["--teacher_path", "{tmp}/bare"],
        "has no VAE, no vae/config.json and no file of one beside it; give --vae_path",
    ),
    "another VAE": (["--vae_path", "{tmp}/other/vae"], "is a VAE of 48 channels and factor 16"),
    "a broken VAE": (["--vae_path", "{tmp}/broken"], "is not a whole safetensors"),
    "output is a file": (["--output", "{tmp}/file"], "is a file"),
    "nothing": (["--prompt", " "], "--prompt"),
    "another's teacher": (
        ["--model", "teacher", "--teacher_path", "{tmp}/other"],
        "has num_channels 48, the student 16",
    ),
    "prompts of no file": (["--num_prompts", "3"], "--num_prompts: is for --prompts_file"),
    "a LoRA of the student": (["--teacher_lora", "x.safetensors"], "are for --model teacher"),
    "a teacher of two experts": (
        ["--model", "teacher", "--teacher_path", "{house}/two"],
        "two: has 2 experts; this student's teacher was one expert",
    ),
    "no such device": (["--device", "warp9"], "warp9"),
}


@pytest.fixture(scope="module")
def mistakes(house, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    (root / "file").write_text("")
    (root / "bare").mkdir()
    shutil.copytree(house / "one" / "vae", root / "broken")
    (root / "broken" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    write_pipeline_folder(root / "other", channels=48)
    return root


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_in_one_line(house, mistakes, capsys, name):
    flags, message = MISTAKES[name]
    flags = [flag.format(tmp=mistakes, house=house) for flag in flags]
    argv = ["--student", str(house / "of_one" / "student"), "--prompt", "x", "--output", str(mistakes / "out"), *flags]
    assert run_command(lambda: generate_images.main(argv)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (mistakes / "out").exists()


def test_a_student_of_noise_levels_of_its_own_draws_in_no_more_steps_than_these(house, tmp_path, run_main):
    levels = {"teacher_sampler": "renoise", "teacher_levels": [1000, 757, 522], "num_inference_steps": 3}
    student = changed_record(house / "of_one" / "student", tmp_path / "own", student_steps=None, **levels)
    words = ["--student", student, "--prompt", "x", "--output", tmp_path / "out", "--device", "cpu"]
    run_main(generate_images.main, *words, "--num_inference_steps", 4).refused("there are 3 noise levels")
    out = run_main(generate_images.main, *words, "--num_inference_steps", 2).ok().out
    assert "learnt to draw in 3 steps, not in 2" in out


def test_the_teacher_is_needed_for_nothing_where_its_parts_are_given(house, tmp_path, run_main):
    student = changed_record(house / "of_one" / "student", tmp_path / "gone", teacher_path="/not/here")
    words = ["--student", student, "--prompt", "x", "--output", tmp_path / "out", "--device", "cpu"]
    run_main(generate_images.main, *words, "--vae_path", house / "one", "--text_encoder_path", house / "one").ok()


def test_the_teacher_of_what_the_mapper_cut_of_two_files_is_both(house, tmp_path, run_main):
    parts = ["--teacher_path", house / "two" / "transformer", "--teacher_path_low", house / "two" / "transformer_2"]
    outcome = run_main(projection_mapper.main, *parts, "--expert", "low", "--output_dir", tmp_path / "cut").ok()
    scale = StudentConfig.load(house / "of_two" / "student").distillation["guidance_scale_2"]
    assert f"--guidance_scale {scale:g} draws" in outcome.out
    words = ["--student", tmp_path / "cut", "--model", "teacher", "--prompt", "x", "--device", "cpu"]
    words += ["--vae_path", house / "two", "--text_encoder_path", house / "two", "--num_inference_steps", 2]
    run_main(generate_images.main, *words, "--height", 32, "--width", 32, "--output", tmp_path / "out").ok()
    alone = ["--teacher_path", house / "two" / "transformer", "--output", tmp_path / "alone"]
    run_main(generate_images.main, *words, *alone).refused("has 1 experts; this student's teacher was two")


def test_a_record_that_lacks_something_is_a_mistake(house, tmp_path, run_main):
    student = house / "of_one" / "student"
    cases = {
        "lacks shift": changed_record(student, tmp_path / "a", shift=None),
        "give --teacher_path": changed_record(student, tmp_path / "c", teacher_path="/not/here"),
        'no "distillation" record': tmp_path / "bare",
    }
    WanLiteStudent(StudentConfig.load(student).replace(distillation=None)).save_pretrained(tmp_path / "bare")
    for message, folder in cases.items():
        outcome = run_main(generate_images.main, "--student", folder, "--prompt", "x", "--output", tmp_path / "out")
        assert outcome.code == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_prompts_come_from_tables_and_from_the_held_out_part_of_templates(house, tmp_path, run_main):
    (tmp_path / "p.csv").write_text("words,seed\na red circle,1\n,2\na blue square,3\n", encoding="utf-8")
    (tmp_path / "p.template.txt").write_text(f"a {'{red|blue|green|white|black} ' * 8}circle\n", encoding="utf-8")
    flags = ["--student", house / "of_one" / "student", "--prompt_cache", house / "of_one" / "cache", "--device", "cpu"]

    def drawn(folder: str, *more: object) -> tuple[str, list[str]]:
        output = ["--num_inference_steps", 1, "--output", tmp_path / folder]
        outcome = run_main(generate_images.main, *flags, *output, *more).ok()
        files = sorted((tmp_path / folder).glob("0*.png"))
        return outcome.out, [Image.open(file).text["prompt"] for file in files]

    table = ["--prompts_file", tmp_path / "p.csv", "--caption_column", "words", "--num_prompts", 1]
    out, prompts = drawn("a", *table)
    assert "1 rows left out: 1 whose caption is empty" in out and prompts == ["a red circle"]
    _, prompts = drawn("b", "--prompts_file", tmp_path / "p.template.txt")
    assert len(prompts) == 8 and all(map(is_held_out, prompts))
