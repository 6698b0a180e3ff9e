"""Draw prompts with a trained student (or with its teacher, from the same noise): a PNG each.

    python generate_images.py --student outputs/demo --prompt "a large red circle on a white background"
    python generate_images.py --student outputs/demo --prompts_file data/static_prompts.txt --model teacher --output outputs/teacher

Steps, shift, guidance and size default to what the student's own record holds. A picture's name tells its seed and size, and
no picture is replaced unless --overwrite says so.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.files.output_folder import (
    check_output_folder,
    check_writable,
    prepare_output_folder,
    removed_if_empty,
)
from wandistiller.flags import DrawingFlags, TextFlags, flag, group, number, parse_flags, path, switch
from wandistiller.model.config import StudentConfig
from wandistiller.model.image_sizes import ImageSize
from wandistiller.prompts.prompts import prompts_to_draw, slug, unusable
from wandistiller.prompts.templates import is_template
from wandistiller.students.drawing import check_picture_size, untrained_warnings
from wandistiller.students.parts import recorded_settings
from wandistiller.students.record import StudentRecord, load_student_config, trained_sizes

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from wandistiller.evaluation.pair import Artist
    from wandistiller.wan.prompt_embeds import PromptEmbeds

NUM_OF_TEMPLATES = 8  # pictures, where prompts without end are asked for and no number is given


@group()
class Flags(TextFlags, DrawingFlags):
    """The flags of this command, as `--help` describes them; None: as the student records."""

    model: str = flag("who draws: the student, or the teacher it records", "student", choices=["student", "teacher"])
    prompt: list[str] | None = flag("one or more prompts, each in quotes", nargs="+", metavar="PROMPT")
    prompts_file: str | None = flag("prompts: text file, table, folder or glob of these, or templates", type=path)
    num_prompts: int | None = flag(
        f"how many of --prompts_file, from the first (all of them; of templates {NUM_OF_TEMPLATES})",
        type=number(int, low=1),
    )
    num_images: int = flag("pictures of each prompt, each from its own noise", 1, type=number(int, low=1, high=10_000))
    guidance_scale: float | None = flag(
        "g of v_uncond + g (v_cond - v_uncond); a student has learnt its teacher's guided velocity, so for it 1",
        type=number(float, low=0),
    )
    height: int | None = flag("pixels", type=number(int, low=1))
    width: int | None = flag("pixels", type=number(int, low=1))
    batch_size: int = flag("pictures drawn at once", 4, type=number(int, low=1))
    output: str = flag("folder for the pictures", "outputs/images", type=path)
    overwrite: bool = switch("replace pictures of the same names there")


def read_prompts(flags: Flags) -> list[str]:
    """Read the prompts of --prompt, then the different ones of --prompts_file, each as often as it is drawn."""
    prompts = flags.prompt or []
    if not prompts and not flags.prompts_file:
        raise UserError("nothing to draw: give --prompt or --prompts_file")
    if flags.num_prompts and not flags.prompts_file:
        raise UserError("--num_prompts: is for --prompts_file; leave it out")
    for prompt in prompts:
        if reason := unusable(prompt):
            raise UserError(f"--prompt {reason}; write what to draw, in quotes")
    if flags.prompts_file:
        count = flags.num_prompts or (NUM_OF_TEMPLATES if is_template(flags.prompts_file) else None)
        prompts = [*prompts, *prompts_to_draw(flags.prompts_file, count, flags)]
    return [prompt for prompt in prompts for _ in range(flags.num_images)]


def warn(config: StudentConfig, flags: Flags, size: tuple[int, int]) -> None:
    """Print what the student has not learnt and is asked for."""
    record, scale = StudentRecord.of(config), flags.guidance_scale
    warnings = untrained_warnings(config, flags.num_inference_steps or record.steps, size)
    if scale not in (None, 1.0) and recorded_settings(config).uses_guidance:
        warnings.append(
            f"this student learnt its teacher's guided velocity (guidance_scale {record.guidance_scale:g}), and "
            f"--guidance_scale {scale:g} guides it once more; leave the flag out for pictures like the teacher's"
        )
    for warning in warnings:
        print(f"Warning: {warning}")


def prepare(
    flags: Flags, config: StudentConfig, prompts: list[str], size: tuple[int, int]
) -> "tuple[Artist, PromptEmbeds]":
    """Load who draws, and the text tokens of the prompts; every file is checked before a weight is read."""
    from wandistiller.evaluation.pair import Pair

    who = flags.model
    pair = Pair(flags.student, flags, flags, flags.prompt_cache, who == "teacher")
    if who == "teacher":
        check_picture_size(size, config, pair.teacher_files.config.patch_size)
    else:
        warn(config, flags, size)
    check_writable(flags.output, "--output")
    settings = pair.settings_of(who, flags.guidance_scale)
    # The text comes first, so that its encoder leaves memory before the model comes:
    embeds, negative = pair.embed(prompts, settings)
    return pair.artist(who, flags.num_inference_steps, settings, negative), embeds


def picture_files(flags: Flags, prompts: list[str], size: tuple[int, int]) -> list[Path]:
    """Return the files of the pictures, by names that tell their seeds and sizes; none that is there is replaced unasked."""
    height, width = size
    folder = check_output_folder(flags.output, "--output")
    drawn = [
        folder / f"{index:03d}_{slug(prompt)}_seed{flags.seed + index}_{width}x{height}.png"
        for index, prompt in enumerate(prompts)
    ]
    if there := [file for file in drawn if os.path.lexists(file) and not flags.overwrite]:
        raise UserError(f"{there[0]}: is there already; give another --output or --seed, or --overwrite")
    return drawn


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    flags = parse_flags(Flags, "generate_images.py", "Draw prompts with a trained student, or with its teacher.", argv)
    if flags.model == "student" and (flags.teacher_lora or flags.teacher_lora_low or flags.teacher_path_low):
        raise UserError("--teacher_lora and --teacher_path_low: are for --model teacher; a student draws as it is")
    config = load_student_config(flags.student)
    prompts = read_prompts(flags)
    own = trained_sizes(config)[0]
    size = flags.height or own.height, flags.width or own.width
    check_picture_size(size, config, config.patch_size)
    files = picture_files(flags, prompts, size)

    from wandistiller.files.pictures import save_png

    # Draw:
    artist, embeds = prepare(flags, config, prompts, size)
    metadata = {
        "model": flags.model,
        "student": flags.student,
        "height": size[0],
        "width": size[1],
        **artist.metadata(),
    }
    shape = recorded_settings(config).latent_shape(config, ImageSize(size[1], size[0]))
    # An embedding that the prompt cache holds is read, or refused, when it is drawn:
    with removed_if_empty(flags.output):
        prepare_output_folder(flags.output, "--output")
        for start in range(0, len(prompts), flags.batch_size):
            indices = range(start, min(start + flags.batch_size, len(prompts)))
            seeds = [flags.seed + index for index in indices]
            for index, seed, picture in zip(indices, seeds, artist.draw(embeds, indices, seeds, shape), strict=True):
                save_png(picture, files[index], {"prompt": prompts[index], "seed": seed, **metadata})
                print(files[index], flush=True)

    print(f"{len(prompts)} pictures by the {flags.model} in {flags.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
