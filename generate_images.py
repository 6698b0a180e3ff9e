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

from wandistiller.command_line import FlagParser, add_student_flag, add_teacher_flags, number, path, run_command
from wandistiller.errors import UserError
from wandistiller.files.output_folder import (
    check_output_folder,
    check_writable,
    prepare_output_folder,
    removed_if_empty,
)
from wandistiller.model.config import StudentConfig
from wandistiller.prompts.prompts import is_endless, load_prompts, slug, unusable
from wandistiller.sampling.drawing import Artist, check_picture_size, untrained_warnings
from wandistiller.sampling.recorded import (
    TeacherLoras,
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
    from torch import Tensor

    from wandistiller.sampling.sampler import SamplingOptions
    from wandistiller.sampling.teacher import Teacher
    from wandistiller.wan.prompt_embeds import PromptEmbeds
    from wandistiller.wan.settings import TeacherSettings
    from wandistiller.wan.wan_files import WanFiles

MAX_GRID_PICTURES = 100
NUM_OF_TEMPLATES = 8  # pictures, where prompts without end are asked for and no number is given


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this command, as `--help` describes them; None leaves a value to the student's record."""

    student: str
    model: str
    teacher_path: str | None
    teacher_path_low: str | None
    teacher_lora: list[tuple[str, float]] | None
    teacher_lora_low: list[tuple[str, float]] | None
    text_encoder_path: str | None
    vae_path: str | None
    prompt: list[str] | None
    prompts_file: str | None
    caption_column: str | None
    num_prompts: int | None
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
    add_student_flag(model)
    model.flag(
        "--model", "who draws: the student, or the teacher it records", "student", choices=["student", "teacher"]
    )
    add_teacher_flags(model)

    prompts = parser.group("Prompts")
    prompts.flag("--prompt", "one or more prompts, each in quotes", nargs="+", metavar="PROMPT")
    prompts.flag(
        "--prompts_file",
        "a text file with one prompt a line, a table, a folder or a glob of these, or a folder of prompt templates; a prompt that "
        "stands there twice is drawn twice",
        type=path,
    )
    prompts.flag("--caption_column", "column of tables that holds the prompts, where their names do not tell")
    prompts.flag(
        "--num_prompts",
        f"how many of --prompts_file, from the first (all of them; of templates {NUM_OF_TEMPLATES})",
        type=number(int, low=1),
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
        file = load_prompts(flags.prompts_file, flags.caption_column, held_out=True, keeps_repeats=True)
        count = flags.num_prompts or (NUM_OF_TEMPLATES if is_endless(file.prompts) else None)
        if file.notice:
            print(f"{flags.prompts_file}: {file.notice}")
        prompts = [*prompts, *file.prompts[:count]]
    return [prompt for prompt in prompts for _ in range(flags.num_images)]


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
    return replace(settings, guidance_scale=scale, guidance_scale_2=None, boundary_ratio=None, guidance_range=None)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Who draws which text, at which size and from which noises."""

    artist: Artist
    embeds: "PromptEmbeds"
    latent_shape: tuple[int, int, int]
    first_seed: int
    batch_size: int

    def pictures(self) -> "Iterator[tuple[int, np.ndarray]]":
        """Yield the index and the picture (H, W, 3) uint8 of every prompt, drawn a batch at a time."""
        num_prompts = len(self.embeds)
        for start in range(0, num_prompts, self.batch_size):
            indices = range(start, min(start + self.batch_size, num_prompts))
            seeds = [self.first_seed + index for index in indices]
            pictures = self.artist.draw(self.embeds, indices, seeds, self.latent_shape)
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
        wan_files = open_recorded_teacher(config, *teacher, TeacherLoras(flags.teacher_lora, flags.teacher_lora_low))
        check_picture_size(size, config, wan_files.config.patch_size)
    else:
        options = student_sampling(config, flags.num_inference_steps, dtype, device)
        wan_files = None
        for warning in untrained_warnings(config, options.num_inference_steps, size):
            print(f"Warning: {warning}")
    parts = load_drawing_parts(
        config, teacher[0], text_encoder_path=flags.text_encoder_path, vae_path=flags.vae_path, device=device
    )
    check_writable(flags.output, "--output")

    # The text comes first, so that its encoder leaves memory before the model comes:
    embeds, negative = embed_with_negative(prompts, settings, parts.encoder, config, flags.prompt_cache, device)
    height, width = (pixels // config.vae_scale_factor for pixels in size)
    field = load_field(flags, config, settings, options, wan_files, negative)
    return Drawing(
        artist=Artist(field=field, options=options, settings=settings, vae=parts.vae),
        embeds=embeds,
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
    metadata = drawing.artist.metadata(flags.model, flags.student, size)
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
