"""Draw prompts with a trained student (or with its teacher, from the same noise): a PNG each and a grid.

    python generate_images.py --student outputs/demo --prompt "a large red circle on a white background"
    python generate_images.py --student outputs/demo --prompts_file data/static_prompts.txt --model teacher --output outputs/teacher

Steps, shift, guidance and size default to what the student's own record holds. A picture's name tells its seed and size, and
no picture is replaced unless --overwrite says so.
"""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import FlagParser, number, path, run_command
from wandistiller.errors import UserError
from wandistiller.files.output_folder import (
    check_output_folder,
    check_writable,
    prepare_output_folder,
    removed_if_empty,
)
from wandistiller.files.prompts import load_prompts, slug, unusable
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.sampling.recorded import (
    StudentRecord,
    check_size,
    embed_with_negative,
    load_drawing_parts,
    load_student_config,
    open_recorded_teacher,
    recorded_settings,
    student_sampling,
    teacher_paths,
    teacher_sampling,
    trained_sizes,
)

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    import numpy as np
    from diffusers import AutoencoderKLWan
    from torch import Tensor

    from wandistiller.sampling.sampler import SamplingOptions
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.wan.prompt_embeds import PromptEmbeds
    from wandistiller.wan.settings import TeacherSettings
    from wandistiller.wan.wan_files import WanFiles

MAX_GRID_PICTURES = 100
# Beyond these a picture is a slip of the keyboard that fills the memory; a student may be trained at more.
MAX_PIXELS = 2048**2


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this command, as `--help` describes them; None leaves a value to the student's record."""

    student: str
    model: str
    teacher_path: str | None
    teacher_path_low: str | None
    text_encoder_path: str | None
    vae_path: str | None
    prompt: list[str] | None
    prompts_file: str | None
    num_images: int
    prompt_cache: str
    num_inference_steps: int | None
    guidance_scale: float | None
    allow_double_guidance: bool
    seed: int
    height: int | None
    width: int | None
    batch_size: int
    device: str | None
    dtype: str | None
    output: str
    overwrite: bool


def parse_args(argv: list[str] | None = None) -> Flags:
    parser = FlagParser(
        "generate_images.py",
        "Draw prompts with a trained student, or with its teacher. Flags are accepted with underscores or hyphens.",
        "Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted, 1 anything else.",
    )
    model = parser.group("Model")
    model.flag(
        "--student", "folder of a trained student (--output_dir of train_distillation.py)", required=True, type=path
    )
    model.flag(
        "--model", "who draws: the student, or the teacher it records", "student", choices=["student", "teacher"]
    )
    model.flag("--teacher_path", "the teacher, where it is no longer where the student's record says", type=path)
    model.flag("--teacher_path_low", "its low-noise expert, where the two experts are two files or folders", type=path)
    model.flag(
        "--text_encoder_path",
        "folder or hub id with text_encoder/ and tokenizer/, where the teacher has none",
        type=path,
    )
    model.flag("--vae_path", "folder or hub id of a diffusers AutoencoderKLWan, where the teacher has none", type=path)

    prompts = parser.group("Prompts")
    prompts.flag("--prompt", "one or more prompts, each in quotes", nargs="+", metavar="PROMPT")
    prompts.flag(
        "--prompts_file", "text file, one prompt a line; one that stands there twice is drawn twice", type=path
    )
    prompts.flag(
        "--num_images", "pictures of each prompt, each from a noise of its own", 1, type=number(int, low=1, high=10_000)
    )
    prompts.flag(
        "--prompt_cache", "folder that keeps prompt embeddings between runs", "outputs/prompt_cache", type=path
    )

    sampling = parser.group("Sampling (left out: as the student records)")
    sampling.flag("--num_inference_steps", "steps of the sampler", type=number(int, low=1, high=1000))
    sampling.flag(
        "--guidance_scale",
        "g of v_uncond + g (v_cond - v_uncond); a student has learnt its teacher's guided velocity, so for it 1",
        type=number(float, low=0),
    )
    sampling.flag(
        "--allow_double_guidance", "guide a student whose teacher was guided already", False, action="store_true"
    )
    sampling.flag(
        "--seed", "of the first picture's noise; each next one has one more", 0, type=number(int, low=0, high=2**62)
    )
    sampling.flag("--height", "pixels", type=number(int, low=1))
    sampling.flag("--width", "pixels", type=number(int, low=1))

    performance = parser.group("Performance")
    performance.flag("--batch_size", "pictures drawn at once", 4, type=number(int, low=1))
    performance.flag("--device", "cpu, cuda, cuda:1, ... (cuda if there is one)")
    performance.flag("--dtype", "of matrix products (bf16 on cuda, else fp32)", choices=["fp32", "bf16"])

    output = parser.group("Output")
    output.flag("--output", "folder for the pictures", "outputs/images", type=path)
    output.flag("--overwrite", "replace pictures of the same names there", False, action="store_true")
    return Flags(**vars(parser.parse(argv)))


def read_prompts(flags: Flags) -> list[str]:
    """Read the prompts of --prompt, then those of --prompts_file, each as often as it is drawn."""
    if not flags.prompt and not flags.prompts_file:
        raise UserError("nothing to draw: give --prompt or --prompts_file")
    prompts = flags.prompt or []
    for prompt in prompts:
        if reason := unusable(prompt):
            raise UserError(f"--prompt {reason}; write what to draw, in quotes")
    if flags.prompts_file:
        prompts = prompts + load_prompts(flags.prompts_file, keeps_repeats=True).prompts
    return [prompt for prompt in prompts for _ in range(flags.num_images)]


def check_picture_size(size: tuple[int, int], config: StudentConfig, patch_size: int) -> None:
    """Refuse a height or width that does not fill whole patches of `patch_size` latent pixels, or is beyond any use."""
    for flag, pixels in zip(("--height", "--width"), size, strict=True):
        check_size(flag, pixels, config, patch_size)
    sizes = trained_sizes(config)
    most = max(MAX_PIXELS, 4 * max(size.pixels for size in sizes))
    if math.prod(size) > most:
        raise UserError(
            f"--height {size[0]} --width {size[1]}: is {math.prod(size):,} pixels; allowed: at most {most:,}, as of "
            f"{math.isqrt(most)} x {math.isqrt(most)} (this student was trained at {sizes_text(sizes)})"
        )


def sizes_text(sizes: list[ImageSize]) -> str:
    """Return sizes in words."""
    *others, last = [f"{size.width} x {size.height}" for size in sizes]
    return f"{', '.join(others)} and {last}" if others else last


def choose_guidance(flags: Flags, settings: "TeacherSettings") -> "TeacherSettings":
    """Return the settings to draw with; a student needs no guidance, because it has learnt guided velocities."""
    if flags.model == "teacher":
        if flags.guidance_scale is None:
            return settings
        low = None if settings.boundary_ratio is None else flags.guidance_scale
        return replace(settings, guidance_scale=flags.guidance_scale, guidance_scale_2=low)
    scale = 1.0 if flags.guidance_scale is None else flags.guidance_scale
    if scale != 1.0 and settings.uses_guidance and not flags.allow_double_guidance:
        raise UserError(
            f"--guidance_scale {scale:g}: this student learnt its teacher's guided velocity (guidance_scale "
            f"{settings.guidance_scale:g}), and guiding it again overdoes it; leave the flag out, or add "
            "--allow_double_guidance"
        )
    return replace(settings, guidance_scale=scale, guidance_scale_2=None, boundary_ratio=None)


def warn_of_untrained(config: StudentConfig, options: "SamplingOptions", size: tuple[int, int]) -> None:
    """Print a warning where the student is asked for noise levels, steps or a size that it has not learnt."""
    record = StudentRecord.of(config)
    if warning := record.warning_of_untrained_levels():
        print(f"Warning: this student was {warning}")
    if record.student_steps not in (None, options.num_inference_steps):
        print(
            f"Warning: this student learnt to draw in {record.student_steps} steps, not in {options.num_inference_steps}"
        )
    sizes, (height, width) = trained_sizes(config), size
    asked = ImageSize(width, height)
    # One that learnt several sizes draws those beside them too; one that learnt a single size knows no other.
    if not (any(map(asked.is_like, sizes)) if len(sizes) > 1 else asked in sizes):
        print(
            f"Warning: this student was trained at {sizes_text(sizes)} pixels alone, and is asked for {width} wide and {height} "
            "high; the picture may be broken"
        )


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How pictures are drawn: the sampler, the velocity field it follows, its text, and what decodes the latents."""

    field: "Teacher"
    embeds: "PromptEmbeds"
    options: "SamplingOptions"
    settings: "TeacherSettings"
    vae: "AutoencoderKLWan"
    latent_shape: tuple[int, int, int]
    first_seed: int
    batch_size: int

    def pictures(self) -> "Iterator[tuple[int, np.ndarray]]":
        """Yield the index and the picture (H, W, 3) uint8 of every prompt, drawn a batch at a time."""
        from wandistiller.sampling.flow import seeded_noise
        from wandistiller.sampling.sampler import sample_in_batches
        from wandistiller.wan.vae import decode

        num_prompts = len(self.embeds)
        for start in range(0, num_prompts, self.batch_size):
            indices = range(start, min(start + self.batch_size, num_prompts))
            noise = seeded_noise([self.first_seed + index for index in indices], self.latent_shape)
            latents = sample_in_batches(self.field, noise, self.embeds, indices, self.options, self.batch_size)
            pictures = decode(self.vae, latents, self.settings.latents_mean, self.settings.latents_std)
            yield from zip(indices, pictures, strict=True)


def prepare(
    flags: Flags, config: StudentConfig, prompts: list[str], size: tuple[int, int], teacher: tuple[str, str | None]
) -> Drawing:
    """Load everything that draws; every file is checked before a weight is read.

    Args:
        size: height and width in pixels.
        teacher: what `teacher_paths` found.
    """
    from wandistiller.device import pick_device, pick_dtype

    device = pick_device(flags.device)
    dtype = pick_dtype(flags.dtype, device)
    settings = choose_guidance(flags, recorded_settings(config))
    if flags.model == "teacher":
        options = teacher_sampling(config, flags.num_inference_steps, dtype, device)
        wan_files = open_recorded_teacher(config, *teacher)
        check_picture_size(size, config, wan_files.config.patch_size)
    else:
        options = student_sampling(config, flags.num_inference_steps, dtype, device)
        wan_files = None
        warn_of_untrained(config, options, size)
    parts = load_drawing_parts(
        config, teacher[0], text_encoder_path=flags.text_encoder_path, vae_path=flags.vae_path, device=device
    )
    check_writable(flags.output, "--output")

    # The text comes first, so that its encoder leaves memory before the model comes:
    embeds, negative = embed_with_negative(prompts, settings, parts.encoder, config, flags.prompt_cache, device)
    height, width = (pixels // config.vae_scale_factor for pixels in size)
    return Drawing(
        field=load_field(flags, config, settings, options, wan_files, negative),
        embeds=embeds,
        options=options,
        settings=settings,
        vae=parts.vae,
        latent_shape=(config.num_channels, height, width),
        first_seed=flags.seed,
        batch_size=flags.batch_size,
    )


def load_field(
    flags: Flags,
    config: StudentConfig,
    settings: "TeacherSettings",
    options: "SamplingOptions",
    wan_files: "WanFiles | None",
    negative_prompt_embeds: "Tensor | None",
) -> "Teacher":
    """Load the velocity field to follow: the experts of the teacher where `wan_files` are given, else the student."""
    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.projection.project import project_experts
    from wandistiller.sampling.sampler import student_as_teacher
    from wandistiller.sampling.teacher import Teacher

    if wan_files is not None:
        experts = project_experts(wan_files, config.text_max_length, options.compute_dtype, options.device)
        return Teacher(experts, settings, negative_prompt_embeds)
    student = WanLiteStudent.from_pretrained(flags.student, options.device)
    return student_as_teacher(student, settings, settings.guidance_scale, negative_prompt_embeds)


def describe(flags: Flags, size: tuple[int, int], drawing: Drawing) -> dict[str, object]:
    """Return what the metadata of every picture holds, beside its prompt and seed."""
    from wandistiller import __version__

    height, width = size
    values = {
        "model": flags.model,
        "student": flags.student,
        "num_inference_steps": drawing.options.num_inference_steps,
        "guidance_scale": drawing.settings.guidance_scale,
        "guidance_scale_2": drawing.settings.guidance_scale_2,
        "shift": drawing.options.shift,
        "height": height,
        "width": width,
        "Software": f"WanDistiller {__version__}",
    }
    return {name: value for name, value in values.items() if value is not None}


def picture_files(flags: Flags, prompts: list[str], size: tuple[int, int]) -> tuple[list[Path], Path]:
    """Return the files of the pictures and of their grid, by names that tell their seeds and sizes.

    Raises:
        UserError: one is there already, and --overwrite is not given.
    """
    height, width = size
    folder = check_output_folder(flags.output, "--output")
    drawn = [
        folder / f"{index:03d}_{slug(prompt)}_seed{flags.seed + index}_{width}x{height}.png"
        for index, prompt in enumerate(prompts)
    ]
    grid = folder / f"grid_seed{flags.seed}_{width}x{height}.png"
    if there := [file for file in [*drawn, grid] if os.path.lexists(file) and not flags.overwrite]:
        raise UserError(
            f"{there[0]}: is there already (and {len(there) - 1} more of these pictures); give another --output or --seed, or "
            "--overwrite to replace them"
        )
    return drawn, grid


def save_grid(file: Path, pictures: "list[np.ndarray]", prompts: list[str], metadata: dict[str, object]) -> None:
    """Write the pictures on one sheet of about as many columns as rows, each under its prompt."""
    from wandistiller.files.pictures import labelled_grid, save_png

    columns = math.ceil(math.sqrt(len(pictures)))
    rows = [slice(start, start + columns) for start in range(0, len(pictures), columns)]
    captions = prompts[: len(pictures)]
    save_png(labelled_grid([pictures[row] for row in rows], [captions[row] for row in rows]), file, metadata)


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    flags = parse_args(argv)
    config = load_student_config(flags.student)
    prompts = read_prompts(flags)
    teacher = teacher_paths(config, flags.teacher_path, flags.teacher_path_low)
    own = trained_sizes(config)[0]
    size = flags.height or own.height, flags.width or own.width
    check_picture_size(size, config, config.patch_size)
    files, grid = picture_files(flags, prompts, size)

    from wandistiller.files.pictures import save_png

    # Draw:
    drawing = prepare(flags, config, prompts, size, teacher)
    metadata = describe(flags, size, drawing)
    shown: list[np.ndarray] = []
    with removed_if_empty(
        flags.output
    ):  # a prompt's embedding that the cache holds is read, or refused, when it is drawn
        prepare_output_folder(flags.output, "--output")
        for index, picture in drawing.pictures():
            file = files[index]
            save_png(picture, file, {"prompt": prompts[index], "seed": flags.seed + index, **metadata})
            print(file, flush=True)
            if len(shown) < MAX_GRID_PICTURES:
                shown.append(picture)

    # Tell:
    save_grid(grid, shown, prompts, metadata | {"seed": flags.seed})
    print(f"{len(prompts)} pictures by the {flags.model} and {grid.name} in {flags.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
