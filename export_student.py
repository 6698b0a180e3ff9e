"""Write a trained student as the Wan it is, for the tools people already use: diffusers, ComfyUI, or this one as a teacher.

    python export_student.py --student outputs/demo --format pipeline --output outputs/demo_pipeline
    python export_student.py --student outputs/demo --format original --dtype bf16 --output outputs/demo.safetensors

diffusers is a WanTransformer3DModel folder, pipeline a whole WanPipeline folder, original one file as ComfyUI reads it, gguf one
file as ComfyUI-GGUF does.
"""

import contextlib
import os
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.files.output_folder import check_output_folder, check_writable, removed_if_empty
from wandistiller.flags import PartsFlags, TeacherFlags, flag, group, parse_flags, path, switch
from wandistiller.model.config import StudentConfig
from wandistiller.students.parts import find_recorded_encoder, teacher_paths
from wandistiller.students.record import StudentRecord, load_shape, load_student_config

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from torch import Tensor

    from wandistiller.wan.text_encoder_files import TextEncoderFiles

# Of a pipeline beside its transformer, text encoder and AutoencoderKLWan; of other formats None
Parts: TypeAlias = "tuple[TextEncoderFiles, Any] | None"
# The precisions of each format
FLOATS, QUANTISED = ["fp32", "bf16", "fp16"], ["q8_0", "q5_0", "q4_0"]
FORMATS = {"diffusers": FLOATS, "original": [*FLOATS, "fp8"], "pipeline": FLOATS, "gguf": [*FLOATS, *QUANTISED]}
# The formats that are one file, with the name that it gets in a folder
FILE_NAMES = {"original": "wan_student.safetensors", "gguf": "wan_student.gguf"}
WORKFLOW_SUFFIX = ".workflow.json"
WEIGHT_SUFFIXES = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt"}


@group()
class Flags(PartsFlags):
    """The flags of this command, as `--help` describes them."""

    student: str = flag("folder of a trained student (--output_dir of train_distillation.py)", required=True, type=path)
    format: str = flag(
        "diffusers: a transformer folder; pipeline: a whole pipeline folder; original: one file for ComfyUI; gguf: one for ComfyUI-GGUF",
        required=True,
        choices=list(FORMATS),
    )
    output: str = flag(
        f"a new folder; for original and gguf also a file, else {' or '.join(FILE_NAMES.values())} in it",
        required=True,
        type=path,
    )
    dtype: str = flag(
        "of the weights (left out: bf16 for a pipeline, else fp32); norms, modulation and time embedding stay fp32; fp8 (original only) is float8_e4m3fn in the blocks, "
        f"{', '.join(QUANTISED)} (gguf only) are its types there",
        choices=[*FLOATS, "fp8", *QUANTISED],
    )
    workflow: bool = switch("write a ComfyUI workflow beside an original file, to drop on its editor")


def check_flags(flags: Flags) -> None:
    """Refuse flags that do not go together."""
    if flags.dtype not in (allowed := FORMATS[flags.format]):
        raise UserError(f"--dtype {flags.dtype}: --format {flags.format} has {', '.join(allowed)}; give one of these")
    for part in fields(PartsFlags):
        if getattr(flags, part.name) and flags.format != "pipeline":
            raise UserError(f"--{part.name} belongs to --format pipeline; the other formats hold the transformer alone")
    if flags.workflow and flags.format != "original":
        raise UserError("--workflow is for --format original, the file that ComfyUI reads")


def read_config(flags: Flags) -> StudentConfig:
    """Read the student's config; a pipeline also needs its record, which says how to draw."""
    config = (load_student_config if flags.format == "pipeline" else load_shape)(flags.student)
    config.check_is_wan(f"--student {flags.student}", "no other tool knows its architecture")
    if flags.workflow and StudentRecord.of(config).sampler == "renoise":
        raise UserError("--workflow: ComfyUI's KSampler has other noise levels than this student; leave it out")
    if flags.workflow and config.num_channels not in (16, 48):
        raise UserError(f"--workflow: ComfyUI draws latents of 16 or 48 channels, not of {config.num_channels}")
    return config


def check_output(flags: Flags) -> Path:
    """Return the path of the file or folder that the export becomes; what is there already is never replaced."""
    target, name = Path(flags.output), FILE_NAMES.get(flags.format)
    is_file, suffix = target.suffix.lower() in WEIGHT_SUFFIXES, Path(name or "").suffix
    if is_file and target.suffix != suffix:
        file = f" or a file of suffix {suffix}" if suffix else ""
        raise UserError(
            f"--output {target}: --format {flags.format} writes no {target.suffix} file; give a new folder{file}"
        )
    target = target / name if name and not is_file else target
    check_writable(target.parent, "--output")
    places = [target, *([target.with_suffix(WORKFLOW_SUFFIX)] if flags.workflow else [])] if name else []
    if there := [place for place in places if os.path.lexists(place)]:
        raise UserError(f"--output {there[0]}: is there already; give another name")
    if not name and check_output_folder(target, "--output").is_dir() and any(target.iterdir()):
        raise UserError(f"--output {target}: holds files already; give a new folder")
    return target


def find_parts(flags: PartsFlags, config: StudentConfig) -> Parts:
    """Find VAE, text encoder and tokenizer of a pipeline, and check that they are those of the student."""
    from wandistiller.wan.vae import check_statistics, find_vae, load_vae

    needs_teacher = not (flags.vae_path and flags.text_encoder_path)
    teacher = teacher_paths(config, TeacherFlags(teacher_path=flags.teacher_path))[0] if needs_teacher else "mock"
    vae = load_vae(find_vae(flags.vae_path, teacher, config.num_channels), config.num_channels, config.vae_scale_factor)
    encoder = find_recorded_encoder(config, flags.text_encoder_path, teacher)
    if encoder is None:
        raise UserError(
            "this student learnt the mock teacher's stand-in embeddings; there is no text encoder for a pipeline, export it "
            "as diffusers or original"
        )
    record = StudentRecord.of(config)
    check_statistics(record.latents_mean, record.latents_std, vae.config, Path(flags.vae_path or teacher))
    return encoder, vae


def write(target: Path, tensors: "dict[str, Tensor]", config: StudentConfig, parts: Parts, flags: Flags) -> None:
    """Write the export: the file or folder appears whole or not at all, and replaces nothing that has come there meanwhile.

    Args:
        tensors: the student's state dict.
        config: the student's, with the record that is published.
    """
    from wandistiller.files.atomic import atomic_folder, new_files, remove_leftovers, write_json
    from wandistiller.projection.comfyui import comfyui_workflow
    from wandistiller.projection.exports import write_gguf_file, write_original_file
    from wandistiller.reports.cards import example_prompt

    remove_leftovers(target)  # of a killed export
    with removed_if_empty(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if flags.format not in FILE_NAMES:
            with atomic_folder(target) as folder:
                write_folder(folder, tensors, config, parts, flags)
            return
        with new_files(target) as folder:
            if flags.workflow:
                workflow = comfyui_workflow(config, target.name, example_prompt(config))
                write_json((folder / target.name).with_suffix(WORKFLOW_SUFFIX), workflow, indent=2)
            write_file = write_gguf_file if flags.format == "gguf" else write_original_file
            write_file(tensors, config, folder / target.name, flags.dtype)


def write_folder(folder: Path, tensors: "dict[str, Tensor]", config: StudentConfig, parts: Parts, flags: Flags) -> None:
    """Write a folder for diffusers: a pipeline where its parts are given, else the transformer alone."""
    from wandistiller.files.atomic import write_text
    from wandistiller.projection.exports import pipeline_scheduler, write_pipeline_parts, write_transformer_folder
    from wandistiller.reports.cards import export_card

    transformer = folder if parts is None else folder / "transformer"
    record, scheduler = StudentRecord.of(config), folder / "scheduler"
    if parts is not None:
        write_pipeline_parts(config, folder, *parts, dtype=flags.dtype)
        transformer.mkdir()
    elif record.shift and record.steps:
        with contextlib.suppress(UserError):  # diffusers has none for the noise levels of every student
            pipeline_scheduler(record).save_pretrained(scheduler)
    write_transformer_folder(tensors, config, transformer, flags.dtype)
    name = Path(flags.output).resolve().name
    write_text(folder / "README.md", export_card(name, config, parts is not None, flags.dtype, scheduler.is_dir()))


def print_result(target: Path, config: StudentConfig, flags: Flags) -> None:
    """Print what was written, what it cannot carry into other tools, and how to draw with it."""
    from wandistiller.model.sizes import count_parameters
    from wandistiller.projection.comfyui import LOADERS, comfyui_settings, comfyui_warnings
    from wandistiller.reports.cards import drawing

    warnings = comfyui_warnings(config) if flags.format in FILE_NAMES else []
    for warning in [*warnings, StudentRecord.of(config).warning_of_untrained_levels()]:
        if warning:
            print(f"Warning: {warning}")
    print(f"Wrote {target}: {count_parameters(config).total:,} parameters, {flags.dtype}")
    if flags.format == "pipeline":
        parts = [target / name for name in ("transformer", "text_encoder", "vae")]
        sizes = [sum(file.stat().st_size for file in part.iterdir()) / 2**20 for part in parts]
        listed = (f"{part.name} {size:,.1f} MiB" for part, size in zip(parts, sizes, strict=True))
        print("Sizes: " + ", ".join(listed))
        print("To draw:\n" + textwrap.indent(drawing(config, str(target), flags.dtype), "  "))
    if flags.format == "diffusers" and (steps := StudentRecord.of(config).steps):
        print(f"In diffusers: num_inference_steps={steps}, guidance_scale=1.0, num_frames=1")
    if flags.format in FILE_NAMES:
        print(f"In ComfyUI: {comfyui_settings(config, LOADERS[flags.format])}")


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    flags = parse_flags(Flags, "export_student.py", "Export a trained student to diffusers or ComfyUI.", argv)
    flags = replace(flags, dtype=flags.dtype or ("bf16" if flags.format == "pipeline" else "fp32"))
    check_flags(flags)
    config = read_config(flags)
    target = check_output(flags)

    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.projection.exports import fold_embedding_map, published, refuse_what_gguf_drops

    # Every file is checked before one is written:
    if flags.format == "gguf":
        refuse_what_gguf_drops(config)
    parts = find_parts(flags, config) if flags.format == "pipeline" else None
    tensors = WanLiteStudent.from_pretrained(flags.student).state_dict()
    public_config = published(config)
    if parts and (embedding_map := parts[0].umt5.read_map()) is not None:
        tensors, public_config = fold_embedding_map(tensors, public_config, embedding_map)
    write(target, tensors, public_config, parts, flags)

    print_result(target, public_config, flags)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
