"""export_student.py writes three formats that those they are for can read, and refuses what it cannot export.

safetensors reads names, dtypes and metadata; diffusers reads the transformer, as a folder and as one file (velocities
to 1e-5), and the pipeline, whose picture must be that of generate_images.py to 2 of 255 levels; this trainer must get
the student back bit for bit and distil it again. ComfyUI is no dependency, so no test imports it: its rules are
written down in wandistiller/projection/comfyui.py.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export_student
import generate_images
from support.processes import exit_code, fork, run_and_exit
from support.runs import ROOT, snapshot
from support.students import train_student
from support.wan_folders import inputs, oracle_velocity, random_weights, relative_error, write_pipeline_folder
from support.wan_parts import sentencepiece_model
from wandistiller.evaluation.pair import sampling_of
from wandistiller.model.config import ConfigError, StudentConfig
from wandistiller.model.transformer import WanLiteStudent
from wandistiller.projection.exports import published
from wandistiller.projection.project import project_teacher
from wandistiller.sampling.sampler import StudentField, sample, wan_scheduler
from wandistiller.walk.grids import teacher_levels
from wandistiller.wan.layouts import open_teacher
from wandistiller.wan.settings import resolve_settings
from wandistiller.wan.text_encoder_files import open_tokenizer

DEMO_TEACHER = ROOT / "data" / "demo_teacher"
PROMPT = "a large red circle on a white background"
FORMATS = ["diffusers", "original", "pipeline"]
# A part of the demo teacher: its heads are of 32 channels.
SHAPE = {
    "block": "wan",
    "hidden_size": 64,
    "depth": 2,
    "num_heads": 2,
    "ffn_dim": 96,
    "num_channels": 16,
    "image_size": 64,
}
ONE_STEP = ["--max_steps", "1", "--batch_size", "1", "--num_samples", "0", "--save_every", "0"]
DEMO_PART = StudentConfig(**SHAPE, text_encoder_output_dim=128).to_dict()


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """What train_distillation.py saves after one step with the demo teacher."""
    return train_student(tmp_path_factory.mktemp("demo"), DEMO_TEACHER, *ONE_STEP, **DEMO_PART)


@pytest.fixture(scope="module")
def exports(student) -> dict[str, Path]:
    """The student in each format, fp32; by format, what to give other tools."""
    places = {name: student.parent / name for name in FORMATS}
    for name, place in places.items():
        words = ["--student", str(student), "--format", name, "--output", str(place), "--dtype", "fp32"]
        assert export_student.main(words) == 0
    return places | {"original": places["original"] / "wan_student.safetensors"}


@pytest.fixture
def export(run_main, tmp_path):
    """Run the command, in fp32 where `flags` say nothing else; `output` is relative to the test's folder."""

    def run(student: Path, export_format: str, *flags: object, output: str = "out"):
        words = ["--student", student, "--format", export_format, "--output", tmp_path / output, *flags]
        return run_main(export_student.main, *words, *([] if "--dtype" in flags else ["--dtype", "fp32"]))

    return run


def save_random_student(folder: Path, **changes) -> WanLiteStudent:
    """A student whose every tensor matters, of a shape that no two sizes of are equal."""
    shape = {"block": "wan", "hidden_size": 24, "depth": 3, "num_heads": 2, "ffn_dim": 40, "num_channels": 16}
    shape |= {"image_size": 64, "text_encoder_output_dim": 20, "freq_dim": 32, "eps": 1e-5}
    student = WanLiteStudent(StudentConfig(**shape | changes))
    random_weights(student, seed=3)
    student.save_pretrained(folder)
    return student.eval()


def changed(student: Path, target: Path, config: dict | None = None, **record) -> Path:
    """A copy of a student with other entries in its config and its record."""
    target.mkdir(parents=True)
    shutil.copy(student / "diffusion_model.safetensors", target)
    values = json.loads((student / "student_config.json").read_text(encoding="utf-8")) | (config or {})
    values["distillation"] |= record
    (target / "student_config.json").write_text(json.dumps(values), encoding="utf-8")
    return target


def weights_file(place: Path) -> Path:
    """The transformer's weights in an export of any format."""
    if place.is_file():
        return place
    folder = place / "transformer" if (place / "transformer").is_dir() else place
    return folder / "diffusion_pytorch_model.safetensors"


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


# ---- there and back ----


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_is_the_student_bit_for_bit(student, exports, name):
    saved = WanLiteStudent.from_pretrained(student)
    back, report = project_teacher(exports[name], None)
    assert_same_tensors(back.state_dict(), saved.state_dict())
    assert report.num_parameters["exact"] == sum(weight.numel() for weight in saved.parameters())
    shape = back.config.replace(image_size=saved.config.image_size, distillation=saved.config.distillation)
    assert shape == saved.config


def test_a_student_without_a_record_comes_back_with_its_heads_and_eps(export, tmp_path):
    """No tensor tells the number of heads, nor eps: 2 heads of 12 channels here."""
    saved = save_random_student(tmp_path / "student")
    export(tmp_path / "student", "original", output="out/file.safetensors").ok()
    back, _ = project_teacher(tmp_path / "out" / "file.safetensors", None)
    assert_same_tensors(back.state_dict(), saved.state_dict())
    assert (back.config.num_heads, back.config.eps) == (2, 1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_carry_the_students_config(student, exports, name):
    with safe_open(weights_file(exports[name]), framework="pt") as file:
        text = file.metadata()["student_config"]
    carried, config = StudentConfig.from_json(text), StudentConfig.load(student)
    assert carried.replace(distillation=None) == config.replace(distillation=None)
    ours, theirs = config.distillation, carried.distillation
    assert ours.keys() - theirs.keys() == {"teacher_path", "data_path", "init_from"}
    assert theirs == {key: ours[key] for key in theirs}
    assert not any(str(path) in text for path in (ROOT, student.parent))
    of_hub = published(config.replace(distillation=ours | {"teacher_path": "Wan-AI/W", "base_model": "Wan-AI/W"}))
    assert of_hub.distillation["teacher_path"] == "Wan-AI/W"


# ---- as diffusers reads it ----


@pytest.mark.parametrize("patch_size", [1, 2])
def test_diffusers_answers_as_the_student(export, tmp_path, patch_size):
    from diffusers import WanTransformer3DModel

    saved = save_random_student(tmp_path / "student", patch_size=patch_size)
    for name in ("diffusers", "original"):
        export(tmp_path / "student", name, output=name).ok()
    loaded = {
        "folder": WanTransformer3DModel.from_pretrained(tmp_path / "diffusers"),
        "file": WanTransformer3DModel.from_single_file(
            str(tmp_path / "original" / "wan_student.safetensors"), config=str(tmp_path / "diffusers")
        ),
    }
    with torch.no_grad():
        expected = saved(*inputs())
    for name, model in loaded.items():
        assert relative_error(oracle_velocity(model.eval(), *inputs()), expected) <= 1e-5, name


# ---- precision ----

# Original name -> always float32: written from Wan's own list, by hand.
FP32 = re.compile(
    r"time_embedding\.|time_projection\.|head\.modulation|blocks\.\d+\.(modulation|norm3\.|.*norm_[qk]\.)"
)
FP8_LAYERS = re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.weight")
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8"])
def test_files_hold_the_dtypes_that_are_claimed(export, tmp_path, dtype):
    saved = save_random_student(tmp_path / "student")
    with torch.no_grad():
        saved.blocks[1].ffn.net[2].weight[0, 0] = 1000.0  # past the largest number of fp8
    saved.save_pretrained(tmp_path / "student")
    export(tmp_path / "student", "original", "--dtype", dtype).ok()
    tensors = load_file(tmp_path / "out" / "wan_student.safetensors")
    assert len(tensors) == len(saved.state_dict())
    for name, tensor in tensors.items():
        if FP32.match(name):
            expected = torch.float32
        elif dtype == "fp8":
            expected = torch.float8_e4m3fn if FP8_LAYERS.fullmatch(name) else torch.bfloat16
        else:
            expected = TORCH[dtype]
        assert tensor.dtype == expected, name

    # Each value is the student's, rounded once; fp8 ends at 448 instead of passing into nan:
    back, _ = project_teacher(tmp_path / "out" / "wan_student.safetensors", None)
    assert back.blocks[1].ffn.net[2].weight[0, 0] == (448.0 if dtype == "fp8" else 1000.0)
    exact = saved.state_dict()
    coarsest = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11, "fp8": 2**-4}[dtype]  # half a step of the mantissa
    for name, tensor in back.state_dict().items():
        expected = exact[name].clamp(-448, 448) if dtype == "fp8" else exact[name]
        torch.testing.assert_close(tensor, expected, rtol=coarsest, atol=2**-10 if dtype == "fp8" else 1e-7)


# ---- a whole pipeline ----


def draw(student: Path, output: Path, *flags: str) -> np.ndarray:
    argv = ["--student", str(student), "--output", str(output), "--prompt_cache", str(output / "cache")]
    assert generate_images.main([*argv, "--device", "cpu", "--prompt", PROMPT, *flags]) == 0
    return np.asarray(Image.open(next(output.glob("000_*.png")))).astype(int)


def draw_as_printed(out: str, folder: Path, steps: int | None = None) -> np.ndarray:
    """What the lines under "To draw:" draw, word for word but for the prompt and the steps; their seed is generate_images.py's."""
    code = textwrap.dedent(out.split("To draw:\n")[1])
    code = re.sub('prompt = ".*"', f'prompt = "{PROMPT}"', code)
    if steps:
        code = re.sub(r"num_inference_steps=\d+", f"num_inference_steps={steps}", code)
    with contextlib.chdir(folder):
        exec(code, names := {})
    assert names["pipe"].vae.dtype == torch.float32
    return np.asarray(Image.open(folder / "picture.png")).astype(int)


@pytest.mark.parametrize("kind", ["as the teacher", "few"])
def test_wan_pipeline_draws_what_generate_images_draws(student, export, tmp_path, kind):
    """Also where the student learnt whole steps, which Euler takes, and other text slots than diffusers' usual 512."""
    if kind == "few":
        student = changed(student, tmp_path / "few", {"text_max_length": 64}, student_steps=3)
    outcome = export(student, "pipeline", output="pipeline").ok()
    for steps in (None, *([] if kind == "few" else [8])):  # its own; and others, where it did not learn a number
        flags = ["--num_inference_steps", str(steps)] if steps else []
        ours = draw(student, tmp_path / f"pictures {steps}", *flags)
        theirs = draw_as_printed(outcome.out, tmp_path, steps)
        assert ours.shape == theirs.shape == (64, 64, 3)
        assert ours.std() > 10  # a flat picture would agree with anything
        assert np.abs(ours - theirs).max() <= 2


def test_a_pipeline_is_in_bf16_where_nobody_says_otherwise_and_the_printed_lines_draw_with_it(
    student, run_main, tmp_path
):
    words = ["--student", student, "--format", "pipeline", "--output", tmp_path / "pipeline"]  # without --dtype
    outcome = run_main(export_student.main, *words)
    assert outcome.code == 0 and "Sizes: transformer 0." in outcome.out, outcome.err
    assert (
        load_file(tmp_path / "pipeline" / "text_encoder" / "model.safetensors")["shared.weight"].dtype == torch.bfloat16
    )
    ours, theirs = draw(student, tmp_path / "pictures"), draw_as_printed(outcome.out, tmp_path)
    assert np.abs(ours - theirs).max() <= 64


def test_no_training_prompt_is_published(student, export, tmp_path):
    """The record names the file of the prompts, which may be any file of whoever exports: no line of it is shown."""
    secret = tmp_path / "token"
    secret.write_text("a secret line\n")
    other = changed(student, tmp_path / "of another", world=None, teacher_path=str(DEMO_TEACHER), data_path=str(secret))
    for name, folder in ((student, "of the demo"), (other, "of another teacher")):
        outcome = export(name, "pipeline", output=folder).ok()
        prompt = re.search('prompt = "(.*)"', outcome.out)[1]
        held_out = (ROOT / "data" / "demo_heldout_prompts.txt").read_text(encoding="utf-8").splitlines()
        assert (prompt in held_out) == (name is student)
        for file in (tmp_path / folder).rglob("*.*"):
            assert file.is_dir() or b"a secret line" not in file.read_bytes()


# ---- the card of a folder ----


@pytest.mark.parametrize("record", [{}, {"student_steps": 4}])
def test_a_transformer_brings_the_scheduler_that_it_is_drawn_with(student, export, tmp_path, record):
    outcome = export(changed(student, tmp_path / "own", **record), "diffusers")
    steps = record.get("student_steps", 20)
    assert f"In diffusers: num_inference_steps={steps}, guidance_scale=1.0" in outcome.out
    kind = FlowMatchEulerDiscreteScheduler if record else UniPCMultistepScheduler
    scheduler = kind.from_pretrained(tmp_path / "out", subfolder="scheduler")
    scheduler.set_timesteps(steps)
    expected = wan_scheduler(3.0, steps, "euler" if record else "unipc").sigmas
    assert torch.allclose(scheduler.sigmas, expected, atol=1e-4)
    assert "The transformer and its `scheduler/`" in (tmp_path / "out" / "README.md").read_text()


def test_where_no_scheduler_has_its_noise_levels_card_and_command_say_them(student, export, tmp_path):
    levels = {"teacher_sampler": "renoise", "teacher_levels": [1000, 757, 522], "num_inference_steps": 3}
    own = changed(student, tmp_path / "own", student_steps=None, **levels)
    export(own, "diffusers").ok()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 1000 sigma of the steps | 1000, 757, 522 |" in card and "The transformer alone" in card
    assert "lcm, the sigmas 1, 0.757, 0.522, 0" in export(own, "original", output="a.safetensors").ok().out
    export(own, "original", "--workflow", output="b.safetensors").refused("KSampler has other noise levels")


def test_a_folder_has_a_model_card(student, export, tmp_path):
    outcome = export(student, "pipeline")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.data.license == "apache-2.0" and card.data.base_model is None  # of the demo teacher
    assert "| shift | 3.0 |" in card.text and "| sampling steps | 20 |" in card.text and "| guidance | 1.0" in card.text
    assert str(ROOT) not in card.content and str(tmp_path) not in card.content
    printed = textwrap.dedent(outcome.out.split("To draw:\n")[1]).strip()
    assert printed.replace(str(tmp_path / "out"), "path/to/this/folder") in card.text


def test_nothing_of_a_strangers_folder_is_copied_but_the_numbers_and_words_of_its_parts(student, export, tmp_path):
    """Neither links nor code nor keys: the parts are written from what was read, and are those of the teacher bit for bit."""
    stranger, tokenizer = shutil.copytree(DEMO_TEACHER, tmp_path / "teacher"), tmp_path / "teacher" / "tokenizer"
    for name in ("text_encoder/pytorch_model.bin", "tokenizer/code.py", "vae/notes.txt", "tokenizer/.hidden"):
        (stranger / name).write_bytes(b"a stranger's")
    for name, target in (("private.txt", ROOT / "LICENSE"), ("dangling.json", "nowhere"), ("x", "."), ("y", ".")):
        (tokenizer / name).symlink_to(target)
    os.mkfifo(tokenizer / "special_tokens_map.json")
    rewrite(tokenizer / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Run", None]})
    rewrite(stranger / "text_encoder" / "config.json", transformers_weights="../../elsewhere.bin")
    rewrite(stranger / "model_index.json", tokenizer=["os", "system"])
    export(student, "pipeline", "--teacher_path", stranger).ok()
    shutil.rmtree(stranger)
    weights = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}
    known = {
        "vae": ["config.json"],
        "text_encoder": ["config.json"],
        "tokenizer": ["tokenizer.json", "tokenizer_config.json"],
    }
    for name, files in known.items():
        names = {*files, weights[name]} if name in weights else set(files)
        assert {file.name for file in (tmp_path / "out" / name).iterdir()} == names
    for name, file in weights.items():
        ours, theirs = (load_file(root / name / file) for root in (tmp_path / "out", DEMO_TEACHER))
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], tensor.to(ours[key])) for key, tensor in theirs.items()
        )
    words = "tokenizer/tokenizer.json"
    assert (tmp_path / "out" / words).read_bytes() == (DEMO_TEACHER / words).read_bytes()
    written = "".join(file.read_text() for file in (tmp_path / "out").rglob("*.json"))
    assert "code.Run" not in written and "elsewhere" not in written and '"os"' not in written


def test_a_tokenizer_that_leads_to_another_file_is_refused_and_not_published(student, export, tmp_path):
    stranger = shutil.copytree(DEMO_TEACHER, tmp_path / "teacher")
    (stranger / "tokenizer" / "tokenizer.json").unlink()
    (stranger / "tokenizer" / "tokenizer.json").symlink_to(ROOT / "LICENSE")
    export(student, "pipeline", "--teacher_path", stranger).refused("the tokenizer cannot be loaded")
    assert not (tmp_path / "out").exists()


def test_files_of_comfyui_become_the_folders_of_a_pipeline(student, export, tmp_path):
    """A sentencepiece tokenizer inside an encoder in one file; the pipeline draws what it drew with these."""
    from transformers import T5TokenizerFast, UMT5EncoderModel

    words = sentencepiece_model()
    tensors = load_file(DEMO_TEACHER / "text_encoder" / "model.safetensors")
    save_file(
        tensors | {"spiece_model": torch.frombuffer(bytearray(words), dtype=torch.uint8)}, tmp_path / "umt5.safetensors"
    )
    flags = ["--text_encoder_path", tmp_path / "umt5.safetensors"]
    export(student, "pipeline", *flags).ok()
    tokenizer = T5TokenizerFast.from_pretrained(tmp_path / "out" / "tokenizer")
    assert tokenizer(PROMPT).input_ids == open_tokenizer(tmp_path / "umt5.safetensors")([PROMPT])[0]
    encoder = UMT5EncoderModel.from_pretrained(tmp_path / "out" / "text_encoder")
    assert all(torch.equal(encoder.state_dict()[name], tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["original", "pipeline"])
def test_what_comes_to_the_output_meanwhile_is_kept(student, tmp_path, name):
    """A second export ends while this one writes: at its first rename, as Python's audit hooks see it."""
    target, log = tmp_path / ("out.safetensors" if name == "original" else "out"), student.parent / f"{name}.txt"
    place = target if target.suffix else target / "another"

    def meanwhile(event: str, arguments: tuple) -> None:
        if event == "os.rename" and not target.exists():
            place.parent.mkdir(exist_ok=True)
            place.write_text("another")

    def export() -> int:
        sys.addaudithook(meanwhile)
        return exit_code(export_student.main, ["--student", student, "--format", name, "--output", target])

    process = fork(run_and_exit, export, os.open(os.devnull, os.O_WRONLY), os.open(log, os.O_CREAT | os.O_WRONLY))
    process.join()
    said = log.read_text()
    assert process.exitcode == 2 and str(target) in said and said.count("\n") == 1, said
    assert place.read_text() == "another" and [path.name for path in tmp_path.iterdir()] == [target.name]


# ---- students as teachers ----


def test_a_student_is_distilled_from_an_exported_student(exports, tmp_path):
    smaller = DEMO_PART | {"hidden_size": 32, "num_heads": 1}
    grandchild = train_student(tmp_path, exports["pipeline"], *ONE_STEP, **smaller)
    record = StudentConfig.load(grandchild).distillation
    assert (record["guidance_scale"], record["shift"], record["num_train_steps"]) == (1.0, 3.0, 1)
    assert draw(grandchild, tmp_path / "pictures").shape == (64, 64, 3)


# ---- refusals: one sentence, and nothing written ----


def assert_refused(outcome, message: str, folder: Path, before: dict) -> None:
    outcome.refused(message)
    assert snapshot(folder) == before and not (folder / "out").exists()


def test_a_lite_student_is_no_wan(student, export, tmp_path):
    record = StudentConfig.load(student).distillation
    shape = {"block": "lite", "hidden_size": 16, "depth": 1, "num_heads": 2, "num_channels": 16, "image_size": 64}
    WanLiteStudent(StudentConfig(**shape, distillation=record)).save_pretrained(tmp_path / "lite")
    before = snapshot(tmp_path)
    assert_refused(export(tmp_path / "lite", "pipeline"), 'block "lite" is no Wan', tmp_path, before)


MISTAKES = {
    "fp8 for diffusers": ("diffusers", ["--dtype", "fp8"], "--format diffusers has fp32, bf16, fp16; give"),
    "a part of a transformer": ("diffusers", ["--vae_path", "x"], "--vae_path belongs to --format pipeline"),
    "no such student": ("original", ["--student", "{tmp}/none"], "is not a folder; give the --output_dir"),
    "a student of the mock": ("pipeline", ["--student", "{tmp}/mock", "--vae_path", DEMO_TEACHER], "stand-in"),
    "the recorded teacher is gone": ("pipeline", ["--student", "{tmp}/moved"], "is not there; give --teacher_path"),
    "another encoder": ("pipeline", ["--text_encoder_path", "{tmp}/other"], "gives embeddings of width 20"),
    "a VAE of other latents": ("pipeline", ["--vae_path", "{tmp}/other_latents"], "has other latents_mean than"),
    "a pickle": (
        "original",
        ["--output", "{tmp}/o.bin"],
        "--format original writes no .bin file; give a new folder or",
    ),
    "a file for a folder": (
        "diffusers",
        ["--output", "{tmp}/tr.safetensors"],
        "writes no .safetensors file; give a new",
    ),
    "a workflow of a folder": ("diffusers", ["--workflow"], "--workflow is for --format original"),
}


@pytest.fixture(scope="module")
def mistakes(student, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    changed(student, root / "mock", teacher_path="mock", text_encoder_path=None)
    changed(student, root / "moved", teacher_path="/not/here")
    shutil.copytree(DEMO_TEACHER / "vae", root / "other_latents")
    settings = json.loads((root / "other_latents" / "config.json").read_text(encoding="utf-8"))
    settings["latents_mean"][3] += 0.01
    (root / "other_latents" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    write_pipeline_folder(root / "other", channels=48)
    return root


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_answered_in_one_line(student, mistakes, run_main, name):
    export_format, flags, message = MISTAKES[name]
    flags = [str(flag).format(tmp=mistakes) for flag in flags]
    before = snapshot(mistakes)
    required = ["--student", student, "--format", export_format, "--output", mistakes / "out"]
    assert_refused(run_main(export_student.main, *required, *flags), message, mistakes, before)


def test_a_record_that_cannot_be_is_refused_before_anything_is_written(student, export, tmp_path):
    """tests/students/test_record.py has the entries one by one."""
    wrong = changed(student, tmp_path / "wrong", sigma_range="x" * 10_000)
    for export_format in ("pipeline", "original"):
        outcome = export(wrong, export_format, output="new/out").refused("sigma_range is 'xxx")
        assert len(outcome.err) < 500 + len(str(tmp_path)) and not (tmp_path / "new").exists()


def test_weights_that_no_student_has_are_refused(student, export, tmp_path):
    wrong = changed(student, tmp_path / "wrong")
    tensors, name = load_file(wrong / "diffusion_model.safetensors"), "blocks.0.attn1.to_q.weight"
    save_file(tensors | {name: tensors[name].to(torch.uint8)}, wrong / "diffusion_model.safetensors")
    export(wrong, "diffusers").refused(f"{name} is stored as U8; allowed: fp32")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["original", "pipeline"])
def test_what_is_there_is_never_replaced(student, export, tmp_path, name):
    export(student, name).ok()
    before = snapshot(tmp_path)
    export(student, name, "--dtype", "bf16").refused(" already; give a")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("end, code", [("Ctrl-C", 130), ("a full disk", 1)])
@pytest.mark.parametrize("name", ["original", "pipeline"])
def test_an_export_that_ends_early_leaves_nothing(student, export, tmp_path, monkeypatch, name, end, code):
    def half(tensors, file, **settings):
        Path(file).write_bytes(b"half of a file")
        if end == "a full disk":
            raise OSError("no space left on device")
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("safetensors.torch.save_file", half)
    assert export(student, name, output="new/out").code == code
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name, output", [("diffusers", "out"), ("original", "out.safetensors")])
def test_what_a_killed_export_left_is_removed(student, export, tmp_path, name, output):
    (tmp_path / f".{output}.0123abcd.tmp").mkdir()
    (tmp_path / f".{output}.0123abcd.tmp" / "half").write_text("")
    (tmp_path / f".{output}.4567abcd.tmp").write_text("")
    (tmp_path / f".{output}.mine.tmp").write_text("")
    export(student, name, output=output).ok()
    assert {path.name for path in tmp_path.iterdir()} == {output, f".{output}.mine.tmp"}


# ---- what ComfyUI makes of it ----


def test_the_file_tells_comfyui_what_no_tensor_tells(export, tmp_path):
    save_random_student(tmp_path / "student", patch_size=1)
    export(tmp_path / "student", "original", output="a.safetensors").ok()
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        told = json.loads(file.metadata()["config"])["transformer"]
    assert told == {
        "num_heads": 2, "text_dim": 20, "freq_dim": 32, "eps": 1e-5, "patch_size": [1, 1, 1], "out_dim": 16,
    }  # fmt: skip


def test_a_workflow_beside_the_file_has_the_students_own_settings(export, student, tmp_path):
    few = changed(student, tmp_path / "few", student_steps=3)
    outcome = export(few, "original", "--workflow", output="a.safetensors")
    assert outcome.code == 0, outcome.err
    nodes = {
        node["type"]: node["widgets_values"] for node in json.loads((tmp_path / "a.workflow.json").read_text())["nodes"]
    }
    assert nodes["UNETLoader"][0] == "a.safetensors" and nodes["ModelSamplingSD3"] == [3.0]
    assert nodes["KSampler"][2:6] == [3, 1.0, "euler", "simple"]
    assert nodes["EmptyHunyuanLatentVideo"][:3] == [64, 64, 1]
    before = snapshot(tmp_path)
    outcome = export(few, "original", "--workflow", output="a.safetensors")
    assert_refused(outcome, "is there already", tmp_path, before)


def drawn_in_comfyui(workflow: dict, model, noise: torch.Tensor, text: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Latents of a workflow by ComfyUI's rules, with diffusers' 3D transformer of the exported file in place of its own.

    comfy/model_sampling.py:ModelSamplingDiscreteFlow, comfy/samplers.py:simple_scheduler, comfy/k_diffusion/sampling.py:sample_euler.
    """
    nodes = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    _, _, steps, cfg, sampler, scheduler, denoise = nodes["KSampler"]
    assert (cfg, sampler, scheduler, denoise) == (1.0, "euler", "simple", 1.0)
    (shift,), u = nodes["ModelSamplingSD3"], torch.arange(1, 1001) / 1000
    table = shift * u / (1 + (shift - 1) * u)
    sigmas = [*(float(table[-(1 + int(step * (1000 / steps)))]) for step in range(steps)), 0.0]
    latents = noise
    for sigma, following in itertools.pairwise(sigmas):
        with torch.no_grad():
            velocity = oracle_velocity(model, latents, torch.full((len(noise),), 1000 * sigma), *text)
        latents = latents + (following - sigma) * velocity
    return latents


def test_a_student_of_few_steps_is_a_teacher_that_is_asked_at_its_own_levels_alone(student, export, tmp_path):
    few = changed(student, tmp_path / "few", student_steps=3)
    export(few, "pipeline", output="pipeline").ok()
    settings = resolve_settings(open_teacher(str(tmp_path / "pipeline"), StudentConfig.load(few)))
    u, shift = torch.tensor([1, 2 / 3, 1 / 3, 0]), settings.shift
    assert settings.has_few_levels
    assert teacher_levels(settings) == pytest.approx((shift * u / (1 + (shift - 1) * u)).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "record", [{"student_steps": 1}, {"student_steps": 3}, {"teacher_sampler": "euler", "num_inference_steps": 4}]
)
def test_a_student_of_few_steps_draws_in_diffusers_and_in_comfyui_what_it_draws_here(student, export, tmp_path, record):
    """Latents to 1e-3, in as many steps and with the sampler that the student was made for."""
    from diffusers import WanPipeline, WanTransformer3DModel

    few = changed(student, tmp_path / "few", **record)
    config = StudentConfig.load(few)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 8, 8, generator=generator)
    text = torch.randn(1, 7, 128, generator=generator), torch.tensor([7])
    options = sampling_of("student", config, None, torch.float32, "cpu")
    ours = sample(StudentField(WanLiteStudent.from_pretrained(few).eval()), noise, *text, options)

    outcome = export(few, "pipeline", "--dtype", "fp32", output="pipeline").ok()
    pipeline = WanPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    padded = torch.nn.functional.pad(text[0], (0, 0, 0, 512 - 7))
    steps = int(re.search(r"num_inference_steps=(\d+)", outcome.out)[1])
    size = {"num_frames": 1, "height": 64, "width": 64, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = pipeline(prompt_embeds=padded, latents=noise[:, :, None], num_inference_steps=steps, **size).frames
    assert relative_error(theirs[:, :, 0], ours) <= 1e-4

    export(few, "original", "--workflow", output="a.safetensors").ok()
    model = WanTransformer3DModel.from_single_file(
        str(tmp_path / "a.safetensors"), config=str(tmp_path / "pipeline" / "transformer")
    )
    workflow = json.loads((tmp_path / "a.workflow.json").read_text())
    assert relative_error(drawn_in_comfyui(workflow, model.eval(), noise, text), ours) <= 1e-3


# ---- a student by folder or by name ----


def test_a_file_of_weights_is_a_student(student, tmp_path):
    saved = WanLiteStudent.from_pretrained(student)
    shutil.copy(student / "diffusion_model.safetensors", tmp_path / "alone.safetensors")
    loaded = WanLiteStudent.from_pretrained(tmp_path / "alone.safetensors")
    assert loaded.config == saved.config
    assert_same_tensors(loaded.state_dict(), saved.state_dict())


@pytest.mark.parametrize("place", ["nosuch", "a_file", "another", "pipeline", "original"])
def test_what_is_no_student_is_one_sentence(exports, tmp_path, place):
    (tmp_path / "a_file").write_text("text")
    paths = exports | {"another": DEMO_TEACHER / "vae" / "diffusion_pytorch_model.safetensors"}
    path = paths.get(place, tmp_path / place)
    with pytest.raises(ConfigError) as caught:
        WanLiteStudent.from_pretrained(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert "a student is the --output_dir of train_distillation.py, its .safetensors file, or a hub id" in str(
        caught.value
    )


def test_a_folder_goes_before_a_hub_repository_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = save_random_student(tmp_path / "owner" / "name")
    assert_same_tensors(WanLiteStudent.from_pretrained("owner/name").state_dict(), saved.state_dict())
