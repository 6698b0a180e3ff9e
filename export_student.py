"""Write a trained student as the Wan it is, for the tools people already use: diffusers, ComfyUI, or this one as a teacher.

    python export_student.py --student outputs/demo --format pipeline --output outputs/demo_pipeline
    python export_student.py --student outputs/demo --format original --dtype bf16 --output outputs/demo.safetensors

diffusers is a WanTransformer3DModel folder, pipeline a whole WanPipeline folder, original one file as ComfyUI reads it, gguf one
file as ComfyUI-GGUF does. With --push_to_hub the export also becomes a repository of the hub; nothing is sent anywhere without
that flag.
"""

import os
import signal
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wandistiller.command_line import run_command
from wandistiller.errors import UserError
from wandistiller.files.hub_push import check_repository, push
from wandistiller.files.output_folder import check_output_folder, check_writable
from wandistiller.files.paths import nearest_existing
from wandistiller.flags import flag, group, parse_flags, path, switch
from wandistiller.model.config import CONFIG_NAME, StudentConfig
from wandistiller.students.drawing import example_prompt, student_sampling
from wandistiller.students.parts import find_recorded_encoder, teacher_paths
from wandistiller.students.record import StudentRecord, load_shape, load_student_config

if TYPE_CHECKING:  # torch and what needs it load only once the flags are known to be right
    from torch import Tensor

    from wandistiller.projection.diffusers_export import PipelineParts

FORMATS = ["diffusers", "original", "pipeline", "gguf"]
# The formats that are one file, with the name that it gets in a folder
FILE_NAMES = {"original": "wan_student.safetensors", "gguf": "wan_student.gguf"}
GGUF_DTYPES = ["q8_0", "q5_0", "q4_0"]
WEIGHT_SUFFIXES = {".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt"}


@dataclass(frozen=True, kw_only=True)
class HubFlags:
    """Where it is published."""

    push_to_hub: str | None = flag(
        "also make this repository of it, private, with the card and the sample pictures", metavar="OWNER/NAME"
    )
    public: bool = switch("make that repository one that everybody sees")


@dataclass(frozen=True, kw_only=True)
class PartsFlags:
    """Where the other parts of a pipeline are; None: beside the teacher that the student records."""

    teacher_path: str | None = flag("the teacher, where it is no longer where the student's record says", type=path)
    vae_path: str | None = flag("folder or hub id of a diffusers AutoencoderKLWan", type=path)
    text_encoder_path: str | None = flag("folder or hub id with text_encoder/ and tokenizer/", type=path)
    link: bool = switch("link to these folders instead of copying them")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this command, as `--help` describes them."""

    student: str = flag(
        "folder of a trained student (--output_dir of train_distillation.py), or its .safetensors file",
        required=True,
        type=path,
    )
    format: str = flag(
        "diffusers: a transformer folder; pipeline: a whole pipeline folder; original: one file for ComfyUI; gguf: one for ComfyUI-GGUF",
        required=True,
        choices=FORMATS,
    )
    output: str = flag(
        f"a new folder; for original and gguf also a file, else {' or '.join(FILE_NAMES.values())} in it",
        required=True,
        type=path,
    )
    dtype: str = flag(
        "of the weights; norms, modulation and time embedding stay fp32; fp8 (original only) is float8_e4m3fn in the blocks, "
        f"{', '.join(GGUF_DTYPES)} (gguf only) are its types there",
        "fp32",
        choices=["fp32", "bf16", "fp16", "fp8", *GGUF_DTYPES],
    )
    workflow: bool = switch("write a ComfyUI workflow beside an original file, to drop on its editor")
    hub: HubFlags = group("Hub (nothing is sent without --push_to_hub)")
    parts: PartsFlags = group("The rest of a pipeline (left out: from the teacher that the student records)")


def parse_args(argv: list[str] | None = None) -> Flags:
    return parse_flags(Flags, "export_student.py", "Export a trained student to diffusers or ComfyUI.", argv)


def check_flags(flags: Flags) -> None:
    """Refuse flags that do not go together."""
    if flags.dtype == "fp8" and flags.format != "original":
        reader, other = ("ComfyUI-GGUF", "q8_0") if flags.format == "gguf" else ("diffusers", "bf16")
        raise UserError(
            f"--dtype fp8 is for --format original; {reader} reads no such files, give {other} with {flags.format}"
        )
    if flags.dtype in GGUF_DTYPES and flags.format != "gguf":
        raise UserError(f"--dtype {flags.dtype} is for --format gguf; give bf16 with {flags.format}")
    for name in ("teacher_path", "vae_path", "text_encoder_path", "link"):
        if getattr(flags.parts, name) and flags.format != "pipeline":
            raise UserError(f"--{name} belongs to --format pipeline; the other formats hold the transformer alone")
    if flags.workflow and flags.format != "original":
        raise UserError("--workflow is for --format original, the file that ComfyUI reads")
    if flags.hub.public and not flags.hub.push_to_hub:
        raise UserError("--public says who sees the repository of --push_to_hub; give that too")
    if flags.hub.push_to_hub and flags.parts.link:
        raise UserError(
            "--link: a link to a folder of this machine is nothing on the hub; leave it out with --push_to_hub"
        )


def read_config(flags: Flags) -> StudentConfig:
    """Read the student's config; a pipeline also needs its record, which says how to draw."""
    if flags.format == "pipeline":
        config = load_student_config(flags.student)
    elif Path(flags.student).is_file():
        from wandistiller.model.transformer import saved_config

        config = saved_config(flags.student)
    else:
        config = load_shape(flags.student)
    if flags.workflow and config.num_channels not in (16, 48):
        raise UserError(
            f"--workflow: ComfyUI draws latents of 16 or 48 channels, this student's have {config.num_channels}"
        )
    if config.block != "wan":
        raise UserError(
            f'{Path(flags.student) / CONFIG_NAME}: a student of block "{config.block}" is no Wan, and no other tool knows its '
            'architecture; only block "wan" can be exported'
        )
    return config


def check_output(flags: Flags) -> Path:
    """Return the path of the file or folder that the export becomes; what is there already is never replaced."""
    target = Path(flags.output)
    is_file = target.suffix.lower() in WEIGHT_SUFFIXES
    name = FILE_NAMES.get(flags.format)
    suffix = Path(name).suffix if name else None
    if is_file and target.suffix != suffix:
        file = f" or a file of suffix {suffix}" if suffix else ""
        raise UserError(
            f"--output {target}: --format {flags.format} writes no {target.suffix} file; give a new folder{file}"
        )
    if name and not is_file:
        target = target / name
    check_writable(target.parent, "--output")
    prove_writable(target.parent)
    if name:
        for place in [target, *([workflow_file(target)] if flags.workflow else [])]:
            if os.path.lexists(place):
                raise UserError(f"--output {place}: is there already; give another name")
        return target
    check_output_folder(target, "--output")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"--output {target}: holds files already; give a new folder")
    return target


def workflow_file(target: Path) -> Path:
    """Return where the workflow of an exported file goes."""
    return target.with_suffix(".workflow.json")


def prove_writable(folder: Path) -> None:
    """Refuse a folder where no file can be made, whatever its permissions say, as in /proc; nothing is left there."""
    folder = nearest_existing(folder.absolute())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written to ({error.strerror}); give another folder") from None


def find_parts(flags: Flags, config: StudentConfig) -> "PipelineParts":
    """Find the VAE, the text encoder and the tokenizer of a pipeline, and check that they are those of the student."""
    from wandistiller.projection.diffusers_export import PipelineParts, text_classes
    from wandistiller.wan.vae import LatentStatistics, VaeLocation, check_statistics, find_vae, load_vae

    needs_teacher = not (flags.parts.vae_path and flags.parts.text_encoder_path)
    teacher = teacher_paths(config, flags.parts.teacher_path)[0] if needs_teacher else "mock"
    vae = find_vae(flags.parts.vae_path, teacher).folder()
    encoder = find_recorded_encoder(config, flags.parts.text_encoder_path, teacher)
    if encoder is None:
        raise UserError(
            "this student learnt the mock teacher's stand-in embeddings; there is no text encoder for a pipeline, export it "
            "as diffusers or original"
        )
    record = StudentRecord.of(config)
    found = load_vae(VaeLocation(str(vae), None), config.num_channels, config.vae_scale_factor).config
    learnt = LatentStatistics(record.latents_mean, record.latents_std)
    check_statistics(learnt, LatentStatistics(found.latents_mean, found.latents_std), vae)
    folders = {"vae": vae, "text_encoder": encoder.encoder, "tokenizer": encoder.tokenizer}
    return PipelineParts(folders, text_classes(encoder.encoder), flags.parts.link)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that it leaves nothing half written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def remove_killed_exports(target: Path) -> None:
    """Remove what a killed export left beside the target, or beside its folder where that is new as well."""
    from wandistiller.files.atomic import remove_leftovers

    remove_leftovers(target)
    if not target.parent.exists():
        remove_leftovers(target.parent)


def write_file(target: Path, tensors: "dict[str, Tensor]", config: StudentConfig, prompt: str, flags: Flags) -> None:
    """Write one file for ComfyUI; a folder that is new appears with the file in it, or not at all.

    Args:
        prompt: what the workflow draws, where one is asked for.
    """
    from wandistiller.files.atomic import atomic_folder, write_json
    from wandistiller.projection.comfyui_workflow import Workflow, ui_workflow
    from wandistiller.projection.diffusers_export import write_original_file
    from wandistiller.projection.gguf_export import write_gguf_file
    from wandistiller.reports.cards import write_export_card

    write = write_gguf_file if flags.format == "gguf" else write_original_file
    is_new = not target.parent.exists()
    with atomic_folder(target.parent) if is_new else nullcontext(target.parent) as folder:
        if flags.workflow:
            workflow = ui_workflow(Workflow.of(config, target.name, prompt=prompt))
            write_json(workflow_file(folder / target.name), workflow, end="\n", indent=2)
        write(tensors, config, folder / target.name, flags.dtype)
        if is_new and flags.format == "gguf":
            write_export_card(folder, target.parent.resolve().name, config, flags.format, flags.dtype, prompt=prompt)


def write_folder(
    target: Path,
    tensors: "dict[str, Tensor]",
    config: StudentConfig,
    parts: "PipelineParts | None",
    prompt: str,
    flags: Flags,
) -> None:
    """Write a folder for diffusers: a pipeline where its parts are given, else the transformer alone.

    Args:
        prompt: what the lines of its card draw.
    """
    import torch

    from wandistiller.files.atomic import atomic_folder
    from wandistiller.projection.diffusers_export import write_pipeline_parts, write_transformer_folder
    from wandistiller.reports.cards import write_export_card

    with atomic_folder(target) as folder:
        transformer = folder
        if parts is not None:
            options = student_sampling(config, None, torch.float32, "cpu")
            write_pipeline_parts(config, folder, options, parts, flags.dtype)
            transformer = folder / "transformer"
            transformer.mkdir()
        write_transformer_folder(tensors, config, transformer, flags.dtype)
        name = target.resolve().name
        write_export_card(folder, name, config, flags.format, flags.dtype, prompt=prompt, link=flags.parts.link)


def print_warnings(config: StudentConfig, export_format: str) -> None:
    """Print what the export cannot carry into other tools."""
    from wandistiller.projection.comfyui import comfyui_warnings

    is_gguf = export_format == "gguf"  # a student that is read right by versions that get its metadata alone is refused
    warnings = comfyui_warnings(config, reads_metadata=is_gguf) if export_format in FILE_NAMES else []
    for warning in [*warnings, StudentRecord.of(config).warning_of_untrained_levels()]:
        if warning:
            print(f"Warning: {warning}")


def print_use(config: StudentConfig, target: Path, prompt: str, flags: Flags) -> None:
    """Print how to draw with a pipeline, or with a file that ComfyUI draws right."""
    from wandistiller.projection.comfyui import LOADERS, comfyui_settings, comfyui_warnings
    from wandistiller.reports.cards import drawing

    if flags.format == "pipeline":
        print(
            "To draw:\n"
            + textwrap.indent(drawing(config, str(target), flags.dtype, prompt=prompt, link=flags.parts.link), "  ")
        )
    if flags.format in FILE_NAMES and not comfyui_warnings(config, reads_metadata=True):
        print(f"In ComfyUI: {comfyui_settings(config, LOADERS[flags.format])}")


def files_to_push(target: Path, config: StudentConfig, flags: Flags) -> "dict[str, Path | bytes]":
    """Return what a repository holds by name: the export, its card, and the pictures of the student's own folder."""
    from wandistiller.files.output_folder import CARD_NAME
    from wandistiller.reports.cards import comfyui_use, export_card, gguf_use, shown_pictures, with_pictures

    student = Path(flags.student)
    if target.is_dir():
        exported = {str(file.relative_to(target)): file for file in sorted(target.rglob("*")) if file.is_file()}
        card = (target / CARD_NAME).read_text(encoding="utf-8")
    else:
        exported = {file.name: file for file in (target, workflow_file(target)) if file.is_file()}
        use = gguf_use(config) if flags.format == "gguf" else comfyui_use(config, target.name)
        card = export_card(target.stem, config, use, "gguf" if flags.format == "gguf" else "diffusers")
    shown = {name: student / name for name in shown_pictures(student)}
    return {**exported, **shown, CARD_NAME: with_pictures(card, student).encode()}


def main(argv: list[str] | None = None) -> int:
    # What a person typed is checked before torch loads:
    flags = parse_args(argv)
    check_flags(flags)
    config = read_config(flags)
    target = check_output(flags)
    if flags.hub.push_to_hub:
        check_repository(flags.hub.push_to_hub)

    from wandistiller.model.transformer import WanLiteStudent
    from wandistiller.projection.diffusers_export import published
    from wandistiller.projection.gguf_export import refuse_what_gguf_drops

    if flags.format == "gguf":
        refuse_what_gguf_drops(config)
    with terminated_as_interrupted():
        # Every file is checked before one is written:
        parts = find_parts(flags, config) if flags.format == "pipeline" else None
        tensors = WanLiteStudent.from_pretrained(flags.student).state_dict()
        public_config, prompt = published(config, flags.parts.teacher_path), example_prompt(config)

        # The file or folder appears whole or not at all:
        remove_killed_exports(target)
        if flags.format in FILE_NAMES:
            write_file(target, tensors, public_config, prompt, flags)
        else:
            write_folder(target, tensors, public_config, parts, prompt, flags)

    # Tell:
    print_warnings(public_config, flags.format)
    print(f"Wrote {target}: {sum(tensor.numel() for tensor in tensors.values()):,} parameters, {flags.dtype}")
    print_use(public_config, target, prompt, flags)
    if flags.hub.push_to_hub:
        files = files_to_push(target, public_config, flags)
        address = push(flags.hub.push_to_hub, files, is_public=flags.hub.public, local=target)
        print(
            f"Pushed {len(files)} files to {address}, {'which everybody sees' if flags.hub.public else 'which is private'}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
