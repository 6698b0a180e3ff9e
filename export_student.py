"""Write a trained student as the Wan it is, for the tools people already use: diffusers, ComfyUI, or this one as a teacher.

    python export_student.py --student outputs/demo --format pipeline --output outputs/demo_pipeline
    python export_student.py --student outputs/demo --format original --dtype bf16 --output outputs/demo.safetensors

diffusers is a WanTransformer3DModel folder, pipeline a whole WanPipeline folder, original one file as ComfyUI reads it.
"""

import argparse
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from wandistiller.command_line import FlagParser, path, run_command
from wandistiller.errors import UserError
from wandistiller.files.output_folder import check_output_folder, check_writable
from wandistiller.files.paths import nearest_existing
from wandistiller.model.config import CONFIG_NAME, StudentConfig
from wandistiller.sampling.recorded import (
    find_recorded_encoder,
    load_shape,
    load_student_config,
    student_sampling,
    teacher_paths,
)

FORMATS = ["diffusers", "original", "pipeline"]
ORIGINAL_NAME = "wan_student.safetensors"
WEIGHT_SUFFIXES = {".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = FlagParser(
        "export_student.py",
        "Export a trained student to diffusers or ComfyUI. Flags are accepted with underscores or hyphens.",
        "Exit codes: 0 done, 2 a mistake in flags, config or files, 130 interrupted, 1 anything else.",
    )
    model = parser.group("Model")
    model.flag(
        "--student",
        "folder of a trained student (--output_dir of train_distillation.py), or its .safetensors file",
        required=True,
        type=path,
    )
    output = parser.group("Output")
    output.flag(
        "--format",
        "diffusers: a transformer folder; pipeline: a whole pipeline folder; original: one file for ComfyUI",
        required=True,
        choices=FORMATS,
    )
    output.flag(
        "--output", f"a new folder; for original also a file, else {ORIGINAL_NAME} in it", required=True, type=path
    )
    output.flag(
        "--dtype",
        "of the weights; norms, modulation and time embedding stay fp32; fp8 (original only) is float8_e4m3fn in the blocks",
        "fp32",
        choices=["fp32", "bf16", "fp16", "fp8"],
    )
    parts = parser.group("The rest of a pipeline (left out: from the teacher that the student records)")
    parts.flag("--teacher_path", "the teacher, where it is no longer where the student's record says", type=path)
    parts.flag("--vae_path", "folder or hub id of a diffusers AutoencoderKLWan", type=path)
    parts.flag("--text_encoder_path", "folder or hub id with text_encoder/ and tokenizer/", type=path)
    parts.flag("--link", "link to these folders instead of copying them", False, action="store_true")
    return parser.parse(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together."""
    if args.dtype == "fp8" and args.format != "original":
        raise UserError(
            f"--dtype fp8 is for --format original; diffusers reads no such files, give bf16 with {args.format}"
        )
    for name in ("teacher_path", "vae_path", "text_encoder_path", "link"):
        if getattr(args, name) and args.format != "pipeline":
            raise UserError(f"--{name} belongs to --format pipeline; the other formats hold the transformer alone")


def read_config(args: argparse.Namespace) -> StudentConfig:
    """The student's config; a pipeline is also told by its record how to draw."""
    if args.format == "pipeline":
        config = load_student_config(args.student)
    elif Path(args.student).is_file():
        from wandistiller.model.transformer import saved_config

        config = saved_config(args.student)
    else:
        config = load_shape(args.student)
    if config.block != "wan":
        raise UserError(
            f'{Path(args.student) / CONFIG_NAME}: a student of block "{config.block}" is no Wan, and no other tool knows its '
            'architecture; only block "wan" can be exported'
        )
    return config


def check_output(args: argparse.Namespace) -> Path:
    """Where the export goes; what is there already is never replaced."""
    target = Path(args.output)
    is_file = target.suffix.lower() in WEIGHT_SUFFIXES
    if is_file and (args.format != "original" or target.suffix != ".safetensors"):
        file = " or a file of suffix .safetensors" if args.format == "original" else ""
        raise UserError(
            f"--output {target}: --format {args.format} writes no {target.suffix} file; give a new folder{file}"
        )
    if args.format == "original" and not is_file:
        target = target / ORIGINAL_NAME
    check_writable(target.parent, "--output")
    prove_writable(target.parent)
    if args.format == "original":
        if target.exists():
            raise UserError(f"--output {target}: is there already; give another name")
        return target
    check_output_folder(target, "--output")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"--output {target}: holds files already; give a new folder")
    return target


def prove_writable(folder: Path) -> None:
    """Refuse a folder where no file can be made, as in /proc, whatever its permissions say; nothing stays there."""
    folder = nearest_existing(folder.absolute())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to ({error.strerror}); give another folder") from None


def find_parts(args: argparse.Namespace, config: StudentConfig) -> tuple[dict[str, Path], dict[str, list]]:
    """Folders of VAE, text encoder and tokenizer, each known to be the student's, and the classes of the text parts."""
    from wandistiller.projection.diffusers_export import text_classes
    from wandistiller.wan.vae import LatentStatistics, VaeLocation, check_statistics, find_vae, load_vae

    teacher = teacher_paths(config, args.teacher_path)[0] if not (args.vae_path and args.text_encoder_path) else "mock"
    vae = find_vae(args.vae_path, teacher).folder()
    encoder = find_recorded_encoder(config, args.text_encoder_path, teacher)
    if encoder is None:
        raise UserError(
            "this student learnt the mock teacher's stand-in embeddings; there is no text encoder for a pipeline, export it "
            "as diffusers or original"
        )
    record = config.distillation or {}
    learnt = LatentStatistics(record.get("latents_mean"), record.get("latents_std"))
    found = load_vae(VaeLocation(str(vae), None), config.num_channels, config.vae_scale_factor).config
    check_statistics(learnt, LatentStatistics(found.latents_mean, found.latents_std), vae)
    parts = {"vae": vae, "text_encoder": encoder.encoder, "tokenizer": encoder.tokenizer}
    return parts, text_classes(encoder.encoder)


def print_warnings(config: StudentConfig, export_format: str) -> None:
    """What the export cannot carry into other tools."""
    from wandistiller.projection.comfyui import comfyui_warnings

    low, high = (config.distillation or {}).get("sigma_range") or (0.0, 1.0)
    warnings = comfyui_warnings(config) if export_format == "original" else []
    if low > 0.0 or high < 1.0:
        warnings.append(f"trained at sigma {low:g} to {high:g} only; a picture needs all of 0 to 1")
    for warning in warnings:
        print(f"Warning: {warning}")


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    args = parse_args(argv)
    check_flags(args)
    config = read_config(args)
    target = check_output(args)

    import torch

    from wandistiller.files.atomic import atomic_folder, remove_leftovers
    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.projection.comfyui import comfyui_settings, comfyui_warnings
    from wandistiller.projection.diffusers_export import (
        published,
        write_original_file,
        write_pipeline_parts,
        write_transformer_folder,
    )
    from wandistiller.reports.export_card import drawing, write_export_card

    with terminated_as_interrupted():
        # Every file, before one is written:
        parts, classes = find_parts(args, config) if args.format == "pipeline" else ({}, {})
        tensors = WanLiteStudent.from_pretrained(args.student).state_dict()

        # The file or folder, whole or not at all:
        config = published(config, args.teacher_path)
        for place in [target] if target.parent.exists() else [target, target.parent]:
            remove_leftovers(place)
        if args.format == "original":
            around = nullcontext(target.parent) if target.parent.exists() else atomic_folder(target.parent)
            with around as folder:
                write_original_file(tensors, config, folder / target.name, args.dtype)
        else:
            with atomic_folder(target) as folder:
                if args.format == "pipeline":
                    options = student_sampling(config, None, torch.float32, "cpu")
                    write_pipeline_parts(config, folder, options, parts, classes, link=args.link, dtype=args.dtype)
                transformer = folder / "transformer" if args.format == "pipeline" else folder
                transformer.mkdir(exist_ok=True)
                write_transformer_folder(tensors, config, transformer, args.dtype)
                write_export_card(folder, target.resolve().name, config, args.format, args.dtype, link=args.link)

    # How to use it:
    print_warnings(config, args.format)
    print(f"Wrote {target}: {sum(tensor.numel() for tensor in tensors.values()):,} parameters, {args.dtype}")
    if args.format == "pipeline":
        print("To draw:\n" + textwrap.indent(drawing(config, str(target), args.dtype, link=args.link), "  "))
    if args.format == "original" and not comfyui_warnings(config, reads_metadata=True):
        print(f"In ComfyUI: {comfyui_settings(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
